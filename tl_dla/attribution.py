"""Direct logit attribution: the parts of a model that wrote a logit, exactly.

    logit = sum over rows,      row = c · w / s   for what a component wrote, c

with the final norm's scale s frozen at its value in this forward pass (see `readout.py`), and two
rows that no component writes: `ln_final.b` = β · u and `b_U`. In logits. A row says what a part
wrote *directly*: nothing about what later parts made of it, nor what removing it would do.
"""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_dla.analyses.neuron_curves import NeuronCurves, neuron_curves
from tl_dla.analyses.promotion import PromotedTokens, promoted_tokens
from tl_dla.core.by_hand import by_hand
from tl_dla.core.certificate import Check, require_check
from tl_dla.core.final_readout import readout_of
from tl_dla.core.readout import Readout
from tl_dla.core.result import Attribution
from tl_dla.core.run import CAUSE, run
from tl_dla.core.view import view_of
from tl_dla.effects.audit import Audit, audit
from tl_dla.effects.interventions import Group
from tl_dla.effects.substitutes import Ablation, At
from tl_dla.errors import ArgumentError
from tl_dla.figures.attention_view import AttentionStyle
from tl_dla.inputs.dictionaries import Dictionaries
from tl_dla.inputs.models import require_model
from tl_dla.inputs.query import read_query
from tl_dla.inputs.selection import Unit, read_selection, require_unit, with_dictionaries
from tl_dla.inputs.targets import Answers, require_answer
from tl_dla.inputs.tokens import Input
from tl_dla.model.reader import ModelReader

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from tl_dla.report.page import Explorer

_BY_HAND = ("attribution", "labels", "unit")


