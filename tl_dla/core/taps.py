"""One forward pass, or a given cache: what the rows need is read at the hooks and nothing is kept.

A `Probe` reads a site and keeps what its function makes of it, usually the dot product with a
pulled-back direction: a number per row and position, never the activation. The model is run once,
and unembeds only the positions asked for.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from tl_dla.errors import IncompleteCacheError, UnsupportedModelError
from tl_dla.inputs.targets import Targets
from tl_dla.inputs.tokens import Positions, Prompts
from tl_dla.model.reader import ModelReader, Site

_LOGITS_AT_ONCE = 2**28  # numbers: 1 GiB in float32; more prompts than that are run in parts


@dataclass(frozen=True, eq=False)
class Probe:
    """Keep `read(activation at the attributed positions)` under `key`.

    `whole` reads the activation at every position instead, real tokens first. `keys` reads an
    attention pattern, as `[batch, pos, head, key]`: at the attributed positions, over every key.
    `heads_first` is for activations `[batch, head, pos, ...]`: the two axes are swapped.
    """

    key: str
    site: Site
    read: Callable[..., Tensor]
    whole: bool = False
    keys: bool = False
    heads_first: bool = False

    def of(
        self, x: Shaped[Tensor, "batch ..."], positions: Positions, start: Tensor | None = None
    ) -> Shaped[Tensor, "batch ..."]:
        """The part of an activation that is read; `start` says where the prompts begin in it."""
        if self.heads_first:
            x = x.transpose(1, 2)
        if self.whole:
            return x if start is None else _rolled(x, start, 1)
        if self.keys:
            x = positions.take(x, start)
            return x if start is None else _rolled(x, start, 3)
        return positions.take(x, start)


@dataclass(frozen=True, eq=False)
class Recording:
    """What the probes kept, and the target tokens' logits before and after the output transform.

    `eps` is the machine epsilon of the logits that the model returned.
    """

    values: dict[str, Tensor]
    raw: Float[Tensor, "batch pos token"] | None = None
    logits: Float[Tensor, "batch pos token"] | None = None
    eps: float = 0.0

    @staticmethod
    def joined(parts: Sequence["Recording"]) -> "Recording":
        """What was seen of some prompts and of others, as one."""
        if len(parts) == 1:
            return parts[0]
        first = parts[0]
        values = {name: torch.cat([part.values[name] for part in parts]) for name in first.values}
        if first.raw is None:
            return Recording(values)
        raw, logits = (torch.cat([getattr(p, name) for p in parts]) for name in ("raw", "logits"))
        return Recording(values, raw, logits, first.eps)


def in_parts(model: Any, positions: Positions) -> list[slice]:
    """The prompts in slices whose logits at the attributed positions can be held at once."""
    batch, pos = positions.index.shape
    step = max(1, _LOGITS_AT_ONCE // (pos * model.cfg.d_vocab))
    return [slice(start, start + step) for start in range(0, batch, step)]


def run(
    model: Any,
    prompts: Prompts,
    positions: Positions,
    probes: Sequence[Probe],
    targets: Targets | None,
) -> Recording:
    """Run the model once on the prompts with the probes in place."""
    values: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}
    tokens = prompts.packed
    both_ways = getattr(model.cfg, "attention_dir", "causal") == "bidirectional"
    if both_ways and int(prompts.length.min()) < tokens.shape[1]:
        raise UnsupportedModelError(
            "The model attends in both directions, so in a batch of prompts of different lengths"
            " the shorter ones would see their padding: run them one by one."
        )
    by_site = _by_site(probes)

    def reader(name: str) -> Callable[..., None]:
        def read(activation: Any, **_: Any) -> None:
            if isinstance(activation, tuple | list):
                activation = activation[0]
            x = _batched(activation, *tokens.shape)
            taken: Tensor | None = None
            for probe in by_site[name]:
                if probe.whole or probe.keys:
                    values[probe.key] = probe.read(probe.of(x, positions))
                else:
                    # The unembedding sees only these positions already.
                    if taken is None:
                        taken = x if name.startswith("unembed.") else positions.take(x)
                    values[probe.key] = probe.read(taken)

        return read

    def read_inputs(name: str) -> Callable[..., None]:
        def read(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            for probe in by_site[name]:
                at = [probe.of(_batched(x, *tokens.shape), positions) for x in tensors]
                values[probe.key] = probe.read(*at)

        return read

    def keep_positions(_module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (positions.take(args[0]), *args[1:])

    def keep_raw(_module: Any, _args: Any, output: Tensor) -> None:
        assert targets is not None
        seen["raw"] = select(output, targets)

    sites = {name: probes[0].site for name, probes in by_site.items()}
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for name, site in sites.items():
            if site.inputs:
                handle = site.module.register_forward_pre_hook(read_inputs(name), with_kwargs=True)
                stack.callback(handle.remove)
            elif not site.hooked:
                handle = site.module.register_forward_hook(partial(_read_output, reader(name)))
                stack.callback(handle.remove)
        stack.callback(model.unembed.register_forward_pre_hook(keep_positions).remove)
        if targets is not None:
            stack.callback(model.unembed.register_forward_hook(keep_raw).remove)
        hooks = [(name, reader(name)) for name, site in sites.items() if site.hooked]
        stack.enter_context(model.hooks(fwd_hooks=hooks))
        output = model(tokens, return_type="logits")
    silent = [probe.site.name for probe in probes if probe.key not in values]
    if silent:
        raise UnsupportedModelError(
            f"The model ran without firing {', '.join(silent[:3])}, which this unit reads;"
            ' unit="component" may work.'
        )
    if targets is None:
        return Recording(values)
    return Recording(values, seen["raw"], select(output, targets), torch.finfo(output.dtype).eps)


def recall(
    reader: ModelReader,
    cache: Any,
    start: Tensor | None,
    positions: Positions,
    probes: Sequence[Probe],
) -> Recording:
    """The same from a cache, full or partial.

    Raises:
        IncompleteCacheError: naming the hooks that the cache lacks.
    """
    batch, pos = positions.index.shape[0], cache_shape(cache)[1]
    by_site = _by_site(probes)
    names = _names_in_cache(reader, cache, by_site)
    missing = [name for name in by_site if name not in names]
    if missing:
        listed = ", ".join(missing[:6]) + (f" and {len(missing) - 6} more" * (len(missing) > 6))
        raise IncompleteCacheError(
            f"The cache lacks {listed}: "
            + (
                "run the model with names_filter=required_hooks(model, unit), or give the input in"
                " place of the cache."
                if all(by_site[name][0].site.hooked for name in missing)
                else "this model shows them at no hook, so give the input in place of the cache."
            )
        )
    values: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, wanted in by_site.items():
            x = cache.cache_dict[names[name]]
            x = _batched(x if cache.has_batch_dim else x[None], batch, pos)
            taken = None
            for probe in wanted:
                if probe.whole or probe.keys:
                    values[probe.key] = probe.read(probe.of(x, positions, start))
                else:
                    taken = positions.take(x, start) if taken is None else taken
                    values[probe.key] = probe.read(taken)
    return Recording(values)


def cache_shape(cache: Any) -> tuple[int, int]:
    """Batch and positions of a cache, from the activations whose second axis is positions."""
    for name, x in cache.cache_dict.items():
        if name.endswith(
            (
                "hook_resid_pre",
                "hook_resid_post",
                "hook_in",
                "hook_embed",
                "hook_out",
                "hook_z",
                "hook_scale",
            )
        ):
            shape = x.shape if cache.has_batch_dim else (1, *x.shape)
            return int(shape[0]), int(shape[1])
    raise IncompleteCacheError(
        "The cache holds no activation of the residual stream: run the model with"
        " names_filter=required_hooks(model, unit)."
    )


def select(
    logits: Float[Tensor, "batch pos d_vocab"], targets: Targets
) -> Float[Tensor, "batch pos token"]:
    """The target tokens' logits, in at least float32."""
    ids = targets.ids.to(logits.device).expand(*logits.shape[:2], -1)
    chosen = logits.gather(-1, ids)
    chosen = chosen.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    if targets.mean_of_vocab:
        mean = logits.mean(-1, keepdim=True, dtype=chosen.dtype)
        chosen = torch.cat([chosen, mean], -1)
    return chosen


