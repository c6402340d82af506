"""Reading a model's hooks and norms: the base of `ModelReader`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_dla.errors import UnsupportedModelError


@dataclass(frozen=True, eq=False)
class Site:
    """A place to read: a hook, or where there is none, what a module returns or is given."""

    name: str
    module: nn.Module
    inputs: bool = False

    @property
    def hooked(self) -> bool:
        """Whether the place is a hook, which a cache can hold."""
        return hasattr(self.module, "fwd_hooks")


@dataclass(frozen=True, eq=False)
class Norm:
    """γ ⊙ (x − mean) / s + β, with or without the mean, γ and β. `site` shows s, or x."""

    name: str
    site: Site
    gamma: Float[Tensor, " d_model"] | None
    beta: Float[Tensor, " d_model"] | None
    centred: bool
    eps: float

    def scale(self, seen: Float[Tensor, "... width"]) -> Float[Tensor, "..."]:
        """s, from what `site` shows: the model's own `hook_scale`, or the norm's input."""
        if self.site.name.endswith("hook_scale"):
            # Split inputs (one for each head) are all normalised alike.
            return seen[:, :, 0, 0] if seen.ndim == 4 else seen[..., 0]
        return self.scale_of(seen)

    def scale_of(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch"]:
        """The scale s, computed from the norm's input."""
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        return (x.square().mean(-1) + self.eps).sqrt()


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Contractions run in float64 for a float64 model, in float32 for every other."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_bridge(model: Any) -> bool:
    """Whether the model is a `TransformerBridge` (it wraps another) or a `HookedTransformer`."""
    return hasattr(model, "original_model")


def unwrap(module: Any) -> Any:
    """The module that a bridge component wraps, or the module itself."""
    return getattr(module, "original_component", None) or module


def parameter(module: Any, name: str) -> Tensor | None:
    """A weight or bias as it is used now, brought back from where `accelerate` offloaded it."""
    value = getattr(module, name, None)
    if not isinstance(value, Tensor):
        return None
    if value.device.type == "meta":
        from accelerate.utils import align_module_device

        with align_module_device(unwrap(module)):
            value = getattr(unwrap(module), name).clone()
    return value.detach()


class NormReader:
    """Hooks by name, and norms of either kind of model, folded or not."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.hooks: Mapping[str, Any] = model.hook_dict
        self.is_bridge = is_bridge(model)

    @property
    def architecture(self) -> str:
        """What the model calls itself, for messages."""
        cfg = self.model.cfg
        return str(
            getattr(cfg, "architecture", None)
            or getattr(cfg, "original_architecture", None)
            or getattr(cfg, "model_name", None)
            or type(self.model).__name__
        )

    def site(self, name: str) -> Site | None:
        """The hook of that name or alias, under its own name; None where there is none."""
        hook = self.hooks.get(name)
        return None if hook is None else Site(hook.name or name, hook)

    def norm(self, module: Any, name: str) -> Norm:
        """A LayerNorm or RMSNorm of either kind of model, folded or not."""
        inner, cfg = unwrap(module), self.model.cfg
        site = self.site(f"{name}.hook_scale") or self.site(f"{name}.hook_in")
        if site is None:
            raise UnsupportedModelError(
                f"{self.architecture} shows neither the scale nor the input of its norm {name},"
                " so nothing can be read back through it."
            )
        if hasattr(module, "uses_rms_norm"):
            centred = not module.uses_rms_norm
        else:
            centred = "RMS" not in type(inner).__name__
        gamma = parameter(module, "w") if not self.is_bridge else parameter(inner, "weight")
        beta = parameter(module, "b") if not self.is_bridge else parameter(inner, "bias")
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
        eps = next(
            (
                float(getattr(place, attribute))
                for place in (inner, module)
                for attribute in ("eps", "variance_epsilon")
                if getattr(place, attribute, None) is not None
            ),
            float(getattr(cfg, "eps", 1e-5)),
        )
        return Norm(name, site, gamma, beta, centred, eps)

    def post_norm(self, layer: int, name: str) -> Norm | None:
        """The norm that a sublayer's output passes through before it joins the stream."""
        block = self.model.blocks[layer]
        module = block._modules.get(f"{name}_post")
        if module is not None and (not self.is_bridge or module.original_component is not None):
            return self.norm(module, f"blocks.{layer}.{name}_post")
        written = self.site(f"blocks.{layer}.hook_{'attn' if name == 'ln1' else 'mlp'}_out")
        if written is not None and written.name == f"blocks.{layer}.{name}.hook_out":
            return self.norm(block._modules[name], f"blocks.{layer}.{name}")
        if not self.is_bridge:
            from transformer_lens.components import transformer_block

            after = getattr(transformer_block, "POST_NORM_ARCHITECTURES", ())
            if self.model.cfg.original_architecture in after:
                return self.norm(getattr(block, name), f"blocks.{layer}.{name}")
        return None