class DirectLogitAttribution(Attribution):
    """What each part of the model wrote to a logit, and what can be asked of it next.

    See `Attribution` for its rows. `plot`, `top` and the tables are there too; what needs the model
    again is here. `DirectLogitAttribution(attribution, labels, unit)`, as of TransformerLens's own
    class, makes one of numbers alone: it ranks, tabulates and draws them, and is not certified.
    """

    def __init__(self, *args: Any, **fields: Any) -> None:
        named = dict(zip(_BY_HAND, args, strict=False)) | fields
        if len(args) + len(fields) == len(_BY_HAND) and named.keys() == set(_BY_HAND):
            args, fields = (), by_hand(**named)
        super().__init__(*args, **fields)

    @property
    def readout(self) -> Readout:
        """The readout of the final residual stream.

        `readout.of(stack)` of what rows wrote is the attribution (see `decompose`); the bias rows
        are not in the stream.

        Raises:
            ArgumentError: for a result over several candidates, which has a readout for each, and
                for a path, whose rows are not in the final stream.
        """
        return readout_of(self)

    @property
    def log_prob_diff(self) -> Float[Tensor, "*batch_and_pos"]:
        """The answer's log-probability less the mean of the incorrect ones', in nats.

        It is the logit difference: log-softmax takes the same number from every logit, so that the
        rows of a difference are parts of a difference of log-probabilities too. Those of a single
        logit are not parts of its log-probability.

        Raises:
            ArgumentError: for a result that is not of a logit difference.
        """
        weights = self.targets.weights
        balanced = weights is not None and bool((weights.sum(1).abs() < 1e-9).all())
        if self.hops or self.subject is not None or not balanced:
            raise ArgumentError(
                "A single logit says nothing of log-probabilities, a difference does: attribute"
                " with incorrect_tokens."
            )
        return self.query.shaped(self.targets.added(self.numbers.logits))

    def promoted_tokens(
        self, label: str, k: int = 10, *, prompt: int | None = None, position: int | None = None
    ) -> PromotedTokens:
        """The tokens whose logits a row raises and lowers most, whatever was attributed.

        Args:
            label: the row.
            k: how many tokens of each.
            prompt: which prompt of a batch.
            position: which of the attributed positions, an index into them.

        Raises:
            ArgumentError: for a row that no single part of the model writes, or where `prompt` or
                `position` is needed.
        """
        return promoted_tokens(self, label, k, prompt=prompt, position=position)

    def neuron_curves(self, layer: int | None = None, *, cache: Any = None) -> NeuronCurves:
        """The neurons of one layer, of a `unit="neuron"` result, with their activations.

        See `tl_dla.analyses.neuron_curves`.

        Example:
            >>> from tl_dla import direct_logit_attribution, load_model
            >>> prompt, capitals = "The Eiffel Tower is in the city of", [" Paris", " London"]
            >>> options = dict(candidate_tokens=capitals, unit="neuron", layers=3)
            >>> neurons = direct_logit_attribution(
            ...     load_model("demo"), prompt, **options
            ... ).neuron_curves()
            >>> len(neurons.top(8)), neurons.share(8) < 1
            (8, True)
        """
        return neuron_curves(self, layer, cache=cache)

    def plot_profile(
        self,
        *,
        layers: Sequence[int] | int | None = None,
        contrast: bool = False,
        prompt: int | None = None,
        candidate: str | int | None = None,
        title: str | None = None,
        width: int | None = None,
        height: int | None = None,
    ) -> "go.Figure":
        """What the rows wrote, along the stream: a line for each candidate, or the mean of prompts.

        Args:
            layers: a zoom on the rows of these layers; negative ones count from the end.
            contrast: what a row says of a candidate and not of all: less its mean over them.
            prompt: only this prompt of a batch.
            candidate: only this one of several candidate tokens, by its text or its index.
            title: in place of the figure's own; `""` for no heading.
            width: in pixels; as wide as the page by default.
            height: in pixels; as high as what is drawn by default.

        Raises:
            ArgumentError: for what the result does not have, or a contrast of one candidate.
        """
        from tl_dla.figures.charts import Look
        from tl_dla.figures.lines import profile

        look = Look(title, width, height)
        return profile(view_of(self, prompt, candidate), layers, contrast, look)

    def plot_sources(
        self,
        *,
        prompt: int | None = None,
        candidate: str | int | None = None,
        k: int = 40,
        title: str | None = None,
        width: int | None = None,
        height: int | None = None,
    ) -> "go.Figure":
        """Head × source token, of a `unit="source"` result: what each head moved from each token.

        A line for each head and candidate; several prompts are their mean, token by token.

        Args:
            prompt: only this prompt of a batch.
            candidate: only this one of several candidate tokens, by its text or its index.
            k: how many lines, those that moved most.
            title: in place of the figure's own; `""` for no heading.
            width: in pixels; as wide as the page by default.
            height: in pixels; as high as what is drawn by default.

        Raises:
            ArgumentError: for a result without rows of source tokens, or k < 1.
        """
        from tl_dla.figures.charts import Look
        from tl_dla.figures.source_map import source_map

        return source_map(view_of(self, prompt, candidate), k, Look(title, width, height))

    def audit(
        self,
        k: int = 10,
        *,
        rows: Sequence[Group] | None = None,
        ablation: Ablation = "zero",
        at: At = "position",
        reference: Any = None,
        batch_size: int = 32,
        progress: bool = True,
    ) -> Audit:
        """The k largest rows beside what intervention says of them; see `tl_dla.effects.audit`."""
        return audit(
            self,
            k,
            rows=rows,
            ablation=ablation,
            at=at,
            reference=reference,
            batch_size=batch_size,
            progress=progress,
        )

    def report(
        self,
        path: str | PathLike[str],
        *,
        prompt: int = 0,
        k: int | None = None,
        attention: AttentionStyle = "patterns",
        audit: Audit | None = None,
        command: str | None = None,
    ) -> Path:
        """Write one self-contained HTML page; see `tl_dla.report.page.write_report`."""
        from tl_dla.report.page import write_report

        return write_report(
            self, path, prompt=prompt, k=k, attention=attention, audit=audit, command=command
        )

    def explore(
        self, *, prompt: int = 0, k: int | None = None, audit: Audit | None = None
    ) -> "Explorer":
        """The same page in a notebook, in a frame of its own that needs no network.

        Press a head, a row or a token to see what stands behind it.

        Args:
            prompt: the prompt of a batch whose lens and attention are shown first.
            k: how many heads of each sign to show with their attention; 3 by default.
            audit: what intervention says of the rows (`result.audit()`), to be shown beside.
        """
        from tl_dla.report.page import Explorer, Shown, page_of

        return Explorer(page_of(self, Shown(prompt, k, audit=audit), "result.explore()"))


