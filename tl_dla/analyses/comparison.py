"""`compare`: what changed between two runs, row by row, and whether the part or its readout did.

A row is what a part wrote to the final residual stream, x, read out along w (the norm's scale, γ,
the columns of W_U and a soft cap, all in one vector). Between two runs both may change:

    Δ(x · w) = Δx · w̄  +  x̄ · Δw,        x̄ and w̄ the means of the two runs

exactly. The first term is `wrote`, the second `read`, and their sum is `change`; over all rows the
changes add up to the change of the logit. Biases of the final norm and of the unembedding are
readout alone. "Wrote" holds all that happened up to the stream: other activations, other weights of
the part itself.

The two cross terms (one run's activations, the other's readout) need no run where the readouts
differ by the norm's scale and the soft cap alone, as between two prompts of one model, or without
and with an ablation: rows are multiplied by numbers that both results hold. Else (two models, two
answers) each model runs once more, with the other's readout pulled back through it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jaxtyping import Float
from torch import Tensor

from tl_dla.analyses.comparable import require_comparable, sides
from tl_dla.analyses.cross_terms import by_runs, by_scales, certified, read_alike, split
from tl_dla.core.certificate import Check, Reconstruction, require_check
from tl_dla.core.choice import read_choice
from tl_dla.core.files import write_page
from tl_dla.core.labelled import require_result
from tl_dla.core.ranking import ranked, rows_to_rank
from tl_dla.core.result import Attribution
from tl_dla.core.rows import Keyed, RowKey, merged
from tl_dla.core.saved import Savable
from tl_dla.core.taps import exact
from tl_dla.core.view import view_of
from tl_dla.errors import ArgumentError
from tl_dla.figures.changes import Changes
from tl_dla.inputs.query import Query
from tl_dla.model.stream import Kind

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

_CAUSE = (
    "The likeliest cause: one of the results was changed by hand, or the model does something to"
    " the stream that was not understood; check_model(model, tokens) shows where."
)


@dataclass(frozen=True, eq=False, repr=False)
class Comparison(Keyed, Savable):
    """Two runs row by row, in logits: a's value, b's, and why they differ.

    Rows that one side lacks stand against 0. `change`, `wrote` and `read` follow `labels`, in the
    order of the stream.

    Attributes:
        keys: what each row is.
        values_a: a's rows, with all their axes.
        values_b: b's rows.
        values_wrote: what the part wrote differently, read out as the two runs do on average.
        values_read: the readout's own change, of what the two runs wrote on average.
        reconstruction: the certificate that the changes add up to the change of the logit.
        queries: the two questions, a's first.
        logits: what a's rows add up to, and what b's do, `[*batch_and_pos]`.
        unit: of the rows.
        targets: what is attributed in a and in b, in words.
        sides: what a and b are, in the words in which they differ.
    """

    keys: Sequence[RowKey]
    values_a: Float[Tensor, "row batch pos candidate"]
    values_b: Float[Tensor, "row batch pos candidate"]
    values_wrote: Float[Tensor, "row batch pos candidate"]
    values_read: Float[Tensor, "row batch pos candidate"]
    reconstruction: Reconstruction
    queries: tuple[Query, Query]
    logits: tuple[Float[Tensor, "..."], Float[Tensor, "..."]]
    unit: str
    targets: tuple[str, str]
    sides: tuple[str, str]

    # ---- what it is ----------------------------------------------------------------------------

    @property
    def a(self) -> Float[Tensor, " row *batch_and_pos"]:
        """The rows of a."""
        return self.query.shaped(self.values_a)

    @property
    def b(self) -> Float[Tensor, " row *batch_and_pos"]:
        """The rows of b."""
        return self.query.shaped(self.values_b)

    @property
    def wrote(self) -> Float[Tensor, " row *batch_and_pos"]:
        """What each part wrote differently, read out as the two runs do on average."""
        return self.query.shaped(self.values_wrote)

    @property
    def read(self) -> Float[Tensor, " row *batch_and_pos"]:
        """The change of the readout, of what the part wrote in the two runs on average."""
        return self.query.shaped(self.values_read)

    @property
    def change(self) -> Float[Tensor, " row *batch_and_pos"]:
        """What each row rose by, from a to b: `wrote` + `read`."""
        return self.query.shaped(self.values)

    @cached_property
    def values(self) -> Float[Tensor, "row batch pos candidate"]:
        """The changes with all their axes."""
        return self.values_b - self.values_a

    @property
    def logit(self) -> Float[Tensor, "*batch_and_pos"]:
        """What the changes add up to: the change of the model's own logit, or logit difference."""
        return self.reconstruction.expected

    @property
    def query(self) -> Query:
        """The question of b, whose positions and tokens name the samples."""
        return self.queries[1]

    path, what, units, mean_over = (), "logit", "logits", ""

    @property
    def target(self) -> str:
        """What is attributed, in words."""
        a, b = self.targets
        return b if a == b else f"{b} against {a}"

    @property
    def total(self) -> str:
        """What the rows of either side add up to, in words."""
        return "model's own logit" if self.query.include_bias else "logit without biases"

    def __getitem__(self, label: str) -> Float[Tensor, "*batch_and_pos"]:
        """The change of one row, by its label."""
        return self.change[self.index(label)]

    # ---- ranking -------------------------------------------------------------------------------

    def top(
        self,
        k: int = 5,
        *,
        kind: Kind | None = None,
        by: Literal["value", "magnitude"] = "value",
        of: Literal["change", "wrote", "read"] = "change",
        largest: bool = True,
        prompt: int | None = None,
        position: int | None = None,
        candidate: str | int | None = None,
    ) -> list[tuple[str, float]]:
        """The k rows that rose most as `(label, change)`, the largest first.

        Values are means over the prompts, positions and candidates that are not chosen.

        Args:
            k: how many; fewer where there are not so many rows.
            kind: only rows of this kind, such as `"head"`.
            by: `"magnitude"` ranks by the absolute value of what is returned.
            of: the whole change, or one of its two terms.
            largest: False for those that fell most.
            prompt: which prompt of a batch.
            position: which of the attributed positions, an index into them.
            candidate: which candidate token, by its text or its index.

        Raises:
            ArgumentError: for a kind, a ranking, a term or a choice that there is not.
        """
        terms = {"change": self.values, "wrote": self.values_wrote, "read": self.values_read}
        if of not in terms:
            raise ArgumentError(f"of must be one of {', '.join(terms)}; {of!r} was given.")
        if by == "contrast":
            raise ArgumentError('by must be "value" or "magnitude" here; "contrast" was given.')
        rows = rows_to_rank(self.kinds, kind, k, by)
        values = self.query.with_axes(self.query.shaped(terms[of]))[rows]
        values = read_choice(self.query, prompt, position, candidate).values(values)
        return ranked(values, [self.labels[row] for row in rows], k, by, largest=largest)

    # ---- tables, text, pictures ----------------------------------------------------------------

    def changes(self, prompt: int | None = None, candidate: str | int | None = None) -> Changes:
        """The numbers and words that figures and tables show.

        Args:
            prompt: only this prompt of a batch.
            candidate: only this one of several candidate tokens, by its text or its index.
        """
        terms = (self.values_a, self.values_b, self.values_wrote, self.values_read)
        logits = (self.query.with_axes(own[None]) for own in self.logits)
        chosen = read_choice(self.query, prompt, None, candidate)
        a, b, wrote, read = map(chosen.samples, terms)
        [logit_a], [logit_b] = map(chosen.samples, logits)
        view = view_of(self, prompt, candidate)
        return Changes(view, a, b, wrote, read, logit_a, logit_b, self.sides)

    def to_dataframe(self) -> "pd.DataFrame":
        """A tidy table: one line per row × prompt × position (× candidate).

        Columns: `label`, `kind`, `layer`, `prompt`, `position_a` and `position_b` (of each prompt's
        real tokens), `candidate` where there are several, `a`, `b`, `change`, `wrote`, `read`,
        `logit_a` and `logit_b` (the model's own).
        """
        import pandas as pd

        own = [q.with_axes(x[None])[0] for q, x in zip(self.queries, self.logits, strict=True)]
        numbers = {
            "a": self.values_a,
            "b": self.values_b,
            "change": self.values,
            "wrote": self.values_wrote,
            "read": self.values_read,
        }
        arrays = {name: x.detach().cpu().numpy() for name, x in numbers.items()}
        names, frames = self.query.targets.candidates, []
        for p, i in self.query.positions.valid.nonzero().tolist():
            for c, name in enumerate(names or [""]):
                frame = pd.DataFrame({"label": self.labels, "kind": self.kinds})
                frame["layer"] = pd.array(self.layers, dtype="Int64")
                frame["prompt"] = p
                for side, query in zip("ab", self.queries, strict=True):
                    frame[f"position_{side}"] = int(query.positions.index[p, i])
                if names:
                    frame["candidate"] = name
                for column, x in arrays.items():
                    frame[column] = x[:, p, i, c]
                for side, logit in zip("ab", own, strict=True):
                    frame[f"logit_{side}"] = float(logit[p, i, c])
                frames.append(frame)
        return pd.concat(frames, ignore_index=True)

    def plot(
        self,
        *,
        prompt: int | None = None,
        candidate: str | int | None = None,
        k: int = 30,
        title: str | None = None,
        width: int | None = None,
        height: int | None = None,
    ) -> "go.Figure":
        """A line from a's value to b's for each row, in the order of the stream; heads as a map.

        Args:
            prompt: only this prompt of a batch.
            candidate: only this one of several candidate tokens; the first by default.
            k: how many rows have a line; the smaller changes are added up in one of their own.
            title: in place of the figure's own; `""` for no heading.
            width: in pixels; as wide as the page by default.
            height: in pixels; as high as what is drawn by default.

        Raises:
            ArgumentError: for a prompt or candidate that there is not, or k < 1.
        """
        from tl_dla.figures import changes, charts

        look = charts.Look(title, width, height)
        return changes.plot(self._chosen(prompt, candidate), k, look)

    def report(
        self,
        path: str | PathLike[str],
        *,
        prompt: int | None = None,
        candidate: str | int | None = None,
        k: int = 30,
    ) -> Path:
        """Write one HTML page that loads nothing: the figure, the rows in numbers, the certificate.

        `prompt`, `candidate` and `k` are those of `plot`. A file that is there is replaced.

        Raises:
            ArgumentError: for a path that cannot be written, or as `plot` does.
        """
        from tl_dla.figures.changes_page import page

        return write_page(path, lambda: page(self._chosen(prompt, candidate), k))

    def _chosen(self, prompt: int | None = None, candidate: str | int | None = None) -> Changes:
        """What is shown where one candidate is: the first, unless another is chosen."""
        if candidate is None and self.query.targets.candidates is not None:
            candidate = 0
        return self.changes(prompt, candidate)

    def _repr_html_(self) -> str:
        """What a notebook shows: the rows that changed most, and the certificate."""
        from tl_dla.figures.changes import html

        return html(self._chosen())

    def __repr__(self) -> str:
        """The rows that changed most, the logits, and the certificate."""
        from tl_dla.figures.changes import text

        shown = self._chosen()
        return f'Comparison: {shown.view.words.target}, unit="{self.unit}"\n{text(shown)}'


