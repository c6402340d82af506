"""The rows of `attribute_inputs`, what each layer holds, and their certificate.

The readout w pulled back through all of the network reaches the embeddings:

    logit = Σ_token  embed[token] · w₀[token]  +  pos_embed[token] · w₀[token]  +  Σ biases

exactly, and the same total at every layer: what the stream holds there, x · w, and what the biases
after it add. See `tl_dla.core.network.step` for each line through the origin, with references.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from tl_dla.analyses.total_effects import Effects, EffectUnit, Lines, effects
from tl_dla.core.certificate import Reconstruction, Wanted, certify
from tl_dla.core.network.pull import Network, Pulled
from tl_dla.core.network.readouts import directions, pull_all
from tl_dla.core.network.step import Rule
from tl_dla.core.result import Attribution, require_prompts
from tl_dla.core.rounding import Sizes, rounding
from tl_dla.core.rows import RowGroup, RowKey, Rows
from tl_dla.core.run import Run
from tl_dla.core.taps import exact
from tl_dla.core.view import prompt_tokens, view_of
from tl_dla.errors import ArgumentError, UnsupportedModelError
from tl_dla.inputs.query import Query
from tl_dla.model.stream import Kind

if TYPE_CHECKING:
    import plotly.graph_objects as go


def _held_of(
    held: Float[Tensor, "point batch pos candidate source"], part: Callable[[Tensor], Tensor]
) -> Float[Tensor, "point b p c source"]:
    """What the stream holds, of a part of the result."""
    return part(held.movedim(-1, 1)).movedim(1, -1)


@dataclass(frozen=True, eq=False, repr=False)
class InputLedger(Attribution):
    """What each token of the prompt, and each bias, wrote to a logit through everything.

    See `Attribution` for its rows, `InputAttribution` for what can be asked of it.

    Attributes:
        held: what the stream holds at each token's place, before each layer and at the end, with
            all axes, `[point, batch, pos, candidate, source]`; `flow` is the view of it with the
            axes that were asked for.
        mlp: how gated MLPs are frozen.
    """

    held: Float[Tensor, "point batch pos candidate source"] = field(
        kw_only=True, metadata={"part": _held_of}
    )
    mlp: Rule = field(default="half", kw_only=True)

    @property
    def flow(self) -> Float[Tensor, " point *batch_and_pos"]:
        """How much of the logit each token's place in the stream holds before each layer.

        `[n_layers + 1, *batch_and_pos, source]`, with a `candidate` axis before the last for
        `candidate_tokens`. The last is before the final norm. With what the biases after it add,
        each adds up to the logit.
        """
        by_source = rearrange(
            self.held, "point batch pos candidate source -> point source batch pos candidate"
        )
        return self.query.shaped(by_source).movedim(1, -1)

    @property
    def points(self) -> list[str]:
        """Where `flow` reads the stream: `0_pre`, `1_pre`, …, `final_post`."""
        return list(self.reconstruction.parts)

    def effects(self, unit: EffectUnit = "head", lines: Lines | None = None) -> Effects:
        """What heads, MLPs or neurons write to the logit through everything after them.

        The model runs again; with tangents, backwards too, once for each position and candidate.

        Args:
            unit: `"head"`, `"component"` (embeddings, attention, MLPs) or `"neuron"`.
            lines: how each non-linearity after a part is replaced: `"frozen"`, by the line through
                the origin (the linear map of the rows), or `"tangent"` (the gradient: attribution
                patching against zero). By default what predicts zero ablation best for the unit:
                tangents for heads, frozen lines for the others.

        Returns:
            `Effects`, with `attribution` `[row, *batch_and_pos, source]` in logits: at each token's
            place. They are no parts of a sum.

        Raises:
            ArgumentError: for another unit or other lines, or where the model cannot run again.
            UnsupportedModelError: where no gradient can be read at a place.

        Example:
            >>> from tl_dla import attribute_inputs, load_model
            >>> model = load_model("demo")
            >>> result = attribute_inputs(model, "The Eiffel Tower is in the city of", " Paris")
            >>> result.effects("component").lines
            'frozen'
        """
        return effects(self, unit, lines, self.mlp)

    def plot_flow(
        self,
        *,
        prompt: int = 0,
        position: int = -1,
        candidate: str | int = 0,
        title: str | None = None,
        width: int | None = None,
        height: int | None = None,
    ) -> "go.Figure":
        """The answer on its way: how much of the logit each token's place holds, layer by layer.

        Args:
            prompt: of a batch.
            position: which of the attributed positions, an index into them.
            candidate: which candidate token, by its text or its index.
            title: in place of the figure's own; `""` for no heading.
            width: in pixels; as wide as the page by default.
            height: in pixels; as high as what is drawn by default.

        Raises:
            ArgumentError: for a prompt, position or candidate that the result does not have, or a
                position that the prompt does not have.
        """
        from tl_dla.figures.charts import Look
        from tl_dla.figures.flow import FlowView, flow

        b, p, c = (index or 0 for index in self.places(prompt, position, candidate))
        require_prompts(self)
        if not self.has_tokens:
            raise ArgumentError(
                "The flow is drawn over the prompt's tokens, and the cache came without them: pass"
                " the prompts as `input` beside it."
            )
        view, at = view_of(self, b), int(self.positions.index[b, p])
        sample = next(i for i, s in enumerate(view.samples) if s.position == at)
        held = self.held[:, b, p, c, : at + 1].detach().cpu().double().numpy()
        shown = FlowView(
            held=held,
            after=view.logit[sample, c] - held.sum(1),
            points=self.points,
            tokens=prompt_tokens(self, b)[: at + 1],
            sample=view.samples[sample],
            words=view.words,
        )
        return flow(shown, Look(title, width, height))


Ledger = TypeVar("Ledger", bound=InputLedger)


@exact()
def ledger(once: Run, network: Network, of: type[Ledger], *, progress: bool = False) -> Ledger:
    """The readouts of a run, which kept what the network's taps do, pulled all the way back.

    Raises:
        UnsupportedModelError: where a block writes to the stream what no known part wrote.
    """
    _require_understood(once)
    base, query = once.result(Attribution), once.query
    pulled = pull_all(once, network, directions(once), progress=progress)
    added, ratio = query.targets.added, once.rows.ratio
    ends = [
        RowGroup.one(group.keys[0], added(group.values[0] * ratio)) for group in once.rows.constants
    ]
    starts = [_token_rows(name, held) for name, held in pulled.start.items()]
    # Forwards again: the pull met the last constant first.
    biases = [RowGroup.one(key, x.to(ratio)) for key, x in reversed(pulled.biases.items())]
    logits = added(base.numbers.logits.to(ratio))
    ones, felt = torch.ones_like(logits), pulled.felt[-1].sqrt().to(logits)
    rows = Rows([*starts, *biases], ends, logits, ones, felt, felt)
    expected = logits
    if not query.include_bias:
        expected = expected - sum(group.values[0] for group in ends)
        rows = rows.without_constants()
    eps = max(network.reader.map_eps, once.kept.machine_eps)
    wanted = Wanted(expected, logits, base.reconstruction.against, eps, once.unchecked)
    # The rows are those of candidates: no tokens are left to add up.
    alone = replace(query, targets=replace(query.targets, weights=None))
    d = once.parts.readout.direction.shape[-1]
    layers = _certified_layers(rows, pulled, wanted, alone, d)
    whole = certify(rows, slice(None), wanted, alone, d)
    whole = replace(whole, parts=layers, splits=("what each layer holds to it",))
    # A difference of logits is pulled back as one: there are no rows of single tokens.
    numbers = replace(base.numbers, rows=base.numbers.rows[:0])
    held = torch.stack(pulled.held[::-1])
    about = (whole, query, base.selection, numbers)
    return of(rows.values, rows.keys, "input", *about, held=held, mlp=network.rule)


def _token_rows(name: str, held: Float[Tensor, "batch pos candidate source"]) -> RowGroup:
    """A row for each token's place at the start of the stream."""
    kind: Kind = "rest" if name == "embed_rest" else "embed"
    keys = [RowKey(kind, None, name, source=source) for source in range(held.shape[-1])]
    return RowGroup(keys, held.movedim(-1, 0))


