"""The units of attribution: which rows, read at which hooks, with which contraction.

A `Plan` is made before the forward pass: the readout is pulled back through the steps of the
stream to every place that is read, which gives the probes. Afterwards `Plan.rows` turns what the
probes kept into rows. Every unit is the same two steps: a place, and a dot product there.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from tl_dla.errors import ArgumentError, UnsupportedModelError
from tl_dla.model import (
    Attention,
    Kind,
    ModelReader,
    Norm,
    Point,
    Rescale,
    Site,
    Step,
    Stream,
    StreamNorm,
    Write,
)
from tl_dla.readout import Readout
from tl_dla.recording import Probe, Recording

Unit = Literal["component", "layer", "head"]


def require_unit(unit: str) -> None:
    if unit not in get_args(Unit):
        raise ArgumentError(f"unit must be one of {', '.join(get_args(Unit))}; {unit!r} was given.")


@dataclass(frozen=True, eq=False)
class Row:
    """One row: its values are `[batch, pos, token]`."""

    label: str
    kind: Kind
    layer: int | None
    value: Float[Tensor, "batch pos token"]


@dataclass(frozen=True, eq=False)
class Refined:
    """A row that others split: the sum of the parts must be its value.

    `gross` is the sum of the parts' absolute values, `magnitude` ‖x ⊙ w‖/s of what is split.
    """

    label: str
    parts_are: str
    value: Float[Tensor, "batch pos token"]
    parts: Float[Tensor, "batch pos token"]
    gross: Float[Tensor, "batch pos token"]
    magnitude: Float[Tensor, "batch pos token"]


@dataclass(frozen=True, eq=False)
class Rows:
    """All rows of a unit, and what the certificate needs."""

    rows: list[Row]
    total: Float[Tensor, "batch pos token"]
    magnitude: Float[Tensor, "batch pos token"]
    final: Float[Tensor, "batch pos token"]
    refined: list[Refined] = field(default_factory=list)


class Plan:
    """What to read in one forward pass, and what to make of it.

    Args:
        reader: the model.
        unembed: the target tokens' columns of W_U, `[batch, pos, token, d_model]`, 1 where shared.
        b_U: their unembedding biases.
        unit: see `Unit`.
    """

    def __init__(
        self,
        reader: ModelReader,
        unembed: Float[Tensor, "#batch #pos token unembedded"],
        b_U: Float[Tensor, "#batch #pos token"] | None,
        unit: Unit,
        include_bias: bool = True,
    ) -> None:
        self.reader, self.unit, self.b_U = reader, unit, b_U
        self.include_bias = include_bias
        self.stream = reader.stream()
        logit = Readout(unembed)
        if self.stream.project_out is not None:
            logit = logit.through_linear(self.stream.project_out.mT)
        self.final_beta = None
        if self.stream.norm is not None:
            if self.stream.norm.beta is not None:
                self.final_beta = logit.of_bias(self.stream.norm.beta)
            logit = logit.through_norm(self.stream.norm)
        self.logit = logit
        self.steps = pull_back(self.stream, logit)
        self.attention = self._attention() if unit == "head" else []
        self.probes = list({probe.key: probe for probe in self._probes()}.values())

    # ---- before the forward pass ---------------------------------------------------------------

    def _attention(self) -> list[tuple[Attention, Readout, Readout]]:
        """Each layer's attention, with the readouts of its output and of its heads."""
        found = []
        for step, readout in self.steps:
            if isinstance(step, Write) and step.label == f"{step.layer}_attn_out":
                attention = self.reader.attention(step.layer or 0)
                if attention is not None:
                    output = attention_output(attention, readout)
                    found.append((attention, output, output.through_linear(attention.W_O)))
        if not found:
            raise UnsupportedModelError(
                f"{self.reader.architecture} has no attention layer that writes to the residual"
                ' stream, so it has no head rows; unit="component" and unit="layer" work.'
            )
        return found

    def _probes(self) -> list[Probe]:
        probes = []
        norms: dict[str, Norm] = {}
        embedded = False
        for step, readout in self.steps:
            norms.update({norm.name: norm for norm in readout.norms})
            if not isinstance(step, Write | Point):
                continue
            probes.append(Probe(step.label, step.site, readout.contract))
            if isinstance(step, Point) and (step.block or self.unit == "layer"):
                probes.append(Probe(f"|{step.label}|", step.site, magnitude(readout)))
            if isinstance(step, Write) and self.unit == "head" and step.kind == "attn":
                probes.append(Probe(f"|{step.label}|", step.site, magnitude(readout)))
            if not embedded and (isinstance(step, Point) or step.label == "embed"):
                embedded = isinstance(step, Point)  # to see whether the stream is the embedding
                probes.append(Probe(f"vector {step.label}", step.site, upcast))
        for attention, output, heads in self.attention:
            norms.update({norm.name: norm for norm in output.norms})
            n_heads = attention.W_O.shape[0]
            read = _heads(heads, n_heads)
            probes.append(Probe(f"heads {attention.layer}", attention.site, read))
        probes += [Probe(norm.name, norm.site, _scale(norm)) for norm in norms.values()]
        return probes

    # ---- after it ------------------------------------------------------------------------------

    def rows(self, seen: Recording) -> Rows:
        """The rows, in the order of the unit, before the output transform."""
        values = seen.values
        scales = {name: x for name, x in values.items() if x.ndim == 2}
        shape = values["final_post"].shape

        def scaled(x: Tensor, readout: Readout) -> Tensor:
            scale = readout.frozen(scales).scale
            x = x.to(values["final_post"].device)
            x = x if scale is None else x / scale.to(x.device).unsqueeze(-1)
            return x.expand(shape)

        stream: list[Row] = []
        magnitudes, pending, additions = [], [], 0
        before: Tensor | None = None
        points: list[Row] = []
        for step, readout in self.steps:
            if isinstance(step, Write):
                value = scaled(values[step.label], readout)
                pending.append(Row(step.label, step.kind, step.layer, value))
                additions += 1
            elif isinstance(step, StreamNorm):
                additions += 2
                if step.norm.beta is not None:
                    value = scaled(readout.of_bias(step.norm.beta), readout)
                    pending.append(Row(step.label, "bias", step.layer, value))
            elif isinstance(step, Rescale):
                additions += 1
            else:
                value = scaled(values[step.label], readout)
                points.append(Row(step.label, "residual", step.layer, value))
                if not step.block:
                    continue
                size = scaled(values[f"|{step.label}|"], readout).abs()
                pending = self._close(pending, before, value, size, additions, step, values)
                magnitudes.append(size * max(additions, 1) ** 0.5)
                stream += pending
                before, pending, additions = value, [], 0
        final = scaled(values["|final_post|"], self.logit).abs()
        size = torch.stack(magnitudes).square().sum(0).sqrt()
        refined = self._refined(stream, values, scaled) if self.unit == "head" else []

        biases = self._biases(shape, final)
        total = points[-1].value + sum(row.value for row in biases)
        rows = {
            "component": stream,
            "layer": points,
            "head": self._heads_first(stream, values, scaled),
        }[self.unit]
        return Rows(rows + biases, total, size, final, refined)

    def _close(
        self,
        rows: list[Row],
        before: Tensor | None,
        after: Tensor,
        size: Tensor,
        additions: int,
        point: Point,
        values: dict[str, Tensor],
    ) -> list[Row]:
        """The rows between two sights of the stream, with a `_rest` row for what they miss."""
        explained = sum((row.value for row in rows), torch.zeros_like(after))
        if before is not None:
            explained = explained + before
        rest = after - explained
        if before is None and [row.label for row in rows] == ["embed"]:
            if is_rescaled_embedding(values["vector embed"], values[f"vector {point.label}"]):
                return [Row("embed", "embed", None, after)]
        eps = self.reader.eps
        rounding = 6 * eps * 12**-0.5 * size * max(additions, 1) ** 0.5
        gross = sum((row.value.abs() for row in rows), after.abs())
        rounding = rounding + 4 * max(torch.finfo(after.dtype).eps, 0.0) * (
            gross + size * self.logit.direction.shape[-1] ** 0.5
        )
        if bool((rest.abs() <= rounding).all()):
            return rows
        if point.label == "final_post" and not self.reader.shows_final_stream(point):
            raise UnsupportedModelError(
                f"{self.reader.architecture} does something to the residual stream between its last"
                f" block and {point.site.name} that is not understood; no unit works on it."
            )
        layer = None if before is None else point.layer - 1
        label = "embed_rest" if layer is None else f"{layer}_rest"
        return [*rows, Row(label, "rest", layer, rest)]

    def _biases(self, shape: torch.Size, like: Tensor) -> list[Row]:
        rows = []
        for label, bias in (("ln_final.b", self.final_beta), ("b_U", self.b_U)):
            if bias is not None and self.include_bias:
                rows.append(Row(label, "bias", None, bias.to(like).expand(shape)))
        return rows

    def _refined(self, stream: list[Row], values: dict[str, Tensor], scaled: Any) -> list[Refined]:
        parents = {row.label: row.value for row in stream}
        readouts = {s.label: r for s, r in self.steps if isinstance(s, Write)}
        refined = []
        for attention, output, heads in self.attention:
            label = f"{attention.layer}_attn_out"
            parts = scaled(values[f"heads {attention.layer}"].sum(-1), heads)
            gross = self._head_values(attention, heads, values, scaled).abs().sum(0)
            if (bias := self._attention_bias(attention, output, readouts[label], scaled)) is not None:
                parts = parts + bias
                gross = gross + bias.abs()
            size = scaled(values[f"|{label}|"], readouts[label]).abs()
            refined.append(Refined(label, "the heads", parents[label], parts, gross, size))
        return refined

    def _head_values(
        self, attention: Attention, heads: Readout, values: dict[str, Tensor], scaled: Any
    ) -> Float[Tensor, "head batch pos token"]:
        kept = values[f"heads {attention.layer}"]
        return torch.stack([scaled(head, heads) for head in kept.unbind(-1)])

    def _attention_bias(
        self, attention: Attention, output: Readout, write: Readout, scaled: Any
    ) -> Tensor | None:
        """b_O and the post-norm's own bias, through what follows them; None where there is none."""
        parts = []
        if attention.b_O is not None and bool(attention.b_O.any()):
            parts.append(scaled(output.of_bias(attention.b_O), output))
        norm = attention.post_norm
        if norm is not None and norm.beta is not None and bool(norm.beta.any()):
            parts.append(scaled(write.times(attention.factor).of_bias(norm.beta), write))
        return sum(parts) if parts else None

    def _heads_first(
        self, stream: list[Row], values: dict[str, Tensor], scaled: Any
    ) -> list[Row]:
        """Heads, then everything else with each `attn_out` replaced by its bias."""
        readouts = {s.label: r for s, r in self.steps if isinstance(s, Write)}
        rows: list[Row] = []
        biases: dict[str, Row | None] = {}
        for attention, output, heads in self.attention:
            layer = attention.layer
            head_values = self._head_values(attention, heads, values, scaled)
            rows += [Row(f"L{layer}H{h}", "head", layer, v) for h, v in enumerate(head_values)]
            label = f"{layer}_attn_out"
            bias = self._attention_bias(attention, output, readouts[label], scaled)
            biases[label] = None if bias is None else Row(f"{layer}_attn_bias", "bias", layer, bias)
        for row in stream:
            replaced = biases.get(row.label, row)
            rows += [] if replaced is None else [replaced]
        return rows


