"""What each part of a model wrote to an answer: token by token, and added up.

Rows split logits, because logits are linear in what parts wrote. A log-probability is the logit
less the log-sum-exp of all logits, which is not: it stands beside the rows, with the token's rank.
Against the mean of the vocabulary or the runner-up, rows split a difference of logits, in which
what all tokens gain alike cancels; the mean is linear again, and the runner-up is what the model
would have said instead.
"""

from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_dla.analyses.odds import Odds
from tl_dla.core.certificate import Reconstruction
from tl_dla.core.choice import read_choice
from tl_dla.core.files import write_page
from tl_dla.core.ranking import ranked, rows_to_rank
from tl_dla.core.result import Attribution
from tl_dla.core.saved import Savable
from tl_dla.core.view import prompt_tokens, view_of
from tl_dla.errors import ArgumentError
from tl_dla.figures import answer_page
from tl_dla.figures.text import shorten
from tl_dla.figures.view import View
from tl_dla.model.stream import Kind

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False, repr=False)
class AnswerAttribution(Savable):
    """What each part of the model wrote to an answer's logits, per step and summed.

    Attributes:
        steps: the answers' attribution, `[row, prompt, step]`, less the vocabulary's mean or the
            runner-up where that is the baseline. NaN where an answer has fewer steps than others.
        baseline_steps: the same of a text as baseline, over its own tokens.
        answers: each prompt's answer, token by token.
        baselines: each prompt's baseline text, token by token; empty without one.
        against: what each token is compared with: `"mean"`, `"runner-up"` or nothing.
        reconstruction: the certificate of every step.
        odds: the model's own log-probabilities and ranks of the answers' tokens.
        segments: what each token of each prompt, its answer included, is: `"prompt"` and
            `"answer"`, or the role of the message and `"template"`.
    """

    steps: Attribution
    baseline_steps: Attribution | None
    answers: list[list[str]]
    baselines: list[list[str]]
    against: str | None
    reconstruction: Reconstruction
    odds: Odds
    segments: list[list[str]]

    @property
    def labels(self) -> list[str]:
        """The rows' names."""
        return self.steps.labels

    @property
    def kinds(self) -> list[Kind]:
        """What each row is."""
        return self.steps.kinds

    @property
    def log_probs(self) -> Float[Tensor, "prompt step"]:
        """The model's log-probability of each token of the answers, in nats."""
        return self.odds.log_probs

    @property
    def ranks(self) -> Int[Tensor, "prompt step"]:
        """How many tokens are likelier than each token of the answers."""
        return self.odds.ranks

    @property
    def attribution(self) -> Float[Tensor, "row prompt"]:
        """Each row summed over the answer's steps, less the baseline's."""
        total = self.steps.attribution.nansum(-1)
        other = self.baseline_steps
        return total if other is None else total - other.attribution.nansum(-1)

    @property
    def logit(self) -> Float[Tensor, " prompt"]:
        """The model's own logits, summed over the answer's steps, less the baseline's."""
        total, other = self.steps.logit.nansum(-1), self.baseline_steps
        return total if other is None else total - other.logit.nansum(-1)

    def target(self, prompt: int = 0) -> str:
        """What is attributed of one prompt, in words: the answer, less what it is compared with."""
        target = repr("".join(self.answers[prompt]))
        if self.baselines:
            return f"{target} − {''.join(self.baselines[prompt])!r}"
        names = {"mean": "mean of the vocabulary", "runner-up": "each token's runner-up"}
        return target if self.against is None else f"{target} − {names[self.against]}"

    @property
    def remark(self) -> str:
        """Where answer and baseline differ in length, in a sentence; else empty."""
        pairs = zip(self.answers, self.baselines, strict=bool(self.baselines))
        for row, (answer, other) in enumerate(pairs):
            if len(answer) != len(other):
                which = f" of prompt {row}" if len(self.answers) > 1 else ""
                return (
                    f"The answer{which} has {len(answer)} tokens and its baseline {len(other)}, so"
                    " sums over different numbers of tokens are compared."
                )
        return ""

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, label: str) -> Float[Tensor, " prompt"]:
        """One row, by its label."""
        return self.attribution[self.steps.index(label)]

    def top(
        self, k: int = 5, *, kind: Kind | None = None, prompt: int | None = None
    ) -> list[tuple[str, float]]:
        """The k rows of the largest magnitude as `(label, value)`, largest first.

        Args:
            k: how many.
            kind: only rows of this kind, such as `"head"`.
            prompt: which prompt of a batch.

        Raises:
            ArgumentError: where there are several prompts and none is chosen; for a kind or a
                prompt that there is not, or k < 1.
        """
        if prompt is None and len(self.answers) > 1:
            raise ArgumentError(f"There are {len(self.answers)} prompts: say which, with prompt=.")
        rows = rows_to_rank(self.kinds, kind, k, "magnitude")
        chosen = read_choice(self.steps.query, prompt or 0, None, None)
        values = self.attribution[rows, chosen.prompt]
        return ranked(values, [self.labels[row] for row in rows], k, "magnitude", largest=True)

    def with_model(self, model: Any) -> "AnswerAttribution":
        """An answer that was loaded or unpickled, with its model again, for what asks its steps.

        Raises:
            ArgumentError: for a model of other sizes.
        """
        other = self.baseline_steps
        other = None if other is None else other.with_model(model)
        return replace(self, steps=self.steps.with_model(model), baseline_steps=other)

    # ---- tables, text, pictures ----------------------------------------------------------------

    def to_dataframe(self) -> "pd.DataFrame":
        """A line per row × prompt × step.

        Columns: `label`, `kind`, `layer`, `prompt`, `answer` (`answer` or `baseline`), `step`,
        `token` (the answer's token at that step), `attribution`, `logit` (the model's own),
        `log_prob` and `rank` (of the answer's tokens; none of a baseline's).
        """
        import pandas as pd

        sides = [("answer", self.steps, self.answers)]
        if self.baseline_steps is not None:
            sides.append(("baseline", self.baseline_steps, self.baselines))
        frames = []
        for name, steps, texts in sides:
            for row, tokens in enumerate(texts):
                for step, token in enumerate(tokens):
                    frame = pd.DataFrame({"label": self.labels, "kind": self.kinds})
                    frame["layer"] = pd.array(steps.layers, dtype="Int64")
                    frame["prompt"], frame["answer"] = row, name
                    frame["step"], frame["token"] = step, token
                    frame["attribution"] = steps.attribution[:, row, step].cpu().numpy()
                    frame["logit"] = float(steps.logit[row, step])
                    own = name == "answer"
                    frame["log_prob"] = float(self.log_probs[row, step]) if own else torch.nan
                    frame["rank"] = pd.array(
                        [int(self.ranks[row, step]) if own else None] * len(frame), dtype="Int64"
                    )
                    frames.append(frame)
        return pd.concat(frames, ignore_index=True)

    def plot(
        self,
        *,
        prompt: int | None = None,
        k: int = 40,
        title: str | None = None,
        width: int | None = None,
        height: int | None = None,
    ) -> "go.Figure":
        """The answer's tokens across and rows down; the sums where there is a baseline text.

        Args:
            prompt: only this prompt of a batch, whose answers are drawn as sums together.
            k: how many rows the figure names; the smaller ones are added up in one of their own.
            title: in place of the figure's own; `""` for no heading.
            width: in pixels; as wide as the page by default.
            height: in pixels; as high as what is drawn by default.

        Raises:
            ArgumentError: for a prompt that there is not, or k < 1.
        """
        from tl_dla.figures import charts, plots

        prompt = 0 if prompt is None and len(self.answers) == 1 else prompt
        whole = prompt is None or self.baselines or len(self.answers[prompt]) == 1
        view = self._summed_view(prompt) if whole else self._step_view(prompt or 0)
        return plots.plot(view, k, charts.Look(title, width, height))

    def report(self, path: str | PathLike[str], *, prompt: int = 0) -> Path:
        """Write a page with the answer as text, coloured by a row; a click shows a token's ledger.

        The page loads nothing.

        Args:
            path: of the HTML file; one that is there is replaced.
            prompt: which prompt of a batch.

        Raises:
            ArgumentError: for a path that cannot be written, or a prompt that there is not.
        """
        return write_page(path, lambda: self._page(prompt))

    def _page(self, prompt: int) -> str:
        view = self._step_view(prompt)
        prompt %= len(self.answers)
        n, first = len(self.answers[prompt]), int(self.steps.positions.index[prompt, 0])
        return answer_page.page(
            view,
            prompt=prompt_tokens(self.steps, prompt)[: first + 1],
            segments=self.segments[prompt],
            log_probs=self.log_probs[prompt, :n].tolist(),
            ranks=self.ranks[prompt, :n].tolist(),
        )

    def _step_view(self, prompt: int) -> View:
        """Rows by the tokens of one prompt's answer."""
        view = view_of(self.steps, prompt)
        tokens = self.answers[prompt]
        samples = [
            replace(sample, token=token) for sample, token in zip(view.samples, tokens, strict=True)
        ]
        # The steps are less the vocabulary's mean or the runner-up, never less a baseline text.
        target = repr("".join(tokens)) if self.baselines else self.target(prompt)
        what = "logit" if self.against is None else "logit difference"
        return replace(view, samples=samples, words=replace(view.words, target=target, what=what))

    def _summed_view(self, prompt: int | None) -> View:
        """Rows summed over the steps, by prompt."""
        view = view_of(self.steps, prompt)
        first = {sample.prompt: sample for sample in reversed(view.samples)}
        prompts = sorted(first)
        numbers = [x.detach().cpu().double().numpy() for x in (self.attribution, self.logit)]
        target = self.target(prompts[0]) if len(prompts) == 1 else "each prompt's own answer"
        return replace(
            view,
            values=numbers[0][:, prompts, None],
            logit=numbers[1][prompts, None],
            samples=[first[i] for i in prompts],
            words=replace(
                view.words,
                target=target,
                logit="sum of the model's own logits",
                certificate=". ".join(filter(None, [self.reconstruction.marked, self.remark])),
            ),
        )

    def _repr_html_(self) -> str:
        """What a notebook shows: the answer as text by likelihood, the sums, the certificate."""
        from tl_dla.figures.table import notebook_html

        n = len(self.answers[0])
        text = answer_page.likelihoods(
            self.answers[0], self.log_probs[0, :n].tolist(), self.ranks[0, :n].tolist()
        )
        return text + notebook_html(self._summed_view(None if len(self.answers) > 1 else 0))

    def __repr__(self) -> str:
        """The rows that matter for the first prompt, and the certificate."""
        title = f"AnswerAttribution: {shorten(self.target(0))}"
        lines = [f'{title}, unit="{self.steps.unit}", {len(self.answers[0])} steps']
        rows = self.top(8, prompt=0)
        width = max(len(label) for label, _ in rows)
        lines += [f"  {label:>{width}}  {value:+9.4f}" for label, value in rows]
        own = f"{self.steps.reconstruction.against}s, summed"
        lines.append(f"  {'all rows':>{width}}  {float(self.logit[0]):+9.4f}   {own}")
        log_prob = float(self.log_probs[0].nansum())
        lines.append(f"  {'log-prob':>{width}}  {log_prob:+9.4f}   of the whole answer, in nats")
        return "\n".join(
            [*lines, f"  {self.reconstruction}", *[f"  {self.remark}"] * bool(self.remark)]
        )