def _require_understood(once: Run) -> None:
    for key in once.rows.keys:
        if key.kind == "rest" and key.layer is not None:
            raise UnsupportedModelError(
                f"blocks.{key.layer} of {once.parts.reader.architecture} changes the stream beyond"
                f" what is known to write there (row {key.label}), so nothing can be pulled back"
                ' through it; unit="component" works.'
            )


def _certified_layers(
    rows: Rows, pulled: Pulled, wanted: Wanted, query: Query, d: int
) -> dict[str, Reconstruction]:
    """What the stream holds before each layer, and what the biases after it add, to the logit."""
    constant = sum((group.values[0] for group in rows.constants), torch.zeros_like(rows.total))
    found = {}
    for i, point in enumerate(pulled.points):
        held, above = pulled.held[i], pulled.above[i].to(constant)
        felt = pulled.felt[i].sqrt().to(constant)
        absolute = held.abs().sum(-1) + above.abs() + constant.abs()
        sizes = Sizes(felt, felt, wanted.rounded, absolute)
        allowed = rounding(sizes, None, wanted.machine_eps, d).to(constant)
        found[point.label] = Reconstruction(
            query.shaped(wanted.value),
            query.shaped(held.sum(-1) + above + constant),
            query.shaped(allowed.nan_to_num(0.0, posinf=0.0)),
            wanted.against,
        )
    return dict(reversed(found.items()))