def pull_back(stream: Stream, logit: Readout) -> list[tuple[Step, Readout]]:
    """Each step with the readout of what it writes or shows, the first step first."""
    readout, steps = logit, []
    for step in reversed(stream.steps):
        if isinstance(step, Write):
            steps.append((step, readout.times(step.factor)))
            continue
        steps.append((step, readout))
        if isinstance(step, Rescale):
            readout = readout.times(step.factor)
        elif isinstance(step, StreamNorm):
            readout = readout.through_norm(step.norm)
    return steps[::-1]


def attention_output(attention: Attention, write: Readout) -> Readout:
    """From the readout where the layer writes, to the readout of W_O's output."""
    write = write.times(attention.factor)
    return write if attention.post_norm is None else write.through_norm(attention.post_norm)


def magnitude(readout: Readout) -> Callable[[Tensor], Tensor]:
    """‖x ⊙ w‖, before the division by the scales."""

    squared = Readout(readout.direction.square())

    def read(x: Tensor) -> Tensor:
        return squared.contract(upcast(x).square()).sqrt()

    return read


def _heads(readout: Readout, n_heads: int) -> Callable[[Tensor], Tensor]:
    def read(z: Tensor) -> Tensor:
        return readout.contract(z.flatten(2).unflatten(2, (n_heads, -1)))

    return read


