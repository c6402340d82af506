"""The units of attribution: which rows, read at which hooks, with which contraction.

A `Plan` is made before the forward pass: the readout is pulled back through the steps of the
stream to every place that is read, which gives the probes. Afterwards `Plan.rows` turns what the
probes kept into rows. Every unit is the same two steps: a place, and a dot product there. What
splits a row of the stream into its parts is a `Refinement`.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_dla.core.neurons import ExpertRows, Neurons, largest
from tl_dla.core.readout import Readout
from tl_dla.core.rows import Block, Heads, Refined, Refinement, Row, Rows, Seen, magnitude, upcast
from tl_dla.core.sources import Sources
from tl_dla.core.stream_rows import stream_rows
from tl_dla.core.taps import Probe, Recording
from tl_dla.errors import UnsupportedModelError
from tl_dla.inputs.selection import Choice, Unit, require_unit
from tl_dla.inputs.tokens import Positions
from tl_dla.model.reader import (
    Attention,
    ModelReader,
    Norm,
    Point,
    Rescale,
    Step,
    Stream,
    StreamNorm,
    Write,
    output_transform,
)
from tl_dla.model.sublayers import Experts


class Plan:
    """What to read in one forward pass, and what to make of it.

    Args:
        reader: the model.
        unembed: the target tokens' columns of W_U, `[batch, pos, token, d_model]`, 1 where shared.
        b_U: their unembedding biases.
        unit: see `Unit`.
    """

    transformed = False

    def __init__(
        self,
        reader: ModelReader,
        unembed: Float[Tensor, "#batch #pos token unembedded"],
        b_U: Float[Tensor, "#batch #pos token"] | None,
        unit: Unit,
        include_bias: bool = True,
        choice: Choice | None = None,
    ) -> None:
        self.reader, self.b_U, self.include_bias = reader, b_U, include_bias
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
        self._split_into(unit, choice or Choice())

    def split_into(self, unit: Unit, choice: Choice) -> "Plan":
        """The same readout, with rows of another unit."""
        plan = copy.copy(self)
        plan._split_into(unit, choice)
        return plan

    def _split_into(self, unit: Unit, choice: Choice) -> None:
        self.unit, self.choice = unit, choice
        self.steps = pull_back(self.stream, self.logit)
        self.refinements = self._refinements()
        self.probes = list({probe.key: probe for probe in self._probes()}.values())

    # ---- before the forward pass ---------------------------------------------------------------

    @property
    def whole(self) -> bool:
        """Whether the stream is read to its end, so that a model without parts is told from it."""
        return True

    @property
    def attention(self) -> list[tuple[Attention, Readout, Readout]]:
        """Each layer's attention, with the readouts of its output and of its heads."""
        heads = [x for x in self.refinements.values() if isinstance(x, Heads)]
        return [(x.part, x.output, x.heads) for x in heads]

    @property
    def end(self) -> str:
        """The last sight of the stream, where it is read out."""
        return self.stream.points[-1].label

    def _refinements(self) -> dict[str, Refinement]:
        """What splits the rows of the unit, by the row."""
        if self.unit in ("component", "layer"):
            return {}
        found: dict[str, Refinement] = {}
        for step, readout in self.steps:
            if isinstance(step, Write) and step.layer is not None:
                split = self._mlp if self.unit == "neuron" else self._attention
                refinement = split(step, step.layer, readout)
                if refinement is not None:
                    found[step.label] = refinement
        if found or not self.whole:
            return found
        part = "MLP" if self.unit == "neuron" else "attention layer"
        raise UnsupportedModelError(
            f"{self.reader.architecture} shows no {part} that writes to the residual stream, so it"
            f' has no {self.unit} rows; unit="component" and unit="layer" work.'
        )

    def _mlp(self, step: Write, layer: int, readout: Readout) -> Refinement | None:
        if step.kind != "mlp" or not self.choice.has_layer(layer):
            return None
        name = step.label.partition("_")[2].removesuffix("_out")
        part = self.reader.mlp(layer, name, step.site)
        if part is None:
            return None
        if isinstance(part, Experts):
            return ExpertRows(part, step.label, readout)
        neurons = Neurons(part, step.label, readout)
        if self.choice.neurons is not None:
            prefix = f"L{layer}N"
            mine = [n for n in self.choice.neurons if n.startswith(prefix)]
            neurons.keep = [int(n.removeprefix(prefix)) for n in mine]
            neurons.alone = self.choice.alone
        return neurons

    def _attention(self, step: Write, layer: int, readout: Readout) -> Refinement | None:
        if step.label != f"{layer}_attn_out":
            return None
        if self.unit == "head" and not self.choice.has_layer(layer):
            return None
        part = self.reader.attention(layer)
        if part is None:
            return None
        chosen = [
            head
            for head in range(part.W_O.shape[0])
            if self.unit == "source"
            and self.choice.has_layer(layer)
            and (self.choice.heads is None or f"L{layer}H{head}" in self.choice.heads)
        ]
        if not chosen:
            return Heads(part, step.label, readout)
        mixing, name = self.reader.mixing(layer), self.reader.architecture
        return Sources(part, step.label, readout, mixing, chosen, name)

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
            if not embedded and (isinstance(step, Point) or step.label == "embed"):
                embedded = isinstance(step, Point)  # to see whether the stream is the embedding
                probes.append(Probe(f"vector {step.label}", step.site, upcast))
            if step.label in self.refinements:
                refinement = self.refinements[step.label]
                norms.update({norm.name: norm for norm in refinement.norms})
                probes.append(Probe(f"|{step.label}|", step.site, magnitude(readout)))
                probes += refinement.probes()
        probes += [Probe(norm.name, norm.site, _scale(norm)) for norm in norms.values()]
        return probes

    # ---- after it ------------------------------------------------------------------------------

    def shown(self, seen: Recording, positions: Positions | None = None) -> Seen:
        """What the pass has shown, with its scales known."""
        scales = {name: x for name, x in seen.values.items() if x.ndim == 2}
        sources = None
        if positions is not None and bool(positions.valid.any()):
            sources = int(positions.index[positions.valid].max()) + 1
        final = seen.values[self.end]
        return Seen(seen.values, scales, final.shape, final.device, sources)

    def rows(
        self,
        seen: Recording,
        positions: Positions | None = None,
        weights: Float[Tensor, "candidate token"] | None = None,
    ) -> Rows:
        """The rows, in the order of the unit, before the output transform.

        Args:
            seen: what the forward pass has shown.
            positions: the attributed positions, which say how far back sources reach and which
                positions count when neurons are ranked.
            weights: how the tokens are added up, for the ranking of neurons.
        """
        shown = self.shown(seen, positions)
        stream, points, size = stream_rows(self.reader, self.steps, shown)
        final = shown.scaled(seen.values[f"|{self.end}|"], self.logit).abs()
        constants = self._constants(final)
        total = points[-1].value + sum(row.value for row in constants)
        biases = constants if self.include_bias else []
        if self.unit == "layer":
            return Rows([*points, *biases], total, size, final)
        if self.choice.top_neurons is not None:
            self._keep_largest(shown, self.ratio(seen, total), positions, weights)
        rows, refined = self._split(stream, shown)
        return Rows([*rows, *biases], total, size, final, refined)

    def _split(self, stream: list[Row], shown: Seen) -> tuple[list[Row | Block], list[Refined]]:
        """Parts before everything else, and each row that they split left out."""
        splits = {
            row.label: self.refinements[row.label].split(shown, row.value)
            for row in stream
            if row.label in self.refinements
        }
        rows = [row for split in splits.values() for row in split.first]
        for row in stream:
            rows += splits[row.label].instead if row.label in splits else [row]
        return rows, [x for split in splits.values() for x in split.refined]

    def _keep_largest(
        self,
        shown: Seen,
        ratio: Float[Tensor, "batch pos token"],
        positions: Positions | None,
        weights: Float[Tensor, "candidate token"] | None,
    ) -> None:
        """Rank all layers' neurons by their mean absolute attribution; the first keep a row."""
        weights = ratio.new_ones(1, ratio.shape[-1]) if weights is None else weights.to(ratio)
        valid = torch.ones(ratio.shape[:2], dtype=torch.bool, device=ratio.device)
        valid = valid if positions is None else positions.valid.to(ratio.device)
        neurons = [x for x in self.refinements.values() if isinstance(x, Neurons)]
        scores = []
        for layer in neurons:
            values = torch.einsum("bptn,bpt,ct->bpcn", layer.values(shown), ratio, weights)
            scores.append(values[valid].abs().mean((0, 1)))
        for layer, keep in zip(neurons, largest(scores, self.choice.top_neurons or 0), strict=True):
            layer.keep = keep

    def ratio(
        self, seen: Recording, total: Float[Tensor, "batch pos token"]
    ) -> Float[Tensor, "batch pos token"]:
        """The output transform (a multiplier, a soft cap) frozen per token: transformed / raw."""
        raw, logits = seen.raw, seen.logits
        if raw is None or logits is None:
            raw = total
            logits = output_transform(self.reader.model, raw)
        ratio = torch.where(raw == 0, torch.ones_like(raw), logits / raw).to(total)
        if self.transformed:  # the mean's direction holds each token's own ratio already
            ratio = torch.cat([ratio[..., :-1], torch.ones_like(ratio[..., -1:])], -1)
        return ratio

    @property
    def biases(self) -> list[tuple[str, Tensor | None]]:
        """The constants that no row of the stream holds, already in logits."""
        return [("ln_final.b", self.final_beta), ("b_U", self.b_U)]

    def _constants(self, like: Float[Tensor, "batch pos token"]) -> list[Row]:
        return [
            Row(label, "bias", None, bias.to(like).expand_as(like))
            for label, bias in self.biases
            if bias is not None
        ]


def pull_back(stream: Stream, logit: Readout) -> list[tuple[Step, Readout]]:
    """Each step with the readout of what it writes or shows, the first step first."""
    readout, steps = logit, list[tuple[Step, Readout]]()
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


def _scale(norm: Norm) -> Callable[[Tensor], Tensor]:
    return lambda seen: norm.scale(upcast(seen))


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
        >>> "ln_final.hook_scale" in required_hooks(model)
        True
    """
    require_unit(unit)
    d = model.cfg.d_model if "project_out" not in model._modules else model.W_U.shape[0]
    plan = Plan(ModelReader(model), torch.zeros(1, 1, 1, d), None, unit)
    return hook_names(plan)
