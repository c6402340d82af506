"""Dictionaries: sparse autoencoders and transcoders, and the hooks that they read and explain."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from tl_dla.errors import ArgumentError
from tl_dla.model.reader import ModelReader


@runtime_checkable
class Autoencoder(Protocol):
    """What a dictionary can do; those of sae-lens can, and `decode` must be affine.

    `W_skip` `[d_out, d_in]`, where there is one, is what a transcoder passes on beside its latents.
    """

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch latent"]: ...  # noqa: D102
    def decode(self, latents: Float[Tensor, "*batch latent"]) -> Float[Tensor, "*batch d_out"]: ...  # noqa: D102


Dictionaries = Mapping[str | tuple[str, str], Autoencoder]


@dataclass(frozen=True)
class Dictionary:
    """A dictionary, the hook whose activation it reads, and the hook that its output explains.

    Two are equal that have the same hooks. A result that was loaded knows no more: `module` is
    None.
    """

    reads: str
    hook: str
    module: Any = field(default=None, compare=False, metadata={"saved": False})


def read_dictionaries(
    reader: ModelReader, dictionaries: Dictionaries | None
) -> tuple[Dictionary, ...]:
    """Dictionaries by hook, or by (hook read, hook explained), held to the model.

    Raises:
        ArgumentError: where there is none, for a hook that the model does not have, and for a
            transcoder under one hook.
    """
    if not isinstance(dictionaries, Mapping) or not dictionaries:
        raise ArgumentError(
            'unit="latent" needs dictionaries={hook: dictionary}, such as'
            f' {{"blocks.0.hook_resid_post": sae}}; {dictionaries!r} was given.'
        )
    found = []
    for at, module in dictionaries.items():
        reads, hook = (at, at) if isinstance(at, str) else at
        for name in (reads, hook):
            if reader.site(name) is None:
                close = get_close_matches(name, reader.hooks, 2)
                hint = f" (did you mean {' or '.join(close)}?)" if close else ""
                raise ArgumentError(f"The model has no hook {name!r}, given a dictionary{hint}.")
        if not isinstance(module, Autoencoder):
            raise ArgumentError(
                f"A dictionary must have encode and decode; a {type(module).__name__} was given for"
                f" {hook}."
            )
        other = getattr(getattr(getattr(module, "cfg", None), "metadata", None), "hook_name_out", 0)
        if isinstance(at, str) and other and other != at:
            raise ArgumentError(
                f"The dictionary given for {at} is a transcoder, which says that it explains"
                f" {other}: give it under both hooks,"
                f" dictionaries={{(hook it reads, {other!r}): transcoder}}."
            )
        found.append(Dictionary(reads, hook, module))
    return tuple(found)
