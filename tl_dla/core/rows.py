"""Rows: what each part of the model wrote, under a typed key, and what splits one into others."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tl_dla.core.readout import Readout
from tl_dla.core.taps import Kept, Tap
from tl_dla.model.stream import FINAL, Kind, ResidPoint, StreamNorm, Write

_LETTERS = {"head": "H", "source": "H", "neuron": "N", "expert": "E"}


class RowKey(NamedTuple):
    """What a row is: its kind, layer, name, index in the layer, and source token.

    The label that a user sees follows from it, as TransformerLens writes it.
    """

    kind: Kind
    layer: int | None = None
    name: str = ""
    index: int | None = None  # type: ignore[assignment]  # of the layer, not of the tuple
    source: int | None = None

    @property
    def label(self) -> str:
        """`3_attn_out`, `L3H7`, `L3H7←5`, `2_post:17`, `embed←5`, `ln_final.b`."""
        if self.index is not None and self.kind in _LETTERS:
            label = f"L{self.layer}{_LETTERS[self.kind]}{self.index}"
        else:
            alone = self.layer is None or self.name == FINAL
            label = self.name if alone else f"{self.layer}_{self.name}"
            label = label if self.index is None else f"{label}:{self.index}"
        return label if self.source is None else f"{label}←{self.source}"


class Keys(Sequence[RowKey]):
    """Keys that are made when they are first asked for: models have 100,000s of neurons.

    Args:
        n: how many.
        make: makes them.
        kind: that of them all, where they share one.
    """

    def __init__(
        self, n: int, make: Callable[[], Iterable[RowKey]], kind: Kind | None = None
    ) -> None:
        self.n, self.make, self.kind = n, make, kind

    @cached_property
    def made(self) -> list[RowKey]:
        """The keys."""
        return list(self.make())

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: Any) -> Any:
        return self.made[i]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self.made == list(other)

    def __reduce__(self) -> Any:
        return list, (self.made,)


class Keyed:
    """Rows that have keys, and what follows from those: labels, kinds, layers, source tokens."""

    keys: Sequence[RowKey]

    @cached_property
    def labels(self) -> list[str]:
        """The rows' names, as TransformerLens writes them (`embed`, `3_attn_out`, `L3H7`)."""
        return [key.label for key in self.keys]

    @cached_property
    def kinds(self) -> list[Kind]:
        """What each row is: `embed`, `attn`, `mlp`, `head`, `neuron`, `bias`, `rest`, …."""
        return [key.kind for key in self.keys]

    @cached_property
    def layers(self) -> list[int | None]:
        """Each row's layer, None for rows of no layer."""
        return [key.layer for key in self.keys]

    @cached_property
    def sources(self) -> list[int | None]:
        """The position of each row's source token (`L9H9←5`), None for rows of no token."""
        return [key.source for key in self.keys]

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def _places(self) -> dict[str, int]:
        return dict(zip(reversed(self.labels), reversed(range(len(self.labels))), strict=True))

    def index(self, label: str) -> int:
        """Where a row is; the first of that label."""
        if label not in self._places:
            shown = ", ".join(self.labels[:4])
            raise KeyError(f"No row {label!r}; the rows are {shown}, …, {self.labels[-1]}.")
        return self._places[label]


REMAINDER = RowKey("remainder", None, "remainder")  # all rows but the heads, as one


def key_of(step: Write | StreamNorm | ResidPoint) -> RowKey:
    """The row of a step of the stream: what is written there, what is seen there, or a norm's β."""
    return RowKey(step.kind, step.layer, step.name)


@dataclass(frozen=True, eq=False)
class RowGroup:
    """Rows together: thousands of neurons of one layer are one tensor."""

    keys: Sequence[RowKey]
    values: Float[Tensor, "row batch pos token"]

    @staticmethod
    def one(key: RowKey, value: Float[Tensor, "batch pos token"]) -> "RowGroup":
        """A single row."""
        return RowGroup((key,), value[None])


@dataclass(frozen=True, eq=False)
class SplitCheck:
    """A row that others split: the sum of the parts must be its value.

    `abs_sum` is the sum of the parts' absolute values, `readout_norm` ‖x ⊙ w‖ / s of what is split.
    """

    key: RowKey
    parts_are: str
    value: Float[Tensor, "batch pos token"]
    parts: Float[Tensor, "batch pos token"]
    abs_sum: Float[Tensor, "batch pos token"]
    readout_norm: Float[Tensor, "batch pos token"]


@dataclass(frozen=True, eq=False)
class SplitRows:
    """What stands for a row: `first` before all rows of the stream, `instead` in its place."""

    first: list[RowGroup]
    instead: list[RowGroup]
    checks: list[SplitCheck]


