"""Reading a model's sublayers: how heads, neurons and experts write, and what heads read.

What cannot be read as such a part is refused by name, with the units that work all the same.
"""

import inspect
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from tl_dla.errors import UnsupportedModelError
from tl_dla.model.norms import Norm, NormReader, Site, parameter, unwrap

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
class MLP:
    """How an MLP writes: W_out of its neurons, which `site` shows after activation and gate."""

    layer: int
    site: Site
    W_out: Float[Tensor, "d_mlp d_model"]
    bias: Float[Tensor, " d_model"] | None
    post_norm: Norm | None
    factor: float


@dataclass(frozen=True, eq=False)
class Experts:
    """How a mixture of experts writes: a sum of experts, each times its router weight.

    `site` shows what the experts are given: the stream `[token, d_model]`, the experts chosen
    `[token, k]` and their weights. `shared` is the expert that every token passes through, times
    the sigmoid of `shared_gate` where there is one. `scalings`: what the routed experts may be
    multiplied by after the router's weights (which of them, the sum shows).
    """

    layer: int
    site: Site
    n_experts: int
    shared: Site | None
    shared_gate: Site | None
    scalings: tuple[float, ...]
    post_norm: Norm | None
    factor: float
    bias: None = None


@dataclass(frozen=True, eq=False)
class Gate:
    """What multiplies the heads' mixed values: an activation at `site`, or a norm over them."""

    site: Site | None
    norm: Norm | None


@dataclass(frozen=True, eq=False)
class Mixing:
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
class ValueMap:
    """Where values come from: `factor` × the attention's input, then W_V, then b_V."""

    layer: int
    W_V: Float[Tensor, "group d_model d_head"]
    b_V: Float[Tensor, "group d_head"] | None
    factor: float


