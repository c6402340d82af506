"""Answers of several tokens, attributed token by token in one forward pass.

The model runs on the prompt with the answer after it. Position by position, what it wrote to the
logit of the answer's next token is attributed, and the steps are added up: rows of the sum add up
to the sum of the answer's logits. A baseline answer runs beside it, over its own tokens, and may
have another length. A sum of logits is not a log-probability: a step that all tokens gain at counts
too, which a baseline of the same length takes away in part.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_dla.core.certificate import Check, Reconstruction
from tl_dla.core.result import Attribution
from tl_dla.core.run import CAUSE, OWN_LOGIT, run
from tl_dla.errors import ArgumentError, TokenError
from tl_dla.inputs.models import require_eval, require_model
from tl_dla.inputs.positions import Positions
from tl_dla.inputs.query import Query
from tl_dla.inputs.selection import Unit, read_selection, require_unit
from tl_dla.inputs.targets import Targets, token_ids
from tl_dla.inputs.tokens import read_prompts, token_strings
from tl_dla.model.reader import ModelReader
from tl_dla.model.stream import Kind

if TYPE_CHECKING:
    import pandas as pd

Answer = str | Sequence[int] | Int[Tensor, " token"]


@dataclass(frozen=True, eq=False, repr=False)
class AnswerAttribution:
    """What each part of the model wrote to an answer's logits, per step and summed.

    Attributes:
        steps: the answers' attribution, `[row, prompt, step]`; the baselines' follow as further
            prompts. NaN where an answer has fewer steps than others.
        answers: each prompt's answer, token by token.
        baselines: each prompt's baseline, token by token; empty without a baseline.
    """

    steps: Attribution
    answers: list[list[str]]
    baselines: list[list[str]]

    @property
    def labels(self) -> list[str]:
        """The rows' names."""
        return self.steps.labels

    @property
    def kinds(self) -> list[Kind]:
        """What each row is."""
        return self.steps.kinds

    @property
    def attribution(self) -> Float[Tensor, "row prompt"]:
        """Each row summed over the answer's steps, less the baseline's."""
        return self._summed(self.steps.attribution)

    @property
    def logit(self) -> Float[Tensor, " prompt"]:
        """The model's own logits, summed over the answer's steps, less the baseline's."""
        return self._summed(self.steps.logit)

    @property
    def reconstruction(self) -> Reconstruction:
        """The certificate of every step."""
        return self.steps.reconstruction

    def _summed(self, x: Float[Tensor, "... prompts step"]) -> Float[Tensor, "... prompt"]:
        total, n = x.nansum(-1), len(self.answers)
        return total[..., :n] - total[..., n:] if self.baselines else total

    def __getitem__(self, label: str) -> Float[Tensor, " prompt"]:
        """One row, by its label."""
        return self._summed(self.steps[label])

    def top(
        self, k: int = 5, *, kind: Kind | None = None, prompt: int | None = None
    ) -> list[tuple[str, float]]:
        """The k rows of the largest magnitude as `(label, value)`, largest first.

        Args:
            k: how many.
            kind: only rows of this kind, such as `"head"`.
            prompt: which prompt of a batch.

        Raises:
            ArgumentError: where there are several prompts and none is chosen.
        """
        if prompt is None and len(self.answers) > 1:
            raise ArgumentError(f"There are {len(self.answers)} prompts: say which, with prompt=.")
        values = self.attribution[:, prompt or 0].tolist()
        named = zip(self.labels, values, self.kinds, strict=True)
        rows = [(label, value) for label, value, own in named if kind in (None, own)]
        return sorted(rows, key=lambda row: -abs(row[1]))[:k]

    def to_dataframe(self) -> "pd.DataFrame":
        """A line per row × prompt × step.

        Columns: `label`, `kind`, `layer`, `prompt`, `answer` (`answer` or `baseline`), `step`,
        `token` (the answer's token at that step), `attribution` and `logit` (the model's own).
        """
        import pandas as pd

        n, frames = len(self.answers), []
        for row, tokens in enumerate([*self.answers, *self.baselines]):
            for step, token in enumerate(tokens):
                frame = pd.DataFrame({"label": self.labels, "kind": self.kinds})
                frame["layer"] = pd.array(self.steps.layers, dtype="Int64")
                frame["prompt"], frame["answer"] = row % n, "baseline" if row >= n else "answer"
                frame["step"], frame["token"] = step, token
                frame["attribution"] = self.steps.attribution[:, row, step].cpu().numpy()
                frame["logit"] = float(self.steps.logit[row, step])
                frames.append(frame)
        return pd.concat(frames, ignore_index=True)

    def __repr__(self) -> str:
        """The rows that matter for the first prompt, and the certificate."""
        title = f"AnswerAttribution: {''.join(self.answers[0])!r}"
        title += f" − {''.join(self.baselines[0])!r}" if self.baselines else ""
        lines = [f'{title}, unit="{self.steps.unit}", {len(self.answers[0])} steps']
        rows = self.top(8, prompt=0)
        width = max(len(label) for label, _ in rows)
        lines += [f"  {label:>{width}}  {value:+9.4f}" for label, value in rows]
        lines.append(
            f"  {'all rows':>{width}}  {float(self.logit[0]):+9.4f}   {OWN_LOGIT}s, summed"
        )
        return "\n".join([*lines, f"  {self.reconstruction}"])


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
            or token ids; or a list of such, one per prompt.
        baseline: another answer, whose logits are subtracted; its length may differ.
        unit: as in `direct_logit_attribution`.
        layers: as in `direct_logit_attribution`.
        heads: as in `direct_logit_attribution`.
        top_neurons: as in `direct_logit_attribution`.
        check: what a failed certificate does.
        prepend_bos: as in `model.to_tokens`, for strings.

    Raises:
        TokenError: for an empty answer, as many answers as there are not prompts, or a prompt that
            with its answer is longer than the model's context.
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
    require_unit(unit)
    model = require_model(model)
    require_eval(model)
    selection = read_selection(ModelReader(model), unit, layers, heads, top_neurons)
    given = read_prompts(model, prompt, prepend_bos=prepend_bos)
    starts = [row[: int(n)] for row, n in zip(given.packed, given.length, strict=True)]
    wanted = [_answers(model, answer, len(starts), "answer")]
    if baseline is not None:
        wanted.append(_answers(model, baseline, len(starts), "baseline"))
    flat = [ids for answers in wanted for ids in answers]
    # What is asked of the last token of an answer is asked before it: the model need not read it.
    rows = [
        torch.cat([start, ids[:-1]]) for start, ids in zip(starts * len(wanted), flat, strict=True)
    ]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows], device=tokens.device)
    mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
    prompts = read_prompts(model, tokens, attention_mask=mask)
    ids = torch.nn.utils.rnn.pad_sequence(flat, batch_first=True)
    step = torch.arange(ids.shape[1], device=ids.device)
    valid = step < torch.tensor([len(x) for x in flat], device=ids.device)[:, None]
    first = torch.tensor([len(start) - 1 for start in starts * len(wanted)], device=ids.device)
    index = torch.where(valid, first[:, None] + step, 0)
    positions = Positions(index, valid, False, False)
    targets = Targets(ids[..., None], torch.ones(1, 1, dtype=torch.float64))
    once = run(Query(model, prompts, positions, targets), unit, selection)
    steps = once.result(Attribution).certified(check, CAUSE)
    texts = [[token_strings(model, x) for x in answers] for answers in wanted]
    return AnswerAttribution(steps, texts[0], texts[1] if baseline is not None else [])


def _answers(
    model: Any, given: Answer | Sequence[Answer], n: int, name: str
) -> list[Int[Tensor, " token"]]:
    """One answer's token ids per prompt."""
    several = not isinstance(given, str | Tensor) and not all(isinstance(x, int) for x in given)
    answers: list[Any] = list(given) if several else [given] * n
    if len(answers) != n:
        raise TokenError(f"{len(answers)} {name}s were given for {n} prompts: give one for each.")
    ids = [_ids(model, x) for x in answers]
    if any(len(x) == 0 for x in ids):
        raise TokenError(f"The {name} is no token: give one token or more.")
    return ids


def _ids(model: Any, answer: Answer) -> Int[Tensor, " token"]:
    if isinstance(answer, str):
        answer = model.to_tokens(answer, prepend_bos=False, truncate=False)[0] if answer else []
    if not len(answer):
        return torch.zeros(0, dtype=torch.long)
    return token_ids(model, answer if isinstance(answer, Tensor) else list(answer)).flatten()
