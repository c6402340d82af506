"""What hooks keep in one forward pass, or what a cache holds.

A `Tap` reads a place and keeps what its function makes of it, usually the dot product with a
pulled-back direction: a number per row and position, never the activation. `forward` runs the model
once with the taps in place, unembedding only the positions asked for; `recall` reads a cache.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from tl_dla.core.numbers import compact
from tl_dla.errors import IncompleteCacheError, UnsupportedModelError
from tl_dla.inputs.caches import cache_shape
from tl_dla.inputs.models import scales_with_length
from tl_dla.inputs.positions import Positions
from tl_dla.inputs.query import Query
from tl_dla.inputs.targets import Targets
from tl_dla.model.hooks import Site, alone_on
from tl_dla.model.reader import ModelReader
from tl_dla.model.sharded import require_same


@dataclass(frozen=True, eq=False)
class Tap:
    """Keep `read(activation at the attributed positions)`.

    `whole` reads the activation at every position instead, real tokens first. `keys` reads an
    attention pattern, as `[batch, pos, head, key]`: at the attributed positions, over every key;
    with `whole`, at every position.
    `heads_first` is for activations `[batch, head, pos, ...]`: the two axes are swapped.
    `together` says that `read` also takes several activations, stacked on a first axis.
    """

    site: Site
    read: Callable[..., Tensor | tuple[Tensor, ...]]
    whole: bool = False
    keys: bool = False
    heads_first: bool = False
    together: bool = False

    def of(
        self, x: Shaped[Tensor, "#batch ..."], positions: Positions, start: Tensor | None = None
    ) -> Shaped[Tensor, "batch ..."]:
        """The part of an activation that is read; `start` says where the prompts begin in it."""
        if self.heads_first:
            x = x.transpose(1, 2)
        x, shares = self._taken(x, positions, start), self.site.shares
        if shares is None:
            return x
        # Last, so that between the processes go the positions that are read alone.
        return shares.whole(x, 3 - shares.axis if self.heads_first else shares.axis)

    def _taken(
        self, x: Shaped[Tensor, "#batch ..."], positions: Positions, start: Tensor | None
    ) -> Shaped[Tensor, "batch ..."]:
        if self.whole:
            if start is None:
                return x
            x = _rolled(x, start, 1)
            return _rolled(x, start, 3) if self.keys else x
        if self.keys:
            x = positions.take(x, start)
            return x if start is None else _rolled(x, start, 3)
        return positions.take(x, start)


@dataclass(frozen=True, eq=False)
class Kept:
    """What the taps kept, and the target tokens' logits before and after the output transform.

    A tap may keep several tensors of a place that is given several. `machine_eps` is that of the
    logits which the model returned, or the widest of a cache's; without either it is 0.
    """

    values: Mapping[Tap, Tensor | tuple[Tensor, ...]]
    raw: Float[Tensor, "batch pos token"] | None = None
    logits: Float[Tensor, "batch pos token"] | None = None
    machine_eps: float = 0.0

    def __getitem__(self, tap: Tap) -> Tensor:
        value = self.values[tap]
        assert isinstance(value, Tensor)
        return value

    def part(self, rows: slice) -> "Kept":
        """What was kept of some of the prompts."""
        values = {tap: self[tap][rows] for tap in self.values}
        if self.raw is None or self.logits is None:
            return Kept(values)
        return Kept(values, self.raw[rows], self.logits[rows], self.machine_eps)

    @staticmethod
    def joined(parts: Sequence["Kept"], taps: Sequence[Sequence[Tap]]) -> "Kept":
        """What was kept of some prompts and of others, as one.

        `taps` names the taps to keep it under, and then those of each part.
        """
        if len(parts) == 1:
            return parts[0]
        columns = zip(*taps, strict=True)  # the n-th tap of every part
        values = {
            mine[0]: _cat([part.values[tap] for part, tap in zip(parts, mine[1:], strict=True)])
            for mine in columns
        }
        if parts[0].raw is None:
            return Kept(values)
        raw, logits = (torch.cat([getattr(p, name) for p in parts]) for name in ("raw", "logits"))
        return Kept(values, raw, logits, parts[0].machine_eps)


class Reading:
    """What taps make of the activations that one pass shows them, in turn.

    Small activations wait for the end, where those of one `read` are read together: short prompts
    would else spend their time on calls.
    """

    def __init__(self) -> None:
        self.values: dict[Tap, Tensor | tuple[Tensor, ...]] = {}
        self._waiting: dict[Any, list[tuple[Tap, Tensor]]] = defaultdict(list)

    def read(self, tap: Tap, x: Shaped[Tensor, "batch pos ..."]) -> None:
        """Keep what the tap makes of it, now or at the end."""
        if tap.together and _is_small(x):
            self._waiting[tap.read, x.shape, x.dtype, x.device].append((tap, x))
        else:
            self.values[tap] = _alone(tap.read(x))

    def end(self) -> dict[Tap, Tensor | tuple[Tensor, ...]]:
        """All of it."""
        for (read, *_), waiting in self._waiting.items():
            taps, activations = zip(*waiting, strict=True)
            self.values |= zip(taps, read(torch.stack(activations)).unbind(), strict=True)
        return self.values


def _cat(parts: Sequence[Any]) -> Any:
    if isinstance(parts[0], tuple):
        return tuple(map(torch.cat, zip(*parts, strict=True)))
    return torch.cat(list(parts))


_DEVICES = ("cpu", "cuda")
# Numbers of an activation: 64 KiB, so that all of a model's are a few megabytes; elsewhere a call
# takes longer.
_SMALL, _SMALL_ELSEWHERE = 2**14, 2**18


@contextmanager
def exact() -> Iterator[None]:
    """No gradients, and no autocast that would take contractions out of float32."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for device in _DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def forward(query: Query, taps: Sequence[Tap], *, logits: bool = True) -> Kept:
    """Run the model once on the prompts with the taps in place.

    Raises:
        UnsupportedModelError: for a place that the model ran without passing.
    """
    model, prompts, positions = query.model, query.prompts, query.positions
    reading, raw = Reading(), list[Tensor]()
    tokens = prompts.packed
    _require_alike(model, query)
    require_same(model, tokens, positions.index, query.targets.ids)
    by_site, mine = _by_site(taps), threading.get_ident()
    # Read where the unembedding still sees every position, before those asked for are taken.
    end = by_site.pop("unembed.hook_in", [])
    # Gradients are off for the whole pass; autocast is the model's business, but not ours.
    guard = exact if any(map(torch.is_autocast_enabled, _DEVICES)) else nullcontext

    def reader(name: str) -> Callable[..., None]:
        def read(activation: Any, **_: Any) -> None:
            if threading.get_ident() != mine:
                return  # a pass of the user's own, in another thread
            if isinstance(activation, tuple | list):
                activation = activation[0]
            x = _batched(activation, *tokens.shape)
            taken: Tensor | None = None
            with guard():
                for tap in by_site[name]:
                    if tap.whole or tap.keys:
                        reading.read(tap, tap.of(x, positions))
                        continue
                    taken = _now(tap.of(x, positions)) if taken is None else taken
                    reading.read(tap, taken)

        return read

    def read_inputs(name: str) -> Callable[..., None]:
        def read(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if threading.get_ident() != mine:
                return
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            with guard():
                for tap in by_site[name]:
                    if tap.site.argument is not None:
                        reading.values[tap] = tap.read(kwargs.get(tap.site.argument))
                        continue
                    at = [tap.of(_batched(x, *tokens.shape), positions) for x in tensors]
                    reading.values[tap] = _alone(tap.read(*at))

        return read

    def keep_positions(_module: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if threading.get_ident() != mine:
            return None
        with guard():
            for tap in end:
                reading.read(tap, _now(tap.of(_batched(args[0], *tokens.shape), positions)))
        return (positions.take(args[0]), *args[1:])

    def keep_raw(_module: Any, _args: Any, output: Tensor) -> None:
        if threading.get_ident() == mine:
            raw.append(select(output, query.targets))

    sites = {name: taps[0].site for name, taps in by_site.items()}
    level = id(reading)  # of the hooks of this pass, and of no other
    with ExitStack() as stack:
        stack.enter_context(alone_on(model))
        stack.enter_context(torch.no_grad())
        for name, site in sites.items():
            if site.hooked:
                # As `model.hooks` does, without looking each name up among the aliases of all.
                point: Any = site.module
                point.add_hook(reader(name), level=level)
                stack.callback(point.remove_hooks, "fwd", level=level)
            elif site.inputs:
                handle = site.module.register_forward_pre_hook(read_inputs(name), with_kwargs=True)
                stack.callback(handle.remove)
            else:
                handle = site.module.register_forward_hook(partial(_read_output, reader(name)))
                stack.callback(handle.remove)
        stack.callback(model.unembed.register_forward_pre_hook(keep_positions).remove)
        if logits:
            stack.callback(model.unembed.register_forward_hook(keep_raw).remove)
        output = model(tokens, return_type="logits")
        with guard():
            values = reading.end()
    silent = [tap.site.name for tap in taps if tap not in values]
    if silent:
        raise UnsupportedModelError(
            f"The model ran without firing {', '.join(silent[:3])}, which this unit reads;"
            ' unit="component" may work.'
        )
    if not logits:
        return Kept(values)
    return Kept(values, raw[0], select(output, query.targets), torch.finfo(output.dtype).eps)


def _require_alike(model: Any, query: Query) -> None:
    """Refuse a batch in which the shorter prompts would not be what they are alone."""
    if int(query.prompts.length.min()) == query.prompts.packed.shape[1]:
        return
    if getattr(model.cfg, "attention_dir", "causal") == "bidirectional":
        raise UnsupportedModelError(
            "The model attends in both directions, so in a batch of prompts of different lengths"
            " the shorter ones would see their padding: run them one by one."
        )
    if scales_with_length(model):
        raise UnsupportedModelError(
            "The model scales positions or attention with the length of the longest prompt in a"
            " batch, so the shorter ones would not be what they are alone: give prompts of one"
            " length at a time."
        )


def recall(reader: ModelReader, cache: Any, query: Query, taps: Sequence[Tap]) -> Kept:
    """The same from a cache, full or partial.

    Raises:
        IncompleteCacheError: naming the hooks that the cache lacks.
    """
    positions, start = query.positions, query.prompts.start
    begins = start if bool(start.any()) else None
    batch, pos = positions.index.shape[0], cache_shape(cache)[1]
    by_site = _by_site(taps)
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
    reading, eps = Reading(), 0.0
    with exact():
        for name, wanted in by_site.items():
            x = cache.cache_dict[names[name]]
            eps = max(eps, torch.finfo(x.dtype).eps if x.is_floating_point() else 0.0)
            x = _batched(x if cache.has_batch_dim else x[None], batch, pos)
            taken = None
            for tap in wanted:
                if tap.whole or tap.keys:
                    reading.read(tap, tap.of(x, positions, begins))
                else:
                    taken = tap.of(x, positions, begins) if taken is None else taken
                    reading.read(tap, taken)
        return Kept(reading.end(), machine_eps=eps)


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


def _alone(kept: Any) -> Any:
    """What a tap keeps, without the whole activation that it may be a view of."""
    if isinstance(kept, tuple):
        return tuple(map(_alone, kept))
    return compact(kept) if isinstance(kept, Tensor) else kept


def _now(x: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """A copy of what may wait to be read, since the model may go on to change what it shows."""
    return x.clone() if _is_small(x) else x


def _is_small(x: Shaped[Tensor, "..."]) -> bool:
    """Whether it may wait."""
    return x.numel() <= (_SMALL if x.is_cpu else _SMALL_ELSEWHERE)


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


def _by_site(taps: Iterable[Tap]) -> dict[str, list[Tap]]:
    by_site: dict[str, list[Tap]] = defaultdict(list)
    for tap in taps:
        by_site[tap.site.name].append(tap)
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
