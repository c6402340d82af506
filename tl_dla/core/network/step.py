"""A direction pulled back through one frozen step, and what is met on the way.

Every non-linearity is a line through the origin, at its value in this forward pass:

    norm         γ ⊙ (x − mean) / s + β, with s frozen
    attention    Σ_source pattern · v, with the pattern (and a gate on it) frozen
    MLP          act(pre) = (act(pre) / pre) · pre, the ratio frozen
    gated MLP    act(gate) ⊙ pre: "gate" freezes act(gate), so all of it goes to pre; "half" gives
                 each factor half, the gate's through its ratio act(gate) / gate
    experts      an MLP each, times the router's weight, frozen

A direction is `[batch, pos, target, d_model]`: every position of the prompts at once, a direction
for each logit. "gate" and the frozen norms are those of RelP (https://arxiv.org/abs/2508.21258),
"half" that of AttnLRP (https://arxiv.org/abs/2402.05602); a network as one frozen linear map is
Golden 2025 (https://arxiv.org/abs/2505.24293). None of the three collects the constants.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tl_dla.core.rows import RowKey
from tl_dla.model.hooks import in_float64
from tl_dla.model.norms import Norm

Rule = Literal["gate", "half"]


@dataclass
class Met:
    """What is met on the way back.

    Attributes:
        felt: how much rounding is felt: the sum over the activations that the model rounded of
            ‖activation ⊙ direction‖².
        biases: what each constant writes to the logit, the last one of the network first.
    """

    felt: Float[Tensor, "batch target"]
    biases: dict[RowKey, Float[Tensor, "batch target"]] = field(default_factory=dict)

    def constant(
        self,
        layer: int,
        name: str,
        vector: Float[Tensor, " d"] | None,
        direction: Float[Tensor, "batch pos target d"],
    ) -> None:
        """A vector that the model adds at every position."""
        if vector is not None and bool(vector.any()):
            self.add(layer, name, direction.sum(1) @ vector.to(direction))

    def add(self, layer: int, name: str, value: Float[Tensor, "batch target"]) -> None:
        """What a constant writes."""
        key = RowKey("bias", layer, name)
        before = self.biases.get(key)
        self.biases[key] = value if before is None else before + value.to(before)

    def rounded(
        self,
        x: Float[Tensor, "batch pos d"],
        direction: Float[Tensor, "batch pos target d"],
        times: int = 1,
    ) -> None:
        """An activation that the model rounded, so many times over."""
        self.feel(times * felt(x, direction).sum(1))

    def feel(self, squares: Float[Tensor, "batch target"]) -> None:
        """More of it, from whichever device."""
        self.felt = self.felt + squares.to(self.felt.device)

    @property
    def above(self) -> Float[Tensor, "batch target"]:
        """What all constants so far write."""
        written = (in_float64(x).to(self.felt.device) for x in self.biases.values())
        return sum(written, torch.zeros_like(self.felt))


def felt(
    x: Float[Tensor, "*place d"], direction: Float[Tensor, "*place target d"]
) -> Float[Tensor, "*place target"]:
    """‖x ⊙ direction‖², in float64, where the square of what is small does not underflow."""
    return in_float64(torch.linalg.vector_norm(x[..., None, :] * direction, dim=-1)).square()


def through_norm(
    norm: Norm, scale: Float[Tensor, "*place"], direction: Float[Tensor, "*place target d"]
) -> Float[Tensor, "*place target d"]:
    """Back through a norm with its scale frozen."""
    return norm.back(direction) / scale.to(direction)[..., None, None]


def through_norm_before(
    norm: Norm | None,
    x: Float[Tensor, "batch pos d_model"],
    direction: Float[Tensor, "batch pos target d_model"],
    layer: int,
    met: Met,
) -> Float[Tensor, "batch pos target d_model"]:
    """From what a norm returns to the stream x that it reads; without a norm, nothing changes."""
    if norm is None:
        return direction
    scale = norm.scale_of(x)
    y = norm.forward(x, scale)
    # The norm rounds what it is given, what it divides and what it returns; its scale, all at once.
    met.rounded(y, direction, times=3)
    met.feel(in_float64((y[:, :, None] * direction).sum(-1)).square().sum(1))
    met.constant(layer, f"{norm.name.rpartition('.')[2]}.b", norm.beta, direction)
    return through_norm(norm, scale, direction)
