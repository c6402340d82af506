"""`unit="source"`: what a head moved from each source token.

A head writes Σ_s pattern[s] v[s] W_O, so its row is a sum over source tokens s of
pattern[s] × (v[s] · readout at z): "attention pattern × value", pulled back through W_O and what
follows it, the pattern frozen. Rows are `L9H9←5`: head 9 of layer 9, from the token at position 5.
Values hold their own bias. Where something multiplies the mixed values before W_O (a gate, a norm
over the heads), that factor is frozen too.
"""

from collections.abc import Collection

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from tl_dla.core.heads import HeadSplit
from tl_dla.core.network.gates import gate_factor
from tl_dla.core.readout import Readout
from tl_dla.core.rows import Keys, RowGroup, RowKey, ScaledKept, SplitCheck, SplitRows
from tl_dla.core.taps import Tap
from tl_dla.model.attention import Attention, PatternAndValues
from tl_dla.model.hooks import upcast
from tl_dla.model.stream import Write


class SourceSplit(HeadSplit):
    """`3_attn_out` as its heads, some of them as the source tokens they read, `L3H7←5`.

    Args:
        part: how the heads write.
        step: where the layer joins the stream.
        write: the readout of what joins the stream.
        reads: the values that the heads mix, and the pattern.
        chosen: the heads that are split by source token.
    """

    def __init__(
        self,
        part: Attention,
        step: Write,
        write: Readout,
        reads: PatternAndValues,
        chosen: Collection[int],
    ) -> None:
        super().__init__(part, step, write)
        self.reads, self.chosen = reads, sorted(chosen)
        d_head = part.W_O.shape[1]

        def by_group(v: Tensor) -> Tensor:
            return rearrange(upcast(v).flatten(2), "b pos (group d) -> b pos group d", d=d_head)

        by_head, heads = self.by_head, self.heads  # every layer's, which are read again below
        self.heads_tap = Tap(part.site, lambda z: heads.contract(by_head(z)))
        self.z_tap = Tap(part.site, lambda z: upcast(by_head(z)))
        self.pattern_tap = Tap(reads.pattern, upcast, keys=True, heads_first=True)
        self.values_tap = Tap(reads.values, by_group, whole=True, heads_first=reads.heads_first)
        self.gate_tap = None
        if reads.gate is not None and reads.gate.site is not None:
            self.gate_tap = Tap(reads.gate.site, upcast)

    def taps(self) -> list[Tap]:
        """Values at every token, the pattern at the attributed ones, and the mixture z itself."""
        gate = [] if self.gate_tap is None else [self.gate_tap]
        return [self.heads_tap, self.z_tap, self.pattern_tap, self.values_tap, *gate]

    def values_of(self, kept: ScaledKept) -> Float[Tensor, "batch source head d_head"]:
        """Each head's values, at every token; heads of a group share theirs."""
        v, n_heads = kept[self.values_tap], self.part.W_O.shape[0]
        return v if v.shape[2] == n_heads else v.repeat_interleave(n_heads // v.shape[2], 2)

    def pattern(self, kept: ScaledKept) -> Float[Tensor, "batch pos head source"]:
        """Attention paid to each token, up to the last one that an attributed position can see."""
        pattern = kept[self.pattern_tap]
        last = pattern.shape[-1] if kept.n_sources is None else kept.n_sources
        return pattern if bool(pattern[..., last:].any()) else pattern[..., :last]

    def readout(self, kept: ScaledKept) -> Readout:
        """The readout of the mixed values, through the gate `[batch, pos, token, head, d_head]`."""
        factor = self.gate(kept)
        return self.heads if factor is None else self.heads.through_mask(factor[:, :, None])

    def gate(self, kept: ScaledKept) -> Float[Tensor, "batch pos head #d_head"] | None:
        """What multiplies the mixed values before W_O, frozen; None where nothing does."""
        gate = self.reads.gate
        if gate is None:
            return None
        mixed = torch.einsum("bphs,bshd->bphd", kept[self.pattern_tap], self.values_of(kept))
        shown = None if self.gate_tap is None else kept[self.gate_tap]
        return gate_factor(gate, shown, mixed, kept[self.z_tap], self.part.layer)

    def split(self, kept: ScaledKept, whole: Float[Tensor, "batch pos token"]) -> SplitRows:
        """The source tokens in place of each chosen head, and the certificate of each."""
        heads, own = super().split(kept, whole), self.values(kept)
        readout, chosen = self.readout(kept), self.chosen
        at = slice(None) if len(chosen) == self.part.W_O.shape[0] else chosen
        pattern = self.pattern(kept)[:, :, at]
        values = self.values_of(kept)[:, : pattern.shape[-1], at]
        direction = readout.direction[..., at, :]
        moved = torch.einsum("bshd,bpthd->bpths", values.to(direction), direction)
        moved = kept.scaled(moved * pattern[:, :, None], readout)
        rows = rearrange(moved, "batch pos token head source -> head source batch pos token")
        z = kept[self.z_tap][:, :, at].to(direction)
        size = kept.scaled(Readout(direction).norm_of(z), readout)
        size = torch.hypot(size, moved.norm(dim=-1))
        sizes = (x.unbind(-1) for x in (moved.sum(-1), moved.abs().sum(-1), size))
        numbers = dict(zip(chosen, zip(rows, *sizes, strict=True), strict=True))
        first: list[RowGroup] = []
        checks = list(heads.checks)
        for head, value in enumerate(own.unbind(-1)):
            key = RowKey("head", self.layer, index=head)
            if head not in numbers:
                first.append(RowGroup.one(key, value))
                continue
            of_sources, *part = numbers[head]
            checks.append(SplitCheck(key, "the source tokens", value, *part))
            first.append(RowGroup(_sources(key, len(of_sources)), of_sources))
        return SplitRows(first, heads.instead, checks)


def _sources(head: RowKey, n: int) -> Keys:
    """A head's row as those of the tokens it reads."""
    return Keys(
        n, lambda: (head._replace(kind="source", source=source) for source in range(n)), "source"
    )
