"""`Decomposition`: which rows, read where, with which readout.

Made before the forward pass: the readout is pulled back through the steps of the stream to every
place that is read, which gives the taps. Afterwards `rows` turns what the taps kept into rows.
Every unit is the same two steps: a place, and a dot product there.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tl_dla.core.heads import HeadSplit, RowSplit
from tl_dla.core.latents import LatentSplit, Place, Score, placed, with_largest
from tl_dla.core.mean_logit import Mean
from tl_dla.core.neurons import ExpertSplit, NeuronSplit, largest
from tl_dla.core.readout import Readout
from tl_dla.core.residual import StreamTaps, pull_back
from tl_dla.core.rows import REMAINDER, RowGroup, RowKey, Rows, ScaledKept, SplitCheck
from tl_dla.core.sources import SourceSplit
from tl_dla.core.taps import Kept, Tap, exact
from tl_dla.errors import ArgumentError, UnsupportedModelError
from tl_dla.inputs.positions import Positions
from tl_dla.inputs.query import Query
from tl_dla.inputs.selection import Selection, Unit
from tl_dla.model.mlp import Experts
from tl_dla.model.norms import Norm
from tl_dla.model.reader import ModelReader
from tl_dla.model.stream import Step, Write
from tl_dla.model.unembedding import unembedding

Constants = Sequence[tuple[RowKey, Tensor | None]]
LN_FINAL_B, B_U = RowKey("bias", None, "ln_final.b"), RowKey("bias", None, "b_U")
RatioOf = Callable[[Float[Tensor, "batch pos token"]], Float[Tensor, "batch pos token"]]


class Decomposition:
    """What is split into what: the steps of a stream, the readout of its end, the unit.

    Args:
        reader: the model.
        steps: the stream, or the part of it that leads to the place that is read.
        readout: how the logit is read off at its end, `[batch, pos, token, d_model]`.
        constants: what the logit owes to no row of the stream, already in logits.
        unit: see `Unit`.
        selection: which rows are split.
        whole: whether the stream is read to its end, so that a model without parts to split is
            told from a stream that ends below them.
    """

    def __init__(
        self,
        reader: ModelReader,
        steps: Sequence[Step],
        readout: Readout,
        constants: Constants,
        unit: Unit,
        selection: Selection,
        whole: bool = True,
    ) -> None:
        self.reader, self.readout = reader, readout
        self.constants = [(key, value) for key, value in constants if value is not None]
        self.unit, self.selection = unit, selection
        self._places: dict[Step, Place] = {}
        if selection.dictionaries:
            steps, self._places = placed(reader, steps, selection.dictionaries)
        self.steps = pull_back(steps, readout)
        self.stream = StreamTaps.of(self.steps, every_point=unit == "layer")
        self.splits = self._splits(whole)
        self._scales = {norm.name: Tap(norm.site, norm.scale) for norm in self._norms()}

    # ---- before the forward pass ---------------------------------------------------------------

    @property
    def end(self) -> Step:
        """The last residual point, where the stream is read out."""
        return self.steps[-1][0]

    @property
    def taps(self) -> list[Tap]:
        """Everything that is kept in the forward pass."""
        splits = [tap for split in self.splits.values() for tap in (split.norm_tap, *split.taps())]
        return [*self.stream.all(), *splits, *self._scales.values()]

    def readout_of(self, name: str) -> Readout | None:
        """The readout of the first step of that name, None where there is none."""
        named = ((getattr(step, "name", ""), readout) for step, readout in self.steps)
        return next((readout for own, readout in named if own == name), None)

    def _norms(self) -> list[Norm]:
        readouts = [readout.norms for _, readout in self.steps]
        return [
            norm
            for norms in (*readouts, *(s.norms for s in self.splits.values()))
            for norm in norms
        ]

    def _splits(self, whole: bool) -> dict[Step, RowSplit]:
        """What splits the rows of the unit, by the step whose row it is."""
        if self.unit in ("component", "layer"):
            return {}
        if self.unit == "latent":
            if not self._places:
                raise ArgumentError('unit="latent" needs dictionaries={hook: dictionary}.')
            return {
                step: LatentSplit(self._places[step], readout, self.reader)
                for step, readout in self.steps
                if isinstance(step, Write) and step in self._places
            }
        split = self._mlp if self.unit == "neuron" else self._attention
        found: dict[Step, RowSplit] = {
            step: part
            for step, readout in self.steps
            if isinstance(step, Write) and (part := split(step, readout)) is not None
        }
        if found or not whole:
            return found
        what = "MLP" if self.unit == "neuron" else "attention layer"
        raise UnsupportedModelError(
            f"{self.reader.architecture} shows no {what} that writes to the residual stream, so it"
            f' has no {self.unit} rows; unit="component" and unit="layer" work.'
        )

    def _mlp(self, step: Write, readout: Readout) -> RowSplit | None:
        layer = step.layer
        if layer is None or not self.selection.has_layer(layer):
            return None
        part = self.reader.mlp(step)
        if part is None:
            return None
        if isinstance(part, Experts):
            return ExpertSplit(part, step, readout)
        keep = self.selection.neurons_of(layer)
        return NeuronSplit(part, step, readout, keep, self.selection.alone)

    def _attention(self, step: Write, readout: Readout) -> RowSplit | None:
        layer = step.layer
        if step.name != "attn_out" or layer is None:
            return None
        part = self.reader.attention(layer)
        if part is None:
            return None
        n_heads = part.W_O.shape[0]
        chosen = [head for head in range(n_heads) if self.selection.has_head(layer, head)]
        if self.unit == "head":
            return HeadSplit(part, step, readout, chosen) if chosen else None
        if not chosen:
            return HeadSplit(part, step, readout)
        reads = self.reader.pattern_and_values(layer)
        return SourceSplit(part, step, readout, reads, chosen)

    # ---- after it ------------------------------------------------------------------------------

    def scaled(self, kept: Kept, positions: Positions | None = None) -> ScaledKept:
        """Values kept by the taps, with the scales of the norms."""
        sources = None
        if positions is not None and bool(positions.valid.any()):
            sources = int(positions.index[positions.valid].max()) + 1
        final = kept[self.stream.value[self.end]]
        scales = {name: kept[tap] for name, tap in self._scales.items()}
        return ScaledKept(kept, scales, final.shape, final.device, sources)

    def rows(
        self,
        kept: Kept,
        positions: Positions | None = None,
        ratio_of: RatioOf = torch.ones_like,
        weights: Float[Tensor, "candidate token"] | None = None,
    ) -> Rows:
        """The rows, in the order of the unit, before the output transform.

        Args:
            kept: what the taps kept.
            positions: the attributed positions, which say how far back sources reach and which
                positions count when neurons and latents are ranked.
            ratio_of: the output transform, frozen, from the total.
            weights: how the tokens are added up, for the ranking of neurons and latents; None for
                not at all.
        """
        known = self.scaled(kept, positions)
        stream = self.stream.rows(self.reader, known)
        like = stream.final_norm
        biases = [RowGroup.one(key, x.to(like).expand_as(like)) for key, x in self.constants]
        total = stream.points[-1].values[0] + sum(row.values[0] for row in biases)
        ratio, sizes = ratio_of(total), (stream.readout_norm, stream.final_norm)
        if self.unit == "layer":
            return Rows(stream.points, biases, total, ratio, *sizes)
        score = _mean_size(ratio, positions, weights)
        keep: dict[Step, list[int]] = {}
        if self.selection.top_neurons is not None:
            keep = self._largest(known, score)
        steps = {split.key: step for step, split in self.splits.items()}
        first: list[RowGroup] = []
        instead: list[RowGroup] = []
        checks: list[SplitCheck] = []
        for row in stream.rows:
            step = steps.get(row.keys[0])
            if step is None:
                instead.append(row)
                continue
            split, value = self.splits[step], row.values[0]
            if isinstance(split, NeuronSplit):
                parts = split.split(known, value, keep.get(step))
            else:
                parts = split.split(known, value)
            first += parts.first
            instead += parts.instead
            checks += parts.checks
        if self.selection.remainder:
            instead = _with_remainder(instead)
        if self.selection.top_latents is not None:
            first = with_largest(first, self.selection.top_latents, score)
        return Rows([*first, *instead], biases, total, ratio, *sizes, checks)

    def _largest(self, kept: ScaledKept, score: Score) -> dict[Step, list[int]]:
        """Rank all layers' neurons by their mean absolute attribution; the first keep a row."""
        neurons = {s: split for s, split in self.splits.items() if isinstance(split, NeuronSplit)}
        scores = [score(layer.values(kept)) for layer in neurons.values()]
        return dict(zip(neurons, largest(scores, self.selection.top_neurons or 0), strict=True))