def _rolled(
    x: Float[Tensor, "batch ..."], start: Int[Tensor, " batch"], axis: int
) -> Float[Tensor, "batch ..."]:
    """Positions counted from where each prompt begins; the padding before it comes last."""
    index = torch.arange(x.shape[axis], device=x.device) + start.to(x.device)[:, None]
    shape = [1] * x.ndim
    shape[0], shape[axis] = index.shape
    return x.take_along_dim((index % x.shape[axis]).reshape(shape), axis)


def _read_output(read: Callable[..., None], _module: Any, _args: Any, output: Any) -> None:
    """As a forward hook of a module that has no hook point."""
    read(output)


def _by_site(probes: Iterable[Probe]) -> dict[str, list[Probe]]:
    by_site: dict[str, list[Probe]] = defaultdict(list)
    for probe in probes:
        by_site[probe.site.name].append(probe)
    return by_site


def _batched(x: Tensor, batch: int, pos: int) -> Tensor:
    """`[batch, pos, …]`, also where a module flattens the two (some mixtures of experts do)."""
    if x.ndim == 2 and x.shape[0] == batch * pos:
        return x.unflatten(0, (batch, pos))
    return x[None] if x.ndim == 2 and x.shape[0] == pos else x


def _names_in_cache(reader: ModelReader, cache: Any, wanted: Collection[str]) -> dict[str, str]:
    """Each hook's own name, to the name or alias under which the cache holds it."""
    held = cache.cache_dict
    names = {name: name for name in wanted if name in held}
    if len(names) == len(wanted):
        return names
    for alias in held.keys() & reader.hooks.keys():
        names.setdefault(reader.hooks[alias].name, alias)
    return names
