"""`decompose`: what each row wrote, as vectors in the final residual stream.

The slow, plain way that the fast way (`units.py`) is held to, and the thing to have for projecting
onto directions of one's own. The rows are those of `ActivationCache.decompose_resid`,
`accumulated_resid(incl_mid=True)` and `stack_head_results`, with the same labels, but on every
model that attribution works on: heads pass through the norm that follows their layer, everything
passes through what later happens to the stream itself (frozen), and what nothing explains is a
`_rest` row.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_dla.core.rows import upcast
from tl_dla.core.stream_rows import is_rescaled_embedding
from tl_dla.core.taps import Probe, cache_shape, recall
from tl_dla.errors import ArgumentError
from tl_dla.inputs.selection import Unit, require_unit
from tl_dla.inputs.tokens import Prompts, read_positions
from tl_dla.model.reader import (
    Attention,
    Kind,
    ModelReader,
    Norm,
    Point,
    Rescale,
    StreamNorm,
    Write,
)


@dataclass(frozen=True, eq=False)
class Vector:
    """One row as vectors."""

    label: str
    kind: Kind
    layer: int | None
    value: Float[Tensor, "batch pos d_model"]


@dataclass(frozen=True, eq=False)
class Gap:
    """What the rows between two sights of the stream leave unexplained."""

    point: Point
    missing: Float[Tensor, "batch pos d_model"]
    seen: Float[Tensor, "batch pos d_model"]
    additions: int

    def explained_by_rounding(self, eps: float) -> bool:
        """Whether the gap is one that adding the rows with this machine epsilon can leave."""
        allowed = 6 * eps * max(self.additions, 1) ** 0.5 * self.seen.norm(dim=-1)
        return bool((self.missing.norm(dim=-1) <= allowed).all())


@dataclass(frozen=True, eq=False)
class ResidualStack:
    """Vectors in the final residual stream, one row per part of the model.

    Attributes:
        vectors: `[row, *batch_and_pos, d_model]`; in the `component` and `head` units they add up
            to the final residual stream.
        labels, kinds, layers: as in `DirectLogitAttribution`, without its two bias rows, which are
            not in the stream.
    """

    vectors: Float[Tensor, "row *batch_and_pos d_model"]
    labels: list[str]
    kinds: list[Kind]
    layers: list[int | None]

    def __getitem__(self, label: str) -> Float[Tensor, "*batch_and_pos d_model"]:
        """One row, by its label."""
        if label not in self.labels:
            raise KeyError(f"No row {label!r}; the rows are {', '.join(self.labels[:4])}, ….")
        return self.vectors[self.labels.index(label)]


def decompose(cache: Any, unit: Unit = "component", *, pos: Any = -1) -> ResidualStack:
    """What each row of `unit` wrote to the final residual stream.

    `result.readout.of(stack)` equals the attribution of the same run: with the norm's scale
    frozen, as `ActivationCache.logit_attrs` reads a stack.

    Args:
        cache: an `ActivationCache` with the hooks of `required_hooks(model, unit)`.
        unit: `"component"`, `"layer"` or `"head"`.
        pos: as in `direct_logit_attribution`; positions count from the start of the cache.

    Returns:
        A `ResidualStack`, in at least float32: rows × positions × d_model numbers.

    Raises:
        ArgumentError: for another unit.
        IncompleteCacheError: naming the hooks that the cache lacks.
        UnsupportedModelError: where the unit does not work on the model.

    Example:
        >>> from tl_dla import decompose, load_model
        >>> model = load_model("demo")
        >>> _, cache = model.run_with_cache("The Eiffel Tower is in the city of")
        >>> stack = decompose(cache)
        >>> stack.labels[:3]
        ['embed', 'pos_embed', '0_attn_out']
    """
    require_unit(unit)
    if unit not in ("component", "layer", "head"):
        raise ArgumentError(
            f'decompose gives vectors for unit "component", "layer" or "head"; {unit!r} was given.'
        )
    reader = ModelReader(cache.model)
    batch, width = cache_shape(cache)
    length = torch.full((batch,), width)
    tokens = torch.zeros(batch, width, dtype=torch.long)
    positions = read_positions(pos, Prompts(tokens, torch.zeros_like(length), length))
    seen = recall(reader, cache, None, positions, vector_probes(reader, unit)).values
    rows, points, _ = walk(reader, seen, unit)
    chosen = points if unit == "layer" else rows
    vectors = torch.stack([positions.squeeze(row.value) for row in chosen])
    return ResidualStack(
        vectors,
        [row.label for row in chosen],
        [row.kind for row in chosen],
        [row.layer for row in chosen],
    )


def vector_probes(reader: ModelReader, unit: Unit) -> list[Probe]:
    """Everything that is written or seen, kept whole."""
    probes = []
    for step in reader.stream().steps:
        if isinstance(step, Write | Point):
            probes.append(Probe(step.label, step.site, upcast))
        elif isinstance(step, StreamNorm):
            probes.append(scale_probe(step.norm))
    for attention in _attentions(reader) if unit == "head" else []:
        probes.append(Probe(f"z {attention.layer}", attention.site, upcast))
        if attention.post_norm is not None:
            probes.append(scale_probe(attention.post_norm))
    return probes


def walk(
    reader: ModelReader, seen: Mapping[str, Tensor], unit: Unit
) -> tuple[list[Vector], list[Vector], list[Gap]]:
    """Follow the stream from the embeddings on: rows, sights and gaps, as they end up."""
    rows: list[Vector] = []
    points: list[Vector] = []
    gaps: list[Gap] = []
    attentions = {f"{a.layer}_attn_out": a for a in _attentions(reader)} if unit == "head" else {}
    additions = 0
    for step in reader.stream().steps:
        if isinstance(step, Write):
            additions += 1
            value = seen[step.label] * step.factor
            if (attention := attentions.get(step.label)) is None:
                rows.append(Vector(step.label, step.kind, step.layer, value))
            else:
                rows += head_vectors(attention, seen, step.factor)
        elif isinstance(step, Point):
            sight = seen[step.label]
            points.append(Vector(step.label, "residual", step.layer, sight))
            if not step.block:
                continue
            total = sum((row.value for row in rows), torch.zeros_like(sight))
            embedded = [row.label for row in rows] == ["embed"]
            if embedded and is_rescaled_embedding(rows[0].value, sight):
                rows, total = [Vector("embed", "embed", None, sight)], sight
            gap = Gap(step, sight - total, sight, additions)
            gaps.append(gap)
            if not gap.explained_by_rounding(reader.eps):
                first = len(gaps) == 1
                label = "embed_rest" if first else f"{step.layer - 1}_rest"
                layer = None if first else step.layer - 1
                rows.append(Vector(label, "rest", layer, gap.missing))
        else:
            additions += 1
            rows = [_onward(row, step, seen) for row in rows]
            points = [_onward(row, step, seen) for row in points]
            if isinstance(step, StreamNorm) and step.norm.beta is not None:
                beta = step.norm.beta.to(rows[0].value).expand_as(rows[0].value)
                rows.append(Vector(step.label, "bias", step.layer, beta))
    return _in_order(rows) if unit == "head" else rows, points, gaps


def head_vectors(attention: Attention, seen: Mapping[str, Tensor], factor: float) -> list[Vector]:
    """Each head, and the output bias, through what follows: a norm, the block's multiplier."""
    layer, W_O = attention.layer, attention.W_O
    z = seen[f"z {layer}"].flatten(2).unflatten(2, (W_O.shape[0], -1))
    heads = torch.einsum("bphk,hkd->hbpd", z, W_O.to(z)) * attention.factor
    constant = torch.zeros_like(heads[0])
    if attention.b_O is not None:
        constant = constant + attention.b_O.to(z) * attention.factor
    if (norm := attention.post_norm) is not None:
        scale = seen[norm.name]
        heads, constant = (through(norm, v, scale) for v in (heads, constant))
        constant = constant if norm.beta is None else constant + norm.beta.to(z)
    heads, constant = heads * factor, constant * factor
    rows = [Vector(f"L{layer}H{h}", "head", layer, v) for h, v in enumerate(heads)]
    if bool(constant.any()):
        rows.append(Vector(f"{layer}_attn_bias", "bias", layer, constant))
    return rows


def through(
    norm: Norm, x: Float[Tensor, "*batch d_model"], scale: Float[Tensor, "*stream"]
) -> Float[Tensor, "*batch d_model"]:
    """Forward through a norm with its scale frozen, without β."""
    x = x - x.mean(-1, keepdim=True) if norm.centred else x
    x = x / scale[..., None]
    return x if norm.gamma is None else x * norm.gamma.to(x)


def _onward(row: Vector, step: Rescale | StreamNorm, seen: Mapping[str, Tensor]) -> Vector:
    if isinstance(step, Rescale):
        value = row.value * step.factor
    else:
        value = through(step.norm, row.value, seen[step.norm.name])
    return Vector(row.label, row.kind, row.layer, value)


def _in_order(rows: list[Vector]) -> list[Vector]:
    heads = [row for row in rows if row.kind == "head"]
    return heads + [row for row in rows if row.kind != "head"]


def _attentions(reader: ModelReader) -> list[Attention]:
    found = (reader.attention(layer) for layer in range(reader.n_layers))
    return [attention for attention in found if attention is not None]


def scale_probe(norm: Norm) -> Probe:
    """The scale of a norm, under its name."""
    return Probe(norm.name, norm.site, lambda x: norm.scale(upcast(x)))
