"""`attribute_inputs`: which tokens of the prompt wrote a logit, through everything.

With every non-linearity frozen at its value in this forward pass, the network is one linear map,
and the readout w pulled back through all of it reaches the embeddings:

    logit = Σ_token  embed[token] · w₀[token]  +  pos_embed[token] · w₀[token]  +  Σ biases

exactly, and the same total at every layer: what the stream holds there, x · w, and what the biases
after it add. In logits. Frozen are the norms' scales, the attention patterns and the MLPs'
activations (`mlp`), so a row says what a token wrote along the ways that this pass took. What a
token did by steering attention is in no row: in " John and Mary … John gave a drink to", that the
name is repeated acts through queries and keys, and shows in `attribute_attention` alone. Nor does
removing a token change the logit by its row.

See `tl_dla.core.way_back` for each line through the origin, with references.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_dla.analyses.total_effects import Effects, EffectUnit, Lines, effects
from tl_dla.core.all_the_way import directions, pull_all
from tl_dla.core.certificate import Check, Reconstruction, Wanted, certify, require_check
from tl_dla.core.network import Network, Pulled
from tl_dla.core.result import Attribution
from tl_dla.core.rounding import Sizes, rounding
from tl_dla.core.rows import RowGroup, RowKey, Rows
from tl_dla.core.run import CAUSE, Run, run
from tl_dla.core.taps import exact
from tl_dla.core.view import prompt_tokens, view_of
from tl_dla.core.way_back import Rule
from tl_dla.errors import ArgumentError, UnsupportedModelError
from tl_dla.inputs.caches import read_cache, read_cached_prompts
from tl_dla.inputs.models import require_eval, require_model
from tl_dla.inputs.positions import read_positions
from tl_dla.inputs.query import Query
from tl_dla.inputs.targets import Answers, read_targets, require_answer
from tl_dla.inputs.tokens import Input, read_prompts, texts_of
from tl_dla.model.reader import ModelReader
from tl_dla.model.stream import Kind

if TYPE_CHECKING:
    import plotly.graph_objects as go
_MOST_CANDIDATES = 1024
_CAUSE = (
    CAUSE
    + " Or a sublayer is no frozen linear map of what it reads; direct_logit_attribution works."
)


def _held_of(
    held: Float[Tensor, "point batch pos candidate source"], part: Callable[[Tensor], Tensor]
) -> Float[Tensor, "point b p c source"]:
    """What the stream holds, of a part of the result."""
    return part(held.movedim(-1, 1)).movedim(1, -1)


@dataclass(frozen=True, eq=False, repr=False)
class InputAttribution(Attribution):
    """What each token of the prompt, and each bias, wrote to a logit through everything.

    See `Attribution` for its rows.

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
        if not self.has_tokens:
            raise ArgumentError(
                "The flow is drawn over the prompt's tokens, and the cache came without them: pass"
                " the prompts as `input` beside it."
            )
        if not bool(self.positions.valid[b, p]):
            raise ArgumentError(f"Prompt {b} has no position {position} of those attributed.")
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


