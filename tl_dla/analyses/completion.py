"""Answers of several tokens, attributed token by token in one forward pass.

The model runs on the prompt with the answer after it. Position by position, what it wrote to the
logit of the answer's next token is attributed, and the steps are added up: rows of the sum add up
to the sum of the answer's logits. A baseline answer runs beside it, over its own tokens, and may
have another length. A sum of logits is not a log-probability: a step that all tokens gain at counts
too, which a baseline of the same length takes away in part.
"""

import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tl_dla.analyses.answer import AnswerAttribution
from tl_dla.analyses.chat import is_answered, is_conversation, read_answered, read_start
from tl_dla.analyses.odds import Odds, OddsReader
from tl_dla.core.certificate import Check, require_check
from tl_dla.core.result import Attribution
from tl_dla.core.rounding import logits_tolerance
from tl_dla.core.run import CAUSE, run
from tl_dla.errors import ArgumentError, TokenError, UnsupportedModelError
from tl_dla.inputs.models import require_eval, require_model
from tl_dla.inputs.positions import Positions
from tl_dla.inputs.query import Query
from tl_dla.inputs.selection import Selection, Unit, read_selection, require_unit
from tl_dla.inputs.targets import Targets, token_ids
from tl_dla.inputs.tokens import Prompts, read_prompts, require_unicode, token_strings
from tl_dla.model.hooks import is_bridge
from tl_dla.model.reader import ModelReader

Answer = str | Sequence[int] | Int[Tensor, "..."]
Against = Literal["mean", "runner-up"]


def attribute_answer(
    model: Any,
    prompt: str | Sequence[str] | Int[Tensor, "*batch pos"],
    answer: Answer | Sequence[Answer],
    baseline: Answer | Sequence[Answer] | None = None,
    *,
    unit: Unit = "component",
    layers: Sequence[int] | None = None,
    heads: Sequence[str] | None = None,
    top_neurons: int | None = None,
    check: Check = "raise",
    prepend_bos: bool | None = None,
) -> AnswerAttribution:
    """Attribute an answer of one or several tokens, in one forward pass over prompt and answer.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`.
        prompt: as `input` in `direct_logit_attribution`.
        answer: what follows the prompt: a string of any number of tokens (with its leading space),
            or token ids; or a list of such, or ids `[prompt, token]`, one per prompt.
        baseline: another answer, whose logits are subtracted; its length may differ, which is
            warned about. `"mean"` is the vocabulary's mean logit, and `"runner-up"` the likeliest
            other token at each step (the model then runs twice); give ids to mean those words.
        unit: as in `direct_logit_attribution`.
        layers: as in `direct_logit_attribution`.
        heads: as in `direct_logit_attribution`.
        top_neurons: as in `direct_logit_attribution`.
        check: what a failed certificate does.
        prepend_bos: as in `model.to_tokens`, for strings.

    Raises:
        TokenError: for an empty answer, as many answers as there are not prompts, ids that may be
            one answer or one for each prompt, or a prompt that with its answer is longer than the
            model's context.
        ReconstructionError: where the rows do not add up to the model's own logits.

    Example:
        >>> from tl_dla import attribute_answer, load_model
        >>> model = load_model("demo")
        >>> result = attribute_answer(model, "The Eiffel Tower is in the city of", " Paris.")
        >>> result.answers
        [[' Paris', '.']]
        >>> result.reconstruction.passed
        True
    """
    about = _About.of(model, unit, layers, heads, top_neurons, check)
    given = read_prompts(about.model, prompt, prepend_bos=prepend_bos)
    starts = given.rows
    answers = _answers(about.model, answer, len(starts), "answer")
    pairs = zip(starts, answers, strict=True)
    segments = [["prompt"] * len(start) + ["answer"] * len(own) for start, own in pairs]
    against = next(
        (x for x in get_args(Against) if isinstance(baseline, str) and x == baseline), None
    )
    if against is not None:
        return about.attribute(starts, answers, segments, against=against)
    others = None if baseline is None else _answers(about.model, baseline, len(starts), "baseline")
    found = about.attribute(starts, answers, segments, others)
    if found.remark:
        warnings.warn(found.remark, stacklevel=2)
    return found


