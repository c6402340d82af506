"""Figures of what direct effects do not tell: audits, self-repair, erasures, groups of prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from tl_dla.figures import charts, theme
from tl_dla.figures.bars import Bars, waterfall
from tl_dla.figures.charts import PLAIN, Colours, Grid, Heading, Look, Sizes
from tl_dla.figures.text import number, safe
from tl_dla.figures.view import Words

_ROW = 26  # pixels


@dataclass(frozen=True, eq=False)
class Effects:
    """Direct and total effects, in logits.

    Attributes:
        rows: their names, the first on top.
        direct: what each wrote.
        total: what the logit loses without it.
        flags: the names of what a reader should know of each.
        sentences: the same as sentences.
    """

    rows: Sequence[str]
    direct: Float[np.ndarray, " row"]
    total: Float[np.ndarray, " row"]
    flags: Sequence[Sequence[str]]
    sentences: Sequence[Sequence[str]]


def direct_and_total(effects: Effects, heading: Heading, look: Look = PLAIN) -> go.Figure:
    """A bar for each direct effect, a diamond for the total one, and the names of the flags.

    Example:
        >>> import numpy as np
        >>> effects = Effects(
        ...     ["L1H0"], np.array([2.0]), np.array([0.5]), [["repaired"]], [["Half is repaired."]]
        ... )
        >>> fig = direct_and_total(effects, Heading("an audit"))
        >>> [trace.name for trace in fig.data]
        ['direct', 'total']
    """
    places = np.arange(len(effects.rows))
    hover = [
        "<br>".join(
            [
                f"<b>{safe(row)}</b>",
                f"direct {direct:+.4f}, total {total:+.4f}, indirect {total - direct:+.4f} logits",
                *(line for one in said for line in charts.lines(safe(one), 560, 6.4)),
            ]
        )
        for row, direct, total, said in zip(
            effects.rows, effects.direct, effects.total, effects.sentences, strict=True
        )
    ]
    shared = dict(y=places, hovertext=hover, hoverinfo="text")
    bars = go.Bar(
        x=effects.direct,
        orientation="h",
        marker_color=charts.signs(effects.direct),
        width=0.6,
        name="direct",
        **shared,
    )
    totals = go.Scatter(
        x=effects.total,
        mode="markers",
        marker=dict(
            symbol="diamond", size=10, color=theme.NEUTRAL, line=dict(width=1, color="white")
        ),
        name="total",
        **shared,
    )
    fig = go.Figure([bars, totals])
    fig.update_yaxes(charts.ledger_axis(effects.rows))
    low = float(min(0.0, *effects.direct, *effects.total))
    high = float(max(0.0, *effects.direct, *effects.total))
    span = (high - low) or 1.0
    names = [", ".join(flags).replace("_", " ") for flags in effects.flags]
    beside = 0.0
    for place, name, direct, total in zip(
        places, names, effects.direct, effects.total, strict=True
    ):
        if name:
            end = max(0.0, direct, total)
            fig.add_annotation(
                text=name, x=end, y=place, xanchor="left", xshift=9, showarrow=False, font_size=11
            )
            share = (len(name) * 6.2 + 14) / max(80, look.room - 130)  # of the axis
            beside = max(beside, (end - low + 0.03 * span) / max(0.2, 1 - share) - (end - low))
    fig.update_xaxes(
        title_text="logits", zeroline=True, range=[low - 0.04 * span, high + 0.06 * span + beside]
    )
    fig.update_layout(meta=dict(marks=charts.marks_of_rows(effects.rows)))
    return charts.styled(fig, heading, look, Sizes(_ROW * len(places) + 20, 40))


def repair(
    parts: Mapping[str, float], total: float, heading: Heading, look: Look = PLAIN
) -> go.Figure:
    """Steps from a row's direct effect, through later parts, to its total effect.

    Args:
        parts: the direct effect, then what goes through each part.
        total: what they add up to.
        heading: above the figure.
        look: title and size in place of the figure's own.
    """
    labels, values = [*parts, "total effect"], np.array([*parts.values(), total])
    direct = values[0] or np.nan
    words = Words("", "total effect", "", "direct effect")
    rows = Bars(labels, values[:, None], values[:, None] / direct, words, totalled=True)
    fig = waterfall(rows, "mean over prompts and positions", look)
    fig.update_yaxes(charts.ledger_axis(labels))
    fig.update_xaxes(title_text="logits", zeroline=True)
    return charts.styled(fig, heading, look, Sizes(_ROW * len(labels) + 20))


def erased(
    writers: Sequence[str],
    erasers: Sequence[str],
    logits: Float[np.ndarray, "writer eraser"],
    ratio: Float[np.ndarray, "writer eraser"],
    heading: Heading,
    look: Look = PLAIN,
) -> go.Figure:
    """Writer × later row: what the later one writes along the writer's direction, in logits."""
    grid = Grid(
        values=logits,
        rows=list(writers),
        columns=list(erasers),
        where=[f"after it, {name}" for name in erasers],
        cells=[[number(x) if x else "" for x in line] for line in logits],
        detail=ratio,
        hover="<b>%{y}</b><br>%{z:+.4f} logits along what it wrote (%{customdata:+.1%} of it)"
        "<br>%{x}",
    )
    return charts.table(grid, heading, look, Colours())


Interval = tuple[Float[np.ndarray, " row"], Float[np.ndarray, " row"], Float[np.ndarray, " row"]]


def by_group(
    labels: Sequence[str],
    groups: Mapping[str, Interval],
    heading: Heading,
    look: Look = PLAIN,
) -> go.Figure:
    """A mean with its interval for each row and group of prompts, the groups in colours.

    Args:
        labels: the rows' names, the first on top.
        groups: of each group the rows' means, and the lower and upper ends of their intervals.
        heading: above the figure.
        look: title and size in place of the figure's own.
    """
    fig = go.Figure()
    n = len(groups)
    for i, (name, (mean, low, high)) in enumerate(groups.items()):
        colour = theme.PALETTE[i % len(theme.PALETTE)]
        fig.add_trace(
            go.Scatter(
                x=mean,
                y=np.arange(len(labels)) + 0.6 * ((i + 0.5) / n - 0.5),
                mode="markers",
                marker=dict(size=7, color=colour),
                error_x=dict(
                    type="data",
                    symmetric=False,
                    array=high - mean,
                    arrayminus=mean - low,
                    width=0,
                    thickness=2,
                    color=colour,
                ),
                hovertext=[
                    f"<b>{safe(label)}</b>, {safe(name)}<br>mean {m:+.4f} logits"
                    f"<br>interval {a:+.4f} to {b:+.4f}"
                    for label, m, a, b in zip(labels, mean, low, high, strict=True)
                ],
                hoverinfo="text",
                name=safe(name),
            )
        )
    fig.update_yaxes(charts.ledger_axis(labels))
    fig.update_xaxes(title_text="logits", zeroline=True)
    return charts.styled(fig, heading, look, Sizes(20 + max(22, 12 * n) * len(labels), 40))
