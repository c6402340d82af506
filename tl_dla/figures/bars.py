"""Rows as bars from 0, with a dot for every value behind a mean, or as steps to a total."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from tl_dla.figures import charts, theme
from tl_dla.figures.text import number, percent, safe
from tl_dla.figures.view import View, Words


@dataclass(frozen=True, eq=False)
class Bars:
    """Rows to draw as bars: their names, values and shares of the logit, in the view's words."""

    labels: Sequence[str]
    values: Float[np.ndarray, "row sample"]
    share: Float[np.ndarray, "row sample"]
    words: Words

    @classmethod
    def of(cls, view: View, rows: Sequence[int]) -> "Bars":
        """Rows of a view."""
        values, _ = view.only()
        return cls(
            [view.labels[row] for row in rows], values[rows], view.share[rows, :, 0], view.words
        )


def bars(
    rows: Bars, names: Sequence[str], *, places: Sequence[int] | None = None, **axes: str
) -> list[Any]:
    """A bar from 0 for each row's value, or its mean with a dot for every value."""
    values, share = rows.values, rows.share
    mean, count = values.mean(1), values.shape[1]
    what, units = rows.words.what, rows.words.units
    if count == 1:
        hover = [
            f"{m:+.4f} {units} ({percent(part, what)})<br>{safe(names[0])}"
            for m, part in zip(mean, share[:, 0], strict=True)
        ]
    else:
        hover = [
            f"mean {m:+.4f} {units}<br>{v.min():+.4f} to {v.max():+.4f} over {count}"
            for m, v in zip(mean, values, strict=True)
        ]
    traces: list[Any] = [
        go.Bar(
            x=mean,
            y=list(places or range(len(rows.labels))),
            orientation="h",
            marker_color=charts.signs(mean),
            width=0.66,
            hovertext=[
                f"<b>{safe(label)}</b><br>{line}"
                for label, line in zip(rows.labels, hover, strict=True)
            ],
            hoverinfo="text",
            showlegend=False,
            **axes,
        )
    ]
    if count > 1:
        dots = charts.dots(
            rows.labels, values, names, (what, units), places=places, share=share, **axes
        )
        traces.extend(dots)
    return traces


def waterfall(rows: Bars, where: str, folded: int | None = None) -> list[Any]:
    """Steps from 0 to the last row, which is what they add up to.

    Args:
        rows: the steps, and their total.
        where: what they are of, for hover.
        folded: the step that adds up smaller ones, which is paler than those that have a name.
    """
    values, share, words = rows.values[:, 0], rows.share[:, 0], rows.words
    ends = np.array([*np.cumsum(values[:-1]), values[-1]])
    places = np.arange(len(values))
    hover = [
        f"<b>{safe(label)}</b><br>{value:+.4f} {words.units} ({percent(part, words.what)})"
        f"<br>{end:+.4f} so far<br>{safe(where)}"
        for label, value, part, end in zip(rows.labels, values, share, ends, strict=True)
    ]
    steps = go.Bar(
        orientation="h",
        y=places,
        x=values,
        base=ends - values,
        marker_color=[*charts.signs(values[:-1]), theme.NEUTRAL],
        marker_opacity=[theme.PALE if i == folded else 1.0 for i in places],
        text=[number(value) for value in values],
        textposition="outside",
        textfont_size=10,
        cliponaxis=False,
        width=0.66,
        hovertext=hover,
        hoverinfo="text",
        showlegend=False,
    )
    joints = go.Scatter(
        x=[x for end in ends[:-1] for x in (end, end, None)],
        y=[y for i in places[:-1] for y in (i + 0.33, i + 0.67, None)],
        mode="lines",
        line=dict(width=0.6, color=theme.NEUTRAL),
        hoverinfo="skip",
        showlegend=False,
    )
    return [steps, joints]
