"""How attention writes and reads: W_O, the values and patterns that its heads mix, and W_V.

What cannot be read as such a part is refused by name, with the units that work all the same.
"""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from tl_dla.model.hooks import Hooks, Site, class_name, parameter, unwrap
from tl_dla.model.norms import Norm, NormReader
from tl_dla.model.sharded import is_sharded, whole

_OTHERS = 'unit="component" and unit="layer" work.'
_HEADS_WORK = 'unit="head" works.'


@dataclass(frozen=True, eq=False)
class Attention:
    """How an attention layer writes: W_O per head, its bias, then what its output passes through.

    `site` shows the heads' mixed values z, `[batch, pos, head, d_head]` or with the last two
    flattened. `factor` multiplies the output before the hook that shows what is written.
    """

    layer: int
    site: Site
    W_O: Float[Tensor, "head d_head d_model"]
    b_O: Float[Tensor, " d_model"] | None
    post_norm: Norm | None
    factor: float

    @property
    def bias(self) -> Float[Tensor, " d_model"] | None:
        """What the layer adds whatever its heads do."""
        return self.b_O


@dataclass(frozen=True, eq=False)
class Gate:
    """What multiplies the heads' mixed values: an activation at `site`, or a norm over them."""

    site: Site | None
    norm: Norm | None


@dataclass(frozen=True, eq=False)
class PatternAndValues:
    """What the heads of a layer mix: values at source tokens, by the attention pattern.

    `values` shows `[batch, pos, group, d_head]`, or `[batch, group, pos, d_head]` with
    `heads_first`; heads share a group's values where there are fewer groups than heads.
    """

    layer: int
    values: Site
    pattern: Site
    heads_first: bool
    gate: Gate | None


@dataclass(frozen=True, eq=False)
class ValueProjection:
    """Where values come from: `factor` × the attention's input, then W_V, then b_V."""

    layer: int
    W_V: Float[Tensor, "group d_model d_head"]
    b_V: Float[Tensor, "group d_head"] | None
    factor: float


class AttentionReader:
    """How attention layers write, and what their heads read."""

    def __init__(self, hooks: Hooks, norms: NormReader) -> None:
        self.hooks, self.norms, self.model = hooks, norms, hooks.model

    def attention(self, layer: int) -> Attention | None:
        """How the layer's heads write; None for a layer that has no attention."""
        block = self.hooks.blocks[layer]
        attn = block._modules.get("attn")
        if attn is None or self.hooks.site(f"blocks.{layer}.hook_attn_out") is None:
            return None
        at = f"blocks.{layer}.attn"
        site = self.hooks.site(f"{at}.hook_z") or self.hooks.site(f"{at}.o.hook_in")
        if site is None:
            raise self.hooks.refusal(
                'unit="head" needs the heads\' mixed values (hook_z), which'
                f" {class_name(attn)} of {at} in {{}} does not show",
                _OTHERS,
            )
        if self.hooks.is_bridge:
            weight, bias = self.hooks.matrix(
                attn._modules["o"], f"{at}.o", 'unit="head"', in_parts=True
            )
            weight = by_head(weight, self.hooks.n_heads(unwrap(attn), weight.shape[0]))
        else:
            weight = self.hooks.stored(attn, "W_O", 'unit="head"')
            bias = parameter(attn, "b_O")
        scale = block_scale(block)
        return Attention(layer, site, weight, bias, self.norms.post_norm(layer, "ln1"), scale)

    def attention_module(self, layer: int) -> nn.Module:
        """The layer's attention, as the model calls it."""
        return self.hooks.blocks[layer].attn

    def pattern_and_values(self, layer: int) -> PatternAndValues:
        """The values that the layer's heads mix, and the pattern they mix them by."""
        at, attn = f"blocks.{layer}.attn", self.hooks.blocks[layer].attn
        inner = unwrap(attn)
        pattern = self.hooks.site(f"{at}.hook_pattern")
        values = self.hooks.site(f"{at}.v_norm.hook_out") or self.hooks.site(f"{at}.hook_v")
        if getattr(inner, "is_kv_shared_layer", False):
            why = "takes its values from another layer"
        elif getattr(getattr(inner, "config", None), "clip_qkv", None):
            why = "clips its values"
        elif pattern is None or values is None:
            why = "does not show its values and its pattern (hook_v, hook_pattern)"
        elif pattern.shares is not None and values.shares is None:
            why = "does not show which of its values each process has"
        else:
            heads_first = self.hooks.is_bridge and "v" not in attn._modules
            return PatternAndValues(layer, values, pattern, heads_first, self._gate(at, inner))
        raise self.hooks.refusal(
            f'unit="source" mixes values by a pattern; {at} in {{}} {why}', _HEADS_WORK
        )

    def gate(self, layer: int) -> Gate | None:
        """What multiplies the layer's mixed values before W_O; None where nothing does."""
        return self._gate(f"blocks.{layer}.attn", unwrap(self.hooks.blocks[layer].attn))

    def _gate(self, at: str, inner: Any) -> Gate | None:
        site = self.hooks.site(f"{at}.hook_q_gate") or self.hooks.site(f"{at}.gate.hook_out")
        norm = getattr(inner, "attn_sub_norm", None)
        gate = None if site is None else Gate(site, None)
        if norm is not None:
            gamma = parameter(norm, "weight")
            site = Site(f"{at}.attn_sub_norm", norm)
            gate = Gate(None, Norm(site.name, site, gamma, None, False, norm.variance_epsilon))
        pattern = self.hooks.site(f"{at}.hook_pattern")
        if gate is not None and pattern is not None and pattern.shares is not None:
            raise self.hooks.refusal(
                f"What {at} in {{}} multiplies its heads' values by is not brought together from"
                " the processes that share it out",
                _HEADS_WORK,
            )
        return gate

    def value_projection(self, layer: int, d_head: int) -> ValueProjection:
        """How the layer's values come from its input."""
        block = self.hooks.blocks[layer]
        at, attn = f"blocks.{layer}.attn", block.attn
        if not self.hooks.is_bridge:
            weight = self.hooks.stored(attn, "W_V", 'unit="source"')
            return ValueProjection(layer, weight, parameter(attn, "b_V"), 1.0)
        if "v" not in attn._modules or "v_norm" in attn._modules:
            raise self.hooks.refusal(
                f"A path goes back through one linear map from the stream to a head's values; {at}"
                " in {} has more on the way",
                'unit="source" works.',
            )
        weight, bias = self.hooks.matrix(attn._modules["v"], f"{at}.v", 'unit="source"')
        return ValueProjection(
            layer,
            weight.unflatten(1, (-1, d_head)).transpose(0, 1),
            None if bias is None else bias.unflatten(0, (-1, d_head)),
            float(getattr(unwrap(block), "attention_in_multiplier", 1.0)),
        )


def by_head(
    weight: Float[Tensor, "head_d_head d_model"], n: int
) -> Float[Tensor, "head d_head d_model"]:
    """W_O head by head, in the parts that processes hold where these are of whole heads."""
    if is_sharded(weight) and n % weight.device_mesh.size() != 0:
        weight = whole(weight)
    return weight.unflatten(0, (n, -1))


def block_scale(block: Any) -> float:
    """What a block multiplies its sublayers' outputs by, before they join the stream."""
    return float(getattr(block, "residual_contribution_scale", 1.0))