@dataclass(frozen=True, eq=False)
class Rows:
    """All rows of a unit before the output transform, and what the certificate needs.

    Attributes:
        groups: the rows, in the order of the unit.
        constants: what the logit owes to no row of the stream, as rows that come last.
        total: what the end of the stream and the constants add up to.
        ratio: the output transform, frozen: transformed / raw.
        readout_norm: root of the sum over additions to the stream of (‖x ⊙ w‖ / s)².
        final_norm: ‖x ⊙ w‖ / s at the end of the stream.
        checks: the rows that others split.
    """

    groups: list[RowGroup]
    constants: list[RowGroup]
    total: Float[Tensor, "batch pos token"]
    ratio: Float[Tensor, "batch pos token"]
    readout_norm: Float[Tensor, "batch pos token"]
    final_norm: Float[Tensor, "batch pos token"]
    checks: list[SplitCheck] = field(default_factory=list)

    @cached_property
    def keys(self) -> Keys:
        """What each row is."""
        every = [group.keys for group in (*self.groups, *self.constants)]
        return Keys(sum(map(len, every)), partial(chain.from_iterable, every))

    def of_kind(self, kind: Kind) -> list[tuple[RowKey, int]]:
        """The rows of a kind, and where they are."""
        found, start = [], 0
        for group in (*self.groups, *self.constants):
            if not isinstance(group.keys, Keys) or group.keys.kind in (None, kind):
                found += [(key, start + i) for i, key in enumerate(group.keys) if key.kind == kind]
            start += len(group.keys)
        return found

    @cached_property
    def values(self) -> Float[Tensor, "row batch pos token"]:
        """All rows in one tensor."""
        return torch.cat([group.values for group in (*self.groups, *self.constants)])

    @staticmethod
    def joined(parts: "Sequence[Rows]") -> "Rows":
        """Rows over some tokens and over the others, as one."""
        sizes = ("total", "ratio", "readout_norm", "final_norm")
        fields = ("value", "parts", "abs_sum", "readout_norm")
        return Rows(
            _joined([part.groups for part in parts]),
            [
                RowGroup.one(key, value)
                for group in _joined([part.constants for part in parts])
                for key, value in zip(group.keys, group.values, strict=True)
            ],
            **{name: torch.cat([getattr(part, name) for part in parts], -1) for name in sizes},
            checks=[
                replace(
                    of[0], **{f: torch.cat([getattr(check, f) for check in of], -1) for f in fields}
                )
                for of in zip(*(part.checks for part in parts), strict=True)
            ],
        )

    def without_constants(self) -> "Rows":
        """The rows of the stream alone."""
        return replace(self, constants=[])

    def map(self, f: Callable[[Tensor], Tensor]) -> "Rows":
        """Every tensor through a function that leaves the axis of rows alone."""
        sizes = ("total", "ratio", "readout_norm", "final_norm")

        def checked(c: SplitCheck) -> SplitCheck:
            parts = (f(x) for x in (c.value, c.parts, c.abs_sum, c.readout_norm))
            return SplitCheck(c.key, c.parts_are, *parts)

        return Rows(
            [RowGroup(group.keys, f(group.values)) for group in self.groups],
            [RowGroup(group.keys, f(group.values)) for group in self.constants],
            **{name: f(getattr(self, name)) for name in sizes},
            checks=[checked(c) for c in self.checks],
        )


def _joined(parts: Sequence[list[RowGroup]]) -> list[RowGroup]:
    """One group; a `_rest` row that is no more than rounding for some tokens is 0 there."""
    keys = [[key for group in groups for key in group.keys] for groups in parts]
    every = merged(keys)
    if not every:
        return []
    values = [torch.cat([group.values for group in groups]) for groups in parts]
    values = [aligned(own, x, every) for own, x in zip(keys, values, strict=True)]
    return [RowGroup(every, torch.cat(values, -1))]


def merged(sides: Sequence[Sequence[RowKey]]) -> list[RowKey]:
    """All rows of several lists of them, each after the one that it follows."""
    merged = list(sides[0])
    for keys in sides[1:]:
        known, last = set(merged), None
        after: dict[RowKey | None, list[RowKey]] = defaultdict(list)
        for key in keys:
            if key in known:
                last = key
            else:
                after[last].append(key)
        merged = [*after[None], *(one for key in merged for one in (key, *after[key]))]
    return merged


def aligned(
    keys: Sequence[RowKey], values: Float[Tensor, " row *rest"], everything: Sequence[RowKey]
) -> Float[Tensor, " all_rows *rest"]:
    """The values under all rows; 0 where there are none of a row."""
    if list(keys) == list(everything):
        return values
    place = {key: i for i, key in enumerate(everything)}
    aligned = values.new_zeros(len(everything), *values.shape[1:])
    aligned[[place[key] for key in keys]] = values
    return aligned


@dataclass(frozen=True, eq=False)
class ScaledKept:
    """Values kept by the taps, and their division by the frozen norm scales.

    `shape` is `[batch, pos, token]` of every row; `n_sources` is how many tokens the attributed
    positions can see, where that is known.
    """

    kept: Kept
    scales: Mapping[str, Float[Tensor, "batch pos"]]
    shape: torch.Size
    device: torch.device
    n_sources: int | None = None

    def __getitem__(self, tap: Tap) -> Tensor:
        return self.kept[tap]

    def scaled(
        self, x: Float[Tensor, "#batch #pos #token *inner"], readout: Readout
    ) -> Float[Tensor, "batch pos token *inner"]:
        """Divided by the scales of the readout's norms, and as large as every row."""
        x = x.to(self.device)
        for norm in readout.norms:
            scale = self.scales[norm.name].to(x)
            x = x / scale.reshape(*scale.shape, *[1] * (x.ndim - 2))
        return x.expand(*self.shape, *x.shape[3:])
