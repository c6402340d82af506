"""The units, and which rows are split: what a user may ask for, checked against the model."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, Literal, get_args

from tl_dla.errors import ArgumentError
from tl_dla.inputs.dictionaries import Dictionaries, Dictionary, read_dictionaries
from tl_dla.model.reader import ModelReader

Unit = Literal["component", "layer", "head", "neuron", "source", "latent"]


def require_unit(unit: str) -> None:
    """Raise `ArgumentError` unless `unit` is one of the units."""
    if unit not in get_args(Unit):
        raise ArgumentError(f"unit must be one of {', '.join(get_args(Unit))}; {unit!r} was given.")


@dataclass(frozen=True)
class Selection:
    """Rows that are split: the layers, the heads, how many neurons; None for all.

    Heads and neurons are (layer, index). `neurons` names those that have a row of their own, in
    place of the largest ones; `alone` leaves out the others, and the certificate with them.
    `remainder` adds up every row but the heads and what is not understood.
    `dictionaries` split what their hooks hold into latents, of which `top_latents` have a row.
    """

    layers: tuple[int, ...] | None = None
    heads: tuple[tuple[int, int], ...] | None = None
    top_neurons: int | None = None
    neurons: tuple[tuple[int, int], ...] | None = None
    alone: bool = False
    remainder: bool = False
    dictionaries: tuple[Dictionary, ...] = ()
    top_latents: int | None = None

    def has_layer(self, layer: int) -> bool:
        """Whether rows of the layer are split."""
        return self.layers is None or layer in self.layers

    def has_head(self, layer: int, head: int) -> bool:
        """Whether the row of the head is split."""
        return self.has_layer(layer) and (self.heads is None or (layer, head) in self.heads)

    def neurons_of(self, layer: int) -> list[int] | None:
        """The neurons of the layer that have a row of their own; None where none is named."""
        if self.neurons is None:
            return None
        return [index for own, index in self.neurons if own == layer]


def read_selection(
    reader: ModelReader,
    unit: Unit,
    layers: int | Sequence[int] | None,
    heads: str | Sequence[str] | None,
    top_neurons: int | None,
    remainder: bool = False,
) -> Selection:
    """Rows that are split, checked against the unit and the model; one may stand for a list of one.

    Raises:
        ArgumentError: for a selection that the unit has no use for, or that the model does not
            have, or of nothing.
    """
    layers, heads = _listed("layers", layers), _listed("heads", heads)
    for name, given, units in (
        ("layers", layers, ("head", "neuron", "source")),
        ("heads", heads, ("head", "source")),
        ("top_neurons", top_neurons, ("neuron",)),
        ("include_remainder", remainder or None, ("head",)),
    ):
        if given is not None and unit not in units:
            wanted = " or ".join(f'unit="{x}"' for x in units)
            raise ArgumentError(f'{name} is for {wanted}; unit="{unit}" was given.')
    n = reader.n_layers
    for layer in layers or ():
        if not _is_integer(layer):
            raise ArgumentError(
                f"layers must be an integer or a list of integers; {layer!r} was given."
            )
        if not -n <= layer < n:
            raise ArgumentError(f"Layer {layer} was asked for; the model has layers 0 to {n - 1}.")
    places = None if heads is None else tuple(place_of_head(reader, head) for head in heads)
    _require_at_least_1("top_neurons", top_neurons)
    listed = None if layers is None else tuple(int(layer) % n for layer in layers)
    return Selection(listed, places, top_neurons, remainder=remainder)


def with_dictionaries(
    selection: Selection,
    reader: ModelReader,
    unit: Unit,
    dictionaries: Dictionaries | None,
    top_latents: int | None = None,
) -> Selection:
    """The same with what latents are read by, checked against the unit and the model.

    Raises:
        ArgumentError: as `read_selection` and `read_dictionaries`.
    """
    for name, given in (("dictionaries", dictionaries), ("top_latents", top_latents)):
        if given is not None and unit != "latent":
            raise ArgumentError(f'{name} is for unit="latent"; unit="{unit}" was given.')
    if unit != "latent":
        return selection
    _require_at_least_1("top_latents", top_latents)
    read = read_dictionaries(reader, dictionaries)
    return replace(selection, dictionaries=read, top_latents=top_latents)


def _require_at_least_1(name: str, top: int | None) -> None:
    if top is not None and (not _is_integer(top) or top < 1):
        raise ArgumentError(f"{name} must be at least 1; {top!r} was given.")


def _is_integer(x: Any) -> bool:
    return isinstance(x, Integral) and not isinstance(x, bool)


def _listed(name: str, given: Any) -> tuple[Any, ...] | None:
    """What was given as a tuple; None for all."""
    if given is None:
        return None
    given = given.tolist() if hasattr(given, "tolist") else given  # tensors and arrays
    listed = (given,) if isinstance(given, str) or not isinstance(given, Iterable) else tuple(given)
    if not listed:
        raise ArgumentError(f"{name} is empty, so nothing would be split: leave it out for all.")
    return listed


def place_of_head(reader: ModelReader, head: str) -> tuple[int, int]:
    """Layer and head of a label such as `L9H9`.

    Raises:
        ArgumentError: for a label that is no head of the model.
    """
    found = re.fullmatch(r"L(\d+)H(\d+)", head) if isinstance(head, str) else None
    if found is None:
        raise ArgumentError(f"A head is written L9H9 (layer 9, head 9); {head!r} was given.")
    layer, index = int(found[1]), int(found[2])
    attention = reader.attention(layer) if layer < reader.n_layers else None
    n_heads = 0 if attention is None else attention.W_O.shape[0]
    if index >= n_heads:
        raise ArgumentError(
            f"{head} was asked for; the model has {reader.n_layers} layers, and layer {layer} has"
            f" {n_heads} heads (numbered from 0)."
        )
    return layer, index
