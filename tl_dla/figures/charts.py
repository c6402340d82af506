"""Figures that know nothing of models: numbers and names in, a plotly figure out, never shown.

Values are in logits unless a `unit` says otherwise; colour scales are centred on 0. Nothing is
registered with plotly: each figure carries its own template (`theme`).
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float, Shaped

from tl_dla.errors import ArgumentError
from tl_dla.figures.text import safe, shorten
from tl_dla.figures.theme import INK, NEGATIVE, NEUTRAL, POSITIVE, SCALES, template
from tl_dla.figures.view import View, where


@dataclass(frozen=True)
class Look:
    """What a caller may choose of any figure.

    Attributes:
        title: in place of the figure's own; `""` for no heading at all.
        width: in pixels; as wide as the page by default.
        height: in pixels; as high as what is drawn by default.

    Raises:
        ArgumentError: for a width or height below 1.
    """

    title: str | None = None
    width: int | None = None
    height: int | None = None

    def __post_init__(self) -> None:
        for name in ("width", "height"):
            given = getattr(self, name)
            if given is not None and given < 1:
                raise ArgumentError(f"{name} must be a number of pixels; {given} was given.")

    @property
    def room(self) -> int:
        """The width to arrange the figure for."""
        return self.width or 760

    @property
    def narrow(self) -> bool:
        """Whether the figure must do without what stands beside it."""
        return self.room < 560


PLAIN = Look()


@dataclass(frozen=True)
class Heading:
    """A figure's own title, and lines in small type below it, as plotly reads them: escaped."""

    title: str
    subtitle: str = ""


def heading_of(what: str, view: View) -> Heading:
    """What is attributed, and below it where, and whether it adds up."""
    named = view.over_candidates
    names = list(map(repr, view.candidates)) if named else view.words.target.split(", ")
    if len(names) > 5:  # more would leave the figure on the right
        names = [*names[:3], "…", names[-1]]
    title = f"{what} {safe(shorten(', '.join(names)))}"
    return Heading(title, f"{safe(where(view))}<br>{safe(view.words.certificate)}")


@dataclass(frozen=True)
class Sizes:
    """How high what is drawn is, and the room around it, in pixels."""

    body: int
    above: int = 16
    below: int = 50
    right: int = 20


def styled(fig: go.Figure, heading: Heading, look: Look, sizes: Sizes) -> go.Figure:
    """The figure with its template, its heading in lines that fit, and its size."""
    title, subtitle = heading.title, heading.subtitle
    if look.title is not None:
        title, subtitle = safe(look.title), subtitle if look.title else ""
    large, small = lines(title, look.room, 8.6), lines(subtitle, look.room, 6.4)
    buttons = 28 if look.narrow and large else 0  # plotly's, which stand over a wide title's end
    head = 21 * len(large) + 16 * len(small) + 26 * bool(large) + buttons
    lower = f'<br><span style="font-size:12px">{"<br>".join(small)}</span>' if small else ""
    total = look.height or head + sizes.above + sizes.body + sizes.below
    fig.update_layout(
        template=template(),
        title_text=f"{'<br>'.join(large)}{lower}",
        title_y=1 - (24 + buttons) / total,
        title_yanchor="top",
        height=total,
        width=look.width,
        margin=dict(l=20, r=sizes.right, t=head + sizes.above, b=sizes.below),
    )
    return fig


def lines(text: str, room: int, letter: float) -> list[str]:
    """Text in lines no wider than the room, for letters of a mean width in pixels."""
    length = int((room - 40) / letter)
    return [line for part in text.split("<br>") for line in textwrap.wrap(part, length)]


def signs(values: Float[np.ndarray, " row"]) -> list[str]:
    """A colour for each value: positive, negative or, for NaN, neither."""
    return [POSITIVE if v >= 0 else NEGATIVE if v < 0 else NEUTRAL for v in values]


def _aligned(labels: Sequence[str], **arrays: Any) -> None:
    for name, values in arrays.items():
        if values is not None and len(values) != len(labels):
            raise ArgumentError(
                f"{name} must have one entry per label: {len(labels)} labels and {len(values)}"
                f" {name} were given."
            )


