"""How an MLP or a mixture of experts writes: what its neurons and experts add to the stream.

What cannot be read as such a part is refused by name, with the units that work all the same.
"""

import inspect
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from tl_dla.model.attention import block_scale
from tl_dla.model.hooks import Hooks, Site, class_name, parameter, unwrap
from tl_dla.model.norms import Norm, NormReader
from tl_dla.model.sharded import shares

_NEURONS = 'unit="neuron"'
_OTHERS = 'unit="component" and unit="layer" work.'


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


class MLPReader:
    """How MLPs write."""

    def __init__(self, hooks: Hooks, norms: NormReader) -> None:
        self.hooks, self.norms, self.model = hooks, norms, hooks.model

    def mlp(self, layer: int, name: str, written: Site) -> MLP | Experts | None:
        """How an MLP's neurons or experts write; None where the sublayer `name` is not an MLP.

        `written` is the site that shows what the sublayer adds to the stream.
        """
        block = self.hooks.blocks[layer]
        if name not in ("mlp", "moe", "shared_mlp"):
            return None
        # Granite's hybrids call their shared MLP the MLP where there are no experts beside it.
        inside = "shared_mlp" if name == "mlp" and "shared_mlp" in block._modules else name
        at, module = f"blocks.{layer}.{inside}", block._modules.get(inside)
        if getattr(unwrap(block), "enable_moe_block", False):
            raise self.hooks.refusal(
                f'unit="neuron" needs one MLP a layer, but {at} in {{}} adds a mixture of experts'
                " and an MLP, each through a norm of its own",
                'unit="component" and unit="head" work.',
            )
        # A scaled residual shows hook_mlp_out already scaled, and other sublayers before it.
        post_norm = self.norms.post_norm(layer, "ln2") if name == "mlp" else None
        factor = block_scale(block) if name == "mlp" else 1.0
        if module is None:  # no hooks inside the block: the last linear map of the MLP itself
            found = [x for x in written.module.named_children() if isinstance(x[1], nn.Linear)]
            name, module = f"{written.name}.{found[-1][0]}", found[-1][1]
            weight, bias = self.hooks.matrix(module, at, _NEURONS, in_parts=True)
            own = shares(weight, 2, True, weight.shape[0], name)
            return MLP(
                layer, Site(name, module, inputs=True, shares=own), weight, bias, post_norm, factor
            )
        if not self.hooks.is_bridge and hasattr(module, "W_out"):
            bias, site = parameter(module, "b_out"), self.hooks.site(f"{at}.hook_post")
            assert site is not None
            weight = self.hooks.stored(module, "W_out", _NEURONS)
            return MLP(layer, site, weight, bias, post_norm, factor)
        for out in ("out", "dense_out"):
            if out in module._modules:
                weight, bias = self.hooks.matrix(
                    module._modules[out], f"{at}.{out}", _NEURONS, in_parts=True
                )
                site = self.hooks.site(f"{at}.{out}.hook_in")
                assert site is not None
                down = float(getattr(unwrap(module), "down_multiplier", 1.0))
                return MLP(layer, site, weight, bias, post_norm, factor * down)
        return self._experts(layer, at, module, post_norm, factor)

    def _experts(
        self, layer: int, at: str, module: Any, post_norm: Norm | None, factor: float
    ) -> Experts:
        inner = unwrap(module)
        experts = unwrap(getattr(inner, "experts", None))
        if not self.hooks.is_bridge or not takes_choice(experts):
            raise self.hooks.refusal(
                f'unit="neuron" splits a mixture of experts where it hands its experts the tokens,'
                f" the choice and the weights; {class_name(inner)} of {at} in {{}} does not",
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
        return self.hooks.site(f"{at}.{name}.hook_out") or Site(f"{at}.{name}", module)


def takes_choice(experts: Any) -> bool:
    """Whether a module of experts is given the tokens, the experts chosen and their weights."""
    forward = getattr(type(experts), "forward", None)
    return forward is not None and len(inspect.signature(forward).parameters) >= 4
