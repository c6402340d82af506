"""From what attention reads to a head's query or key: a few steps, each linear once it is frozen.

    Linear      x W + b, for every head
    HeadNorm    a norm over a head (or over all of them), its scale frozen
    Rotate      the rotation of a position
    Beside      several ways at once, their results side by side (latent-compressed keys)

`Projection.freeze(x)` runs the steps and keeps what freezes them. Then, for each head,

    value = linear(x) + constant,       direction · linear(x) = back(direction, head) · x

A vector of a latent that all heads share has one head.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from tl_dla.model.norms import Norm


@dataclass(frozen=True, eq=False)
class Frozen:
    """A projection at its value in one forward pass.

    Attributes:
        value: what the projection gives.
        constant: what it gives whatever x is: biases and β, through what follows them.
        back: from a direction at a head's `value` to one at x.
        felt: what rounding after each step is felt by: the sum over the steps of ‖v ⊙ w‖², where a
            step gave v and the direction at the head's `value` is w there.
    """

    value: Float[Tensor, "*lead head d_head"]
    constant: Float[Tensor, "*lead head d_head"]
    back: Callable[[Float[Tensor, "*more d_head"], int], Float[Tensor, "*more d_in"]]
    felt: Callable[[Float[Tensor, "*lead d_head"], int], Float[Tensor, "*lead"]]

    def then(
        self,
        value: Float[Tensor, "*lead head d_head"],
        constant: Float[Tensor, "*lead head d_head"],
        back: Callable[[Tensor, int], Tensor],
        size: Float[Tensor, "*lead head d_head"] | None = None,
    ) -> "Frozen":
        """After one more step, which takes a head's direction `back`; `size` is |v| of it."""
        size = value.abs() if size is None else size

        def felt(direction: Tensor, head: int) -> Tensor:
            here = (of_head(size, -2, head) * direction).square().sum(-1)
            return here + self.felt(back(direction, head), head)

        return Frozen(value, constant, lambda d, head: self.back(back(d, head), head), felt)


def of_head(x: Shaped[Tensor, "..."], axis: int, head: int) -> Shaped[Tensor, "..."]:
    """A head's part of a tensor, or the one part that all heads share."""
    return x.select(axis, head if x.shape[axis] > 1 else 0)


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

        def back(direction: Tensor, head: int) -> Tensor:
            return direction @ of_head(W, 0, head).mT

        return x.then(forward(x.value), forward(x.constant), back)


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

        def back(direction: Tensor, head: int) -> Tensor:
            own = norm
            if norm.gamma is not None and norm.gamma.ndim > 1:
                own = replace(norm, gamma=of_head(norm.gamma, 0, head))
            return own.back(direction) / of_head(scale, -1, head)[..., None]

        return x.then(norm.forward(x.value, scale), norm.forward(x.constant, scale), back)


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

        def back(direction: Tensor, head: int) -> Tensor:
            return (rotation.to(direction).mT @ direction[..., None])[..., 0]

        # two products and their sum are rounded, as large as the products
        size = (R.abs() @ x.value.abs()[..., None])[..., 0]
        return x.then(forward(x.value), forward(x.constant), back, size)


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

        def back(direction: Tensor, head: int) -> Tensor:
            parts = zip(ends, direction.split(widths, -1), strict=True)
            return torch.stack([end.back(part, head) for end, part in parts]).sum(0)

        def felt(direction: Tensor, head: int) -> Tensor:
            parts = zip(ends, direction.split(widths, -1), strict=True)
            return torch.stack([end.felt(part, head) for end, part in parts]).sum(0)

        values, constants = [end.value for end in ends], [end.constant for end in ends]
        return Frozen(side_by_side(values), side_by_side(constants), back, felt)


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
        stream = x[..., None, :]

        def nothing(direction: Tensor, head: int) -> Tensor:
            return torch.zeros_like(direction[..., 0])

        start = Frozen(stream, torch.zeros_like(stream), lambda d, head: d, nothing)
        return _follow(self.steps, start, rotation)


def _follow(steps: tuple[Step, ...], x: Frozen, rotation: Tensor | None) -> Frozen:
    for step in steps:
        x = step.freeze(x, rotation)
    return x
