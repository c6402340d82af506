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

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_dla.core.assembly import finish, require
from tl_dla.core.decomposition import Plan
from tl_dla.core.readout import Readout
from tl_dla.core.result import DirectLogitAttribution, require_input
from tl_dla.core.rows import Block, Refined, Row, Rows, Seen
from tl_dla.core.sources import Sources
from tl_dla.core.taps import Recording, run
from tl_dla.errors import TokenError, UnsupportedModelError
from tl_dla.inputs.selection import Choice, Unit, place_of_head, read_choice, require_unit
from tl_dla.inputs.tokens import Positions, Prompts, token_strings
from tl_dla.model.reader import Norm, Point, Step, Stream, StreamNorm, Write
from tl_dla.model.sublayers import ValueMap

_CAUSE = (
    "The likeliest causes: a hook of yours changes activations between the stream and the head's"
    " values, or the attention reads the stream in a way that was not understood."
)


class PathPlan(Plan):
    """The readout of the stream that a head reads at one source token, through its values.

    The token axis is `pos token` of the result whose row is split: every attributed position has
    its own readout of the source token.

    Args:
        before: the plan whose row is split.
        values: the readout of the head's values at the source token, pattern and all scales
            included.
        source: where the stream is read.
        ratio: the output transform, frozen.
    """

    def __init__(
        self,
        before: Plan,
        head: tuple[int, int],
        values: Float[Tensor, "batch 1 token d_head"],
        source: Positions,
        ratio: Float[Tensor, "batch 1 token"],
        unit: Unit,
        choice: Choice,
    ) -> None:
        layer, index = head
        self.reader, self.include_bias = before.reader, True
        self.final_beta = self.b_U = None
        self.source, self.frozen_ratio = source, ratio
        steps, norm = _below(before, layer)
        self.stream = Stream(steps, None, None)
        self.map = before.reader.value_map(layer, values.shape[-1])
        W_V, b_V = _of_head(self.map, index, before)
        logit = Readout(values).through_linear(W_V).times(self.map.factor)
        beta = None if norm is None or norm.beta is None else logit.of_bias(norm.beta)
        moved = None if b_V is None or not bool(b_V.any()) else Readout(values).of_bias(b_V)
        self.constants = [(f"{layer}_ln1.b", beta), (f"{layer}_b_V", moved)]
        self.logit = logit if norm is None else logit.through_norm(norm)
        self._split_into(unit, choice)

    @property
    def whole(self) -> bool:
        """The stream is read below one layer: there may be no part to split."""
        return False

    @property
    def biases(self) -> list[tuple[str, Tensor | None]]:
        """The norm's β and b_V, through the head."""
        return self.constants

    def ratio(
        self, seen: Recording, total: Float[Tensor, "batch pos token"]
    ) -> Float[Tensor, "batch pos token"]:
        """The output transform of the result whose row is split."""
        return self.frozen_ratio.to(total)


def attribute_path(
    result: DirectLogitAttribution,
    head: str,
    source: int | str | Sequence[int],
    *,
    unit: Unit = "head",
    layers: Sequence[int] | None = None,
    heads: Sequence[str] | None = None,
    top_neurons: int | None = None,
    check: Literal["raise", "warn", "off"] = "raise",
) -> DirectLogitAttribution:
    """Split what a head moved from a source token into what earlier parts wrote there.

    The prompts run again (twice, where the result does not hold the head's sources).

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
        A `DirectLogitAttribution` whose rows add up to the source row, which is its `logit`; `path`
        names it. Rows of the stream are followed by `9_ln1.b` and `9_b_V` where there are such.

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
    require_input(result)
    reader = result.plan.reader
    place = place_of_head(reader, head)
    choice = read_choice(reader, unit, layers, heads, top_neurons)
    at = result.plan.source if isinstance(result.plan, PathPlan) else result.positions
    index = _source_positions(result, source)
    seen, sources = _sources(result, head, at)
    values, moved, size = _values(sources, seen, place[1], index)

    batch, pos, tokens = result.ratio.shape
    flat = (batch, 1, pos * tokens)
    positions = Positions(index[:, None], torch.ones_like(index[:, None]).bool(), True, False)
    plan = PathPlan(
        result.plan,
        place,
        values.reshape(*flat, -1),
        positions,
        result.ratio.reshape(flat),
        unit,
        choice,
    )
    weights = torch.kron(torch.eye(pos, dtype=torch.float64), result.targets.weights.cpu().double())
    again = run(result.model, result.prompts, positions, plan.probes, None)
    rows = _reshaped(plan.rows(again, positions, weights), result.ratio.shape)
    moved, size = (x.reshape(result.ratio.shape) for x in (moved, size))
    label = f"{head}←{int(index[0])}" if len(index.unique()) == 1 else f"{head}←source"
    ratio, expected = result.ratio, moved * result.ratio
    path = finish(
        plan, again, rows, ratio, expected, size * ratio, f"row {label}",
        result.prompts, result.positions, result.targets, (*result.path, label),
    )  # fmt: skip
    require(path, _CAUSE, check)
    return path


# ---- the row that is split ---------------------------------------------------------------------


def _sources(result: DirectLogitAttribution, head: str, at: Positions) -> tuple[Seen, Sources]:
    """What the head read at the attributed positions: from the result, or from a run for it."""
    plan, recording = result.plan, result.seen
    layer, index = place_of_head(plan.reader, head)
    label = f"{layer}_attn_out"
    found = plan.refinements.get(label)
    if not (isinstance(found, Sources) and index in found.chosen):
        plan = plan.split_into("source", Choice(heads=(head,)))
        found = plan.refinements.get(label)
        recording = run(result.model, result.prompts, at, plan.probes, None)
    if not isinstance(found, Sources):
        last = max(s.layer for s in plan.stream.writes if s.layer is not None)
        raise UnsupportedModelError(
            f"{head} wrote nothing to the stream that is read here, which ends in layer {last}."
        )
    return plan.shown(recording, at), found


def _values(
    sources: Sources, seen: Seen, head: int, index: Int[Tensor, " batch"]
) -> tuple[
    Float[Tensor, "batch pos token d_head"],
    Float[Tensor, "batch pos token"],
    Float[Tensor, "batch pos token"],
]:
    """The readout of the head's values at the source token, what they moved, and ‖v ⊙ w‖."""
    readout = sources.readout(seen)
    direction = seen.scaled(readout.direction[..., head, :], readout)
    pattern = seen.values[f"pattern {sources.layer}"][:, :, head].to(direction)
    rows = torch.arange(len(index), device=direction.device)
    index = index.to(direction.device)
    weight = pattern[rows, :, index]
    direction = direction * weight[..., None, None]
    v = sources.values_of(seen)[rows, index, head].to(direction)
    moved = torch.einsum("bptd,bd->bpt", direction, v)
    size = torch.einsum("bptd,bd->bpt", direction.square(), v.square()).sqrt()
    return direction, moved, size


