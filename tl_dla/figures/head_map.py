"""The figure of `head` rows: layer × head, and every other row beside its layer or below."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from tl_dla.errors import ArgumentError
from tl_dla.figures import charts, theme
from tl_dla.figures.bars import Bars, bars
from tl_dla.figures.charts import PLAIN, Colours, Heading, Look, Sizes
from tl_dla.figures.text import in_template, number, percent, safe
from tl_dla.figures.view import View, headings, largest

_ROW, _GAP = 20, 74  # pixels: of a ledger's row, and between what is drawn
_CELL = 36  # pixels that a number in a cell needs


@dataclass(frozen=True)
class _Ledger:
    """Named rows below the map: its place on the page, its heading, and its own axes."""

    heading: str
    rows: Bars
    axis: int
    neutral: int | None = None  # the row that is a total


def heads(view: View, k: int = 10, look: Look = PLAIN) -> go.Figure:
    """Layer × head, coloured from red to blue about 0, and every other row beside its layer.

    What belongs to no layer (embeddings, biases) stands below, with the model's own logit. Several
    prompts: the colours and bars are means, the dots are the prompts, and the `k` heads farthest
    from 0 are drawn below with a dot for each prompt.

    Raises:
        ArgumentError: for a view without head rows, or k < 1.
    """
    values, logit = view.only()
    grid = head_grid(view, values.mean(1))
    beside = _beside(view)
    fig = go.Figure(_heatmap(grid, view))
    ledgers = [_outside(view)]
    if values.shape[1] > 1:
        ledgers.append(_top_heads(view, k))

    pixels = len(grid) * max(14, min(26, 700 // len(grid)))
    heights = [pixels, *(_ROW * len(one.rows.labels) for one in ledgers)]
    body = sum(heights) + _GAP * len(ledgers)
    ends = 1 - np.cumsum([0, *(height + _GAP for height in heights)]) / body
    split = _add_map(fig, grid, look, len(beside), 1 - pixels / body)
    worded = int(150 + _CELL * grid.shape[1] / split)  # the width that numbers need
    if look.room >= worded:
        words = [["" if np.isnan(x) else number(x)[:6] for x in line] for line in grid]
        fig.data[0].update(text=words, texttemplate="%{text}", textfont=dict(size=9))
    fig.update_layout(
        coloraxis=Colours(view.words.units).axis(grid, pixels)
        | dict(showscale=not look.narrow),  # signs are red and blue, values in the hover
        barmode="overlay",
    )
    marks = {
        label: ("x", "y", at.head - 0.5, at.head + 0.5, at.layer - 0.5, at.layer + 0.5)
        for label, at in _places(view.labels).items()
    }
    width = (1 - split) / max(1, len(beside))
    for i, (column, rows) in enumerate(beside.items()):
        left = split + i * width
        side = dict(domain=[left + 0.015, left + width], anchor="y", matches="x2", zeroline=True)
        ticks = 2 if look.narrow else 4
        fig.update_layout({f"xaxis{i + 2}": side | dict(nticks=ticks, side="bottom")})
        fig.add_annotation(_heading(column, left + 0.015, look))
        places = [view.layers[row] or 0 for row in rows]
        for row, layer in zip(rows, places, strict=True):
            side_of = (f"x{i + 2} domain", "y", 0.0, 1.0, layer - 0.5, layer + 0.5)
            marks[view.labels[row]] = side_of
        for trace in bars(Bars.of(view, rows), view.names, places=places, xaxis=f"x{i + 2}"):
            fig.add_trace(trace)
    for one, height, end in zip(ledgers, heights[1:], ends[1:], strict=False):
        _add_ledger(fig, one, view, look, (max(0.0, float(end) - height / body), float(end)))
        marks = charts.marks_of_rows(one.rows.labels, f"y{one.axis}") | marks
    fig.update_layout(meta=dict(scale="diverging", least=520, worded=worded, marks=marks))
    heading = Heading(*headings(f"What wrote the {view.words.what} of", view))
    return charts.styled(fig, heading, look, Sizes(body, 56 if look.narrow else 46))


def head_grid(view: View, values: Float[np.ndarray, " row"]) -> Float[np.ndarray, "layer head"]:
    """Head rows by layer and head; NaN where a layer has no such head."""
    places = _places(view.labels)
    if not places:
        raise ArgumentError(
            f'A unit="{view.unit}" result has no head rows to draw: attribute with unit="head".'
        )
    rows, layers, heads = np.array([tuple(at) for at in places.values()]).T
    n_layers = 1 + max(layer for layer in view.layers if layer is not None)
    grid = np.full((n_layers, heads.max() + 1), np.nan)
    grid[layers, heads] = values[rows]
    return grid


class _Cell(NamedTuple):
    """A head's row, and its place on the map."""

    row: int
    layer: int
    head: int


def _places(labels: Sequence[str]) -> dict[str, _Cell]:
    return {
        label: _Cell(row, int(match[1]), int(match[2]))
        for row, label in enumerate(labels)
        if (match := re.fullmatch(r"L(\d+)H(\d+)", label))
    }


