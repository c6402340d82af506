"""`unit="neuron"`: what an MLP wrote, as its neurons or its experts.

An MLP adds z @ W_out + b_out to the stream, so a neuron's row is z_n × (W_out[n] · readout): the
readout pulled back through W_out has a number for each neuron, and nothing of size
`d_mlp × d_model × positions` is ever made. A mixture of experts is a sum of experts times the
router's weights, which are frozen.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_dla.core.readout import Readout
from tl_dla.core.rows import Block, Refinement, Row, Seen, Split, upcast
from tl_dla.core.taps import Probe
from tl_dla.model.sublayers import MLP, Experts


class Neurons(Refinement):
    """`3_mlp_out` as its neurons, `L3N1024`, and `3_mlp_bias`.

    `keep` names the neurons that have a row of their own; the others share `3_other_neurons`, or
    have none where the kept ones are asked for `alone`.
    """

    part: MLP
    keep: Sequence[int] | None = None
    alone: bool = False

    def __init__(self, part: MLP, label: str, write: Readout) -> None:
        super().__init__(part, label, write)
        self.neurons = self.output.through_linear(part.W_out)

    def probes(self) -> list[Probe]:
        """The neurons: which of them are largest shows only once the scales are known."""
        return [Probe(f"neurons {self.label}", self.part.site, upcast)]

    def values(
        self, seen: Seen, keep: Sequence[int] | None = None
    ) -> Float[Tensor, "batch pos token neuron"]:
        """What neurons wrote: all of them, or those named."""
        z, direction = seen.values[f"neurons {self.label}"], self.neurons.direction
        if keep is not None:
            z, direction = z[..., list(keep)], direction[..., list(keep)]
        return seen.scaled(z.to(direction)[:, :, None] * direction, self.output)

    def split(self, seen: Seen, whole: Float[Tensor, "batch pos token"]) -> Split:
        """The neurons first, the bias in place."""
        layer, bias, values = self.layer, self.bias(seen), self.values(seen, self.keep)
        kept = range(values.shape[-1]) if self.keep is None else self.keep
        labels = [f"L{layer}N{neuron}" for neuron in kept]
        rows: list[Row | Block] = [Block(labels, "neuron", layer, values.movedim(-1, 0))]
        if self.alone:
            return Split(rows, bias, [])
        z, neurons = seen.values[f"neurons {self.label}"], self.neurons
        total = seen.scaled(neurons.contract(z), neurons)
        gross = seen.scaled(Readout(neurons.direction.abs()).contract(z.abs()), neurons)
        refined = self.certificate(seen, "the neurons", whole, total, gross, bias)
        if self.keep is not None:
            z = z.clone()
            z[..., list(self.keep)] = 0
            others = seen.scaled(neurons.contract(z), neurons)
            rows.append(Row(self.others, "neuron", layer, others))
        return Split(rows, bias, [refined])

    @property
    def others(self) -> str:
        """The row that the neurons without a row of their own share."""
        return f"{self.label.removesuffix('_mlp_out')}_other_neurons"


class ExpertRows(Refinement):
    """`3_mlp_out` as its experts, `L3E2`, and `3_shared_expert` where there is one."""

    part: Experts

    def probes(self) -> list[Probe]:
        """Each expert is run again on the attributed tokens that chose it, and on no other."""
        part = self.part
        probes = [Probe(f"experts {self.label}", part.site, self._read)]
        if part.shared is not None:
            read = self.output.contract
            probes.append(Probe(f"shared {self.label}", part.shared, read))
        if part.shared_gate is not None:
            gate = torch.sigmoid
            probes.append(Probe(f"gate {self.label}", part.shared_gate, lambda x: gate(upcast(x))))
        return probes

    def _read(
        self,
        x: Float[Tensor, "batch pos d_model"],
        chosen: Int[Tensor, "batch pos k"],
        weight: Float[Tensor, "batch pos k"],
    ) -> Float[Tensor, "batch pos token expert"]:
        direction = self.output.direction
        direction = direction.expand(*chosen.shape[:2], *direction.shape[2:])
        values = direction.new_zeros(*direction.shape[:3], self.part.n_experts)
        for expert in chosen.unique().tolist():
            b, p, k = (chosen == expert).nonzero(as_tuple=True)
            wrote = self.part.site.module.forward(
                x[b, p], chosen[b, p, k, None], weight[b, p, k, None]
            )
            values[b, p, :, expert] = torch.einsum("nd,ntd->nt", wrote.to(values), direction[b, p])
        return values

    def split(self, seen: Seen, whole: Float[Tensor, "batch pos token"]) -> Split:
        """The experts first; the shared expert in place of the row."""
        layer, name = self.layer, self.label
        routed, shared = seen.scaled(seen.values[f"experts {name}"], self.output), []
        if self.part.shared is not None:
            value = seen.values[f"shared {name}"]
            if self.part.shared_gate is not None:
                value = value * seen.values[f"gate {name}"]
            value = seen.scaled(value, self.output)
            label = f"{name.partition('_')[0]}_shared_expert"
            shared = [Row(label, "expert", layer, value)]
        instead = shared + self.bias(seen)
        rest = whole - sum((row.value for row in instead), torch.zeros_like(whole))
        total = routed.sum(-1)
        scaling = min(self.part.scalings, key=lambda s: float((rest - s * total).abs().nansum()))
        routed, total = routed * scaling, total * scaling
        refined = self.certificate(seen, "the experts", whole, total, routed.abs().sum(-1), instead)
        labels = [f"L{layer}E{expert}" for expert in range(routed.shape[-1])]
        return Split([Block(labels, "expert", layer, routed.movedim(-1, 0))], instead, [refined])


def largest(scores: Sequence[Float[Tensor, " neuron"]], k: int) -> list[list[int]]:
    """The k largest of all layers' neurons, as indices layer by layer."""
    everything = torch.cat([score.cpu() for score in scores])
    top = torch.zeros_like(everything, dtype=torch.bool)
    top[everything.topk(min(k, len(everything))).indices] = True
    return [x.nonzero().flatten().tolist() for x in top.split([len(s) for s in scores])]
