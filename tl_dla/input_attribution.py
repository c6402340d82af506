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

See `tl_dla.core.network.step` for each line through the origin, with references.
"""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Bool, Int
from torch import Tensor

from tl_dla.analyses.inputs_ledger import InputLedger, ledger
from tl_dla.core.certificate import Check, require_check
from tl_dla.core.network.pull import Network
from tl_dla.core.network.step import Rule
from tl_dla.core.run import CAUSE, run
from tl_dla.errors import ArgumentError
from tl_dla.figures.attention_view import AttentionStyle
from tl_dla.inputs.models import require_model
from tl_dla.inputs.query import read_query
from tl_dla.inputs.targets import Answers, require_answer
from tl_dla.inputs.tokens import Input
from tl_dla.model.reader import ModelReader

if TYPE_CHECKING:
    from tl_dla.report.page import Explorer

_MOST_CANDIDATES = 1024
_CAUSE = (
    CAUSE
    + " Or a sublayer is no frozen linear map of what it reads; direct_logit_attribution works."
)


class InputAttribution(InputLedger):
    """What each token of the prompt, and each bias, wrote to a logit, and what can be asked of it.

    See `Attribution` for its rows, and `InputLedger` for `flow`, `plot_flow` and `effects`.
    """

    def report(
        self,
        path: str | PathLike[str],
        *,
        prompt: int = 0,
        k: int | None = None,
        attention: AttentionStyle = "patterns",
        command: str | None = None,
    ) -> Path:
        """Write one self-contained HTML page, the flow on it; see `tl_dla.report.page`."""
        from tl_dla.report.page import write_report

        return write_report(self, path, prompt=prompt, k=k, attention=attention, command=command)

    def explore(self, *, prompt: int = 0, k: int | None = None) -> "Explorer":
        """The same page in a notebook; see `DirectLogitAttribution.explore`."""
        from tl_dla.report.page import Explorer, Shown, page_of

        return Explorer(page_of(self, Shown(prompt, k), "result.explore()"))


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
    reader = ModelReader(model)
    options: dict[str, Any] = dict(prepend_bos=prepend_bos, attention_mask=attention_mask)
    answers = (answer_tokens, incorrect_tokens, candidate_tokens)
    query, cache = read_query(model, input, answers, pos, cache, include_bias, options)
    n_candidates = len(query.targets.candidates or ())
    if n_candidates > _MOST_CANDIDATES:
        raise ArgumentError(
            f"Each candidate is pulled back through the whole network, so at most"
            f" {_MOST_CANDIDATES} can be given; there are {n_candidates}: direct_logit_attribution"
            " takes any number."
        )
    # A cache holds its patterns already.
    network = Network(reader, mlp, query if cache is None else None)
    once = run(
        query, "component", cache=cache, taps=network.taps, within=network.within, reader=reader
    )
    result = ledger(once, network, InputAttribution, progress=progress)
    return result.certified(check, _CAUSE)
