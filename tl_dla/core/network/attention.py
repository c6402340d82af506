"""An attention layer as a linear map: its pattern, its gate and its norms frozen."""

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from tl_dla.core.network.gates import gate_factor
from tl_dla.core.network.step import Met, through_norm, through_norm_before
from tl_dla.model.attention import Attention, Gate
from tl_dla.model.hooks import product
from tl_dla.model.values import ValueMap, Values


@dataclass(frozen=True, eq=False)
class FrozenAttention:
    """An attention layer at its value in one forward pass.

    Attributes:
        part: how its heads write.
        values: how their values are made.
        z: the heads' mixed values.
        pattern: how they are mixed.
        scale: of the norm after it, where there is one.
        gate: what multiplies the mixed values, where something does.
        shown: what the gate's site shows; None for a gate that is a norm.
    """

    part: Attention
    values: Values
    z: Float[Tensor, "batch pos head d_head"]
    pattern: Float[Tensor, "batch head query key"]
    scale: Float[Tensor, "batch pos"] | None
    gate: Gate | None
    shown: Float[Tensor, "batch pos ..."] | None

    def to_heads(
        self, direction: Float[Tensor, "batch pos target d_model"], met: Met
    ) -> Float[Tensor, "batch pos target head d_head"]:
        """From what joins the stream to the heads' mixed values."""
        part, layer = self.part, self.part.layer
        direction = direction * part.factor if part.factor != 1.0 else direction
        if part.post_norm is not None:
            assert self.scale is not None
            met.constant(layer, "attn_bias", part.post_norm.beta, direction)
            direction = through_norm(part.post_norm, self.scale, direction)
        met.constant(layer, "attn_bias", part.b_O, direction)
        W_O = part.W_O
        to_heads = product(W_O.flatten(0, 1), direction).unflatten(-1, W_O.shape[:2])
        met.rounded(self.z.flatten(2), to_heads.flatten(3))
        return to_heads

    def back(
        self,
        to_heads: Float[Tensor, "batch pos target head d_head"],
        x: Float[Tensor, "batch pos d_model"],
        met: Met,
    ) -> Float[Tensor, "batch pos target d_model"]:
        """From the heads' mixed values to the stream x that the layer reads."""
        norm, factor = self.values.norm, self.values.factor
        y = x if norm is None else norm.forward(x, norm.scale_of(x))
        y = y * factor
        seen: list[tuple[ValueMap, Tensor, Tensor | None]] = []
        for value in self.values.maps:
            y, scale = _forward(value, y)
            seen.append((value, y, scale))
        n_heads, d_head = to_heads.shape[-2:]
        groups = y.shape[-1] // d_head
        if self.gate is not None:
            v = y.unflatten(-1, (groups, d_head)).repeat_interleave(n_heads // groups, 2)
            mixed = torch.einsum("bhqk,bkhd->bqhd", self.pattern.to(v), v)
            by = gate_factor(self.gate, self.shown, mixed, self.z, self.part.layer)
            to_heads = to_heads * by[:, :, None]
        at_query = rearrange(to_heads, "b p t h d -> b h p (t d)")
        at_key = self.pattern.mT.to(at_query) @ at_query
        # Heads of a group share its values.
        to_values = rearrange(at_key, "b h p (t d) -> b p t h d", d=d_head)
        to_values = to_values.unflatten(3, (groups, n_heads // groups)).sum(4).flatten(3)
        for value, v, scale in reversed(seen):
            met.rounded(v, to_values)
            to_values = self._back(value, to_values, scale, met)
        to_values = to_values * factor if factor != 1.0 else to_values
        return through_norm_before(norm, x, to_values, self.part.layer, met)

    def _back(
        self,
        value: ValueMap,
        direction: Float[Tensor, "batch pos target d_out"],
        scale: Float[Tensor, "batch pos group"] | None,
        met: Met,
    ) -> Float[Tensor, "batch pos target d_in"]:
        """Back through one map and the norm over each group of its coordinates."""
        layer, norm = self.part.layer, value.norm
        if norm is not None:
            assert scale is not None
            if norm.beta is not None:
                beta = norm.beta.repeat(direction.shape[-1] // value.width)
                met.constant(layer, f"{value.name}.b", beta, direction)
            grouped = direction.unflatten(-1, (-1, value.width)).transpose(2, 3)
            direction = through_norm(norm, scale, grouped).transpose(2, 3).flatten(3)
        met.constant(layer, value.name, value.b, direction)
        return product(value.W, direction)


def _forward(
    value: ValueMap, y: Float[Tensor, "batch pos d_in"]
) -> tuple[Float[Tensor, "batch pos d_out"], Float[Tensor, "batch pos group"] | None]:
    """What a map gives, and the scale of its norm for each group."""
    v = y @ value.W.to(y)
    v = v if value.b is None else v + value.b.to(y)
    if value.norm is None:
        return v, None
    grouped = v.unflatten(-1, (-1, value.width))
    scale = value.norm.scale_of(grouped)
    return value.norm.forward(grouped, scale).flatten(2), scale
