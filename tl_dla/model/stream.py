"""The residual stream as a list of steps, from the embeddings to the final norm.

    Write       a part of the model adds `factor * activation` to the stream
    Rescale     the stream is multiplied by a number (Gemma 4, RWKV)
    StreamNorm  the stream itself is normalised (GPT-1, OPT-350M): frozen and chained
    ResidPoint  the stream can be seen here: `3_pre`, `3_mid`, `final_post`

Nothing here knows a model's name. What is misread shows in the certificate, because the steps must
add up to the stream that the model itself unembeds.
"""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from tl_dla.errors import UnsupportedModelError
from tl_dla.model.attention import block_scale
from tl_dla.model.hooks import Hooks, Site, parameter, unwrap
from tl_dla.model.norms import Norm, NormReader

Kind = Literal[
    "embed",
    "attn",
    "mlp",
    "ssm",
    "head",
    "neuron",
    "neurons",  # those of a layer that share a row
    "expert",
    "source",
    "latent",
    "latents",  # those of a dictionary that share a row
    "skip",  # what a transcoder passes on beside its latents
    "error",  # what a dictionary does not explain
    "bias",
    "residual",
    "rest",
    "remainder",  # everything but the heads
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
# Unhooked modules that add positions to the embeddings.
_POSITION_MODULES = ("embed_positions", "position_embeddings", "wpe")

_IN_WORDS = {"attn": "attention", "mlp": "MLP", "ssm": "state space"}

FINAL = "final_post"


@dataclass(frozen=True, eq=False)
class Write:
    """`factor` × the activation at `site` is added to the stream."""

    name: str
    kind: Kind
    layer: int | None
    site: Site
    factor: float = 1.0

    @property
    def label(self) -> str:
        """`3_attn_out`, or `embed`."""
        return self.name if self.layer is None else f"{self.layer}_{self.name}"


@dataclass(frozen=True, eq=False)
class Rescale:
    """The whole stream is multiplied by `factor`."""

    factor: float


@dataclass(frozen=True, eq=False)
class StreamNorm:
    """The stream itself passes through a norm; its β is a row of its own."""

    norm: Norm
    layer: int
    kind: Kind = "bias"

    @property
    def name(self) -> str:
        """The row of its β, in its layer: `ln1.b`."""
        return f"{self.norm.name.rpartition('.')[2]}.b"


@dataclass(frozen=True, eq=False)
class ResidPoint:
    """The stream can be seen here; `block` is True at the borders of blocks."""

    name: str
    layer: int
    site: Site
    block: bool = True
    kind: Kind = "residual"

    @property
    def label(self) -> str:
        """`3_pre`, `3_mid`, or `final_post`."""
        return self.name if self.name == FINAL else f"{self.layer}_{self.name}"


Step = Write | Rescale | StreamNorm | ResidPoint


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
    def points(self) -> list[ResidPoint]:
        """The places where the stream can be seen."""
        return [step for step in self.steps if isinstance(step, ResidPoint)]

    @property
    def writers(self) -> dict[str, str]:
        """What wrote to the stream since the point before, in words, for each point's label."""
        written: dict[str, str] = {}
        kinds: list[str] = []
        for step in self.steps:
            if isinstance(step, Write):
                kinds.append(_IN_WORDS.get(step.kind, step.kind))
            elif isinstance(step, ResidPoint):
                written[step.label] = " and ".join(dict.fromkeys(kinds)) or "norm"
                kinds = []
        return written


class StreamReader:
    """What writes to the residual stream, in order."""

    def __init__(self, hooks: Hooks, norms: NormReader) -> None:
        self.hooks, self.norms, self.model = hooks, norms, hooks.model

    def stream(self) -> Stream:
        """Every step from the embeddings to the unembedding."""
        steps: list[Step] = [*self._embeddings()]
        for layer in range(self.hooks.n_layers):
            steps += self._block(layer)
        norm = self.norms.final_norm()
        last = self.hooks.n_layers - 1
        final = (
            self.hooks.site("ln_final.hook_in")
            or self.hooks.site("project_out.hook_in")
            or (self.hooks.site("unembed.hook_in") if norm is None else None)
            or self.hooks.site(f"blocks.{last}.hook_resid_post")
        )
        if final is None:
            raise UnsupportedModelError(
                f"{self.hooks.architecture} shows its final residual stream at no hook"
                f" (ln_final.hook_in, blocks.{last}.hook_resid_post), so no unit works on it."
            )
        steps.append(ResidPoint(FINAL, self.hooks.n_layers, final))
        project_out = self.model._modules.get("project_out")
        weight = None if project_out is None else parameter(unwrap(project_out), "weight")
        return Stream(tuple(steps), norm, weight)

    def shows_final_stream(self, point: ResidPoint) -> bool:
        """Whether nothing can lie between the last block and this point of the stream."""
        return point.site.name.endswith(("ln_final.hook_in", "hook_resid_post", "hook_out"))

    def last_block(self) -> Site:
        """What the last block returns, as a module's output."""
        name = f"blocks.{self.hooks.n_layers - 1}"
        return Site(name, unwrap(self.hooks.blocks[-1]))

    def _embeddings(self) -> list[Step]:
        steps: list[Step] = []
        embed = self.hooks.site("project_in.hook_out") or self.hooks.site("hook_embed")
        if embed is not None:
            steps.append(Write("embed", "embed", None, embed))
        if (positions := self._positions()) is not None:
            steps.append(Write("pos_embed", "embed", None, positions))
        return steps

    def _positions(self) -> Site | None:
        """Positions that are added to the stream: not rotary, ALiBi or shortformer ones."""
        if getattr(self.model.cfg, "positional_embedding_type", "standard") != "standard":
            return None
        site = self.hooks.site("hook_pos_embed")
        if site is not None and not site.name.startswith("rotary"):
            return site
        if self.hooks.is_bridge:
            for name, module in self.model.original_model.named_modules():
                if name.rpartition(".")[2] in _POSITION_MODULES:
                    return Site(f"original_model.{name}", module)
        return None

    def _block(self, layer: int) -> list[Step]:
        block = self.hooks.blocks[layer]
        inner = unwrap(block)
        writes = self._writes(layer)
        before = self.hooks.site(f"blocks.{layer}.hook_resid_pre")
        steps: list[Step] = []
        if before is not None:
            steps.append(ResidPoint("pre", layer, before))
        if layer == 0 and "pre_ln" in block._modules:
            steps.append(StreamNorm(self.norms.norm(block.pre_ln, "blocks.0.pre_ln"), 0))

        where = self.norms.on_stream(layer)
        for i, write in enumerate(writes):
            norm = None
            if where != "none" and i < 2:
                name = f"blocks.{layer}.ln{i + 1}"
                norm = StreamNorm(self.norms.norm(getattr(block, f"ln{i + 1}"), name), layer)
            middle = self.hooks.site(f"blocks.{layer}.hook_resid_mid")
            if where == "none" and write.kind == "mlp" and i > 0 and middle is not None:
                if not any(isinstance(step, ResidPoint) and not step.block for step in steps):
                    steps.append(ResidPoint("mid", layer, middle, block=False))
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

    def _writes(self, layer: int) -> list[Write]:
        block = self.hooks.blocks[layer]
        inner = unwrap(block)
        # A block that scales what it adds shows hook_attn_out and hook_mlp_out already scaled.
        scale = block_scale(block)
        writes: list[Write] = []
        seen: set[str] = set()
        for hook, label, kind, multiplier in _WRITERS:
            site = self.hooks.site(f"blocks.{layer}.{hook}")
            if site is None or site.name in seen:
                continue
            if kind == "mlp" and getattr(self.model.cfg, "attn_only", False):
                continue  # HookedTransformer has the hook all the same
            if (
                hook in ("moe.hook_out", "shared_mlp.hook_out")
                and any(write.name == "mlp_out" for write in writes)
                and f"blocks.{layer}.hook_mlp_out" in self.hooks.by_name
            ):
                continue
            seen.add(site.name)
            factor = float(getattr(inner, multiplier, 1.0)) if multiplier else 1.0
            factor *= 1.0 if hook.startswith("hook_") else scale
            writes.append(Write(f"{label}_out", kind, layer, site, factor))
        if not writes:
            modules = dict(inner.named_modules())
            for path, label, kind in _UNHOOKED_WRITERS:
                if path in modules:
                    site = Site(f"blocks.{layer}.original_component.{path}", modules[path])
                    writes.append(Write(f"{label}_out", kind, layer, site))
        return writes
