"""The figure of a `head` result: layer × head, and every other row beside its layer."""

import re
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from tl_dla.errors import ArgumentError
from tl_dla.figures import charts
from tl_dla.figures.charts import in_template, safe
from tl_dla.figures.view import View, bars, headings, read

if TYPE_CHECKING:
    from tl_dla.core.result import DirectLogitAttribution


def heads(
    result: "DirectLogitAttribution",
    *,
    prompt: int | None = None,
    candidate: str | int | None = None,
    k: int = 10,
) -> go.Figure:
    """Layer × head, coloured from red to blue about 0, and every other row beside its layer.

    What belongs to no layer stands above the first one (embeddings) and below the last (biases).
    Several prompts: the colours and bars are means, the dots are the prompts, and the `k` heads
    farthest from 0 are drawn below with a dot for each prompt.

    Raises:
        ArgumentError: for a result without head rows, or more heads than there are.
    """
    view = read(result, prompt, candidate)
    values, _ = view.only()
    grid = head_grid(result, values.mean(1))
    beside = _beside(result, len(grid))
    several = values.shape[1] > 1
    columns = list(dict.fromkeys(column for _, column, _ in beside)) or ["other rows"]
    above = -min([0, *(place for _, _, place in beside)])
    n_rows = above + max([len(grid), *(place + 1 for _, _, place in beside)])
    pixels = n_rows * max(14, min(26, 700 // n_rows))
    strip = 80 + 22 * k if several else 0
    bottom = strip / (pixels + strip)

    fig = go.Figure(_heatmap(grid, result, view))
    split = 0.72 - 0.1 * (len(columns) - 1)
    width = (1 - split) / len(columns)
    shared = dict(tickmode="linear", showgrid=False, zeroline=False)
    step = -(-grid.shape[1] // 32)
    fig.update_layout(
        xaxis=dict(domain=[0, split - 0.02], side="top", dtick=step, **shared),
        yaxis=dict(
            domain=[bottom, 1],
            range=[n_rows - above - 0.5, -above - 0.5],
            tickmode="array",
            tickvals=list(range(0, len(grid), -(-14 * n_rows // pixels))),
            title_text="layer",
            showgrid=False,
            zeroline=False,
        ),
        coloraxis=charts.colour_axis(
            grid, x=1.01, y=1, yanchor="top", lenmode="pixels", len=min(220, pixels)
        ),
        meta="diverging",
        barmode="overlay",
    )
    fig.add_annotation(_heading("head", (split - 0.02) / 2))
    for i, column in enumerate(columns):
        own = [(row, place) for row, name, place in beside if name == column]
        left = split + i * width
        x = f"x{i + 2}"
        side = dict(domain=[left + 0.015, left + width], anchor="y", matches="x2", nticks=4)
        fig.update_layout({f"xaxis{i + 2}": side | dict(zeroline=True, side="bottom")})
        fig.add_annotation(_heading(column, left + 0.015 + (width - 0.015) / 2))
        _add_beside(fig, result, view, own, x)
    for row, _, place in beside:
        if result.layers[row] is None:
            fig.add_annotation(
                text=safe(result.labels[row]),
                x=split - 0.005,
                xref="paper",
                xanchor="right",
                y=place,
                yref="y",
                showarrow=False,
                font_size=11,
            )
    if several:
        _add_top_heads(fig, result, view, k, bottom, strip)
    title, subtitle = headings(result, "What wrote the logit of", view)
    charts.styled(fig, title, subtitle, height=170 + pixels + strip)
    return fig.update_layout(margin_t=130)


def head_grid(
    result: "DirectLogitAttribution", values: Float[np.ndarray, " row"]
) -> Float[np.ndarray, "layer head"]:
    """Head rows by layer and head; NaN where a layer has no such head."""
    places = [
        (row, int(match[1]), int(match[2]))
        for row, label in enumerate(result.labels)
        if (match := re.fullmatch(r"L(\d+)H(\d+)", label))
    ]
    if not places:
        raise ArgumentError(
            f'A unit="{result.unit}" result has no head rows to draw: attribute with unit="head".'
        )
    rows, layers, heads = np.array(places).T
    grid = np.full((result.plan.reader.n_layers, heads.max() + 1), np.nan)
    grid[layers, heads] = values[rows]
    return grid


def _heatmap(
    grid: Float[np.ndarray, "layer head"], result: "DirectLogitAttribution", view: View
) -> go.Heatmap:
    """The cells, with each head's share of the logit, or its range over prompts, in hover."""
    values, _ = view.only()
    if values.shape[1] == 1:
        share = head_grid(result, view.share[:, 0, 0])
        data = np.vectorize(charts.percent)(share)
        hover = f"%{{z:+.4f}} logits (%{{customdata}})<br>{in_template(view.samples[0])}"
    else:
        low, high = head_grid(result, values.min(1)), head_grid(result, values.max(1))
        data = np.vectorize(lambda a, b: f"{a:+.4f} to {b:+.4f}")(low, high)
        hover = f"mean %{{z:+.4f}} logits<br>from %{{customdata}} over {values.shape[1]}"
    return go.Heatmap(
        z=grid,
        customdata=data,
        coloraxis="coloraxis",
        xgap=1,
        ygap=1,
        hoverongaps=False,
        hovertemplate=f"<b>L%{{y}}H%{{x}}</b><br>{hover}<extra></extra>",
    )


def _beside(result: "DirectLogitAttribution", n_layers: int) -> list[tuple[int, str, int]]:
    """Every other row as (row, column, place).

    The rows of a layer have a column for each kind of row; the others stand in the last column,
    above the layers or below them.
    """
    others = [row for row, kind in enumerate(result.kinds) if kind != "head"]
    of_layer = [row for row in others if result.layers[row] is not None]
    found = [
        (row, result.labels[row].partition("_")[2] or result.labels[row], result.layers[row] or 0)
        for row in of_layer
    ]
    last = found[-1][1] if found else "other rows"
    free = [row for row in others if result.layers[row] is None]
    top = [row for row in free if not of_layer or row < of_layer[0]]
    top = [row for row in top if result.kinds[row] != "bias"]
    found += [(row, last, i - len(top)) for i, row in enumerate(top)]
    below = [row for row in free if row not in top]
    return found + [(row, last, n_layers + i) for i, row in enumerate(below)]


def _heading(text: str, x: float) -> dict[str, Any]:
    return dict(
        text=f"<b>{safe(text)}</b>",
        x=x,
        y=1,
        yshift=26,
        xref="paper",
        yref="paper",
        xanchor="center",
        yanchor="bottom",
        showarrow=False,
        font_size=11,
    )


def _add_beside(
    fig: go.Figure,
    result: "DirectLogitAttribution",
    view: View,
    rows: list[tuple[int, int]],
    x: str,
) -> None:
    """Bars for these rows, beside the layers."""
    values, _ = view.only()
    own, places = [row for row, _ in rows], [place for _, place in rows]
    labels = [result.labels[row] for row in own]
    for trace in bars(labels, values[own], view, view.share[own, :, 0], places=places, xaxis=x):
        fig.add_trace(trace)


def _add_top_heads(
    fig: go.Figure, result: "DirectLogitAttribution", view: View, k: int, bottom: float, strip: int
) -> None:
    """The k heads farthest from 0 on average, with every prompt."""
    values, _ = view.only()
    rows = [row for row, kind in enumerate(result.kinds) if kind == "head"]
    if not 1 <= k <= len(rows):
        raise ArgumentError(f"k must be 1 to the number of heads, {len(rows)}; {k} was given.")
    top = sorted(rows, key=lambda row: -abs(values[row].mean()))[:k]
    labels = [result.labels[row] for row in top]
    share = view.share[top, :, 0]
    for trace in bars(labels, values[top], view, share, xaxis="x9", yaxis="y9"):
        fig.add_trace(trace)
    height = bottom * (1 - 70 / strip)
    words = f"the {k} heads farthest from 0 on average"
    fig.add_annotation(_heading(words, 0.0) | dict(xanchor="left", y=height, yshift=4))
    fig.update_layout(
        xaxis9=dict(domain=[0, 1], anchor="y9", title_text="logits", zeroline=True),
        yaxis9=charts.ledger_axis(labels) | dict(domain=[0, height], anchor="x9"),
    )
