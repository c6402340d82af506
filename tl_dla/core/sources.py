"""`unit="source"`: what a head moved from each source token.

A head writes Σ_s pattern[s] v[s] W_O, so its row is a sum over source tokens s of
pattern[s] × (v[s] · readout at z): "attention pattern × value", pulled back through W_O and what
follows it, the pattern frozen. Rows are `L9H9←5`: head 9 of layer 9, from the token at position 5.
Values hold their own bias. Where something multiplies the mixed values before W_O (a gate, a norm
over the heads), that factor is frozen too.
"""

from collections.abc import Collection

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from tl_dla.core.readout import Readout
from tl_dla.core.rows import Block, Heads, Refined, Row, Seen, Split, upcast
from tl_dla.core.taps import Probe
from tl_dla.errors import UnsupportedModelError
from tl_dla.model.sublayers import Attention, Mixing

_GATES = (torch.sigmoid, functional.softplus)


class Sources(Heads):
    """`3_attn_out` as its heads, some of them as the source tokens they read, `L3H7←5`."""

    def __init__(
        self,
        part: Attention,
        label: str,
        write: Readout,
        mixing: Mixing,
        chosen: Collection[int],
        architecture: str,
    ) -> None:
        super().__init__(part, label, write)
        self.mixing, self.chosen = mixing, sorted(chosen)
        self.architecture = architecture

    def probes(self) -> list[Probe]:
        """Values at every token, the pattern at the attributed ones, and the mixture z itself."""
        layer, mixing, shape = self.layer, self.mixing, self.part.W_O.shape[:2]

        def by_head(z: Tensor) -> Tensor:
            return upcast(z).flatten(2).unflatten(2, shape)

        def by_group(v: Tensor) -> Tensor:
            return upcast(v).flatten(2).unflatten(2, (-1, shape[1]))

        probes = [
            *super().probes(),
            Probe(f"z {layer}", self.part.site, by_head),
            Probe(f"pattern {layer}", mixing.pattern, upcast, keys=True, heads_first=True),
            Probe(
                f"values {layer}",
                mixing.values,
                by_group,
                whole=True,
                heads_first=mixing.heads_first,
            ),
        ]
        if mixing.gate is not None and mixing.gate.site is not None:
            probes.append(Probe(f"gate {layer}", mixing.gate.site, upcast))
        return probes

    def values_of(self, seen: Seen) -> Float[Tensor, "batch source head d_head"]:
        """Each head's values, at every token; heads of a group share theirs."""
        v, n_heads = seen.values[f"values {self.layer}"], self.part.W_O.shape[0]
        return v[:, :, [head * v.shape[2] // n_heads for head in range(n_heads)]]

    def pattern(self, seen: Seen) -> Float[Tensor, "batch pos head source"]:
        """Attention paid to each token, up to the last one that an attributed position can see."""
        pattern = seen.values[f"pattern {self.layer}"]
        last = pattern.shape[-1] if seen.sources is None else seen.sources
        return pattern if bool(pattern[..., last:].any()) else pattern[..., :last]

    def readout(self, seen: Seen) -> Readout:
        """The readout of the mixed values, through the gate `[batch, pos, token, head, d_head]`."""
        gate = self.mixing.gate
        if gate is None:
            return self.heads
        z, shape = seen.values[f"z {self.layer}"], self.part.W_O.shape[:2]
        pattern = seen.values[f"pattern {self.layer}"]
        mixed = torch.einsum("bphs,bshd->bphd", pattern, self.values_of(seen))
        if gate.norm is not None:
            scale = gate.norm.scale_of(mixed.flatten(2))[..., None, None]
            gamma = 1.0 if gate.norm.gamma is None else gate.norm.gamma.to(z).unflatten(0, shape)
            factors = [gamma / scale]
        else:
            x = seen.values[f"gate {self.layer}"]
            x = x[..., None] if x.shape[-1] == shape[0] else x.flatten(2).unflatten(2, shape)
            factors = [function(x) for function in _GATES]
        for factor in factors:
            if bool(((mixed * factor - z).abs().amax() <= 0.01 * z.abs().amax()).all()):
                return Readout(self.heads.direction * factor[:, :, None], self.heads.norms)
        raise UnsupportedModelError(
            f"blocks.{self.layer}.attn in {self.architecture} multiplies what its heads mix by"
            ' something that is not understood; unit="head" works.'
        )

    def split(self, seen: Seen, whole: Float[Tensor, "batch pos token"]) -> Split:
        """The source tokens in place of each chosen head, and the certificate of each."""
        heads, own = super().split(seen, whole), self.values(seen)
        readout, chosen = self.readout(seen), self.chosen
        pattern = self.pattern(seen)[:, :, chosen]
        values = self.values_of(seen)[:, : pattern.shape[-1], chosen]
        direction = readout.direction[..., chosen, :]
        moved = torch.einsum("bshd,bpthd->bpths", values.to(direction), direction)
        moved = seen.scaled(moved * pattern[:, :, None], readout)
        z = seen.values[f"z {self.layer}"][:, :, chosen].to(direction)
        size = torch.einsum("bphd,bpthd->bpth", z.square(), direction.square()).sqrt()
        size = seen.scaled(size, readout).square() + moved.square().sum(-1)
        parts, gross, size = moved.sum(-1), moved.abs().sum(-1), size.sqrt()
        first: list[Row | Block] = []
        refined = list(heads.refined)
        for head, value in enumerate(own.unbind(-1)):
            label = f"L{self.layer}H{head}"
            if head not in chosen:
                first.append(Row(label, "head", self.layer, value))
                continue
            i = chosen.index(head)
            part = (value, parts[..., i], gross[..., i], size[..., i])
            refined.append(Refined(label, "the source tokens", *part))
            rows = moved[..., i, :].movedim(-1, 0)
            labels = [f"{label}←{source}" for source in range(len(rows))]
            first.append(Block(labels, "source", self.layer, rows))
        return Split(first, heads.instead, refined)