def compare(
    a: Attribution, b: Attribution, *, answers: bool = False, check: Check = "raise"
) -> Comparison:
    """What changed from a to b: each row's change, and whether the part or its readout changed.

    Args:
        a: an attribution.
        b: another of the same unit and as many prompts and positions: other prompts (of any
            length), another model of the same architecture, or a run of `ablate`.
        answers: whether they may be of different answers.
        check: what a failed certificate does.

    Returns:
        A `Comparison`. Rows that one side lacks stand against 0.

    Raises:
        ArgumentError: for results that cannot stand against each other, saying why.
        ReconstructionError: where the changes do not add up to the change of the logit.

    Example:
        >>> from tl_dla import compare, direct_logit_attribution, load_model
        >>> model = load_model("demo")
        >>> prompts = "The Eiffel Tower is in the city of", "The Colosseum is in the city of"
        >>> a, b = (direct_logit_attribution(model, prompt, " Paris") for prompt in prompts)
        >>> changes = compare(a, b)
        >>> bool(changes.change.sum() < -5)
        True
        >>> changes.reconstruction.passed
        True
    """
    require_check(check)
    for one in (a, b):
        require_result(one)
    require_comparable(a, b, answers)
    keys = merged([a.keys, b.keys])
    crossed = by_scales(a, b) if read_alike(a, b) else by_runs(a, b)
    with exact():
        keys = merged([keys, *(side.keys for side in crossed)])
        own_a, own_b, wrote, read = split(a, b, crossed, keys)
    reconstruction = certified(a, b, keys, wrote + read, crossed)
    reconstruction.raise_or_warn(check, _CAUSE)
    logits, targets = (a.logit, b.logit.to(a.logit)), (a.target, b.target)
    found = (own_a, own_b, wrote, read, reconstruction, (a.query, b.query), logits)
    return Comparison(keys, *found, a.unit, targets, sides(a.query, b.query))