def _heatmap(grid: Float[np.ndarray, "layer head"], view: View) -> go.Heatmap:
    """The cells, with each head's share of the logit, or its range over prompts, in hover."""
    (values, _), units = view.only(), view.words.units
    if values.shape[1] == 1:
        shares = head_grid(view, view.share[:, 0, 0])
        data = np.vectorize(percent)(shares, view.words.what)
        hover = f"%{{z:+.4f}} {units} (%{{customdata}})<br>{in_template(view.names[0])}"
    else:
        low, high = head_grid(view, values.min(1)), head_grid(view, values.max(1))
        data = np.vectorize(lambda a, b: f"{a:+.4f} to {b:+.4f}")(low, high)
        hover = f"mean %{{z:+.4f}} {units}<br>from %{{customdata}} over {values.shape[1]}"
    return go.Heatmap(
        z=grid,
        customdata=data,
        coloraxis="coloraxis",
        xgap=1,
        ygap=1,
        hoverongaps=False,
        hovertemplate=f"<b>L%{{y}}H%{{x}}</b><br>{hover}<extra></extra>",
    )


def _beside(view: View) -> dict[str, list[int]]:
    """The other rows of layers, a column for each kind of row (`mlp_out`, `attn_bias`)."""
    columns: dict[str, list[int]] = {}
    for row, label in enumerate(view.labels):
        if view.kinds[row] != "head" and view.layers[row] is not None:
            columns.setdefault(label.partition("_")[2] or label, []).append(row)
    return columns


def _outside(view: View) -> _Ledger:
    """The rows of no layer, and the model's own logit."""
    rows = [row for row, layer in enumerate(view.layers) if layer is None]
    own, logit = Bars.of(view, rows), view.logit[None, :, 0]
    total = Bars(
        [*own.labels, view.words.logit],
        np.vstack([own.values, logit]),
        np.vstack([own.share, np.where(logit == 0, np.nan, 1.0)]),
        view.words,
    )
    return _Ledger("embeddings, biases, and the total", total, 8, neutral=len(rows))


def _top_heads(view: View, k: int) -> _Ledger:
    """The k heads farthest from 0 on average; all of fewer."""
    rows = view.rows("head")
    values, _ = view.only()
    top = [rows[i] for i in largest(values[rows].mean(1, keepdims=True), k)]
    return _Ledger(f"the {len(top)} heads farthest from 0 on average", Bars.of(view, top), 9)


def _add_map(
    fig: go.Figure, grid: Float[np.ndarray, "layer head"], look: Look, n_columns: int, bottom: float
) -> float:
    """The axes of the map; returns where it ends and what stands beside it begins."""
    n_layers, n_heads = grid.shape
    split = (0.8 - 0.14 * n_columns) if n_columns else 1.0
    split = max(0.4, split)
    shared = dict(showgrid=False, zeroline=False)
    step = -(-n_heads // max(4, int((look.room - 150) * split / 20)))
    fig.update_layout(
        xaxis=dict(domain=[0, split - 0.01], side="top", tickmode="linear", dtick=step, **shared),
        yaxis=dict(
            domain=[bottom, 1],
            range=[n_layers - 0.5, -0.5],
            tickmode="array",
            tickvals=list(range(0, n_layers, 1 + (n_layers > 50))),
            title_text="layer",
            **shared,
        ),
    )
    fig.add_annotation(_heading("head", 0.0, look))
    return split


def _add_ledger(
    fig: go.Figure, one: _Ledger, view: View, look: Look, domain: Sequence[float]
) -> None:
    """Named rows with their bars and, for several prompts, dots."""
    x, y = f"x{one.axis}", f"y{one.axis}"
    traces = bars(one.rows, view.names, xaxis=x, yaxis=y)
    colours = list(traces[0].marker.color)
    if one.neutral is not None:
        colours[one.neutral] = theme.NEUTRAL
    traces[0].marker.color = colours
    axis = dict(domain=[0, 1], anchor=y, title_text=view.words.units, zeroline=True)
    if len(view.samples) == 1:
        ends = one.rows.values[:, 0].tolist()
        axis["range"] = charts.room_beside(
            ends, [end for end in ends if end < 0], one.rows.labels, look
        )
        words = dict(textposition="outside", textfont_size=10, cliponaxis=False)
        traces[0].update(text=[number(end) for end in ends], **words)
    fig.add_traces(traces)
    fig.add_annotation(
        _heading(one.heading, 0.0, PLAIN) | dict(y=domain[1], yshift=4, xanchor="left")
    )
    fig.update_layout(
        {
            f"xaxis{one.axis}": axis,
            f"yaxis{one.axis}": charts.ledger_axis(one.rows.labels)
            | dict(domain=list(domain), anchor=x),
        }
    )


def _heading(text: str, x: float, look: Look) -> dict[str, Any]:
    """A heading above the map, from x on; slanted where headings stand close together."""
    return dict(
        text=f"<b>{safe(text)}</b>",
        x=x,
        y=1,
        yshift=20,
        xref="paper",
        yref="paper",
        xanchor="left",
        yanchor="bottom",
        textangle=-25 if look.narrow and x else 0,
        showarrow=False,
        font_size=11,
    )