def _source_positions(
    result: DirectLogitAttribution, source: int | str | Sequence[int]
) -> Int[Tensor, " batch"]:
    """The source token of each prompt, counted over its real tokens."""
    prompts = result.prompts
    lengths = prompts.length.tolist()
    if isinstance(source, str):
        places = [_find(result, prompts, row, source) for row in range(len(lengths))]
    else:
        places = [source] * len(lengths) if isinstance(source, int) else list(source)
    if len(places) != len(lengths):
        raise TokenError(f"{len(places)} sources were given for {len(lengths)} prompts.")
    for row, (place, length) in enumerate(zip(places, lengths, strict=True)):
        if not -length <= place < length:
            raise TokenError(f"Source {place} is outside prompt {row}, which has {length} tokens.")
    resolved = [place % length for place, length in zip(places, lengths, strict=True)]
    return torch.tensor(resolved, device=prompts.tokens.device)


def _find(result: DirectLogitAttribution, prompts: Prompts, row: int, text: str) -> int:
    texts = token_strings(result.model, prompts.packed[row, : int(prompts.length[row])])
    places = [place for place, token in enumerate(texts) if token == text]
    if len(places) != 1:
        raise TokenError(
            f"{text!r} is {len(places)} times a token of prompt {row}"
            f" ({', '.join(map(repr, texts))}): give its position."
        )
    return places[0]


# ---- the stream below it -----------------------------------------------------------------------


def _below(plan: Plan, layer: int) -> tuple[tuple[Step, ...], Norm | None]:
    """The steps of the stream up to what the layer's attention reads, and the norm in between."""
    steps, label = list(plan.stream.steps), f"{layer}_attn_out"
    [write] = [i for i, step in enumerate(steps) if getattr(step, "label", "") == label]
    steps = steps[:write]
    norm = plan.reader.attention_norm(layer)
    if steps and isinstance(last := steps[-1], StreamNorm):
        norm = last.norm
        steps.pop()
    if not steps or not isinstance(steps[-1], Point):
        before = steps[-1].label if steps and isinstance(steps[-1], Write) else "nothing"
        raise UnsupportedModelError(
            f"{plan.reader.architecture} does not show the stream that blocks.{layer}.attn reads"
            f' (after {before}), so no path goes back from its heads; unit="source" works.'
        )
    return tuple(steps), norm


def _of_head(
    values: ValueMap, head: int, plan: Plan
) -> tuple[Float[Tensor, "d_model d_head"], Float[Tensor, " d_head"] | None]:
    """The head's own W_V and b_V; heads of a group share theirs."""
    attention = plan.reader.attention(values.layer)
    assert attention is not None
    n_heads, groups = attention.W_O.shape[0], values.W_V.shape[0]
    group = head * groups // n_heads
    return values.W_V[group], None if values.b_V is None else values.b_V[group]


def _reshaped(rows: Rows, shape: torch.Size) -> Rows:
    """Rows with the positions of the result in place of the source token's."""

    def at(x: Float[Tensor, "batch 1 token"]) -> Float[Tensor, "batch pos target"]:
        return x.reshape(shape)

    return Rows(
        [Row(x.label, x.kind, x.layer, at(x.value)) if isinstance(x, Row) else
         Block(x.labels, x.kind, x.layer, x.values.reshape(-1, *shape)) for x in rows.blocks],
        at(rows.total),
        at(rows.magnitude),
        at(rows.final),
        [
            Refined(
                part.label, part.parts_are, at(part.value), at(part.parts), at(part.gross),
                at(part.magnitude),
            )
            for part in rows.refined
        ],
    )  # fmt: skip
