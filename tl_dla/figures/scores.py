"""The figure of an attention score: its query's ledger, its keys', and the pairs of both."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from tl_dla.errors import ArgumentError
from tl_dla.figures import charts, theme
from tl_dla.figures.bars import Bars, bars
from tl_dla.figures.charts import PLAIN, Colours, Heading, Look, Sizes
from tl_dla.figures.text import number, safe
from tl_dla.figures.view import View, fold

_ROW, _GAP, _ABOVE_PAIRS = 20, 84, 170  # pixels: of a row, between ledgers, over the pairs' columns
_CELL = 44  # pixels that a number in a cell needs


@dataclass(frozen=True)
class _Place:
    """Where a part of the figure stands, as fractions of it, and the number of its axes."""

    x: tuple[float, float]
    y: tuple[float, float]
    axis: str


def scores(
    query: View,
    key: View,
    pairs: Float[np.ndarray, "query_row key_row"],
    heading: Heading,
    k: int = 10,
    look: Look = PLAIN,
) -> go.Figure:
    """Two ledgers side by side (one below the other where it is narrow), and the pairs below.

    Args:
        query: the rows of the query.
        key: the rows of the keys.
        pairs: what each row of the query makes of each row of the keys, over all prompts.
        heading: above the figure.
        k: how many rows of either side have a name; the others are added up.
        look: title and size in place of the figure's own.

    Raises:
        ArgumentError: for k < 1.
    """
    if k < 1:
        raise ArgumentError(f"k must be at least 1; {k} was given.")
    sides = [_rows(view, k) for view in (query, key)]
    means = [view.only()[0].mean(1, keepdims=True) for view in (query, key)]
    _, folded = fold(query.labels, pairs, means[0], k)
    _, folded = fold(key.labels, folded.T, means[1], k)
    heights = [_ROW * len(side.labels) for side in sides]
    above = sum(heights) + _GAP if look.narrow else max(heights)
    map_height = _ROW * folded.shape[1]
    body = above + _ABOVE_PAIRS + map_height

    def span(top: int, height: int) -> tuple[float, float]:
        return max(0.0, 1 - (top + height) / body), 1 - top / body

    places = [
        _Place((0.0, 1.0) if look.narrow else (0.0, 0.42), span(0, heights[0]), ""),
        _Place(
            (0.0, 1.0) if look.narrow else (0.58, 1.0),
            span(heights[0] + _GAP if look.narrow else 0, heights[1]),
            "2",
        ),
    ]
    fig = go.Figure()
    half = replace(look, width=look.room - 50 if look.narrow else look.room // 2 + 80)
    for name, view, side, place in zip(
        ("the query", "the keys"), (query, key), sides, places, strict=True
    ):
        _add_ledger(fig, side, view, half, place)
        fig.add_annotation(_heading(f"who wrote {name}", place, 6))
    whole = _Place((0.0, 1.0), span(body - map_height, map_height), "3")
    _add_pairs(fig, folded.T, [side.labels[:-1] for side in sides], look, whole)
    fig.add_annotation(_heading("pairs: the query's rows down, the keys' across", whole, 88))
    fig.update_layout(meta=dict(scale="diverging", least=560), barmode="overlay")
    return charts.styled(fig, heading, look, Sizes(body, 34, 24))


def _rows(view: View, k: int) -> Bars:
    """The rows that matter, the others added up, and the score."""
    values, score = view.only()
    labels, values = fold(view.labels, values, values.mean(1, keepdims=True), k)
    every = np.vstack([values, score])
    share = every / np.where(score == 0, np.nan, score)
    return Bars([*labels, "score"], every, share, view.words)


def _add_ledger(fig: go.Figure, rows: Bars, view: View, look: Look, place: _Place) -> None:
    """Named rows with their bars and, for several prompts, dots."""
    x, y = f"x{place.axis}", f"y{place.axis}"
    traces = bars(rows, view.names, xaxis=x, yaxis=y)
    traces[0].marker.color = [*list(traces[0].marker.color)[:-1], theme.NEUTRAL]
    axis: dict[str, Any] = dict(domain=place.x, anchor=y, title_text=view.words.units)
    if len(view.samples) == 1:
        ends = rows.values[:, 0].tolist()
        fallen = [end for end in ends if end < 0]
        axis["range"] = charts.room_beside(ends, fallen, rows.labels, look)
        words = dict(textposition="outside", textfont_size=10, cliponaxis=False)
        traces[0].update(text=[number(end) for end in ends], **words)
    fig.add_traces(traces)
    vertical = charts.ledger_axis(rows.labels) | dict(domain=place.y, anchor=x)
    fig.update_layout(
        {f"xaxis{place.axis}": axis | dict(zeroline=True), f"yaxis{place.axis}": vertical}
    )


def _add_pairs(
    fig: go.Figure,
    values: Float[np.ndarray, "query_row key_row"],
    labels: Sequence[Sequence[str]],
    look: Look,
    place: _Place,
) -> None:
    """A cell for each row of the query and row of the keys, coloured from red to blue about 0."""
    rows, columns = [[safe(label) for label in side] for side in labels]
    worded = (look.room - 170) / len(columns) >= _CELL
    fig.add_trace(
        go.Heatmap(
            z=values,
            x=columns,
            y=rows,
            coloraxis="coloraxis",
            xaxis=f"x{place.axis}",
            yaxis=f"y{place.axis}",
            xgap=1,
            ygap=1,
            text=[[number(value) for value in line] for line in values] if worded else None,
            texttemplate="%{text}" if worded else None,
            textfont_size=10,
            hovertemplate="<b>%{y}</b> in the query × <b>%{x}</b> in the keys<br>%{z:+.4f} nats"
            "<extra></extra>",
        )
    )
    shared = dict(showgrid=False, zeroline=False, tickmode="array")
    fig.update_layout(
        {
            f"xaxis{place.axis}": shared
            | dict(
                domain=place.x,
                anchor=f"y{place.axis}",
                side="top",
                tickangle=-60,
                tickvals=columns,
            ),
            f"yaxis{place.axis}": shared
            | dict(domain=place.y, anchor=f"x{place.axis}", autorange="reversed", tickvals=rows),
        },
        coloraxis=Colours("nats").axis(values) | dict(showscale=False),  # the numbers are there
    )


def _heading(text: str, place: _Place, shift: int) -> dict[str, Any]:
    return dict(
        text=f"<b>{safe(text)}</b>",
        x=place.x[0],
        y=place.y[1],
        yshift=shift,
        xref="paper",
        yref="paper",
        xanchor="left",
        yanchor="bottom",
        showarrow=False,
        font_size=11,
    )