def intervals(
    labels: Sequence[str],
    mean: Float[np.ndarray, " row"],
    low: Float[np.ndarray, " row"],
    high: Float[np.ndarray, " row"],
    *,
    heading: Heading,
    look: Look = PLAIN,
) -> go.Figure:
    """A bar for each mean, in logits, and its interval from `low` to `high`.

    Args:
        labels: the rows' names, the first on top.
        mean: the rows' means.
        low: the lower ends of their intervals.
        high: the upper ends.
        heading: above the figure.
        look: title and size in place of the figure's own.

    Raises:
        ArgumentError: where the lengths differ.

    Example:
        >>> import numpy as np
        >>> one = np.array([1.0, -2.0])
        >>> fig = intervals(["L0H0", "L0H1"], one, one - 0.5, one + 0.5, heading=Heading("two"))
        >>> len(fig.data)
        1
    """
    _aligned(labels, mean=mean, low=low, high=high)
    hover = [
        f"<b>{safe(label)}</b><br>mean {m:+.4f} logits<br>interval {a:+.4f} to {b:+.4f}"
        for label, m, a, b in zip(labels, mean, low, high, strict=True)
    ]
    ends = dict(array=high - mean, arrayminus=mean - low, symmetric=False, type="data")
    bars = go.Bar(
        x=mean,
        y=np.arange(len(labels)),
        orientation="h",
        marker_color=signs(mean),
        width=0.7,
        error_x=dict(width=3, thickness=1.4, color=NEUTRAL, **ends),
        hovertext=hover,
        hoverinfo="text",
        showlegend=False,
        name="mean",
    )
    fig = go.Figure(bars)
    fig.update_yaxes(ledger_axis(labels))
    fig.update_xaxes(title_text="logits")
    return styled(fig, heading, look, Sizes(20 + 22 * len(labels)))


def ledger_axis(labels: Sequence[str]) -> dict[str, Any]:
    """A vertical axis with a named row at each integer, the first on top."""
    return dict(
        tickmode="array",
        tickvals=list(range(len(labels))),
        ticktext=[safe(label) for label in labels],
        range=[len(labels) - 0.4, -0.6],
        showgrid=False,
        zeroline=False,
    )


def panel_title(text: str, x: float, y: float, shift: int) -> dict[str, Any]:
    """A part's own title, from a place of the figure on and some pixels above it."""
    return dict(
        text=f"<b>{safe(text)}</b>",
        x=x,
        y=y,
        yshift=shift,
        xref="paper",
        yref="paper",
        xanchor="left",
        yanchor="bottom",
        showarrow=False,
        font_size=11,
    )


Mark = tuple[str, str, float, float, float, float]


def marks_of_rows(labels: Sequence[str], axis: str = "y") -> dict[str, Mark]:
    """Where each row stands, for a page that marks it: xref, yref, x0, x1, y0, y1."""
    return {label: ("paper", axis, 0.0, 1.0, i - 0.5, i + 0.5) for i, label in enumerate(labels)}


def marks_of_columns(positions: Sequence[int]) -> dict[str, Mark]:
    """The same of each column that is a position, `@5`."""
    return {f"@{at}": ("x", "paper", i - 0.5, i + 0.5, 0.0, 1.0) for i, at in enumerate(positions)}


@dataclass(frozen=True, eq=False)
class Grid:
    """Numbers with a named row and column for each line of them, the first row on top.

    Attributes:
        values: the colours; NaN leaves a cell empty.
        rows: the names of the rows, all different.
        columns: the names of the columns; a line break in them is one.
        where: the columns' names for hover, all different.
        cells: the text in each cell, shown where it fits.
        detail: what hover shows as `%{customdata}`.
        hover: plotly's template for it, with `%{y}` the row and `%{x}` the column.
        positions: the columns' positions in a prompt, where they have some.

    Raises:
        ArgumentError: where there is not one name for each row and column.
    """

    values: Float[np.ndarray, "row column"]
    rows: Sequence[str]
    columns: Sequence[str]
    where: Sequence[str]
    cells: Sequence[Sequence[str]]
    detail: Shaped[np.ndarray, "row column"]
    hover: str
    positions: Sequence[int] = ()

    def __post_init__(self) -> None:
        _aligned(self.rows, values=self.values, cells=self.cells)
        _aligned(self.columns, values=self.values.T, where=self.where)


