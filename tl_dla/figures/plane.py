"""Tokens as points of a plane, and vectors as lines of a matrix."""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from tl_dla.figures import charts, theme
from tl_dla.figures.charts import PLAIN, Grid, Heading, Look, Sizes
from tl_dla.figures.text import in_template, safe, visible


def plane(
    at: Float[np.ndarray, "token 2"],
    tokens: Sequence[str],
    share: Sequence[float],
    connect: bool = True,
    look: Look = PLAIN,
) -> go.Figure:
    """Tokens by their first two components, equally scaled, joined in their order.

    Args:
        at: their coordinates.
        tokens: their names.
        share: of the variance, along each component.
        connect: whether they are joined.
        look: title and size in place of the figure's own.
    """
    middle = at.mean(0)
    # A name stands on the far side of its point from the middle, where there are fewer lines.
    sides = [
        f"{'top' if y >= middle[1] else 'bottom'} {'right' if x >= middle[0] else 'left'}"
        for x, y in at
    ]
    fig = go.Figure(
        go.Scatter(
            x=at[:, 0],
            y=at[:, 1],
            mode="lines+markers+text" if connect else "markers+text",
            line=dict(color=theme.NEUTRAL, width=1),
            marker=dict(color=theme.POSITIVE, size=9),
            text=[safe(visible(token)) for token in tokens],
            textposition=sides,
            textfont_size=13,
            cliponaxis=False,
            customdata=[in_template(repr(token)) for token in tokens],
            hovertemplate="<b>%{customdata}</b><br>%{x:+.3f}, %{y:+.3f}<extra></extra>",
            showlegend=False,
        )
    )
    low, high = at.min(0), at.max(0)
    room = 0.14 * (high - low).max()
    for i, update in enumerate((fig.update_xaxes, fig.update_yaxes)):
        update(
            title_text=f"PC{i + 1} ({share[i]:.0%} of the variance)",
            range=[low[i] - room, high[i] + room],
            zeroline=False,
        )
    fig.update_yaxes(scaleanchor="x")
    heading = Heading(
        f"{len(tokens)} tokens in the plane in which their readout directions differ most",
        f"{sum(share):.0%} of their variance" + "; joined in the order given" * connect,
    )
    return charts.styled(fig, heading, look, Sizes(380))


def matrix(
    values: Float[np.ndarray, "source target"],
    names: tuple[Sequence[str], Sequence[str]],
    heading: Heading,
    look: Look = PLAIN,
) -> go.Figure:
    """Source × target: a line of logits for each source token or vector.

    Args:
        values: in logits.
        names: of the lines and of the columns.
        heading: above the figure.
        look: title and size in place of the figure's own.
    """
    rows, columns = (
        [name if list(some).count(name) == 1 else f"{i} {name}" for i, name in enumerate(some)]
        for some in names
    )
    grid = Grid(
        values=values,
        rows=rows,
        columns=[visible(name) for name in columns],
        where=[f"to {name!r}" for name in columns],
        cells=[[f"{value:+.2f}".replace("-", "−") for value in line] for line in values],
        detail=values,
        hover="<b>%{y}</b> %{x}<br>%{z:+.4f} logits",
    )
    return charts.table(grid, heading, look, cell_width=54)