def attribute_completion(
    model: Any,
    prompt: str | Sequence[Mapping[str, str]] | Sequence[int] | Int[Tensor, "*batch pos"],
    completion: str | Sequence[int] | Int[Tensor, " new"] | None = None,
    *,
    max_new_tokens: int = 32,
    unit: Unit = "component",
    baseline: Against | None = None,
    layers: Sequence[int] | None = None,
    heads: Sequence[str] | None = None,
    top_neurons: int | None = None,
    check: Check = "raise",
    prepend_bos: bool | None = None,
    **generate: Any,
) -> AnswerAttribution:
    """Attribute every token of what a model says, in one forward pass over prompt and completion.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`.
        prompt: a text or token ids; or a conversation, messages with `role` and `content`, which
            the tokenizer's own chat template writes.
        completion: what was said, as text or ids. Without it the model says it now, greedily; of a
            conversation that ends with the assistant's message, that message.
        max_new_tokens: how many tokens the model says at most.
        unit: as in `direct_logit_attribution`.
        baseline: what each token is compared with: nothing, the vocabulary's `"mean"` logit, or the
            `"runner-up"`, the likeliest other token (the model then runs once more).
        layers: as in `direct_logit_attribution`.
        heads: as in `direct_logit_attribution`.
        top_neurons: as in `direct_logit_attribution`.
        check: what a failed certificate does.
        prepend_bos: as in `model.to_tokens`, for a text.
        **generate: passed on to `model.generate`, as `do_sample=True, temperature=0.7`.

    Returns:
        The completion's rows token by token (`.steps`), its log-probabilities and ranks, and the
        segment (`system`, `user`, `assistant`, `template`) of every token.

    Raises:
        TokenError: for a prompt or completion that cannot be read, or is longer than the context.
        ArgumentError: for other arguments that do not fit.
        UnsupportedModelError: where what `model.generate` said is not what the model itself would.
        ReconstructionError: where the rows do not add up to the model's own logits.

    Example:
        >>> from tl_dla import attribute_completion, load_model
        >>> model = load_model("demo")
        >>> result = attribute_completion(
        ...     model, "The Eiffel Tower is in the city of", max_new_tokens=2
        ... )
        >>> result.answers
        [[' Paris', '.']]
        >>> result.ranks.tolist()
        [[0, 0]]
    """
    if baseline not in (None, *get_args(Against)):
        raise ArgumentError(
            f'baseline must be None, "mean" or "runner-up"; {baseline!r} was given. Another text'
            " is a baseline of attribute_answer."
        )
    about = _About.of(model, unit, layers, heads, top_neurons, check)
    model, role = about.model, "assistant" if is_conversation(prompt) else "answer"
    said = completion is not None or is_answered(prompt)
    _require_options(model, generate, said)
    if completion is None and is_answered(prompt):
        start, ids, segments = read_answered(model, prompt)
    else:
        start, segments = read_start(model, prompt, prepend_bos)
        if completion is None:
            ids = _generated(model, start, max_new_tokens, generate)
        else:
            [ids] = _answers(model, completion, 1, "completion")
        segments = [*segments, *[role] * len(ids)]
    found = about.attribute([start], [ids], [segments], against=baseline)
    if not (said or generate) and found.ranks.any():
        _require_likeliest(about.attribute([start], [ids], [segments], against="runner-up"))
    return found


def _require_options(model: Any, options: Mapping[str, Any], said: bool) -> None:
    """Raise for what `model.generate` would leave out without a word: a mistyped argument."""
    known = inspect.signature(model.generate).parameters
    for name in options:
        if said or name not in known:
            reason = "the completion is there already" if said else "it has none of that name"
            raise ArgumentError(
                f"{name}= is no argument of attribute_completion, and for model.generate {reason}."
            )


