"""Reading a model: the front of the readers of its parts, and what no reader understands.

Nothing here knows a model's name. What is read comes from the interface that `HookedTransformer`
and `TransformerBridge` share (hook names, `blocks`, `ln_final`, `W_U`) and from the attributes of
the wrapped modules; what is misread shows in the certificate. No module outside this folder touches
`model.blocks`.
"""

from functools import cache, cached_property
from typing import Any

import torch
from torch import nn

from tl_dla.errors import UnsupportedModelError
from tl_dla.model.attention import AttentionReader
from tl_dla.model.hooks import Hooks, is_packed, own_map, unwrap
from tl_dla.model.mlp import MLP, Experts, MLPReader
from tl_dla.model.mlp_in import ExpertsIn, MLPIn, MLPInReader
from tl_dla.model.norms import NormReader
from tl_dla.model.queries_keys import QueriesAndKeys, QueriesAndKeysReader
from tl_dla.model.stream import StreamReader, Write
from tl_dla.model.values import Values, values_of

# Modules between the stream and the logits that no frozen linear map can stand for.
_NONLINEAR_HEADS = ("mlm_head", "prediction_head", "hc_head", "sigma_map", "classifier_ln")


class ModelReader:
    """What one model says of itself: one reader a part, together.

    Made anew for every call, so an edited weight is never stale; within one, the stream is read
    once.
    """

    def __init__(self, model: Any) -> None:
        self._hooks = hooks = Hooks(model)
        _refuse_other_streams(hooks)
        self._norms = norms = NormReader(hooks)
        self._attention = attention = AttentionReader(hooks, norms)
        stream = StreamReader(hooks, norms)
        self.model, self._autocast = model, _autocast_eps()
        self.hooks = hooks.by_name
        self.is_bridge, self.architecture = hooks.is_bridge, hooks.architecture
        self.n_layers, self.site = hooks.n_layers, hooks.site
        self.norm, self.post_norm = norms.norm, norms.post_norm
        self.final_norm, self.attention_norm = norms.final_norm, norms.attention_norm
        self.mlp_norm, self.parallel = norms.mlp_norm, norms.parallel
        self.attention, self.attention_module = attention.attention, attention.attention_module
        self.pattern_and_values, self.gate = attention.pattern_and_values, attention.gate
        self.value_projection = attention.value_projection
        self.stream, self.last_block = cache(stream.stream), stream.last_block
        self.shows_final_stream = stream.shows_final_stream

    def mlp(self, step: Write) -> MLP | Experts | None:
        """How a step's neurons or experts write; None where it is no MLP's. See `MLPReader`."""
        if step.kind != "mlp" or step.layer is None:
            return None
        reader, name = MLPReader(self._hooks, self._norms), step.name.removesuffix("_out")
        return reader.mlp(step.layer, name, step.site)

    def neurons(self, layer: int) -> MLP | None:
        """The layer's MLP; None where it has experts alone, or neither."""
        parts = (self.mlp(step) for step in self.stream().writes if step.layer == layer)
        return next((part for part in parts if isinstance(part, MLP)), None)

    def mlp_in(self, layer: int, name: str = "mlp") -> MLPIn | ExpertsIn | None:
        """How the layer's neurons or experts are made; see `MLPInReader`."""
        return MLPInReader(self._hooks, self._norms).mlp_in(layer, name)

    def queries_and_keys(self, layer: int) -> QueriesAndKeys:
        """How the layer's scores come about; see `QueriesAndKeysReader`."""
        return QueriesAndKeysReader(self._hooks, self._norms).queries_and_keys(layer)

    def values(self, layer: int, d_head: int) -> Values:
        """How the layer's values are made; see `values_of`."""
        return values_of(self._attention, layer, d_head)

    @property
    def map_eps(self) -> float:
        """Machine epsilon of the stream, its norms, and the linear maps that were read so far."""
        return max(self.machine_eps, self._hooks.map_eps)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype that the model computes in, whose rounding the stream carries."""
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    @cached_property
    def machine_eps(self) -> float:
        """Machine epsilon of the narrowest dtype that the stream and its norms go through.

        Many models take their norms in float32 whatever their own dtype; autocast takes products in
        a narrower one. Where the unembedding is packed, that of its map.
        """
        return max(self._stored_eps(), self._autocast)

    def _stored_eps(self) -> float:
        unembed = unwrap(getattr(self.model, "unembed", None))
        if is_packed(unembed) and (own := own_map(unembed, self.model)) is not None:
            return max(own[1], torch.finfo(self.dtype).eps)
        norm = self.final_norm() if self.dtype == torch.float64 and self.is_bridge else None
        if norm is not None:
            x = torch.linspace(-1, 2, self.model.cfg.d_model, dtype=torch.float64)
            x = x.to(next(self.model.parameters()).device)
            with torch.no_grad():
                y = unwrap(self.model.ln_final)(x[None])[0]
            exact = norm.forward(x, norm.scale_of(x))
            if float((y - exact).abs().max()) > 1e-12 * float(exact.abs().max()):
                return torch.finfo(torch.float32).eps
        return torch.finfo(self.dtype).eps


def _autocast_eps() -> float:
    """Machine epsilon of what autocast takes products in; 0 where there is none."""
    on = [torch.get_autocast_dtype(x) for x in ("cpu", "cuda") if torch.is_autocast_enabled(x)]
    return max((torch.finfo(dtype).eps for dtype in on), default=0.0)


def _refuse_other_streams(hooks: Hooks) -> None:
    """Raise where the logits are not read off one residual stream that blocks write to."""
    model = hooks.model
    if not isinstance(getattr(model, "blocks", None), nn.ModuleList):
        raise UnsupportedModelError(
            f"{hooks.architecture} has no single stack of blocks writing to one residual stream,"
            " so its logits cannot be split into rows; no unit works on it."
        )
    for name, module in model._modules.items():
        if getattr(module, "original_component", module) is None:
            raise UnsupportedModelError(
                f"{hooks.architecture} has no `{name}` although TransformerLens expects one, so"
                " the model cannot run; no unit works on it."
            )
        if name in _NONLINEAR_HEADS:
            raise UnsupportedModelError(
                f"{hooks.architecture} passes the residual stream through `{name}`, which is not"
                " linear, before its logits: no row is a part of them, and no unit works on it."
            )
    for layer, block in enumerate(model.blocks):
        if not getattr(block, "hook_out_is_single_residual_stream", True):
            raise UnsupportedModelError(
                f"{hooks.architecture} carries several residual streams through blocks.{layer}"
                f" ({type(block).__name__}), so its logits cannot be split into rows;"
                " no unit works on it."
            )