def direct_logit_attribution(
    model: Any,
    input: Input | None = None,
    answer_tokens: Answers | None = None,
    incorrect_tokens: Answers | None = None,
    *,
    unit: Unit = "component",
    pos: Any = -1,
    cache: Any = None,
    candidate_tokens: str | int | Sequence[str | int] | Int[Tensor, " candidate"] | None = None,
    layers: int | Sequence[int] | None = None,
    heads: str | Sequence[str] | None = None,
    top_neurons: int | None = None,
    include_remainder: bool = False,
    dictionaries: Dictionaries | None = None,
    top_latents: int | None = None,
    include_bias: bool = True,
    check: Check = "raise",
    attention_mask: Int[Tensor, "batch pos"] | Bool[Tensor, "batch pos"] | None = None,
    prepend_bos: bool | None = None,
) -> DirectLogitAttribution:
    """Split a logit, or a logit difference, into what each part of the model wrote to it.

    The same name and parameters as `transformer_lens.tools.analysis.direct_logit_attribution`
    (TransformerLens 4), for any model: folded or not, LayerNorm or RMSNorm. The definition is that
    of Elhage et al. 2021 (https://transformer-circuits.pub/2021/framework) and Wang et al. 2022
    (https://arxiv.org/abs/2211.00593), with the norm's γ, β and b_U kept.

    Args:
        model: a `HookedTransformer` or a `TransformerBridge`, in evaluation mode.
        input: a prompt, a list of prompts of any lengths, or token ids `[pos]` or `[batch, pos]`.
            May be left out where a `cache` is given.
        answer_tokens: the token whose logit is attributed: a string, an id, one per prompt, or a
            tensor `[batch]` or `[batch, pos]`.
        incorrect_tokens: the baseline, subtracted: the same forms, or several per prompt (the mean
            of their logits), or `"mean"` for the mean logit of the vocabulary.
        unit: `"component"` (embeddings, attention and MLP outputs, as `decompose_resid`),
            `"layer"` (the stream after each sublayer, as `accumulated_resid(incl_mid=True)`),
            `"head"` (heads, as `stack_head_results`, then everything else), `"neuron"` (neurons, as
            `stack_neuron_results`, or experts, then everything else), `"source"` (what each head
            moved from each token, `L9H9←5`, then everything else) or `"latent"` (what the
            dictionaries' hooks hold as latents, `2_post:17`, then everything after).
        pos: positions of each prompt, counted over its real tokens: an integer, a list, a slice, a
            `Slice`, or None for all of them.
        cache: an `ActivationCache` to read in place of running the model. Its final residual
            stream then stands in for the model's logits.
        candidate_tokens: in place of `answer_tokens`: attribute to each of these tokens, on a last
            axis of the result; `"all"` for the whole vocabulary (`["all"]` is the word).
        layers: the layers that are split, for `unit="head"` (the others keep their `attn_out`),
            `unit="neuron"` and `unit="source"`; all by default.
        heads: heads such as `["L9H9"]`. For `unit="head"`: those with a row of their own; the
            others of their layers share one, `9_other_heads`. For `unit="source"`: those that are
            split by source token; every other head keeps its row.
        top_neurons: how many neurons have a row of their own, for `unit="neuron"`: those of the
            largest mean absolute attribution. The others share a row per layer,
            `3_other_neurons`.
        include_remainder: for `unit="head"`: everything but the heads as one row, `remainder`, as
            TransformerLens's own result has it.
        dictionaries: for `unit="latent"`: `{hook: dictionary}`, and for transcoders
            `{(hook read, hook explained): transcoder}`. Those of sae-lens work, and anything with
            `encode` and `decode`. The hook explained is one of the stream (`hook_resid_post`), of
            what a sublayer adds to it (`hook_mlp_out`), or `attn.hook_z`.
        top_latents: how many latents have a row of their own, as `top_neurons`; all that are
            active by default.
        include_bias: whether `ln_final.b` and `b_U` are rows. Without them the rows of a folded
            model are TransformerLens's own.
        check: what a failed certificate does.
        attention_mask: which tokens are real, for padded token ids.
        prepend_bos: as in `model.to_tokens`, for strings.

    Returns:
        A `DirectLogitAttribution`, with `attribution` `[row, *batch_and_pos]` in logits.

    Raises:
        TokenError: for a prompt, answer or position that cannot be what was meant.
        ArgumentError: for other arguments that do not fit; a `ValueError`.
        UnsupportedModelError: where the unit does not work on the model.
        IncompleteCacheError: where the cache lacks hooks, which are named.
        ReconstructionError: where the rows do not add up to the model's own logit.

    Example:
        >>> from tl_dla import direct_logit_attribution, load_model
        >>> model = load_model("demo")
        >>> result = direct_logit_attribution(
        ...     model, "The Eiffel Tower is in the city of", " Paris", " London"
        ... )
        >>> result.attribution.shape == (len(result.labels), 1)
        True
        >>> result.reconstruction.passed
        True
    """
    require_unit(unit)
    require_check(check)
    require_answer(answer_tokens, candidate_tokens)
    model = require_model(model)
    reader = ModelReader(model)
    selection = read_selection(reader, unit, layers, heads, top_neurons, include_remainder)
    selection = with_dictionaries(selection, reader, unit, dictionaries, top_latents)
    options: dict[str, Any] = dict(prepend_bos=prepend_bos, attention_mask=attention_mask)
    answers = (answer_tokens, incorrect_tokens, candidate_tokens)
    query, cache = read_query(model, input, answers, pos, cache, include_bias, options)
    once = run(query, unit, selection, cache=cache, reader=reader)
    return once.result(DirectLogitAttribution).certified(check, CAUSE)