def attribute_inputs(
    model: Any,
    input: Input | None = None,
    answer_tokens: Answers | None = None,
    incorrect_tokens: Answers | None = None,
    *,
    mlp: Rule = "half",
    pos: Any = -1,
    cache: Any = None,
    candidate_tokens: str | int | Sequence[str | int] | Int[Tensor, " candidate"] | None = None,
    include_bias: bool = True,
    check: Check = "raise",
    attention_mask: Int[Tensor, "batch pos"] | Bool[Tensor, "batch pos"] | None = None,
    prepend_bos: bool | None = None,
    progress: bool = True,
) -> InputAttribution:
    """Split a logit, or a logit difference, into what each token of the prompt wrote to it.

    Args:
        model: a `HookedTransformer` or a `TransformerBridge`, in evaluation mode.
        input: as in `direct_logit_attribution`.
        answer_tokens: as in `direct_logit_attribution`.
        incorrect_tokens: as in `direct_logit_attribution`.
        mlp: how a gated MLP is frozen: `"gate"` (the activated gate is a constant, all goes to
            what it multiplies) or `"half"` (each factor takes half).
        pos: as in `direct_logit_attribution`.
        cache: an `ActivationCache` with every hook, to read in place of running the model.
        candidate_tokens: as in `direct_logit_attribution`.
        include_bias: whether `ln_final.b` and `b_U` are rows. The model's other biases always are.
        check: what a failed certificate does.
        attention_mask: as in `direct_logit_attribution`.
        prepend_bos: as in `direct_logit_attribution`.
        progress: whether a bar is shown where many positions or candidates are pulled in parts.

    Returns:
        An `InputAttribution`: rows `embed←5`, `pos_embed←5`, and every bias by the place where it
        is added (`3_attn_bias`, `3_b_V`, `3_ln1.b`, `3_mlp_bias`, `3_b_in`, `ln_final.b`, `b_U`).

    Raises:
        TokenError: for a prompt, answer or position that cannot be what was meant.
        ArgumentError: for other arguments that do not fit; a `ValueError`.
        UnsupportedModelError: for a part that cannot be frozen as a linear map, by its name.
        IncompleteCacheError: where the cache lacks hooks, which are named.
        ReconstructionError: where the rows do not add up to the model's own logit, or what a layer
            holds does not.

    Example:
        >>> from tl_dla import attribute_inputs, load_model
        >>> model = load_model("demo")
        >>> result = attribute_inputs(
        ...     model, "The Eiffel Tower is in the city of", " Paris", " London"
        ... )
        >>> result.reconstruction.passed
        True
    """
    if mlp not in ("gate", "half"):
        raise ArgumentError(f'mlp must be "gate" or "half"; {mlp!r} was given.')
    require_check(check)
    require_answer(answer_tokens, candidate_tokens)
    model = require_model(model)
    network = Network(ModelReader(model), mlp)
    options: dict[str, Any] = dict(prepend_bos=prepend_bos, attention_mask=attention_mask)
    if cache is None:
        require_eval(model)
        prompts = read_prompts(model, input, **options)
    else:
        cache = read_cache(model, cache)
        prompts = read_cached_prompts(model, input, cache, **options)
    positions = read_positions(pos, prompts)
    answers = (answer_tokens, incorrect_tokens, candidate_tokens)
    targets = read_targets(model, *answers, len(prompts.tokens), positions, texts_of(input))
    if len(targets.candidates or ()) > _MOST_CANDIDATES:
        raise ArgumentError(
            f"Each candidate is pulled back through the whole network, so at most"
            f" {_MOST_CANDIDATES} can be given; there are {len(targets.candidates or ())}:"
            " direct_logit_attribution takes any number."
        )
    has_batch = cache is None or cache.has_batch_dim
    query = Query(model, prompts, positions, targets, include_bias, has_batch)
    once = run(query, "component", cache=cache, taps=network.taps)
    with exact():
        result = _result(once, network, mlp, progress)
    return result.certified(check, _CAUSE)


# ---- the answer --------------------------------------------------------------------------------


def _result(once: Run, network: Network, mlp: Rule, progress: bool) -> InputAttribution:
    _require_understood(once)
    base, query = once.result(Attribution), once.query
    pulled = pull_all(once, network, directions(once), progress=progress)
    added, ratio = query.targets.added, once.rows.ratio
    ends = [
        RowGroup.one(group.keys[0], added(group.values[0] * ratio)) for group in once.rows.constants
    ]
    starts = [_tokens(name, held) for name, held in pulled.start.items()]
    # Forwards again: the pull met the last constant first.
    biases = [RowGroup.one(key, value) for key, value in reversed(pulled.biases.items())]
    logits = added(base.numbers.logits.to(ratio))
    ones, felt = torch.ones_like(logits), pulled.felt[-1].sqrt().to(logits)
    rows = Rows([*starts, *biases], ends, logits, ones, felt, felt)
    expected = logits
    if not query.include_bias:
        expected = expected - sum(group.values[0] for group in ends)
        rows = rows.without_constants()
    eps = max(network.reader.machine_eps, once.kept.machine_eps)
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
    return InputAttribution(rows.values, rows.keys, "input", *about, held=held, mlp=mlp)


def _tokens(name: str, held: Float[Tensor, "batch pos candidate source"]) -> RowGroup:
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
        held, above, felt = pulled.held[i], pulled.above[i], pulled.felt[i].sqrt().to(constant)
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