def _generated(
    model: Any, start: Int[Tensor, " token"], n: int, options: Mapping[str, Any]
) -> Int[Tensor, " new"]:
    """What the model says: greedily, where nothing else is asked for."""
    if n < 1 or len(start) + n > model.cfg.n_ctx:
        raise TokenError(
            f"max_new_tokens must be 1 to {model.cfg.n_ctx - len(start)}, the room that the prompt"
            f" leaves in the model's context; {n} was given."
        )
    known = [getattr(one, "eos_token_id", None) for one in (model.tokenizer, model.cfg)]
    ends = any(one is not None for one in [*known, options.get("eos_token_id")])
    given = {"do_sample": False, "verbose": False, "stop_at_eos": ends, **options}
    with torch.no_grad():
        if _forgets(model, start):
            given["use_past_kv_cache"] = False
        out = model.generate(start[None], max_new_tokens=n, return_type="tokens", **given)
    return out[0, len(start) :]


def _forgets(model: Any, start: Int[Tensor, " token"]) -> bool:
    """Whether attention leaves the keys and values it is given to keep empty.

    Every token said after the first would then see itself alone. TransformerLens 4.3 does so with
    transformers 5.24, which calls that argument by another name.
    """
    if not is_bridge(model):
        return False
    output = model.original_model(start[None, :1], use_cache=True)
    kept = getattr(getattr(output, "past_key_values", None), "layers", [])
    return any(x.get_seq_length() == 0 for x in kept if hasattr(x, "get_seq_length"))


def _require_likeliest(found: AnswerAttribution) -> None:
    """Raise where a runner-up, with which each token is compared, is likelier beyond rounding."""
    steps, logits = found.steps, found.steps.numbers.logits[0]
    eps = ModelReader(steps.model).machine_eps
    allowed = steps.reconstruction.tolerance[0] + logits_tolerance(eps) * logits.abs().amax()
    wrong = (logits[:, 1] - logits[:, 0] > allowed).nonzero()
    if len(wrong):
        n = int(wrong[0])
        raise UnsupportedModelError(
            f"model.generate said {found.answers[0][n]!r} as token {n} of its completion, which the"
            f" model's own pass over the same text gives rank {int(found.ranks[0, n])} (0 is the"
            " likeliest): it forgets earlier tokens as it speaks, or sees later ones. Give"
            " use_past_kv_cache=False, or the text as completion."
        )


# ---- the run -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _About:
    """What is asked of the model, whatever the answers."""

    model: Any
    unit: Unit
    selection: Selection
    check: Check

    @staticmethod
    def of(
        model: Any, unit: Unit, layers: Any, heads: Any, top_neurons: Any, check: Check
    ) -> "_About":
        """The arguments, checked."""
        require_unit(unit)
        require_check(check)
        model = require_model(model)
        require_eval(model)
        selection = read_selection(ModelReader(model), unit, layers, heads, top_neurons)
        return _About(model, unit, selection, check)

    def attribute(
        self,
        starts: Sequence[Int[Tensor, " _"]],
        answers: Sequence[Int[Tensor, " _"]],
        segments: list[list[str]],
        others: Sequence[Int[Tensor, " _"]] | None = None,
        against: Against | None = None,
    ) -> AnswerAttribution:
        """Run the prompts with their answers, and with other texts where there are such."""
        model, n = self.model, len(starts)
        flat = [*answers, *(others or [])]
        prompts, positions, ids = _laid_out(model, [*starts] * (1 if others is None else 2), flat)
        query = Query(model, prompts, positions, _targets(ids, None))
        if against == "runner-up":
            reads = OddsReader(model, ids)
            once = run(query, "component", taps=reads.taps)
            likeliest = reads.odds(once).runner_up.clamp(min=0).to(ids)
            ids = torch.cat([ids, likeliest[..., None]], -1)
        query = Query(model, prompts, positions, _targets(ids, against))
        reads = OddsReader(model, ids[..., :1])
        once = run(query, self.unit, self.selection, taps=reads.taps)
        whole = once.result(Attribution).certified(self.check, CAUSE)
        odds, steps, other = reads.odds(once), whole, None
        if others is not None:
            own, rest = (slice(0, n), slice(n, 2 * n))
            steps, other = (once.part(at, query.part(at)).result(Attribution) for at in (own, rest))
            odds = Odds(*(x[own] for x in vars(odds).values()))
        texts = [token_strings(model, x) for x in flat]
        certificate = whole.reconstruction
        return AnswerAttribution(
            steps, other, texts[:n], texts[n:], against, certificate, odds, segments
        )


