"""Reading a model: what writes to its residual stream, in which order, and how logits are read off.

The residual stream is told as a list of steps, from the embeddings to the final norm:

    Write       a part of the model adds `factor * activation` to the stream
    Rescale     the stream is multiplied by a number (Gemma 4, RWKV)
    StreamNorm  the stream itself is normalised (GPT-1, OPT-350M): frozen and chained
    Point       the stream can be seen here: `3_pre`, `3_mid`, `final_post`

Nothing here knows a model's name. What is read comes from the interface that `HookedTransformer`
and `TransformerBridge` share (hook names, `blocks`, `ln_final`, `W_U`) and from the attributes of
the wrapped modules; what is misread shows in the certificate (`reconstruction.py`), because the
steps must add up to the stream that the model itself unembeds. `norms.py` and `sublayers.py` read
the parts; no other module touches `model.blocks`.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_dla.errors import UnsupportedModelError
from tl_dla.model.norms import Norm as Norm
from tl_dla.model.norms import Site as Site
from tl_dla.model.norms import compute_dtype as compute_dtype
from tl_dla.model.norms import is_bridge as is_bridge
from tl_dla.model.norms import parameter as parameter
from tl_dla.model.norms import unwrap as unwrap
from tl_dla.model.sublayers import Attention as Attention
from tl_dla.model.sublayers import SublayerReader

Kind = Literal[
    "embed", "attn", "mlp", "ssm", "head", "neuron", "expert", "source", "bias", "residual", "rest"
]

# Where a block writes, as (hook below the block, label, kind, attribute of the wrapped block that
# multiplies it before it joins the stream).
_WRITERS: tuple[tuple[str, str, Kind, str], ...] = (
    ("hook_attn_out", "attn", "attn", "attn_out_multiplier"),
    ("linear_attn.hook_out", "linear_attn", "ssm", ""),
    ("mamba.hook_out", "mamba", "ssm", "ssm_out_multiplier"),
    ("hook_mixer_out", "mixer", "ssm", ""),
    ("mixer.hook_out", "mixer", "ssm", ""),
    ("conv.hook_out", "conv", "ssm", ""),
    ("hook_time_mix_out", "time_mix", "ssm", ""),
    ("hook_mlp_out", "mlp", "mlp", ""),
    ("hook_channel_mix_out", "channel_mix", "mlp", ""),
    ("moe.hook_out", "moe", "mlp", ""),
    ("shared_mlp.hook_out", "shared_mlp", "mlp", ""),
    ("post_per_layer_input_norm.hook_out", "per_layer_input", "mlp", ""),
)
# Writers of blocks that have no hooks inside: submodules of the wrapped block.
_UNHOOKED_WRITERS: tuple[tuple[str, str, Kind], ...] = (
    ("temporal_block", "temporal", "ssm"),
    ("mamba_decoder.mamba", "mamba", "ssm"),
    ("mlp_block", "mlp", "mlp"),
)
# Modules between the stream and the logits that no frozen linear map can stand for.
_NONLINEAR_HEADS = ("mlm_head", "prediction_head", "hc_head", "sigma_map", "classifier_ln")
# Unhooked modules that add positions to the embeddings.
_POSITION_MODULES = ("embed_positions", "position_embeddings", "wpe")


@dataclass(frozen=True, eq=False)
class Write:
    """`factor` × the activation at `site` is added to the stream."""

    label: str
    kind: Kind
    layer: int | None
    site: Site
    factor: float = 1.0


@dataclass(frozen=True, eq=False)
class Rescale:
    """The whole stream is multiplied by `factor`."""

    factor: float


@dataclass(frozen=True, eq=False)
class StreamNorm:
    """The stream itself passes through a norm; its β is a row of its own."""

    norm: Norm
    layer: int

    @property
    def label(self) -> str:
        """The row of its β: `3_ln1.b`."""
        return f"{self.norm.name.removeprefix('blocks.').replace('.', '_')}.b"


@dataclass(frozen=True, eq=False)
class Point:
    """The stream can be seen here; `block` is True at the borders of blocks."""

    label: str
    layer: int
    site: Site
    block: bool = True


Step = Write | Rescale | StreamNorm | Point


@dataclass(frozen=True, eq=False)
class Stream:
    """The residual stream of a model, and how its logits are read off."""

    steps: tuple[Step, ...]
    norm: Norm | None
    project_out: Float[Tensor, "unembedded d_model"] | None

    @property
    def writes(self) -> list[Write]:
        """The steps that write to the stream."""
        return [step for step in self.steps if isinstance(step, Write)]

    @property
    def points(self) -> list[Point]:
        """The sights of the stream."""
        return [step for step in self.steps if isinstance(step, Point)]


class ModelReader(SublayerReader):
    """What one model says of itself.

    Cheap to make: nothing is kept between calls, so an edited weight is never stale.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        if not isinstance(getattr(model, "blocks", None), nn.ModuleList):
            raise UnsupportedModelError(
                f"{self.architecture} has no single stack of blocks writing to one residual stream,"
                " so its logits cannot be split into rows; no unit works on it."
            )
        for name, module in model._modules.items():
            if getattr(module, "original_component", module) is None:
                raise UnsupportedModelError(
                    f"{self.architecture} has no `{name}` although TransformerLens expects one, so"
                    " the model cannot run; no unit works on it."
                )
            if name in _NONLINEAR_HEADS:
                raise UnsupportedModelError(
                    f"{self.architecture} passes the residual stream through `{name}`, which is not"
                    " linear, before its logits: no row is a part of them, and no unit works on it."
                )
        for layer, block in enumerate(model.blocks):
            if not getattr(block, "hook_out_is_single_residual_stream", True):
                raise UnsupportedModelError(
                    f"{self.architecture} carries several residual streams through blocks.{layer}"
                    f" ({type(block).__name__}), so its logits cannot be split into rows;"
                    " no unit works on it."
                )

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype that the model computes in, whose rounding the stream carries."""
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    @cached_property
    def eps(self) -> float:
        """Machine epsilon of the narrowest dtype that the stream and its norms go through.

        Many models take their norms in float32 whatever their own dtype.
        """
        norm = self._final_norm() if self.dtype == torch.float64 and self.is_bridge else None
        if norm is not None:
            x = torch.linspace(-1, 2, self.model.cfg.d_model, dtype=torch.float64)
            x = x.to(next(self.model.parameters()).device)
            with torch.no_grad():
                y = unwrap(self.model.ln_final)(x[None])[0]
            centred = x - x.mean() if norm.centred else x
            exact = centred / norm.scale_of(x) * (1.0 if norm.gamma is None else norm.gamma)
            exact = exact if norm.beta is None else exact + norm.beta
            if float((y - exact).abs().max()) > 1e-12 * float(exact.abs().max()):
                return torch.finfo(torch.float32).eps
        return torch.finfo(self.dtype).eps

    @property
    def n_layers(self) -> int:
        """How many blocks the model has."""
        return len(self.model.blocks)

    # ---- the stream ----------------------------------------------------------------------------

    def stream(self) -> Stream:
        """Every step from the embeddings to the unembedding."""
        steps: list[Step] = [*self._embeddings()]
        for layer in range(self.n_layers):
            steps += self._block(layer)
        norm = self._final_norm()
        last = self.n_layers - 1
        final = (
            self.site("ln_final.hook_in")
            or self.site("project_out.hook_in")
            or (self.site("unembed.hook_in") if norm is None else None)
            or self.site(f"blocks.{last}.hook_resid_post")
        )
        if final is None:
            raise UnsupportedModelError(
                f"{self.architecture} shows its final residual stream at no hook (ln_final.hook_in,"
                f" blocks.{last}.hook_resid_post), so no unit works on it."
            )
        steps.append(Point("final_post", self.n_layers, final))
        project_out = self.model._modules.get("project_out")
        weight = None if project_out is None else parameter(unwrap(project_out), "weight")
        return Stream(tuple(steps), norm, weight)

    def shows_final_stream(self, point: Point) -> bool:
        """Whether nothing can lie between the last block and this sight of the stream."""
        return point.site.name.endswith(("ln_final.hook_in", "hook_resid_post", "hook_out"))

    def last_block(self) -> Site:
        """What the last block returns, as a module's output."""
        name = f"blocks.{self.n_layers - 1}"
        return Site(name, unwrap(self.model.blocks[self.n_layers - 1]))

    def _embeddings(self) -> list[Step]:
        steps: list[Step] = []
        embed = self.site("project_in.hook_out") or self.site("hook_embed")
        if embed is not None:
            steps.append(Write("embed", "embed", None, embed))
        if (positions := self._positions()) is not None:
            steps.append(Write("pos_embed", "embed", None, positions))
        return steps

    def _positions(self) -> Site | None:
        """Positions that are added to the stream: not rotary, ALiBi or shortformer ones."""
        if getattr(self.model.cfg, "positional_embedding_type", "standard") != "standard":
            return None
        site = self.site("hook_pos_embed")
        if site is not None and not site.name.startswith("rotary"):
            return site
        if self.is_bridge:
            for name, module in self.model.original_model.named_modules():
                if name.rpartition(".")[2] in _POSITION_MODULES:
                    return Site(f"original_model.{name}", module)
        return None

    def _block(self, layer: int) -> list[Step]:
        block, inner = self.model.blocks[layer], unwrap(self.model.blocks[layer])
        writes = self._writes(layer)
        before = self.site(f"blocks.{layer}.hook_resid_pre")
        steps: list[Step] = []
        if before is not None:
            steps.append(Point(f"{layer}_pre", layer, before))
        if layer == 0 and "pre_ln" in block._modules:
            steps.append(StreamNorm(self.norm(block.pre_ln, "blocks.0.pre_ln"), 0))

        where = self._stream_norms(layer)
        for i, write in enumerate(writes):
            norm = None
            if where != "none" and i < 2:
                name = f"blocks.{layer}.ln{i + 1}"
                norm = StreamNorm(self.norm(getattr(block, f"ln{i + 1}"), name), layer)
            middle = self.site(f"blocks.{layer}.hook_resid_mid")
            if where == "none" and write.kind == "mlp" and i > 0 and middle is not None:
                if not any(isinstance(step, Point) and not step.block for step in steps):
                    steps.append(Point(f"{layer}_mid", layer, middle, block=False))
            order = [norm, write] if where == "before" else [write, norm]
            steps += [step for step in order if step is not None]

        scalar = getattr(inner, "layer_scalar", None)
        if isinstance(scalar, Tensor):
            steps.append(Rescale(float(scalar)))
        every = getattr(getattr(self.model, "original_model", None), "config", None)
        every = getattr(every, "rescale_every", 0) if "time_mix" in block._modules else 0
        if every and (layer + 1) % every == 0:
            steps.append(Rescale(0.5))
        return steps

    def _stream_norms(self, layer: int) -> Literal["none", "before", "after"]:
        """Whether ln1 and ln2 act on the stream itself, before each write or after it."""
        block, inner = self.model.blocks[layer], unwrap(self.model.blocks[layer])
        if getattr(inner, "apply_residual_connection_post_layernorm", False):
            return "before"
        names = list(block._modules)
        if not {"attn", "ln1", "ln2"} <= set(names):
            return "none"
        post = getattr(inner, "do_layer_norm_before", None) is False
        if "ln_final" not in self.model._modules and self.is_bridge:
            post = post or names.index("attn") < names.index("ln1")
        return "after" if post else "none"

    def _writes(self, layer: int) -> list[Write]:
        block, inner = self.model.blocks[layer], unwrap(self.model.blocks[layer])
        # A block that scales what it adds shows hook_attn_out and hook_mlp_out already scaled.
        scale = float(getattr(block, "residual_contribution_scale", 1.0))
        writes: list[Write] = []
        seen: set[str] = set()
        for hook, label, kind, multiplier in _WRITERS:
            site = self.site(f"blocks.{layer}.{hook}")
            if site is None or site.name in seen:
                continue
            if kind == "mlp" and getattr(self.model.cfg, "attn_only", False):
                continue  # HookedTransformer has the hook all the same
            if (
                hook in ("moe.hook_out", "shared_mlp.hook_out")
                and any(write.label.endswith("_mlp_out") for write in writes if write.kind == "mlp")
                and f"blocks.{layer}.hook_mlp_out" in self.hooks
            ):
                continue
            seen.add(site.name)
            factor = float(getattr(inner, multiplier, 1.0)) if multiplier else 1.0
            factor *= 1.0 if hook.startswith("hook_") else scale
            writes.append(Write(f"{layer}_{label}_out", kind, layer, site, factor))
        if not writes:
            modules = dict(inner.named_modules())
            for path, label, kind in _UNHOOKED_WRITERS:
                if path in modules:
                    site = Site(f"blocks.{layer}.original_component.{path}", modules[path])
                    writes.append(Write(f"{layer}_{label}_out", kind, layer, site))
        return writes

    # ---- norms ---------------------------------------------------------------------------------

    def attention_norm(self, layer: int) -> Norm | None:
        """The norm that attention reads the stream through.

        None where it reads the stream itself, or where the norm is a step of the stream.
        """
        module = self.model.blocks[layer]._modules.get("ln1")
        if module is None or getattr(module, "original_component", module) is None:
            return None
        after = self.post_norm(layer, "ln1")
        if after is not None and after.name.endswith("ln1") or self._stream_norms(layer) != "none":
            return None
        if isinstance(module, nn.Identity) or (self.is_bridge and not self._normalises(module)):
            return None
        return self.norm(module, f"blocks.{layer}.ln1")

    def _final_norm(self) -> Norm | None:
        module = self.model._modules.get("ln_final")
        if module is None or isinstance(module, nn.Identity):
            return None
        if self.is_bridge and self.site("ln_final.hook_scale") is None:
            if isinstance(unwrap(module), nn.Identity) or not self._normalises(module):
                return None
        return self.norm(module, "ln_final")

    @staticmethod
    def _normalises(module: Any) -> bool:
        return "norm" in type(unwrap(module)).__name__.lower()


def output_transform(model: Any, logits: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The model's own output transform: a multiplier, a soft cap."""
    adapter = getattr(model, "adapter", None)
    if adapter is not None and hasattr(adapter, "apply_output_logits_transform"):
        return adapter.apply_output_logits_transform(logits)
    cap = getattr(model.cfg, "output_logits_soft_cap", None)
    return cap * torch.tanh(logits / cap) if cap and cap > 0 else logits
