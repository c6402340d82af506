"""Rows, and the splitting of one row into others: what every refinement shares.

A refinement stands for a row of the residual stream (`3_attn_out`) and gives the rows of its parts
(heads, neurons, source tokens): the readout pulled back through what the sublayer's output passes
through, and a dot product there. Parts must add up to the row that they split.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from tl_dla.core.readout import Readout
from tl_dla.core.taps import Probe
from tl_dla.model.reader import Kind, Norm
from tl_dla.model.sublayers import MLP, Attention, Experts


@dataclass(frozen=True, eq=False)
class Row:
    """One row: its values are `[batch, pos, token]`."""

    label: str
    kind: Kind
    layer: int | None
    value: Float[Tensor, "batch pos token"]


@dataclass(frozen=True, eq=False)
class Block:
    """Rows of one kind and layer, together: thousands of neurons are one tensor."""

    labels: list[str]
    kind: Kind
    layer: int | None
    values: Float[Tensor, "row batch pos token"]


@dataclass(frozen=True, eq=False)
class Refined:
    """A row that others split: the sum of the parts must be its value.

    `gross` is the sum of the parts' absolute values, `magnitude` ‖x ⊙ w‖/s of what is split.
    """

    label: str
    parts_are: str
    value: Float[Tensor, "batch pos token"]
    parts: Float[Tensor, "batch pos token"]
    gross: Float[Tensor, "batch pos token"]
    magnitude: Float[Tensor, "batch pos token"]


@dataclass(frozen=True, eq=False)
class Rows:
    """All rows of a unit, and what the certificate needs."""

    blocks: list[Row | Block]
    total: Float[Tensor, "batch pos token"]
    magnitude: Float[Tensor, "batch pos token"]
    final: Float[Tensor, "batch pos token"]
    refined: list[Refined] = field(default_factory=list)

    @property
    def rows(self) -> list[Row]:
        """One by one."""
        named = zip(self.labels, self.kinds, self.layers, self.values(), strict=True)
        return [Row(label, kind, layer, value) for label, kind, layer, value in named]

    @property
    def labels(self) -> list[str]:
        """The rows' names."""
        return [label for block in self.blocks for label in names(block)]

    @property
    def kinds(self) -> list[Kind]:
        """What each row is."""
        return [block.kind for block in self.blocks for _ in names(block)]

    @property
    def layers(self) -> list[int | None]:
        """Each row's layer."""
        return [block.layer for block in self.blocks for _ in names(block)]

    def values(self) -> Float[Tensor, "row batch pos token"]:
        """All rows in one tensor."""
        stacks = [x.value[None] if isinstance(x, Row) else x.values for x in self.blocks]
        return torch.cat(stacks)


def names(block: Row | Block) -> list[str]:
    """The labels of a row, or of rows."""
    return [block.label] if isinstance(block, Row) else block.labels


@dataclass(frozen=True, eq=False)
class Split:
    """What stands for a row: `first` before all rows of the stream, `instead` in its place."""

    first: list[Row | Block]
    instead: list[Row]
    refined: list[Refined]


@dataclass(frozen=True, eq=False)
class Seen:
    """What a forward pass has shown, and the division by the scales that waited for it.

    `shape` is `[batch, pos, token]` of every row; `sources` is how many tokens the attributed
    positions can see, where that is known.
    """

    values: Mapping[str, Tensor]
    scales: Mapping[str, Tensor]
    shape: torch.Size
    device: torch.device
    sources: int | None = None

    def scaled(
        self, x: Float[Tensor, "#batch #pos #token *inner"], readout: Readout
    ) -> Float[Tensor, "batch pos token *inner"]:
        """Divided by the readout's scales, and as large as every row."""
        x = x.to(self.device)
        for norm in readout.norms:
            scale = self.scales[norm.name].to(x)
            x = x / scale.reshape(*scale.shape, *[1] * (x.ndim - 2))
        return x.expand(*self.shape, *x.shape[3:])


