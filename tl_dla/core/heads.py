"""Splitting one row of the stream into others: the base of every split, and `unit="head"`.

A split stands for a row of the residual stream (`3_attn_out`) and gives the rows of its parts
(heads, neurons, source tokens): the readout pulled back through what the sublayer's output passes
through, and a dot product there. Parts must add up to the row that they split.
"""

from collections.abc import Sequence
from functools import cached_property, partial, reduce

import torch
from jaxtyping import Float
from torch import Tensor

from tl_dla.core.readout import Readout
from tl_dla.core.rows import Keys, RowGroup, RowKey, ScaledKept, SplitCheck, SplitRows, key_of
from tl_dla.core.taps import Tap
from tl_dla.model.attention import Attention
from tl_dla.model.mlp import MLP, Experts
from tl_dla.model.norms import Norm
from tl_dla.model.stream import Write


class RowSplit:
    """One sublayer whose row is split.

    Args:
        part: how the sublayer writes; None where what joins the stream is split as it is.
        step: where it joins the stream.
        write: the readout of what joins the stream.
    """

    def __init__(self, part: Attention | MLP | Experts | None, step: Write, write: Readout) -> None:
        self.part, self.key, self.layer, self.write = part, key_of(step), step.layer, write
        self.output = write if part is None else write.times(part.factor)
        if part is not None and part.post_norm is not None:
            self.output = self.output.through_norm(part.post_norm)
        self.norm_tap = Tap(step.site, write.norm_of, together=True)

    @property
    def norms(self) -> tuple[Norm, ...]:
        """The norms whose scales the rows are divided by."""
        return self.output.norms

    def taps(self) -> list[Tap]:
        """What to keep in the forward pass, beside `norm_tap`."""
        raise NotImplementedError

    def split(self, kept: ScaledKept, whole: Float[Tensor, "batch pos token"]) -> SplitRows:
        """The rows that stand for `whole`."""
        raise NotImplementedError

    def bias(self, kept: ScaledKept) -> list[RowGroup]:
        """The output bias and the post-norm's own, through what follows them; none if all 0."""
        part, values = self.part, []
        if part is None:
            return []
        if part.bias is not None and bool(part.bias.any()):
            values.append(kept.scaled(self.output.of_bias(part.bias), self.output))
        norm = part.post_norm
        if norm is not None and norm.beta is not None and bool(norm.beta.any()):
            values.append(kept.scaled(self.write.times(part.factor).of_bias(norm.beta), self.write))
        if not values:
            return []
        key = RowKey("bias", self.layer, f"{self.key.name.removesuffix('_out')}_bias")
        return [RowGroup.one(key, torch.stack(values).sum(0))]

    def check(
        self,
        kept: ScaledKept,
        parts_are: str,
        whole: Float[Tensor, "batch pos token"],
        parts: list[tuple[Float[Tensor, "batch pos token"], Float[Tensor, "batch pos token"]]],
    ) -> SplitCheck:
        """The parts against the row that they split; each as its sum and its sum of |values|."""
        size = kept.scaled(kept[self.norm_tap], self.write)
        total, abs_sum = (reduce(torch.add, x) for x in zip(*parts, strict=True))
        return SplitCheck(self.key, parts_are, whole, total, abs_sum, size)


def sums(groups: list[RowGroup]) -> list[tuple[Tensor, Tensor]]:
    """Each group's sum over rows, and its sum of absolute values."""
    return [(group.values.sum(0), group.values.abs().sum(0)) for group in groups]


def _by_head(
    z: Float[Tensor, "batch pos ..."], n_heads: int
) -> Float[Tensor, "batch pos head d_head"]:
    return z.flatten(2).unflatten(2, (n_heads, -1))


class HeadSplit(RowSplit):
    """`3_attn_out` as its heads, `L3H7`, and `3_attn_bias`.

    Where only some heads are asked for, `keep`, the others share a row, `3_other_heads`.
    """

    part: Attention

    def __init__(
        self, part: Attention, step: Write, write: Readout, keep: Sequence[int] | None = None
    ) -> None:
        super().__init__(part, step, write)
        self.keep = range(part.W_O.shape[0]) if keep is None else keep
        # Nothing that the tap holds may hold the split: a circle would keep directions alive.
        output, W_O = self.output, part.W_O
        by_head = partial(_by_head, n_heads=W_O.shape[0])

        def by_dot_product(z: Tensor) -> Tensor:  # of many positions, one layer's directions
            return output.through_linear(W_O).contract(by_head(z))

        self.by_head, self.heads_tap = by_head, Tap(part.site, by_dot_product)

    @cached_property
    def heads(self) -> Readout:
        """The readout at z."""
        return self.output.through_linear(self.part.W_O)

    def taps(self) -> list[Tap]:
        """Each head's dot product with the readout at z."""
        return [self.heads_tap]

    def values(self, kept: ScaledKept) -> Float[Tensor, "batch pos token head"]:
        """What each head wrote."""
        return kept.scaled(kept[self.heads_tap], self.output)

    def split(self, kept: ScaledKept, whole: Float[Tensor, "batch pos token"]) -> SplitRows:
        """The heads first, the bias in place."""
        bias, values = self.bias(kept), self.values(kept)
        every, layer, keep = values.movedim(-1, 0), self.layer, self.keep
        keys = Keys(len(keep), lambda: (RowKey("head", layer, index=n) for n in keep), "head")
        check = self.check(kept, "the heads", whole, sums([RowGroup((), every), *bias]))
        if len(keys) == len(every):
            return SplitRows([RowGroup(keys, every)], bias, [check])
        others = [head for head in range(len(every)) if head not in keep]
        rest = RowGroup.one(RowKey("attn", layer, "other_heads"), every[others].sum(0))
        return SplitRows([RowGroup(keys, every[list(keep)])], [rest, *bias], [check])