def _scale(norm: Norm) -> Callable[[Tensor], Tensor]:
    return lambda seen: norm.scale(upcast(seen))


def upcast(x: Tensor) -> Tensor:
    return x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def is_rescaled_embedding(
    embed: Float[Tensor, "batch pos d_model"], start: Float[Tensor, "batch pos d_model"]
) -> bool:
    """Whether the stream starts as the token embedding times a number at each position (an
    embedding multiplier, or a norm without weights), seen in the vectors themselves."""
    ratio = (start * embed).sum(-1, keepdim=True) / embed.square().sum(-1, keepdim=True)
    miss = (start - ratio * embed).norm(dim=-1)
    return bool((miss <= 0.02 * start.norm(dim=-1)).all())


def hook_names(plan: Plan) -> list[str]:
    """The hooks that a plan reads, as a cache names them."""
    return sorted({probe.site.name for probe in plan.probes if probe.site.hooked})


def required_hooks(model: Any, unit: Unit = "component") -> list[str]:
    """The hooks that a cache must hold for `unit`, to pass as `names_filter`.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`.
        unit: as in `direct_logit_attribution`.

    Raises:
        UnsupportedModelError: where the unit does not work on the model.

    Example:
        >>> from tl_dla import load_model
        >>> model = load_model("demo")
        >>> required_hooks(model)[:2]
        ['blocks.0.attn.hook_out', 'blocks.0.hook_in']
    """
    require_unit(unit)
    d = model.cfg.d_model if "project_out" not in model._modules else model.W_U.shape[0]
    plan = Plan(ModelReader(model), torch.zeros(1, 1, 1, d), None, unit)
    return hook_names(plan)


__all__ = ["Plan", "Row", "Rows", "Site", "Unit", "pull_back", "required_hooks"]