@dataclass(frozen=True, eq=False)
class Colours:
    """How the numbers of a grid are coloured.

    Attributes:
        title: what they are, beside the colours.
        scale: `"diverging"` is centred on 0, `"sequential"` starts at it.
        largest: where the colours end; at the largest number by default.
        options: plotly's own, of the colour bar.
        strong_is_low: whether 0 has the strongest colour of a sequential scale.
    """

    title: str = "logits"
    scale: Literal["diverging", "sequential"] = "diverging"
    largest: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    strong_is_low: bool = False

    def axis(self, values: Float[np.ndarray, "..."], height: int | float = 220) -> dict[str, Any]:
        """A colour axis: symmetric about 0 where it diverges, from 0 upwards where it does not.

        Its bar stands beside the top of what is `height` pixels high, and has room for its numbers;
        a line or two of cells say theirs, and have no bar.
        """
        finite = np.abs(values[np.isfinite(values)])
        largest = self.largest or (float(finite.max()) if finite.size else 0.0) or 1.0
        words = dict(text=self.title, side="top", font=dict(size=12))
        size = dict(lenmode="pixels", len=max(120, min(220, height)), thickness=10)
        place = dict(x=1.01, y=1, yanchor="top", outlinewidth=0)
        return dict(
            colorscale=SCALES[self.scale]["light"],
            reversescale=self.strong_is_low,
            cmin=-largest if self.scale == "diverging" else 0.0,
            cmax=largest,
            showscale=height >= 60,
            colorbar={"title": words, **size, **place, **self.options},
        )


LOGITS = Colours()


def cells(
    values: Float[np.ndarray, "row column"],
    hover: str,
    words: Sequence[Sequence[str]] | None = None,
    **options: Any,
) -> go.Heatmap:
    """A cell for each value, in the colours of the figure, with words in them where some are given.

    Args:
        values: NaN leaves a cell empty.
        hover: plotly's template for it.
        words: in the cells.
        options: plotly's own, of the trace.
    """
    return go.Heatmap(
        z=values,
        coloraxis="coloraxis",
        xgap=1,
        ygap=1,
        hoverongaps=False,
        hovertemplate=f"{hover}<extra></extra>",
        text=words,
        texttemplate=None if words is None else "%{text}",
        **options,
    )


def table(
    grid: Grid,
    heading: Heading,
    look: Look,
    colours: Colours = LOGITS,
    cell_width: int = 46,
) -> go.Figure:
    """A heatmap of the grid, with text in its cells where there is room for it, or no width given.

    Args:
        grid: what is drawn.
        heading: above it.
        look: title and size in place of the figure's own.
        colours: of the cells.
        cell_width: what a cell's text needs, in pixels.
    """
    n_rows, n_columns = grid.values.shape
    margin = 130 if look.narrow else 170
    wanted = margin + cell_width * n_columns
    worded = n_columns <= 48 and (look.width is None or look.width >= wanted)
    height = 22 if n_rows <= 140 else max(8, 2400 // n_rows)
    keys, names = [safe(key) for key in grid.where], [safe(row) for row in grid.rows]
    fixed = INK["light"] if colours.scale == "sequential" else None
    words = [[safe(cell) for cell in line] for line in grid.cells] if worded else None
    font = dict(size=10, color=fixed)
    shown = dict(x=keys, y=names, textfont=font, customdata=grid.detail)
    fig = go.Figure(cells(grid.values, grid.hover, words, **shown))
    if worded and look.width is None:
        look = replace(look, width=max(760, wanted))
    # A tick for as many names as fit, so that they never overlap.
    cell = (look.room - margin) / n_columns
    tall = range(0, n_rows, -(-14 // height))
    wide = range(0, n_columns, max(1, math.ceil(13 / cell)))
    level = cell >= 62
    fig.update_yaxes(
        tickmode="array",
        tickvals=[names[i] for i in tall],
        autorange="reversed",
        showgrid=False,
        zeroline=False,
    )
    fig.update_xaxes(
        tickmode="array",
        tickvals=[keys[i] for i in wide],
        ticktext=["<br>".join(map(safe, grid.columns[i].split("\n"))) for i in wide],
        side="top",
        tickangle=0 if level else -60,
        showgrid=False,
        zeroline=False,
    )
    fig.update_layout(
        coloraxis=colours.axis(grid.values, height * n_rows),
        meta=dict(
            scale=colours.scale,
            least=(look.width if worded else 330),
            marks=marks_of_rows(grid.rows) | marks_of_columns(grid.positions),
        ),
    )
    return styled(fig, heading, look, Sizes(height * n_rows, 44 if level else 84, 20))
