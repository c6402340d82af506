"""From what attention reads to a head's query or key: a few steps, each linear once it is frozen.

    Linear      x W + b, for every head
    HeadNorm    a norm over a head (or over all of them), its scale frozen
    Rotate      the rotation of a position
    Beside      several ways at once, their results side by side (latent-compressed keys)

`Projection.freeze(x)` runs the steps and keeps what freezes them. Then

    value = linear(x) + constant,       direction · linear(x) = back(direction) · x

A vector of a latent that all heads share has one head.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_dla.model.norms import Norm


@dataclass(frozen=True, eq=False)
class Frozen:
    """A projection at its value in one forward pass.

    Attributes:
        value: what the projection gives.
        constant: what it gives whatever x is: biases and β, through what follows them.
        back: from a direction at `value`, for each head, to one at x.
    """

    value: Float[Tensor, "*lead head d_head"]
    constant: Float[Tensor, "*lead head d_head"]
    back: Callable[[Float[Tensor, "*lead head d_head"]], Float[Tensor, "*lead head d_in"]]


@dataclass(frozen=True, eq=False)
class Linear:
    """x W + b, for every head."""

    W: Float[Tensor, "head d_in d_out"]
    b: Float[Tensor, "head d_out"] | None = None

    def freeze(self, x: Frozen, rotation: Tensor | None) -> Frozen:
        """One step on."""
        W = self.W.to(x.value)
        b = 0.0 if self.b is None else self.b.to(x.value)

        def forward(y: Tensor) -> Tensor:
            return (y[..., None, :] @ W)[..., 0, :] + b

        def back(direction: Tensor) -> Tensor:
            return x.back((W @ direction[..., None])[..., 0])

        return Frozen(forward(x.value), forward(x.constant), back)


@dataclass(frozen=True, eq=False)
class HeadNorm:
    """A norm over each head; over all of them together where `joint`. γ is `[head, d_head]`."""

    norm: Norm
    joint: bool = False

    def freeze(self, x: Frozen, rotation: Tensor | None) -> Frozen:
        """One step on."""
        norm = self.norm
        scale = norm.scale_of(x.value.flatten(-2))[..., None] if self.joint else None
        scale = norm.scale_of(x.value) if scale is None else scale

        def back(direction: Tensor) -> Tensor:
            direction = direction if norm.gamma is None else direction * norm.gamma.to(direction)
            if norm.centred:
                direction = direction - direction.mean(-1, keepdim=True)
            return x.back(direction / scale[..., None])

        return Frozen(norm.forward(x.value, scale), norm.forward(x.constant, scale), back)


@dataclass(frozen=True, eq=False)
class Rotate:
    """The rotation of a position, which leaves some of a head's axes as they are."""

    def freeze(self, x: Frozen, rotation: Tensor | None) -> Frozen:
        """One step on; without a rotation, nothing."""
        if rotation is None:
            return x
        R = rotation.to(x.value)[..., None, :, :]

        def forward(y: Tensor) -> Tensor:
            return (R @ y[..., None])[..., 0]

        def back(direction: Tensor) -> Tensor:
            return x.back((R.mT @ direction[..., None])[..., 0])

        return Frozen(forward(x.value), forward(x.constant), back)


@dataclass(frozen=True, eq=False)
class Beside:
    """Several ways from the same vector, their results one after the other in each head."""

    ways: "tuple[tuple[Step, ...], ...]"

    def freeze(self, x: Frozen, rotation: Tensor | None) -> Frozen:
        """One step on; a way's rotation follows it, outside."""
        ends = [_follow(way, x, rotation) for way in self.ways]
        widths = [end.value.shape[-1] for end in ends]

        def side_by_side(parts: list[Tensor]) -> Tensor:
            heads = max(part.shape[-2] for part in parts)
            return torch.cat([p.expand(*p.shape[:-2], heads, -1) for p in parts], -1)

        def back(direction: Tensor) -> Tensor:
            parts = direction.split(widths, -1)
            backs = (end.back(part) for end, part in zip(ends, parts, strict=True))
            return torch.stack(list(backs)).sum(0)

        values, constants = [end.value for end in ends], [end.constant for end in ends]
        return Frozen(side_by_side(values), side_by_side(constants), back)


Step = Linear | HeadNorm | Rotate | Beside


@dataclass(frozen=True, eq=False)
class Projection:
    """The steps from what attention reads to what a head multiplies."""

    steps: tuple[Step, ...]

    def freeze(
        self,
        x: Float[Tensor, "*lead d_model"],
        rotation: Float[Tensor, "*#lead d_head d_head"] | None = None,
    ) -> Frozen:
        """Every step at its value for x, at positions with these rotations."""
        start = Frozen(x[..., None, :], torch.zeros_like(x[..., None, :]), lambda d: d)
        return _follow(self.steps, start, rotation)


def _follow(steps: tuple[Step, ...], x: Frozen, rotation: Tensor | None) -> Frozen:
    for step in steps:
        x = step.freeze(x, rotation)
    return x
