"""The figure of an attention score: its query's ledger, its keys', and the pairs of both."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from tl_dla.figures import charts
from tl_dla.figures.bars import Bars, Panel, add_bars
from tl_dla.figures.charts import PLAIN, Colours, Heading, Look, Sizes
from tl_dla.figures.text import number, safe
from tl_dla.figures.view import View, fold

_ROW, _GAP, _ABOVE_PAIRS = 20, 84, 170  # pixels: of a row, between ledgers, over the pairs' columns
_CELL = 44  # pixels that a number in a cell needs


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

    panels = [
        Panel((0.0, 1.0) if look.narrow else (0.0, 0.42), span(0, heights[0]), ""),
        Panel(
            (0.0, 1.0) if look.narrow else (0.58, 1.0),
            span(heights[0] + _GAP if look.narrow else 0, heights[1]),
            "2",
        ),
    ]
    fig = go.Figure()
    half = replace(look, width=look.room - 50 if look.narrow else look.room // 2)
    for name, view, side, panel in zip(
        ("the query", "the keys"), (query, key), sides, panels, strict=True
    ):
        add_bars(fig, side, view.names, half, panel)
        fig.add_annotation(charts.panel_title(f"who wrote {name}", panel.x[0], panel.y[1], 6))
    whole = Panel((0.0, 1.0), span(body - map_height, map_height), "3")
    _add_pairs(fig, folded.T, [side.labels[:-1] for side in sides], look, whole)
    across = "pairs: the query's rows down, the keys' across"
    fig.add_annotation(charts.panel_title(across, 0.0, whole.y[1], 88))
    fig.update_layout(meta=dict(scale="diverging", least=560), barmode="overlay")
    return charts.styled(fig, heading, look, Sizes(body, 34, 24))


def _rows(view: View, k: int) -> Bars:
    """The rows that matter, the others added up, and the score."""
    values, _ = view.only()
    labels, values = fold(view.labels, values, values.mean(1, keepdims=True), k)
    return Bars.with_total(view, labels, values, "score")


def _add_pairs(
    fig: go.Figure,
    values: Float[np.ndarray, "query_row key_row"],
    labels: Sequence[Sequence[str]],
    look: Look,
    panel: Panel,
) -> None:
    """A cell for each row of the query and row of the keys, coloured from red to blue about 0."""
    rows, columns = [[safe(label) for label in side] for side in labels]
    worded = (look.room - 170) / len(columns) >= _CELL
    words = [[number(value) for value in line] for line in values] if worded else None
    hover = "<b>%{y}</b> in the query × <b>%{x}</b> in the keys<br>%{z:+.4f} nats"
    x, y = f"x{panel.axis}", f"y{panel.axis}"
    shown = dict(x=columns, y=rows, xaxis=x, yaxis=y, textfont_size=10)
    fig.add_trace(charts.cells(values, hover, words, **shown))
    shared = dict(showgrid=False, zeroline=False, tickmode="array")
    across = dict(domain=panel.x, anchor=y, side="top", tickangle=-60, tickvals=columns)
    down = dict(domain=panel.y, anchor=x, autorange="reversed", tickvals=rows)
    fig.update_layout(
        {f"xaxis{panel.axis}": shared | across, f"yaxis{panel.axis}": shared | down},
        coloraxis=Colours("nats").axis(values) | dict(showscale=False),  # the numbers are there
    )
