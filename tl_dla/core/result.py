"""`Attribution`: rows, labels, the model's own logit and the certificate. No activations."""

import dataclasses
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jaxtyping import Float
from torch import Tensor

from tl_dla.core import tidy
from tl_dla.core.certificate import Check, Wanted, certify
from tl_dla.core.choice import Average, Choice, read_choice
from tl_dla.core.files import aside, place_for
from tl_dla.core.labelled import LabelledRows, require_result
from tl_dla.core.numbers import Hop, Numbers, compact
from tl_dla.core.ranking import By, loudest, ranked, rows_to_rank
from tl_dla.core.rows import Rows
from tl_dla.core.saved import Savable
from tl_dla.core.view import view_of
from tl_dla.errors import ArgumentError
from tl_dla.inputs.absent import name_of, require_alike
from tl_dla.inputs.models import device_of, on_device, require_model
from tl_dla.inputs.query import Query
from tl_dla.inputs.selection import Selection, Unit
from tl_dla.model.stream import Kind

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go
    from typing_extensions import Self

_SHOWN = 12


class Attribution(LabelledRows, Savable):
    """What each part of the model wrote to a logit, in logits.

    See `LabelledRows` for its fields: `attribution`, `labels`, `kinds`, `logit`, `reconstruction`,
    `result["L9H9"]`.
    """

    @classmethod
    def of(
        cls,
        rows: Rows,
        wanted: Wanted,
        numbers: Numbers,
        query: Query,
        about: tuple[Unit, Selection, int],
        hops: tuple[Hop, ...] = (),
    ) -> "Self":
        """The result of rows: added up over the target tokens, and certified.

        Args:
            rows: the rows, before the output transform.
            wanted: what they must add up to.
            numbers: the same, to keep.
            query: the question.
            about: the unit, what is split, and the length of the dot products.
            hops: the source rows that the rows split, the last one last.
        """
        unit, selection, d = about
        as_is = bool((rows.ratio == 1).all())  # most models transform nothing: one copy is kept
        values = query.targets.added(rows.values if as_is else rows.values * rows.ratio)
        # Of the residual points, the last one and the biases add up to the logit.
        n_points = len(rows.keys) - len(rows.constants)
        kept = slice(n_points - 1, None) if unit == "layer" else slice(None)
        reconstruction = certify(rows, kept, wanted, query, d)
        if unit == "layer":
            claim = (
                "the last reading and the biases are" if rows.constants else "the last reading is"
            )
            reconstruction = replace(reconstruction, claim=claim)
        numbers = numbers.map(compact, compact)
        return cls(values, rows.keys, unit, reconstruction, query, selection, numbers, hops)

    # ---- ranking -------------------------------------------------------------------------------

    def top(
        self,
        k: int = 5,
        *,
        kind: Kind | None = None,
        by: By = "value",
        largest: bool = True,
        prompt: int | None = None,
        position: int | None = None,
        candidate: str | int | None = None,
    ) -> list[tuple[str, float]]:
        """The k highest rows as `(label, value)`, best first.

        Values are means over the prompts, positions and candidates that are not chosen, as in
        `transformer_lens.tools.analysis`.

        Args:
            k: how many; fewer where there are not so many rows.
            kind: only rows of this kind, such as `"head"`.
            by: `"magnitude"` ranks by the absolute value of what is returned; `"contrast"` by what
                the row says of a candidate and not of all, at its largest where none is chosen.
            largest: False for the lowest rows instead.
            prompt: which prompt of a batch.
            position: which of the attributed positions, an index into them.
            candidate: which candidate token, by its text or its index.

        Raises:
            ArgumentError: for a kind, a ranking or a choice that the result does not have.
        """
        rows = rows_to_rank(self.kinds, kind, k, by)
        values = self.contrast_values if by == "contrast" else self._existing
        values = read_choice(self.query, prompt, position, candidate).values(values[rows])
        if by == "contrast" and candidate is None:
            values = loudest(values)
        return ranked(values, [self.labels[row] for row in rows], k, by, largest=largest)

    def places(
        self, prompt: int | None, position: int | None, candidate: str | int | None
    ) -> tuple[int | None, int | None, int | None]:
        """A prompt, position and candidate as indices, checked.

        Raises:
            ArgumentError: for one that the result does not have.
        """
        chosen = read_choice(self.query, prompt, position, candidate)
        return chosen.prompt, chosen.position, chosen.candidate

    @property
    def _existing(self) -> Float[Tensor, "row batch pos candidate"]:
        """The values, NaN where a prompt has no such position."""
        return self.query.with_axes(self.attribution)

    # ---- a part of it, and the mean ------------------------------------------------------------

    def select(
        self,
        *,
        prompt: int | None = None,
        position: int | None = None,
        candidate: str | int | None = None,
    ) -> "Self":
        """The result of one prompt, position or candidate: what the question gives alone.

        A chosen prompt leaves a batch of one, with the positions that it has; a chosen position or
        candidate leaves no such axis.

        Args:
            prompt: which prompt of a batch.
            position: which of the attributed positions, an index into them.
            candidate: which candidate token, by its text or its index.

        Raises:
            ArgumentError: for one that the result does not have.

        Example:
            >>> from tl_dla import direct_logit_attribution, load_model
            >>> prompts = ["The Eiffel Tower is in the city of", "The Colosseum is in the city of"]
            >>> answers = [" Paris", " Rome"]
            >>> result = direct_logit_attribution(load_model("demo"), prompts, answers)
            >>> result.select(prompt=1).target
            "' Rome'"
        """
        chosen = read_choice(self.query, prompt, position, candidate)
        hops = self.hops
        if chosen.prompt is not None:
            hops = tuple(replace(hop, source=hop.source[[chosen.prompt]]) for hop in hops)
        return self._of(chosen, hops, self.mean_over)

    def mean(self) -> "Self":
        """The mean over prompts and positions, those that exist: rows of the mean logit.

        It has no prompt of its own, so what runs the model is asked of the result itself.
        """
        average = Average(self.query)
        return self if self.mean_over else self._of(average, (), average.words)

    def _of(self, part: Choice | Average, hops: tuple[Hop, ...], mean_over: str) -> "Self":
        """A part, less the rows of source tokens that none of its positions sees."""
        query = part.query
        last = int(query.positions.index[query.positions.valid].max())
        rows = [
            i
            for i, key in enumerate(self.keys)
            if mean_over or key.source is None or key.source <= last
        ]
        more = {
            own.name: own.metadata["part"](getattr(self, own.name), part.values)
            for own in dataclasses.fields(self)
            if "part" in own.metadata
        }
        rests = {
            key.label: part.shown(self.attribution[[i]])[0]
            for i, key in enumerate(self.keys)
            if key.kind == "rest"
        }
        return replace(
            self,
            values=part.values(self.values[rows]),
            keys=[self.keys[i] for i in rows],
            query=query,
            numbers=part.numbers(self.numbers.of_rows(rows)),
            reconstruction=self.reconstruction.map(part.shown, rests),
            hops=hops,
            mean_over=mean_over,
            **more,
        )

    # ---- kept ----------------------------------------------------------------------------------

    def with_model(self, model: Any) -> "Self":
        """A result that was loaded or unpickled, with its model again, and on its device.

        Raises:
            ArgumentError: for a model of other sizes. Whether its weights are those that the result
                was made of is seen when it runs.
        """
        model = require_model(model)
        require_alike(self.model, model)
        names = {own.name for own in dataclasses.fields(self)} - {"keys", "query"}
        placed = {name: on_device(getattr(self, name), device_of(model)) for name in names}
        return replace(self, query=self.query.with_model(model), **placed)

    # ---- tables, text, pictures ----------------------------------------------------------------

    def to_dataframe(self) -> "pd.DataFrame":
        """A tidy table: one line per row × prompt × position (× candidate).

        Columns: `label`, `kind`, `layer`, `prompt`, `position` (of the prompt's real tokens),
        `token` (the token at that position; empty where only a cache was given), `candidate` where
        there are several, `attribution`, `logit` (the model's own) and `share` (attribution /
        logit). Rows of source tokens also say which: `source` (its position) and `source_token`.
        """
        return tidy.dataframe(self)

    def plot(
        self,
        *,
        prompt: int | None = None,
        candidate: str | int | None = None,
        k: int = 40,
        title: str | None = None,
        width: int | None = None,
        height: int | None = None,
    ) -> "go.Figure":
        """The figure for this unit, a plotly figure, returned and never shown.

        Args:
            prompt: only this prompt of a batch.
            candidate: only this one of several candidate tokens, by its text or its index.
            k: how many rows the figure names; the smaller ones are added up in a row of their own.
            title: in place of the figure's own; `""` for no heading.
            width: in pixels; as wide as the page by default.
            height: in pixels; as high as what is drawn by default.

        Raises:
            ArgumentError: for a prompt or candidate that the result does not have, or k < 1.
        """
        from tl_dla.figures import charts, plots

        return plots.plot(view_of(self, prompt, candidate), k, charts.Look(title, width, height))

    def save_figure(
        self,
        path: str | PathLike[str],
        *,
        width: Literal["column", "page"] | float = "column",
        height: float | None = None,
        certificate: bool = False,
        prompt: int | None = None,
        candidate: str | int | None = None,
        k: int = 20,
    ) -> Path:
        """Write the figure as a paper prints it, without a title, and return its path.

        `caption` says what stands below it. Files are made by plotly's own exporter, kaleido
        (`pip install 'tl-dla[figures]'`), which needs Chrome or Chromium.

        Args:
            path: ends in `.pdf`, `.svg` or `.png` (300 dots an inch).
            width: `"column"` (3.25 inches), `"page"` (6.75 inches), or inches.
            height: in inches; as high as what is drawn by default.
            certificate: write the certificate above the figure.
            prompt: as in `plot`.
            candidate: as in `plot`.
            k: as in `plot`.

        Raises:
            ArgumentError: for another format, a width or height that is none, a folder that is not
                there, and as `plot` does.
            ImportError: kaleido is not installed.
            RuntimeError: it finds no Chrome or Chromium; plotly says how to get one.
        """
        from tl_dla.figures import paper

        path, sheet = place_for(path, "figure"), paper.Sheet(width, height, certificate)
        fig = paper.figure(view_of(self, prompt, candidate), k, sheet)
        file = paper.exported(fig, path.suffix)
        with aside(path) as temporary:
            temporary.write_bytes(file)
        return path

    def caption(self, *, prompt: int | None = None, candidate: str | int | None = None) -> str:
        """What the figure shows, as the caption that a paper puts below it.

        Args:
            prompt: as in `plot`.
            candidate: as in `plot`.
        """
        from tl_dla.figures import paper

        return paper.caption(view_of(self, prompt, candidate), name_of(self.model))

    def _repr_html_(self) -> str:
        """What a notebook shows: the rows that matter as bars, and the certificate."""
        from tl_dla.figures.table import notebook_html

        return notebook_html(view_of(self))

    def __repr__(self) -> str:
        """The rows that matter, the total, the model's own logit and the certificate."""
        from tl_dla.figures.table import table, text

        view, shape = view_of(self), list(self.attribution.shape)
        title = f'{type(self).__name__}: {view.words.target}, unit="{self.unit}", rows {shape}'
        return f"{title}\n{text(table(view, _SHOWN))}\n  {view.words.certificate}"

    # ---- the certificate -----------------------------------------------------------------------

    def certified(self, check: Check, cause: str) -> "Self":
        """The result itself, once a failed certificate was raised or warned of."""
        self.reconstruction.raise_or_warn(check, cause)
        return self


def require_input(result: Attribution) -> None:
    """Raise unless the model can be run again on the result's prompts."""
    require_prompts(result)
    if not result.has_tokens:
        raise ArgumentError(
            "The result was made from a cache without its input, or of numbers alone, and the model"
            " must run again: attribute with the prompts as `input`, beside a cache or without one."
        )


def require_prompts(result: Attribution) -> None:
    """Raise for a mean, which no run of the model gives, and for what is no result."""
    require_result(result)
    if result.mean_over:
        raise ArgumentError(
            f"The result is a mean over {result.mean_over}, which no run of the model gives: ask"
            " the result that the mean was taken of, or its select(prompt=…)."
        )
