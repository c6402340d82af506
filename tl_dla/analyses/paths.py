"""`attribute_path`: what a head moved from a source token, split by who wrote it there.

A row of `unit="source"` is the readout pulled back to a head's values at one token, times the
attention paid to it:

    L9H9←5 = pattern[5] × v[5] · w / s,        v[5] = ln1(x[5]) @ W_V + b_V

Values are linear in the stream at the source token once ln1's scale is frozen, so the pull-back
goes on: w back through W_V and ln1 is a readout of the stream below layer 9 at that token, and
every part of the model that wrote to it has a row, besides the two constants `9_ln1.b` (the norm's
β) and `9_b_V`. Queries and keys are frozen with the pattern. The rows add up to the source row, and
a path of a path goes one step further back. This is the residual stream seen through a head of
"logit prisms" (https://neuralblog.github.io/logit-prisms), and the OV circuit of Elhage et al. 2021
(https://transformer-circuits.pub/2021/framework) on one prompt.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from tl_dla.core.certificate import Check, Wanted
from tl_dla.core.decomposition import Decomposition, of_query
from tl_dla.core.labelled import require_result
from tl_dla.core.numbers import Hop
from tl_dla.core.readout import Readout
from tl_dla.core.result import Attribution, require_input
from tl_dla.core.rows import RowKey, ScaledKept
from tl_dla.core.run import direct_unit, require_same
from tl_dla.core.sources import SourceSplit
from tl_dla.core.taps import exact, forward
from tl_dla.errors import UnsupportedModelError
from tl_dla.inputs.positions import Positions, read_places
from tl_dla.inputs.query import Query
from tl_dla.inputs.selection import Selection, Unit, place_of_head, read_selection, require_unit
from tl_dla.model.attention import ValueProjection
from tl_dla.model.norms import Norm
from tl_dla.model.reader import ModelReader
from tl_dla.model.stream import ResidPoint, Step, StreamNorm, Write

Result = TypeVar("Result", bound=Attribution)

_CAUSE = (
    "The likeliest causes: a hook of yours changes activations between the stream and the head's"
    " values, or the attention reads the stream in a way that was not understood."
)


def attribute_path(
    result: Result,
    head: str,
    source: int | str | Sequence[int],
    *,
    unit: Unit = "head",
    layers: Sequence[int] | None = None,
    heads: Sequence[str] | None = None,
    top_neurons: int | None = None,
    check: Check = "raise",
) -> Result:
    """Split what a head moved from a source token into what earlier parts wrote there.

    The prompts run again, once for each step of the path and once for its rows.

    Args:
        result: of `direct_logit_attribution` with `input`, or of `attribute_path` itself: the head
            is then one that wrote to the path's source token, and the path goes a step further.
        head: such as `"L9H9"`.
        source: the token that the head reads: its position (of the prompt's real tokens), one per
            prompt, or its text where that is once in each prompt.
        unit: how the earlier parts are split, as in `direct_logit_attribution`.
        layers: as in `direct_logit_attribution`.
        heads: as in `direct_logit_attribution`.
        top_neurons: as in `direct_logit_attribution`.
        check: what a failed certificate does.

    Returns:
        A result whose rows add up to the source row, which is its `logit`; `path` names it. Rows of
        the stream are followed by `9_ln1.b` and `9_b_V` where there are such.

    Raises:
        ArgumentError: for a head that the model does not have, or a result made from a cache alone.
        TokenError: for a source that a prompt does not have.
        UnsupportedModelError: where values are not one linear map of the stream.
        ReconstructionError: where the rows do not add up to the source row.

    Example:
        >>> from tl_dla import attribute_path, direct_logit_attribution, load_model
        >>> model = load_model("demo")
        >>> result = direct_logit_attribution(
        ...     model, "The Eiffel Tower is in the city of", " Paris", " London", unit="source"
        ... )
        >>> path = attribute_path(result, "L1H0", source=2)
        >>> path.path
        ('L1H0←2',)
        >>> path.reconstruction.passed
        True
    """
    require_unit(unit)
    require_result(result)
    direct_unit(result)
    require_input(result)
    reader = ModelReader(result.model)
    place = place_of_head(reader, head)
    selection = read_selection(reader, unit, layers, heads, top_neurons)
    hops = (*result.hops, Hop(*place, read_places(reader.model, result.prompts, source, "source")))
    end = follow(result, hops)
    parts = end.parts(unit, selection)
    once = forward(end.query, parts.taps, logits=False)
    with exact():
        shape, targets = result.numbers.ratio.shape, result.targets
        # The token axis is `pos token` of the result: every position has a readout of its own.
        weights = targets.weights
        if weights is not None:
            weights = torch.kron(torch.eye(shape[1], device="cpu"), weights.cpu()).to(weights)
        rows = parts.rows(once, end.query.positions, lambda total: end.ratio.to(total), weights)
        rows = rows.map(lambda x: x.reshape(*x.shape[:-3], *shape))
        ratio, eps = rows.ratio, reader.map_eps
        moved, size = (x.reshape(shape).to(ratio) * ratio for x in (end.moved, end.size))
        wanted = Wanted(moved, size, f"row {hops[-1].label}", eps)
        numbers = replace(result.numbers, rows=rows.values)
        about = (unit, selection, parts.readout.direction.shape[-1])
        path = type(result).of(rows, wanted, numbers, result.query, about, hops)
    return path.certified(check, _CAUSE)


# ---- the row that is split ---------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class PathEnd:
    """The readout of the stream that a head reads at one source token, through its values.

    Attributes:
        query: the prompts at the source token.
        before: what the head's row is a part of.
        hop: the head.
        values: the readout of its values there, pattern and all scales included.
        moved: what the values moved, before the output transform.
        size: ‖v ⊙ w‖ of them.
        ratio: the output transform, frozen.
    """

    query: Query
    before: Decomposition
    hop: Hop
    values: Float[Tensor, "batch 1 token d_head"]
    moved: Float[Tensor, "batch 1 token"]
    size: Float[Tensor, "batch 1 token"]
    ratio: Float[Tensor, "batch 1 token"]

    @exact()
    def parts(self, unit: Unit, selection: Selection) -> Decomposition:
        """What wrote to the stream that the head reads."""
        return through_head(self.before, self.hop, self.values, (unit, selection))


def follow(result: Attribution, hops: Sequence[Hop]) -> PathEnd:
    """Go back along a path, a forward pass for each of its steps."""
    query, flat = result.query, result.numbers.ratio.flatten(1)[:, None]
    reader = ModelReader(query.model)
    end: PathEnd | None = None
    for hop in hops:
        selection = Selection(heads=((hop.layer, hop.head),))
        before = (
            of_query(query, "source", selection, reader=reader)
            if end is None
            else end.parts("source", selection)
        )
        split = next((s for s in before.splits.values() if s.layer == hop.layer), None)
        if not isinstance(split, SourceSplit):
            layers = [step.layer for step, _ in before.steps if isinstance(step, Write)]
            raise UnsupportedModelError(
                f"L{hop.layer}H{hop.head} wrote nothing to the stream that is read here, which ends"
                f" in layer {max(layer for layer in layers if layer is not None)}."
            )
        kept = forward(query, before.taps, logits=end is None)
        if end is None:
            size = before.stream.rows(reader, before.scaled(kept)).readout_norm
            require_same(result, kept, size)
        with exact():
            read = _values(split, before.scaled(kept, query.positions), hop)
        index = hop.source[:, None]
        at = Positions(index, torch.ones_like(index).bool(), True, False)
        query = replace(query, positions=at)
        values, moved, size = (rearrange(x, "b pos t ... -> b 1 (pos t) ...") for x in read)
        end = PathEnd(query, before, hop, values, moved, size, flat)
    assert end is not None
    return end


def _values(
    split: SourceSplit, kept: ScaledKept, hop: Hop
) -> tuple[
    Float[Tensor, "batch pos token d_head"],
    Float[Tensor, "batch pos token"],
    Float[Tensor, "batch pos token"],
]:
    """The readout of the head's values at the source token, what they moved, and ‖v ⊙ w‖."""
    readout = split.readout(kept)
    direction = kept.scaled(readout.direction[..., hop.head, :], readout)
    pattern = kept[split.pattern_tap][:, :, hop.head].to(direction)
    index = hop.source.to(direction.device)
    rows = torch.arange(len(index), device=direction.device)
    direction = direction * pattern[rows, :, index][..., None, None]
    v = (
        split.values_of(kept)[rows, index, hop.head]
        .to(direction)[:, None]
        .expand(-1, direction.shape[1], -1)
    )
    here = Readout(direction)
    return direction, here.contract(v), here.norm_of(v)


# ---- the stream below it -----------------------------------------------------------------------


def through_head(
    before: Decomposition,
    hop: Hop,
    values: Float[Tensor, "batch pos token d_head"],
    about: tuple[Unit, Selection],
) -> Decomposition:
    """The readout of a head's values pulled back to the stream that it reads."""
    reader, layer = before.reader, hop.layer
    steps, norm = below(reader, [step for step, _ in before.steps], layer)
    projection = reader.value_projection(layer, values.shape[-1])
    W_V, b_V = _of_head(projection, reader, hop)
    readout = Readout(values)
    logit = readout.through_linear(W_V).times(projection.factor)
    beta = None if norm is None or norm.beta is None else logit.of_bias(norm.beta)
    moved = None if b_V is None or not bool(b_V.any()) else readout.of_bias(b_V)
    constants = [(RowKey("bias", layer, "ln1.b"), beta), (RowKey("bias", layer, "b_V"), moved)]
    logit = logit if norm is None else logit.through_norm(norm)
    return Decomposition(reader, steps, logit, constants, *about, whole=False)


def below(
    reader: ModelReader, stream: Iterable[Step], layer: int
) -> tuple[list[Step], Norm | None]:
    """The steps of the stream up to what the layer's attention reads, and the norm in between.

    Raises:
        UnsupportedModelError: where the stream is not shown there.
    """
    steps: list[Step] = []
    for step in stream:
        if isinstance(step, Write) and (step.layer, step.name) == (layer, "attn_out"):
            break
        steps.append(step)
    norm = reader.attention_norm(layer)
    if steps and isinstance(last := steps[-1], StreamNorm):
        norm = last.norm
        steps.pop()
    if not steps or not isinstance(steps[-1], ResidPoint):
        written = steps[-1].label if steps and isinstance(steps[-1], Write) else "nothing"
        raise UnsupportedModelError(
            f"{reader.architecture} does not show the stream that blocks.{layer}.attn reads"
            f' (after {written}), so no path goes back from its heads; unit="source" works.'
        )
    return steps, norm


def _of_head(
    projection: ValueProjection, reader: ModelReader, hop: Hop
) -> tuple[Float[Tensor, "d_model d_head"], Float[Tensor, " d_head"] | None]:
    """The head's own W_V and b_V; heads of a group share theirs."""
    attention = reader.attention(hop.layer)
    assert attention is not None
    group = hop.head * projection.W_V.shape[0] // attention.W_O.shape[0]
    return projection.W_V[group], None if projection.b_V is None else projection.b_V[group]
