"""The figure of `head` rows: layer × head, and every other row beside its layer or below."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float, Shaped

from tl_dla.errors import ArgumentError
from tl_dla.figures import charts
from tl_dla.figures.bars import Bars, Panel, add_bars, bars
from tl_dla.figures.charts import PLAIN, Colours, Look, Sizes
from tl_dla.figures.text import in_template, number, percent
from tl_dla.figures.view import View, largest

_ROW, _GAP = 20, 74  # pixels: of a ledger's row, and between what is drawn
_CELL = 36  # pixels that a number in a cell needs


def heads(view: View, k: int = 10, look: Look = PLAIN) -> go.Figure:
    """Layer × head, coloured from red to blue about 0, and every other row beside its layer.

    What belongs to no layer (embeddings, biases) stands below, with the model's own logit. Several
    prompts: the colours and bars are means, the dots are the prompts, and the `k` heads farthest
    from 0 are drawn below with a dot for each prompt.

    Raises:
        ArgumentError: for a view without head rows, or k < 1.
    """
    values, _ = view.only()
    grid = head_grid(view, values.mean(1))
    beside = _beside(view)
    ledgers = {"embeddings, biases, and the total": _outside(view)}
    if values.shape[1] > 1:
        top = _top_heads(view, k)
        ledgers[f"the {len(top.labels)} heads farthest from 0 on average"] = top

    pixels = len(grid) * max(14, min(26, 700 // len(grid)))
    heights = [pixels, *(_ROW * len(ledger.labels) for ledger in ledgers.values())]
    body = sum(heights) + _GAP * len(ledgers)
    ends = 1 - np.cumsum([0, *(height + _GAP for height in heights)]) / body
    # Where the map ends, and what stands beside it begins.
    split = max(0.4, 0.8 - 0.14 * len(beside)) if beside else 1.0
    worded = room_for_numbers(grid, split)
    fig = go.Figure(head_cells(grid, *_hover(view), look.room >= worded))
    across, down = map_axes(grid, split * (look.room - 150))
    fig.update_layout(
        xaxis=across | dict(domain=[0, split - 0.01]),
        yaxis=down | dict(domain=[1 - pixels / body, 1]),
        coloraxis=Colours(view.words.units).axis(grid, pixels)
        | dict(showscale=not look.narrow),  # signs are red and blue, values in the hover
        barmode="overlay",
    )
    fig.add_annotation(_heading("head", 0.0, look))
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
    for i, (title, ledger) in enumerate(ledgers.items(), 1):
        end, axis = float(ends[i]), f"{7 + i}"
        panel = Panel((0.0, 1.0), (max(0.0, end - heights[i] / body), end), axis)
        add_bars(fig, ledger, view.names, look, panel)
        fig.add_annotation(charts.panel_title(title, 0.0, end, 4))
        marks = charts.marks_of_rows(ledger.labels, f"y{axis}") | marks
    fig.update_layout(meta=dict(scale="diverging", least=520, worded=worded, marks=marks))
    heading = charts.heading_of(f"What wrote the {view.words.what} of", view)
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


def room_for_numbers(grid: Float[np.ndarray, "layer head"], split: float = 1.0) -> int:
    """The width of a figure in which the cells of the map, a part of it, have room for numbers."""
    return int(150 + _CELL * grid.shape[1] / split)


def head_cells(
    grid: Float[np.ndarray, "layer head"],
    hover: str,
    detail: Shaped[np.ndarray, "layer head *each"],
    worded: bool,
    **axes: str,
) -> go.Heatmap:
    """A cell for each head, with its number in it where that is wanted."""
    words = None
    if worded:
        words = [["" if np.isnan(x) else number(x)[:6] for x in line] for line in grid]
    hover = f"<b>L%{{y}}H%{{x}}</b><br>{hover}"
    return charts.cells(grid, hover, words, customdata=detail, textfont_size=9, **axes)


def map_axes(
    grid: Float[np.ndarray, "layer head"], width: int | float
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Heads across and layers down, with as many ticks as a width has room for."""
    n_layers, n_heads = grid.shape
    plain = dict(showgrid=False, zeroline=False)
    step = -(-n_heads // max(4, int(width / 20)))
    across = dict(side="top", tickmode="linear", dtick=step, **plain)
    layers = list(range(0, n_layers, 1 + (n_layers > 50)))
    down = dict(range=[n_layers - 0.5, -0.5], tickmode="array", tickvals=layers, **plain)
    return across, down | dict(title_text="layer")


def _hover(view: View) -> tuple[str, Shaped[np.ndarray, "layer head"]]:
    """What hover shows: each head's share of the logit, or its range over prompts."""
    (values, _), units = view.only(), view.words.units
    if values.shape[1] == 1:
        shares = head_grid(view, view.share[:, 0, 0])
        words = f"%{{z:+.4f}} {units} (%{{customdata}})<br>{in_template(view.names[0])}"
        return words, np.vectorize(percent)(shares, view.words.what)
    low, high = head_grid(view, values.min(1)), head_grid(view, values.max(1))
    words = f"mean %{{z:+.4f}} {units}<br>from %{{customdata}} over {values.shape[1]}"
    return words, np.vectorize(lambda a, b: f"{a:+.4f} to {b:+.4f}")(low, high)


def _beside(view: View) -> dict[str, list[int]]:
    """The other rows of layers, a column for each kind of row (`mlp_out`, `attn_bias`)."""
    columns: dict[str, list[int]] = {}
    for row, label in enumerate(view.labels):
        if view.kinds[row] != "head" and view.layers[row] is not None:
            columns.setdefault(label.partition("_")[2] or label, []).append(row)
    return columns


def _outside(view: View) -> Bars:
    """The rows of no layer, and the model's own logit."""
    rows = [row for row, layer in enumerate(view.layers) if layer is None]
    values, _ = view.only()
    return Bars.with_total(view, [view.labels[row] for row in rows], values[rows], view.words.logit)


def _top_heads(view: View, k: int) -> Bars:
    """The k heads farthest from 0 on average; all of fewer."""
    rows = view.rows("head")
    values, _ = view.only()
    return Bars.of(view, [rows[i] for i in largest(values[rows].mean(1, keepdims=True), k)])


def _heading(text: str, x: float, look: Look) -> dict[str, Any]:
    """A heading above the map, from x on; slanted where headings stand close together."""
    return charts.panel_title(text, x, 1.0, 20) | dict(textangle=-25 if look.narrow and x else 0)