class SublayerReader(NormReader):
    """How attention layers and MLPs write, and what heads mix."""

    def attention(self, layer: int) -> Attention | None:
        """How the layer's heads write; None for a layer that has no attention."""
        block = self.model.blocks[layer]
        attn = block._modules.get("attn")
        if attn is None or self.site(f"blocks.{layer}.hook_attn_out") is None:
            return None
        at = f"blocks.{layer}.attn"
        site = self.site(f"{at}.hook_z") or self.site(f"{at}.o.hook_in")
        if site is None:
            raise self._refusal(
                f'unit="head" needs the heads\' mixed values (hook_z), which {_class(attn)} of {at}'
                " in {} does not show",
                _OTHERS,
            )
        if self.is_bridge:
            weight, bias = self._matrix(attn._modules["o"], f"{at}.o", "head")
            weight = weight.unflatten(0, (self._n_heads(attn, weight.shape[0]), -1))
        else:
            weight, bias = attn.W_O.detach(), parameter(attn, "b_O")
        return Attention(layer, site, weight, bias, self.post_norm(layer, "ln1"), _scale(block))

    def mlp(self, layer: int, name: str, written: Site) -> MLP | Experts | None:
        """How an MLP's neurons or experts write; None where the sublayer `name` is not an MLP.

        `written` is the site that shows what the sublayer adds to the stream.
        """
        block = self.model.blocks[layer]
        if name not in ("mlp", "moe", "shared_mlp"):
            return None
        # Granite's hybrids call their shared MLP the MLP where there are no experts beside it.
        inside = "shared_mlp" if name == "mlp" and "shared_mlp" in block._modules else name
        at, module = f"blocks.{layer}.{inside}", block._modules.get(inside)
        if getattr(unwrap(block), "enable_moe_block", False):
            raise self._refusal(
                f'unit="neuron" needs one MLP a layer, but {at} in {{}} adds a mixture of experts'
                " and an MLP, each through a norm of its own",
                'unit="component" and unit="head" work.',
            )
        # A scaled residual shows hook_mlp_out already scaled, and other sublayers before it.
        post_norm = self.post_norm(layer, "ln2") if name == "mlp" else None
        factor = _scale(block) if name == "mlp" else 1.0
        if module is None:  # no hooks inside the block: the last linear map of the MLP itself
            found = [x for x in written.module.named_children() if isinstance(x[1], nn.Linear)]
            last = Site(f"{written.name}.{found[-1][0]}", found[-1][1], inputs=True)
            return MLP(layer, last, *self._matrix(found[-1][1], at, "neuron"), post_norm, factor)
        if not self.is_bridge and hasattr(module, "W_out"):
            bias, site = parameter(module, "b_out"), self.site(f"{at}.hook_post")
            assert site is not None
            return MLP(layer, site, module.W_out.detach(), bias, post_norm, factor)
        for out in ("out", "dense_out"):
            if out in module._modules:
                weight, bias = self._matrix(module._modules[out], f"{at}.{out}", "neuron")
                site = self.site(f"{at}.{out}.hook_in")
                assert site is not None
                down = float(getattr(unwrap(module), "down_multiplier", 1.0))
                return MLP(layer, site, weight, bias, post_norm, factor * down)
        return self._experts(layer, at, module, post_norm, factor)

    def _experts(
        self, layer: int, at: str, module: Any, post_norm: Norm | None, factor: float
    ) -> Experts:
        inner = unwrap(module)
        experts = unwrap(getattr(inner, "experts", None))
        forward = getattr(type(experts), "forward", None)
        if not self.is_bridge or forward is None or len(inspect.signature(forward).parameters) < 4:
            raise self._refusal(
                f'unit="neuron" splits a mixture of experts where it hands its experts the tokens,'
                f" the choice and the weights; {_class(inner)} of {at} in {{}} does not",
                _OTHERS,
            )
        shared = self._inside(at, inner, "shared_experts")
        shared = shared or self._inside(at, inner, "shared_expert")
        scaling = float(getattr(inner, "routed_scaling_factor", None) or 1.0)
        return Experts(
            layer,
            Site(f"{at}.experts", experts, inputs=True),
            int(getattr(experts, "num_experts", 0)) or len(experts.down_proj),
            shared,
            self._inside(at, inner, "shared_expert_gate"),
            (1.0,) if scaling == 1.0 else (1.0, scaling),
            post_norm,
            factor,
        )

    def _inside(self, at: str, inner: Any, name: str) -> Site | None:
        """What a submodule of a wrapped module returns."""
        module = getattr(inner, name, None)
        if module is None:
            return None
        return self.site(f"{at}.{name}.hook_out") or Site(f"{at}.{name}", module)

    # ---- what heads read -----------------------------------------------------------------------

    def mixing(self, layer: int) -> Mixing:
        """The values that the layer's heads mix, and the pattern they mix them by."""
        at, attn = f"blocks.{layer}.attn", self.model.blocks[layer].attn
        inner = unwrap(attn)
        pattern = self.site(f"{at}.hook_pattern")
        values = self.site(f"{at}.v_norm.hook_out") or self.site(f"{at}.hook_v")
        if getattr(inner, "is_kv_shared_layer", False):
            why = "takes its values from another layer"
        elif getattr(getattr(inner, "config", None), "clip_qkv", None):
            why = "clips its values"
        elif pattern is None or values is None:
            why = "does not show its values and its pattern (hook_v, hook_pattern)"
        else:
            heads_first = self.is_bridge and "v" not in attn._modules
            return Mixing(layer, values, pattern, heads_first, self._gate(at, inner))
        raise self._refusal(
            f'unit="source" mixes values by a pattern; {at} in {{}} {why}', _HEADS_WORK
        )

    def _gate(self, at: str, inner: Any) -> Gate | None:
        site = self.site(f"{at}.hook_q_gate") or self.site(f"{at}.gate.hook_out")
        norm = getattr(inner, "attn_sub_norm", None)
        if norm is not None:
            gamma = parameter(norm, "weight")
            site = Site(f"{at}.attn_sub_norm", norm)
            return Gate(None, Norm(site.name, site, gamma, None, False, norm.variance_epsilon))
        return None if site is None else Gate(site, None)

    def value_map(self, layer: int, d_head: int) -> ValueMap:
        """How the layer's values come from its input."""
        block = self.model.blocks[layer]
        at, attn = f"blocks.{layer}.attn", block.attn
        if not self.is_bridge:
            return ValueMap(layer, attn.W_V.detach(), parameter(attn, "b_V"), 1.0)
        if "v" not in attn._modules or "v_norm" in attn._modules:
            raise self._refusal(
                f"A path goes back through one linear map from the stream to a head's values; {at}"
                " in {} has more on the way",
                'unit="source" works.',
            )
        weight, bias = self._matrix(attn._modules["v"], f"{at}.v", "source")
        return ValueMap(
            layer,
            weight.unflatten(1, (-1, d_head)).transpose(0, 1),
            None if bias is None else bias.unflatten(0, (-1, d_head)),
            float(getattr(unwrap(block), "attention_in_multiplier", 1.0)),
        )

    # ---- weights -------------------------------------------------------------------------------

    def _matrix(self, module: Any, at: str, unit: str) -> tuple[Tensor, Tensor | None]:
        """A linear map's weight as `[in, out]`, and its bias."""
        inner = unwrap(module)
        weight, bias = parameter(inner, "weight"), parameter(inner, "bias")
        if weight is None or weight.ndim != 2 or not weight.is_floating_point():
            raise self._refusal(
                f'unit="{unit}" needs the weight of {at} as a matrix, but {_class(inner)} in {{}}'
                " holds it in another form (quantised or sharded)",
                _OTHERS,
            )
        return weight if type(inner).__name__ == "Conv1D" else weight.mT, bias

    def _n_heads(self, attn: Any, width: int) -> int:
        inner = unwrap(attn)
        for name in ("v_head_dim", "head_dim"):
            d_head = getattr(inner, name, None)
            if isinstance(d_head, int) and d_head > 0 and width % d_head == 0:
                return width // d_head
        return int(self.model.cfg.n_heads)

    def _refusal(self, why: str, works: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{why.format(self.architecture)}; {works}")


def _scale(block: Any) -> float:
    return float(getattr(block, "residual_contribution_scale", 1.0))


def _class(module: Any) -> str:
    return type(module).__name__
