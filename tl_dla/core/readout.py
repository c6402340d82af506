"""`Readout`: a logit as a direction and a scale, pulled back through frozen maps.

With every norm's scale s frozen at its value in this forward pass, a logit is linear in the final
residual stream x:

    logit = x · w / s  +  β · u  +  b_U,     u = W_U[:, token],   w = γ ⊙ u  (LayerNorm: centred)

A readout is such a direction w, and the norms whose scales it is divided by. Pulling it back
through one more linear map (another norm, W_O, W_out, a multiplier) gives the readout of the place
before that map, and the dot product with what is there says what that place wrote to the logit.
Only the direction travels, d_model numbers a token; activations never do. The division by the
scales waits for the end, so the direction is known before the forward pass starts.

Folded weights are the special case γ = 1, β = 0. Frozen scales are the convention of
`ActivationCache.apply_ln_to_stack` and of Elhage et al. 2021 (https://transformer-circuits.pub/2021/framework).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_dla.errors import ArgumentError
from tl_dla.model.hooks import product, upcast
from tl_dla.model.norms import Norm
from tl_dla.model.sharded import whole

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, eq=False)
class Readout:
    """How a logit is read off at one place: `activation · direction / scale`.

    Attributes:
        direction: `[*lead, d]`; `lead` is `*batch_and_pos` in `result.readout`, and
            `batch pos token` (with 1 where it is shared) inside the package. d is `d_model` on the
            residual stream, `head d_head` at the heads, `d_mlp` at the neurons.
        norms: the norms between this place and the logit; their frozen scales divide.
        scale: the product of those scales, `[*lead]`; None until a forward pass has shown it.
        is_identity: whether there is a "token" for every coordinate of the stream, so that a
            contraction is the activation itself and no matrix is multiplied.

    Example:
        >>> import torch
        >>> readout = Readout(torch.tensor([[1.0, -1.0]]), scale=torch.tensor([2.0]))
        >>> readout.of(torch.tensor([[[3.0, 1.0]], [[0.0, 4.0]]]))
        tensor([[ 1.],
                [-2.]])
    """

    direction: Float[Tensor, "..."]
    norms: tuple[Norm, ...] = ()
    scale: Float[Tensor, "..."] | None = None
    is_identity: bool = False

    @staticmethod
    def identity(like: Float[Tensor, "d d_vocab"]) -> "Readout":
        """The readout of every coordinate: what it reads off a row is the row as a vector."""
        eye = torch.eye(len(like), dtype=upcast(like[:0]).dtype, device=like.device)
        return Readout(eye[None, None], is_identity=True)

    def of(self, stack: Any) -> Float[Tensor, "..."]:
        """What vectors at this place write to the logit, in logits.

        Takes `[row, *lead, d]`, or a `ResidualStack`, to `[row, *lead]`. Where the readout is of
        one place only, the stack may come without the axes of `lead`.

        Raises:
            ArgumentError: for a stack of other places than the readout's.
        """
        stack = getattr(stack, "vectors", stack).to(self.direction)
        lead, own = self.direction.shape[:-1], stack.shape[1:-1]
        if len(own) < len(lead):
            if lead.numel() != 1:
                raise ArgumentError(
                    f"The readout has a direction for each of {list(lead)} prompts and positions,"
                    f" and the stack, {list(stack.shape)}, is not"
                    f" [row, {', '.join(map(str, lead))}, d]: read the whole stack, and take the"
                    " prompt from what comes out."
                )
            missing = [1] * (len(lead) - len(own))
            return self.of(stack.reshape(*stack.shape[:-1], *missing, -1)).reshape(stack.shape[:-1])
        if any(a not in (1, b) for a, b in zip(lead[::-1], own[::-1], strict=False)):
            raise ArgumentError(
                f"The readout is of {list(lead)} prompts and positions, the stack of {list(own)}:"
                " take both at the same ones."
            )
        value = (stack * self.direction).sum(-1)
        return value if self.scale is None else value / self.scale

    def times(self, factor: float) -> "Readout":
        """Back through a multiplication by a number."""
        if factor == 1.0:
            return self
        return replace(self, direction=self.direction * factor, is_identity=False)

    def through_norm(self, norm: Norm) -> "Readout":
        """Back through a norm with its scale frozen: γ ⊙ w, less its mean where it centres."""
        return Readout(norm.back(self.direction), (*self.norms, norm), self.scale)

    def through_linear(self, weight: Float[Tensor, "*place d"]) -> "Readout":
        """Back through `y = x @ weight`: each place before the map gets `weight · direction`."""
        *place, d = weight.shape
        if self.is_identity:
            eye = whole(weight).to(self.direction).movedim(-1, 0)
            return Readout(eye[None, None], self.norms, self.scale)
        direction = product(weight.reshape(-1, d), self.direction)
        return replace(self, direction=direction.unflatten(-1, place))

    def through_mask(self, factor: Float[Tensor, "*lead d"]) -> "Readout":
        """Back through a multiplication of each coordinate by a frozen number."""
        return Readout(self.direction * factor, self.norms, self.scale)

    def of_bias(self, bias: Float[Tensor, " d"]) -> Float[Tensor, "..."]:
        """What a constant at this place writes, before the division by the scales."""
        return self.direction @ bias.to(self.direction)

    def contract(self, activation: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The dot product over the last axis, before the division by the scales.

        `[batch, pos, d]` gives `[batch, pos, token]`; `[batch, pos, head, d_head]` gives
        `[batch, pos, token, head]`. Several places of one readout may be stacked on a first axis.
        """
        x = upcast(activation)
        if self.is_identity:
            return x
        w = self.direction.to(x)
        if w.shape[1] == 1 and w.ndim == 4:  # one direction for every position
            if len(w) == 1 or x.ndim == 3:  # of one token einsum makes no matrix product
                return x @ (w[0, 0] if len(w) == 1 else w[:, 0]).mT
            return torch.einsum("...bpd,btd->...bpt", x, w[:, 0])
        if w.shape[2] <= 4:  # few tokens: reads z as it lies, where einsum transposes it first
            return torch.linalg.vecdot(x.unsqueeze(2 - w.ndim), w)
        inner = "h" if w.ndim == 5 else ""
        w, p = (w, "p") if w.shape[1] > 1 else (w[:, 0], "")
        return torch.einsum(f"...bp{inner}d,b{p}t{inner}d->...bpt{inner}", x, w)

    def norm_of(self, activation: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """‖x ⊙ w‖, by which rounding in x is felt, before the division by the scales.

        Shapes are those of `contract`.
        """
        x = upcast(activation)
        if self.is_identity:  # what a coordinate passed on its way here may be larger than its end
            return (x.square() + x.square().mean(-1, keepdim=True)).sqrt()
        squared, largest = self._squared
        return squared.contract(x.square()).clamp_(min=0).sqrt_() * largest.to(x)

    @cached_property
    def _squared(self) -> "tuple[Readout, Float[Tensor, '*lead']]":
        """The direction squared, over its largest entry's square; and that entry.

        Of order 1 before it is squared: a direction of 1e-20 would underflow.
        """
        largest = self.direction.abs().amax(-1, keepdim=True).clamp(min=_TINY)
        return Readout((self.direction / largest).square()), largest[..., 0]

    def checksum(self) -> Int[Tensor, "*lead"]:
        """A number for each direction that two of them share where they are equal bit by bit."""
        bits = self.direction.contiguous().view(torch.int32)
        odd = torch.arange(bits.shape[-1], device=bits.device) * 2654435761 % 2**31 | 1
        return (bits * odd.int()).sum(-1)

    def part(self, rows: slice) -> "Readout":
        """Of some of the prompts."""
        return self if len(self.direction) == 1 else replace(self, direction=self.direction[rows])

    def frozen(self, scales: Mapping[str, Float[Tensor, "batch pos"]]) -> "Readout":
        """The same readout once the scales are known."""
        product = None
        for norm in self.norms:
            scale = scales[norm.name].to(self.direction)
            product = scale if product is None else product * scale
        return replace(self, scale=product)
