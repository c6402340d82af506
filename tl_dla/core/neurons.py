"""`unit="neuron"`: what an MLP wrote, as its neurons or its experts.

An MLP adds z @ W_out + b_out to the stream, so a neuron's row is z_n × (W_out[n] · readout): the
readout pulled back through W_out has a number for each neuron, and nothing of size
`d_mlp × d_model × positions` is ever made. A mixture of experts is a sum of experts times the
router's weights, which are frozen.
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from tl_dla.core.heads import RowSplit, sums
from tl_dla.core.readout import Readout
from tl_dla.core.rows import Keys, RowGroup, RowKey, ScaledKept, SplitRows
from tl_dla.core.taps import Tap
from tl_dla.model.hooks import upcast
from tl_dla.model.mlp import MLP, Experts
from tl_dla.model.stream import Write


class NeuronSplit(RowSplit):
    """`3_mlp_out` as its neurons, `L3N1024`, and `3_mlp_bias`.

    Args:
        part: how the MLP writes.
        step: where it joins the stream.
        write: the readout of what joins the stream.
        keep: the neurons that have a row of their own, where they are named.
        alone: whether the others have no row at all, and the certificate none either.
    """

    part: MLP

    def __init__(
        self,
        part: MLP,
        step: Write,
        write: Readout,
        keep: Sequence[int] | None = None,
        alone: bool = False,
    ) -> None:
        super().__init__(part, step, write)
        self.keep, self.alone = keep, alone
        self.neurons = self.output.through_linear(part.W_out)
        # Which neurons are largest shows only once the scales are known.
        self.neurons_tap = Tap(part.site, upcast)

    def taps(self) -> list[Tap]:
        """The neurons."""
        return [self.neurons_tap]

    def values(
        self, kept: ScaledKept, keep: Sequence[int] | None = None
    ) -> Float[Tensor, "batch pos token neuron"]:
        """What neurons wrote: all of them, or those named."""
        z, direction = kept[self.neurons_tap], self.neurons.direction
        if keep is not None:
            z, direction = z[..., list(keep)], direction[..., list(keep)]
        return kept.scaled(z.to(direction)[:, :, None] * direction, self.output)

    def split(
        self,
        kept: ScaledKept,
        whole: Float[Tensor, "batch pos token"],
        largest: Sequence[int] | None = None,
    ) -> SplitRows:
        """The neurons first, the bias in place; of `largest`, where the ranking chose them."""
        keep = self.keep if largest is None else largest
        layer, bias, values = self.layer, self.bias(kept), self.values(kept, keep)
        chosen = range(values.shape[-1]) if keep is None else keep
        keys = Keys(
            len(chosen), lambda: (RowKey("neuron", layer, index=n) for n in chosen), "neuron"
        )
        values = rearrange(values, "batch pos token neuron -> neuron batch pos token")
        first = [RowGroup(keys, values)]
        if self.alone:
            return SplitRows(first, bias, [])
        z, neurons = kept[self.neurons_tap], self.neurons
        total = kept.scaled(neurons.contract(z), neurons)
        absolute = kept.scaled(Readout(neurons.direction.abs()).contract(z.abs()), neurons)
        check = self.check(kept, "the neurons", whole, [(total, absolute), *sums(bias)])
        if keep is not None:
            z = z.clone()
            z[..., list(keep)] = 0
            key = RowKey("neurons", layer, f"{self.key.name.removesuffix('mlp_out')}other_neurons")
            first.append(RowGroup.one(key, kept.scaled(neurons.contract(z), neurons)))
        return SplitRows(first, bias, [check])


class ExpertSplit(RowSplit):
    """`3_mlp_out` as its experts, `L3E2`, and `3_shared_expert` where there is one."""

    part: Experts

    def __init__(self, part: Experts, step: Write, write: Readout) -> None:
        super().__init__(part, step, write)
        self.experts_tap = Tap(part.site, self._read)
        self.shared_tap = self.gate_tap = None
        if part.shared is not None:
            self.shared_tap = Tap(part.shared, self.output.contract)
        if part.shared_gate is not None:
            self.gate_tap = Tap(part.shared_gate, lambda x: torch.sigmoid(upcast(x)))

    def taps(self) -> list[Tap]:
        """Each expert is run again on the attributed tokens that chose it, and on no other."""
        taps = [self.experts_tap, self.shared_tap, self.gate_tap]
        return [tap for tap in taps if tap is not None]

    def _read(
        self,
        x: Float[Tensor, "batch pos d_model"],
        chosen: Int[Tensor, "batch pos k"],
        weight: Float[Tensor, "batch pos k"],
    ) -> Float[Tensor, "batch pos token expert"]:
        direction = self.output.direction.to(x.device)
        direction = direction.expand(*chosen.shape[:2], *direction.shape[2:])
        values = direction.new_zeros(*direction.shape[:3], self.part.n_experts)
        for expert in chosen.unique().tolist():
            b, p, k = (chosen == expert).nonzero(as_tuple=True)
            wrote = self.part.site.module.forward(
                x[b, p], chosen[b, p, k, None], weight[b, p, k, None]
            )
            values[b, p, :, expert] = torch.einsum("nd,ntd->nt", wrote.to(values), direction[b, p])
        return values

    def split(self, kept: ScaledKept, whole: Float[Tensor, "batch pos token"]) -> SplitRows:
        """The experts first; the shared expert in place of the row."""
        layer, instead = self.layer, []
        routed = kept.scaled(kept[self.experts_tap], self.output)
        if self.shared_tap is not None:
            value = kept[self.shared_tap]
            if self.gate_tap is not None:
                value = value * kept[self.gate_tap]
            key = RowKey("expert", layer, "shared_expert")
            instead.append(RowGroup.one(key, kept.scaled(value, self.output)))
        instead += self.bias(kept)
        rest = whole - sum((group.values[0] for group in instead), torch.zeros_like(whole))
        total = routed.sum(-1)
        routed = routed * min(
            self.part.scalings, key=lambda s: float((rest - s * total).abs().nansum())
        )
        keys = [RowKey("expert", layer, index=expert) for expert in range(routed.shape[-1])]
        experts = RowGroup(keys, rearrange(routed, "batch pos token e -> e batch pos token"))
        check = self.check(kept, "the experts", whole, sums([experts, *instead]))
        return SplitRows([experts], instead, [check])


def largest(scores: Sequence[Float[Tensor, " neuron"]], k: int) -> list[list[int]]:
    """The k largest of all layers' neurons, as indices layer by layer."""
    everything = torch.cat([torch.empty(0, device="cpu"), *(score.cpu() for score in scores)])
    top = torch.zeros_like(everything, dtype=torch.bool)
    top[everything.topk(min(k, len(everything))).indices] = True
    return [x.nonzero().flatten().tolist() for x in top.split([len(s) for s in scores])]
