"""A norm: γ, β, centring and scale; and the norms of a model, read wherever they stand.

    y = γ ⊙ (x − mean) / s + β        LayerNorm
    y = γ ⊙ x / s                     RMSNorm

With s frozen at its value in a forward pass, y is linear in x.
"""

from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor, nn

from tl_dla.errors import UnsupportedModelError
from tl_dla.model.hooks import Hooks, Site, compute_dtype, parameter, unwrap, upcast


@dataclass(frozen=True, eq=False)
class Norm:
    """γ ⊙ (x − mean) / s + β, with or without the mean, γ and β. `site` shows s, or x."""

    name: str
    site: Site
    gamma: Float[Tensor, "*head width"] | None
    beta: Float[Tensor, "*head width"] | None
    centred: bool
    norm_eps: float

    def scale(self, seen: Float[Tensor, "... width"]) -> Float[Tensor, "..."]:
        """s, from what `site` shows: the model's own `hook_scale`, or the norm's input."""
        seen = upcast(seen)
        if self.site.name.endswith("hook_scale"):
            # Split inputs (one for each head) are all normalised alike.
            return seen[:, :, 0, 0] if seen.ndim == 4 else seen[..., 0]
        return self.scale_of(seen)

    def scale_of(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch"]:
        """The scale s, computed from the norm's input."""
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        return (x.square().mean(-1) + self.norm_eps).sqrt()

    def through(
        self, x: Float[Tensor, "*batch width"], scale: Float[Tensor, "*stream"]
    ) -> Float[Tensor, "*batch width"]:
        """Forward with the scale frozen, without β: a linear map of x."""
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        x = x / scale[..., None]
        return x if self.gamma is None else x * self.gamma.to(x)

    def back(self, direction: Float[Tensor, "*lead width"]) -> Float[Tensor, "*lead width"]:
        """A direction at what the norm returns, as one at its input times the scale.

        The transpose of `through`, but for the division: γ ⊙ w, less its mean where it centres.
        """
        direction = direction if self.gamma is None else direction * self.gamma.to(direction)
        return direction - direction.mean(-1, keepdim=True) if self.centred else direction

    def forward(
        self, x: Float[Tensor, "*batch width"], scale: Float[Tensor, "*stream"]
    ) -> Float[Tensor, "*batch width"]:
        """Forward with the scale frozen, β included: what the norm returns."""
        y = self.through(x, scale)
        return y if self.beta is None else y + self.beta.to(y)


class NormReader:
    """The norms of either kind of model, folded or not."""

    def __init__(self, hooks: Hooks) -> None:
        self.hooks, self.model = hooks, hooks.model

    def norm(self, module: Any, name: str) -> Norm:
        """A LayerNorm or RMSNorm of the stream: its input or its scale is a hook."""
        hooks = self.hooks
        site = hooks.site(f"{name}.hook_scale") or hooks.site(f"{name}.hook_in")
        if site is None:
            raise UnsupportedModelError(
                f"{hooks.architecture} shows neither the scale nor the input of its norm {name},"
                " so nothing can be read back through it."
            )
        return self.norm_at(module, name, site)

    def norm_at(self, module: Any, name: str, site: Site) -> Norm:
        """A LayerNorm or RMSNorm whose input or scale `site` shows."""
        inner, cfg, is_bridge = unwrap(module), self.model.cfg, self.hooks.is_bridge
        if hasattr(module, "uses_rms_norm"):
            centred = not module.uses_rms_norm
        else:
            centred = "RMS" not in type(inner).__name__
        gamma = parameter(module, "w") if not is_bridge else parameter(inner, "weight")
        beta = parameter(module, "b") if not is_bridge else parameter(inner, "bias")
        if type(module).__name__ in ("LayerNormPreBridge", "RMSNormPreBridge"):
            gamma = beta = None
        if beta is not None and not bool(beta.any()):
            beta = None  # folded away: no row of zeros
        if hasattr(module, "uses_weight_offset"):
            offset = module.uses_weight_offset
        else:
            offset = not centred and bool(getattr(cfg, "rmsnorm_uses_offset", False))
            offset = offset and hasattr(module, "uses_rms_norm")
        if gamma is not None:
            gamma = gamma.to(compute_dtype(gamma.dtype)) + (1.0 if offset else 0.0)
        norm_eps = next(
            (
                float(getattr(place, attribute))
                for place in (inner, module)
                for attribute in ("eps", "variance_epsilon")
                if getattr(place, attribute, None) is not None
            ),
            float(getattr(cfg, "eps", 1e-5)),
        )
        return Norm(name, site, gamma, beta, centred, norm_eps)

    def final_norm(self) -> Norm | None:
        """The norm between the stream and the unembedding; None where there is none."""
        module = self.model._modules.get("ln_final")
        if module is None or isinstance(module, nn.Identity):
            return None
        if self.hooks.is_bridge and self.hooks.site("ln_final.hook_scale") is None:
            if isinstance(unwrap(module), nn.Identity) or not _normalises(module):
                return None
        return self.norm(module, "ln_final")

    def post_norm(self, layer: int, name: str) -> Norm | None:
        """The norm that a sublayer's output passes through before it joins the stream."""
        block, hooks = self.hooks.blocks[layer], self.hooks
        module = block._modules.get(f"{name}_post")
        if module is not None and (not hooks.is_bridge or module.original_component is not None):
            return self.norm(module, f"blocks.{layer}.{name}_post")
        written = hooks.site(f"blocks.{layer}.hook_{'attn' if name == 'ln1' else 'mlp'}_out")
        if written is not None and written.name == f"blocks.{layer}.{name}.hook_out":
            return self.norm(block._modules[name], f"blocks.{layer}.{name}")
        if not hooks.is_bridge:
            from transformer_lens.components import transformer_block

            after = getattr(transformer_block, "POST_NORM_ARCHITECTURES", ())
            if self.model.cfg.original_architecture in after:
                return self.norm(getattr(block, name), f"blocks.{layer}.{name}")
        return None

    def attention_norm(self, layer: int) -> Norm | None:
        """The norm that attention reads the stream through.

        None where it reads the stream itself, or where the norm is a step of the stream.
        """
        return self._before(layer, "ln1")

    def mlp_norm(self, layer: int) -> Norm | None:
        """The norm that the MLP reads the stream through: ln2, or attention's where they share it.

        None where it reads the stream itself, or where the norm is a step of the stream.
        """
        shared = self.parallel(layer) and "ln2" not in self.hooks.blocks[layer]._modules
        return self._before(layer, "ln1" if shared else "ln2")

    def parallel(self, layer: int) -> bool:
        """Whether the MLP reads the stream as it was before the layer's attention wrote."""
        if not self.hooks.is_bridge:
            return bool(self.model.cfg.parallel_attn_mlp)
        return "Parallel" in type(self.hooks.blocks[layer]).__name__

    def _before(self, layer: int, name: str) -> Norm | None:
        module = self.hooks.blocks[layer]._modules.get(name)
        if module is None or getattr(module, "original_component", module) is None:
            return None
        after = self.post_norm(layer, name)
        if after is not None and after.name.endswith(name) or self.on_stream(layer) != "none":
            return None
        if isinstance(module, nn.Identity) or (self.hooks.is_bridge and not _normalises(module)):
            return None
        return self.norm(module, f"blocks.{layer}.{name}")

    def on_stream(self, layer: int) -> Literal["none", "before", "after"]:
        """Whether ln1 and ln2 act on the stream itself, before each write or after it."""
        block = self.hooks.blocks[layer]
        inner = unwrap(block)
        if getattr(inner, "apply_residual_connection_post_layernorm", False):
            return "before"
        names = list(block._modules)
        if not {"attn", "ln1", "ln2"} <= set(names):
            return "none"
        post = getattr(inner, "do_layer_norm_before", None) is False
        if "ln_final" not in self.model._modules and self.hooks.is_bridge:
            post = post or names.index("attn") < names.index("ln1")
        return "after" if post else "none"


def _normalises(module: Any) -> bool:
    return "norm" in type(unwrap(module)).__name__.lower()