def _laid_out(
    model: Any, starts: Sequence[Int[Tensor, " _"]], answers: Sequence[Int[Tensor, " _"]]
) -> tuple[Prompts, Positions, Int[Tensor, "prompt step 1"]]:
    """Prompts with their answers, the positions before each answer's tokens, and those tokens."""
    # What is asked of the last token of an answer is asked before it: the model need not read it.
    rows = [torch.cat([start, ids[:-1]]) for start, ids in zip(starts, answers, strict=True)]
    tokens, mask = _padded(rows)
    prompts = read_prompts(model, tokens, attention_mask=mask)
    ids, valid = _padded(answers)
    step = torch.arange(ids.shape[1], device=ids.device)
    first = torch.tensor([len(start) - 1 for start in starts], device=ids.device)
    index = torch.where(valid, first[:, None] + step, 0)
    return prompts, Positions(index, valid, False, False), ids[..., None]


def _padded(
    rows: Sequence[Int[Tensor, " _"]],
) -> tuple[Int[Tensor, "row token"], Bool[Tensor, "row token"]]:
    """The rows under each other, and which tokens are theirs."""
    real = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return pad_sequence(list(rows), batch_first=True), real.bool()


def _targets(ids: Int[Tensor, "prompt step token"], against: Against | None) -> Targets:
    """Each step's token, less what it is compared with."""
    weights = [[1.0]] if against is None else [[1.0, -1.0]]
    return Targets(
        ids, torch.tensor(weights, dtype=torch.float64, device="cpu"), None, against == "mean"
    )


# ---- what a user wrote -------------------------------------------------------------------------


def _answers(
    model: Any, given: Answer | Sequence[Answer], n: int, name: str
) -> list[Int[Tensor, " _"]]:
    """One answer's token ids per prompt."""
    _require_ids(given, name)
    if isinstance(given, Tensor):
        if given.ndim not in (1, 2):
            raise TokenError(
                f"The {name} as a tensor is ids [token], or [prompt, token] with one for each"
                f" prompt; it has shape {tuple(given.shape)}."
            )
        given = list(given) if given.ndim == 2 else given.tolist()
    several = not isinstance(given, str) and not all(isinstance(x, Integral) for x in given)
    if not (isinstance(given, str) or several) and len(given) == n > 1:
        raise TokenError(
            f"{given} may be one {name} of {n} tokens, or a token for each of the {n} prompts:"
            f" give [{list(given)}] * {n} to mean the one, {[[x] for x in given]} the other."
        )
    answers: list[Any] = list(given) if several else [given] * n
    if len(answers) != n:
        raise TokenError(f"{len(answers)} {name}s were given for {n} prompts: give one for each.")
    for answer in answers:
        _require_ids(answer, name)
    ids = [_ids(model, x) for x in answers]
    if any(len(x) == 0 for x in ids):
        raise TokenError(f"The {name} is no token: give one token or more.")
    return ids


def _require_ids(given: Any, name: str) -> None:
    if isinstance(given, bytes) or not isinstance(given, str | Tensor | Sequence):
        raise TokenError(f"The {name} must be a text or token ids, as [5, 9]; {given!r} was given.")


def _ids(model: Any, answer: Answer) -> Int[Tensor, " token"]:
    if isinstance(answer, str):
        require_unicode(answer)
        answer = model.to_tokens(answer, prepend_bos=False, truncate=False)[0] if answer else []
    if not len(answer):
        return torch.zeros(0, dtype=torch.long)
    return token_ids(model, answer).flatten()