class Refinement:
    """One sublayer whose row is split.

    Args:
        part: how the sublayer writes.
        label: the row that is split.
        write: the readout of what the sublayer adds to the stream.
    """

    def __init__(self, part: Attention | MLP | Experts, label: str, write: Readout) -> None:
        self.part, self.label, self.layer, self.write = part, label, part.layer, write
        self.output = write.times(part.factor)
        if part.post_norm is not None:
            self.output = self.output.through_norm(part.post_norm)

    @property
    def norms(self) -> tuple[Norm, ...]:
        """The norms whose scales the rows are divided by."""
        return self.output.norms

    def probes(self) -> list[Probe]:
        """What to read in the forward pass."""
        raise NotImplementedError

    def split(self, seen: Seen, whole: Float[Tensor, "batch pos token"]) -> Split:
        """The rows that stand for `whole`."""
        raise NotImplementedError

    def bias(self, seen: Seen) -> list[Row]:
        """The output bias and the post-norm's own, through what follows them; none if all 0."""
        part, values = self.part, []
        if part.bias is not None and bool(part.bias.any()):
            values.append(seen.scaled(self.output.of_bias(part.bias), self.output))
        norm = part.post_norm
        if norm is not None and norm.beta is not None and bool(norm.beta.any()):
            values.append(seen.scaled(self.write.times(part.factor).of_bias(norm.beta), self.write))
        label = f"{self.label.removesuffix('_out')}_bias"
        return [Row(label, "bias", self.layer, torch.stack(values).sum(0))] if values else []

    def certificate(
        self,
        seen: Seen,
        parts_are: str,
        whole: Float[Tensor, "batch pos token"],
        parts: Float[Tensor, "batch pos token"],
        gross: Float[Tensor, "batch pos token"],
        bias: list[Row],
    ) -> Refined:
        """The parts and the bias against the row that they split."""
        for row in bias:
            parts, gross = parts + row.value, gross + row.value.abs()
        size = seen.scaled(seen.values[f"|{self.label}|"], self.write).abs()
        return Refined(self.label, parts_are, whole, parts, gross, size)


class Heads(Refinement):
    """`3_attn_out` as its heads, `L3H7`, and `3_attn_bias`."""

    part: Attention

    def __init__(self, part: Attention, label: str, write: Readout) -> None:
        super().__init__(part, label, write)
        self.heads = self.output.through_linear(part.W_O)

    def probes(self) -> list[Probe]:
        """Each head's dot product with the readout at z."""
        n_heads = self.part.W_O.shape[0]

        def read(z: Tensor) -> Tensor:
            return self.heads.contract(z.flatten(2).unflatten(2, (n_heads, -1)))

        return [Probe(f"heads {self.layer}", self.part.site, read)]

    def values(self, seen: Seen) -> Float[Tensor, "batch pos token head"]:
        """What each head wrote."""
        return seen.scaled(seen.values[f"heads {self.layer}"], self.heads)

    def split(self, seen: Seen, whole: Float[Tensor, "batch pos token"]) -> Split:
        """The heads first, the bias in place."""
        values, bias = self.values(seen), self.bias(seen)
        refined = self.certificate(
            seen, "the heads", whole, values.sum(-1), values.abs().sum(-1), bias
        )
        labels = [f"L{self.layer}H{head}" for head in range(values.shape[-1])]
        return Split([Block(labels, "head", self.layer, values.movedim(-1, 0))], bias, [refined])


def magnitude(readout: Readout) -> Callable[[Tensor], Tensor]:
    """‖x ⊙ w‖, before the division by the scales."""
    squared = Readout(readout.direction.square())

    def read(x: Tensor) -> Tensor:
        return squared.contract(upcast(x).square()).sqrt()

    return read


def upcast(x: Tensor) -> Tensor:
    """Contractions run in at least float32."""
    return x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
