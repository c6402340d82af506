"""Figures of rows: `plot(view)` picks the right one for the unit; returned, never shown.

    component, and any other unit   `ledger`       bars from 0 to the model's own logit
    head                            `heads`        layer × head, the other rows beside
    layer                           `trajectory`   the stream's reading, attention and MLP steps
    over candidates                 `candidates`   row × candidate, or a line for each
    one prompt, several positions   `positions`    row × token

Several prompts are drawn as their mean with every prompt's own value beside it. Values are in
logits; `share` is the value over the model's own logit.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from tl_dla.errors import ArgumentError
from tl_dla.figures import charts
from tl_dla.figures.bars import Bars, bars, waterfall
from tl_dla.figures.charts import PLAIN, Colours, Grid, Look, Sizes
from tl_dla.figures.head_map import heads
from tl_dla.figures.text import number
from tl_dla.figures.trajectory import trajectory
from tl_dla.figures.view import Sample, View, fold, require_few, require_some, share_of


def plot(view: View, k: int = 40, look: Look = PLAIN) -> go.Figure:
    """The figure for the view's unit.

    Args:
        view: what to draw.
        k: how many rows a figure names; the smaller ones are added up in a row of their own.
        look: title and size in place of the figure's own.

    Raises:
        ArgumentError: for k < 1, or more candidates than there is room for.
    """
    require_some(k)
    require_few(view)
    if view.unit == "layer":
        return trajectory(view, look)
    if len(view.candidates) > 1:
        return candidates(view, k, look)
    if view.n_prompts == 1 and view.several_positions:
        return positions(view, k, look)
    if view.unit == "head":
        return heads(view, min(k, 10), look)
    return ledger(view, k, look)


# ---- the ledger --------------------------------------------------------------------------------


def ledger(view: View, k: int = 40, look: Look = PLAIN) -> go.Figure:
    """The rows in the order of the stream, the smallest ones added up, then the model's own logit.

    One prompt is a waterfall from 0 to the logit; several are bars from 0 for the means, with a dot
    for each prompt.

    Raises:
        ArgumentError: for k < 1, or a `layer` view, whose rows are no parts of a sum.
    """
    if view.unit == "layer":
        raise ArgumentError("Readings of a stream are no parts of a sum: draw their trajectory.")
    view = view.along_the_stream()
    values, _ = view.only()
    labels, values = fold(view.labels, values, values.mean(1, keepdims=True), k)
    rows = Bars.with_total(view, labels, values, view.words.logit)
    if len(labels) < len(view.labels):
        rows = replace(rows, folded=len(labels) - 1)
    if len(view.samples) == 1:
        fig = waterfall(rows, view.names[0], look)
    else:
        fig = go.Figure(bars(rows, view.names))
        fig.data[0].marker.opacity = rows.opacities
    fig.update_yaxes(charts.ledger_axis(rows.labels))
    fig.update_xaxes(title_text=view.words.units, zeroline=True)
    fig.update_layout(meta=dict(marks=charts.marks_of_rows(labels)))
    heading = charts.heading_of(f"What wrote the {view.words.what} of", view)
    return charts.styled(fig, heading, look, Sizes(20 * len(rows.labels) + 20))


# ---- tables of rows ----------------------------------------------------------------------------


def candidates(view: View, k: int = 40, look: Look = PLAIN) -> go.Figure:
    """Row × candidate: the k rows that matter and the sum of the others.

    A line for each candidate for `unit="layer"`. Several prompts have a column each beside the mean
    of each candidate.

    Raises:
        ArgumentError: for a view that is not over candidates, or k < 1.
    """
    if not view.over_candidates:
        raise ArgumentError("The result is not over candidates: attribute with candidate_tokens.")
    if view.unit == "layer":
        return trajectory(view, look)
    n_samples = len(view.samples)
    columns, values, logits, where = [], [], [], []
    for c, name in enumerate(view.candidates):
        if n_samples > 1:
            columns.append(f"{name!r} mean")
            values.append(view.values[..., c].mean(1))
            logits.append(view.logit[:, c].mean())
            where.append(f"{name!r}, mean over {n_samples}")
        for i, sample in enumerate(view.samples):
            columns.append(_column(view, sample) if n_samples > 1 else repr(name))
            values.append(view.values[:, i, c])
            logits.append(view.logit[i, c])
            where.append(f"{name!r}, {sample}")
    names = [f"{name} ({x:+.4f} logits)" for name, x in zip(where, logits, strict=True)]
    every = np.stack(values, 1), np.array(logits)
    shown = view.values.mean(1)
    heading = charts.heading_of("What wrote the logits of", view)
    return charts.table(_grid(view, *every, columns, names, fold_by=(shown, k)), heading, look)


def positions(view: View, k: int = 40, look: Look = PLAIN) -> go.Figure:
    """Row × token of one prompt, the k rows that matter and the sum of the others.

    The colours end at the second largest column, so that one (of the first token, as a rule) cannot
    take them all.
    """
    values, logit = view.only()
    tokens = [sample.short for sample in view.samples]
    names = [f"{name} ({x:+.4f} logits)" for name, x in zip(view.names, logit, strict=True)]
    grid = _grid(view, values, logit, tokens, names, fold_by=(values, k))
    grid = replace(grid, positions=[sample.position for sample in view.samples])
    columns = np.sort(np.abs(grid.values).max(0))
    colours = Colours(largest=float(columns[-2]) if len(columns) > 2 else None)
    heading = charts.heading_of("What wrote the logit of", view)
    return charts.table(grid, heading, look, colours)


def _column(view: View, sample: Sample) -> str:
    """A sample among those of the view: its prompt, its token, or both."""
    if view.n_prompts == 1:
        return sample.short
    return f"{sample.prompt}: {sample.short}" if view.several_positions else f"{sample.prompt}"


def _grid(
    view: View,
    values: Float[np.ndarray, "row column"],
    logit: Float[np.ndarray, " column"],
    columns: Sequence[str],
    where: Sequence[str],
    fold_by: tuple[Float[np.ndarray, "row shown"], int],
) -> Grid:
    """The rows that matter; the model's own logit is in each column's hover, and its name."""
    labels, values = fold(view.labels, values, *fold_by)
    if len(columns) <= 12:
        columns = [f"{name}\n{number(x)}" for name, x in zip(columns, logit, strict=True)]
    return Grid(
        values=values,
        rows=labels,
        columns=columns,
        where=where,
        cells=[[number(value) for value in line] for line in values],
        detail=share_of(logit, values),
        hover="<b>%{y}</b><br>%{z:+.4f} logits (%{customdata:.1%} of the logit)<br>%{x}",
    )