def _with_remainder(rows: list[RowGroup]) -> list[RowGroup]:
    """One row for all of them, but for what is not understood, which keeps its own."""
    rests = [row for row in rows if row.keys[0].kind == "rest"]
    others = torch.cat([row.values for row in rows if row.keys[0].kind != "rest"])
    return [*rests, RowGroup.one(REMAINDER, others.sum(0))]


def _mean_size(
    ratio: Float[Tensor, "batch pos token"],
    positions: Positions | None,
    weights: Float[Tensor, "candidate token"] | None,
) -> Score:
    """What neurons and latents are ranked by: mean absolute attribution over prompts' positions."""
    valid = torch.ones(ratio.shape[:2], dtype=torch.bool, device=ratio.device)
    valid = valid if positions is None else positions.valid.to(ratio.device)

    def score(values: Float[Tensor, "batch pos token row"]) -> Float[Tensor, " row"]:
        values = values * ratio[..., None]
        if weights is not None:
            values = torch.einsum("bptn,ct->bpcn", values, weights.to(values))
        return values[valid].abs().mean((0, 1))

    return score


def logit_readout(
    reader: ModelReader, columns: Float[Tensor, "#batch #pos token unembedded"]
) -> tuple[Readout, Float[Tensor, "#batch #pos token"] | None]:
    """The readout of the final residual stream for columns of W_U, and what the norm's β adds."""
    stream, logit, beta = reader.stream(), Readout(columns), None
    if stream.project_out is not None:
        logit = logit.through_linear(stream.project_out.mT)
    if stream.norm is not None:
        if stream.norm.beta is not None:
            beta = logit.of_bias(stream.norm.beta)
        logit = logit.through_norm(stream.norm)
    return logit, beta


@exact()
def of_query(
    query: Query,
    unit: Unit,
    selection: Selection,
    mean: Mean | None = None,
    reader: ModelReader | None = None,
    *,
    end_only: bool = False,
) -> Decomposition:
    """The target tokens' logits: their columns of W_U pulled back to the end of the stream.

    `mean` is the vocabulary's mean capped logit (see `mean_logit.py`), which is then the last
    target. With `end_only` no further than that end, where only the whole stream is read.
    """
    reader, targets = ModelReader(query.model) if reader is None else reader, query.targets
    columns, b_U = unembedding(query.model, targets.ids, targets.mean_of_vocab)
    if mean is not None:
        lead = mean.direction.shape[:2]
        columns = torch.cat([columns[:, :, :-1].expand(*lead, -1, -1), mean.direction], 2)
        if b_U is not None:
            b_U = torch.cat([b_U[:, :, :-1].expand(*lead, -1), mean.bias], 2)
    logit, beta = logit_readout(reader, columns)
    constants = [(LN_FINAL_B, beta), (B_U, b_U)]
    steps = reader.stream().steps[-1 if end_only else 0 :]
    return Decomposition(reader, steps, logit, constants, unit, selection, not end_only)
