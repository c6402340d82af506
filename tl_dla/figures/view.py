"""What figures, tables and pages show: numbers by row, sample and candidate, and words for them.

`tl_dla.core.view.view_of` makes a `View` of a result. One rule says which rows matter, here and in
`result.top(by="magnitude")`: the largest magnitude of what is shown, so the magnitude of the mean
where means are shown.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from tl_dla.errors import ArgumentError
from tl_dla.figures.text import shorten, visible

MOST_CANDIDATES = 500


@dataclass(frozen=True)
class Sample:
    """One attributed position of one prompt, with its token and the prompt's text where known.

    `mean_over` is what a mean was taken over, of which the values then are.
    """

    prompt: int
    position: int
    token: str | None = None
    text: str = ""
    mean_over: str = ""

    def __str__(self) -> str:
        if self.mean_over:
            return f"mean over {self.mean_over}"
        token = "" if self.token is None else f" {self.token!r}"
        text = f": {shorten(self.text)}" if self.text else ""
        return f"prompt {self.prompt}, position {self.position}{token}{text}"

    @property
    def short(self) -> str:
        """The token for a small cell; its position where it is not known."""
        return str(self.position) if self.token is None else visible(self.token)


@dataclass(frozen=True)
class Words:
    """What is attributed, in words.

    Attributes:
        target: what the logit is of: `' Mary' − ' John'`.
        logit: what the rows add up to: `model's own logit`.
        certificate: whether they do, with its mark.
        what: what the rows are parts of, in a word.
        units: what they are in.
    """

    target: str
    logit: str
    certificate: str
    what: str = "logit"
    units: str = "logits"


@dataclass(frozen=True, eq=False)
class View:
    """The values that a figure shows, in logits; a sample for each prompt and position that exists.

    Attributes:
        values: of every row, sample and candidate.
        logit: the model's own.
        labels: the rows' names.
        kinds: what each row is (`head`, `mlp`, `bias`, …).
        layers: each row's layer, None for rows of no layer.
        unit: of the rows; those of `layer` are readings, which do not add up.
        samples: where the values were read.
        candidates: the candidate tokens, `[""]` where there is one logit.
        words: what is attributed and whether it adds up.
        writers: what wrote to the stream since the point before, by the label of the point.
        sources: the tokens that source rows are of, by position; a position alone where the
            prompts differ.
    """

    values: Float[np.ndarray, "row sample candidate"]
    logit: Float[np.ndarray, "sample candidate"]
    labels: list[str]
    kinds: list[Any]
    layers: list[int | None]
    unit: str
    samples: list[Sample]
    candidates: list[str]
    words: Words
    writers: Mapping[str, str] = field(default_factory=dict)
    sources: list[str] = field(default_factory=list)

    @cached_property
    def names(self) -> list[str]:
        """The samples in words."""
        return [str(sample) for sample in self.samples]

    @property
    def n_prompts(self) -> int:
        """How many prompts the samples are of."""
        return len({sample.prompt for sample in self.samples})

    @property
    def several_positions(self) -> bool:
        """Whether some prompt has more than one sample."""
        return self.n_prompts < len(self.samples)

    @property
    def over_candidates(self) -> bool:
        """Whether there is a logit for each of some candidate tokens."""
        return self.candidates != [""]

    @property
    def share(self) -> Float[np.ndarray, "row sample candidate"]:
        """Of the model's own logit; NaN where that is 0."""
        return share_of(self.logit, self.values)

    def only(self) -> tuple[Float[np.ndarray, "row sample"], Float[np.ndarray, " sample"]]:
        """Values and logits of the first, and as a rule the one, candidate."""
        return self.values[..., 0], self.logit[..., 0]

    def at(self, position: int) -> "View":
        """Only the samples at one position of their prompts."""
        kept = [i for i, sample in enumerate(self.samples) if sample.position == position]
        samples = [self.samples[i] for i in kept]
        return replace(self, values=self.values[:, kept], logit=self.logit[kept], samples=samples)

    @property
    def stream_order(self) -> list[int]:
        """The rows in the order in which they are written.

        A result lists what splits a sublayer (neurons, heads, their source tokens) before the rest.
        """
        stage = {"mlp": 1, "neuron": 1, "expert": 1, "rest": 2}

        def place(row: int) -> tuple[float, int]:
            layer, kind = self.layers[row], self.kinds[row]
            if layer is None:
                return (np.inf if kind == "bias" else -1.0, 0)
            return (float(layer), stage.get(kind, 0))

        rows = list(range(len(self.labels)))
        return sorted(rows, key=place) if self.unit in ("head", "neuron", "source") else rows

    def along_the_stream(self) -> "View":
        """The same with the rows in that order."""
        order = self.stream_order
        return replace(
            self,
            values=self.values[order],
            labels=[self.labels[row] for row in order],
            kinds=[self.kinds[row] for row in order],
            layers=[self.layers[row] for row in order],
        )

    def rows(self, kind: str) -> list[int]:
        """The rows of a kind."""
        return [row for row, own in enumerate(self.kinds) if own == kind]


def share_of(
    total: Float[np.ndarray, "..."], values: Float[np.ndarray, "..."]
) -> Float[np.ndarray, "..."]:
    """What part of a total the values are; NaN where that is 0."""
    return values / np.where(total == 0, np.nan, total)


def where(view: View) -> str:
    """Which prompts and positions the values are of."""
    if len(view.samples) == 1:
        return view.names[0]
    if not view.several_positions:
        return f"mean over {view.n_prompts} prompts, and each of them"
    if view.n_prompts == 1:
        return f"{len(view.samples)} positions of prompt {view.samples[0].prompt}"
    return f"mean over {len(view.samples)} positions of {view.n_prompts} prompts, and each of them"


def require_few(view: View) -> None:
    """Raise where there are more candidates than a figure has room for."""
    if len(view.candidates) > MOST_CANDIDATES:
        raise ArgumentError(
            f"A figure has room for {MOST_CANDIDATES} candidates, and the result has"
            f" {len(view.candidates)}: give candidate=, or attribute to fewer of them."
        )


# ---- which rows matter -------------------------------------------------------------------------


def require_some(k: int) -> None:
    """Raise where no row at all would be named."""
    if k < 1:
        raise ArgumentError(f"k must be at least 1; {k} was given.")


def largest(shown: Float[np.ndarray, "row shown"], k: int) -> Int[np.ndarray, " k"]:
    """The k rows of largest magnitude (its mean over all numbers that are shown), best first."""
    require_some(k)
    return np.argsort(-np.abs(shown).mean(1), kind="stable")[:k]


def fold(
    labels: Sequence[str],
    values: Float[np.ndarray, " row *inner"],
    shown: Float[np.ndarray, "row shown"],
    k: int,
) -> tuple[list[str], Float[np.ndarray, " kept *inner"]]:
    """The k rows that matter, in their order, and the sum of all others as a row."""
    top = largest(shown, k)
    if len(labels) <= k + 1:
        return list(labels), values
    kept = np.sort(top)
    rest = np.setdiff1d(np.arange(len(labels)), kept)
    names = [*(labels[i] for i in kept), smaller(len(rest))]
    return names, np.concatenate([values[kept], values[rest].sum(0, keepdims=True)])


def smaller(count: int) -> str:
    """The name of the row that adds up what is left."""
    return f"{count} smaller rows"


def spread(place: float, count: int, width: float = 0.5) -> Float[np.ndarray, " sample"]:
    """Places of several points around one, in order, so that equal values stay apart."""
    if count == 1:
        return np.array([place])
    return place + width * (np.arange(count) / (count - 1) - 0.5)
