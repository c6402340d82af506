"""Rows as bars from 0, with a dot for every value behind a mean, or as steps to a total."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from tl_dla.figures import charts, theme
from tl_dla.figures.charts import Look
from tl_dla.figures.text import in_template, number, percent, safe
from tl_dla.figures.view import View, Words, share_of, spread


@dataclass(frozen=True, eq=False)
class Bars:
    """Rows to draw as bars.

    Attributes:
        labels: their names.
        values: their values, of every sample.
        share: the same as shares of the logit.
        words: the view's.
        totalled: whether the last row is what the others add up to.
        folded: the row that adds up smaller ones, which is paler than those that have a name.
    """

    labels: Sequence[str]
    values: Float[np.ndarray, "row sample"]
    share: Float[np.ndarray, "row sample"]
    words: Words
    totalled: bool = False
    folded: int | None = None

    @classmethod
    def of(cls, view: View, rows: Sequence[int]) -> "Bars":
        """Rows of a view."""
        values, _ = view.only()
        return cls(
            [view.labels[row] for row in rows], values[rows], view.share[rows, :, 0], view.words
        )

    @classmethod
    def with_total(
        cls, view: View, labels: Sequence[str], values: Float[np.ndarray, "row sample"], total: str
    ) -> "Bars":
        """Some rows, and a view's logit as their total."""
        _, logit = view.only()
        every = np.vstack([values, logit])
        return cls([*labels, total], every, share_of(logit, every), view.words, totalled=True)

    @property
    def colours(self) -> list[str]:
        """By the sign of the mean; a total is neutral."""
        own = charts.signs(self.values.mean(1))
        return [*own[:-1], theme.NEUTRAL] if self.totalled else own

    @property
    def opacities(self) -> list[float]:
        """Of each row."""
        return [theme.PALE if i == self.folded else 1.0 for i in range(len(self.labels))]


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
            marker_color=rows.colours,
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
        traces += _dots(rows, names, places, **axes)
    return traces


def _dots(
    rows: Bars, names: Sequence[str], places: Sequence[int] | None, **axes: str
) -> list[go.Scatter]:
    """Every value of every row as a dot at the row's place on the vertical axis.

    Each sample is a trace, so that its name is in the page once, and not once a dot.
    """
    n_samples, words = len(names), rows.words
    size, opacity, edge = (6, 0.85, 0.8) if n_samples <= 40 else (4, 0.4, 0.0)
    offsets = spread(0.0, n_samples)
    at = np.asarray(places if places is not None else range(len(rows.labels)), dtype=np.float32)
    return [
        go.Scatter(
            x=rows.values[:, i],
            y=at + np.float32(offsets[i]),
            customdata=rows.share[:, i].astype(np.float32),
            text=[safe(label) for label in rows.labels],
            mode="markers",
            marker=dict(
                size=size, color=theme.DOT, opacity=opacity, line=dict(width=edge, color="#ffffff")
            ),
            hovertemplate=f"<b>%{{text}}</b><br>%{{x:+.4f}} {words.units} (%{{customdata:.1%}} of"
            f" the {words.what})<br>{in_template(name)}<extra></extra>",
            name=f"sample {i}",
            showlegend=False,
            **axes,
        )
        for i, name in enumerate(names)
    ]


def waterfall(rows: Bars, where: str, look: Look) -> go.Figure:
    """Steps from 0 to the last row, which is what they add up to.

    Args:
        rows: the steps of one sample, and their total.
        where: what they are of, for hover.
        look: how wide the figure is.
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
        marker_color=rows.colours,
        marker_opacity=rows.opacities,
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
    fig = go.Figure([steps, joints])
    fig.update_xaxes(range=_room_beside(rows, ends, look))
    return fig


def _room_beside(rows: Bars, ends: Float[np.ndarray, " row"], look: Look) -> tuple[float, float]:
    """The ends of the horizontal axis, with room for a number beside each bar's end.

    A falling bar has its number on the left, where the names are. Without a width the room is that
    of a phone.
    """
    low, high = min(0.0, *ends), max(0.0, *ends)
    width = (look.width or 390) - 40 - 6.4 * max(map(len, rows.labels))
    number = 46  # pixels of seven characters, on either side
    room = max(0.18, number / max(60, width - 2 * number)) * ((high - low) or 1.0)
    fallen = ends[rows.values[:, 0] < 0]
    return min([low - 0.3 * room, *(fallen - room)]), high + room


# ---- bars as a part of a figure ----------------------------------------------------------------


@dataclass(frozen=True)
class Panel:
    """Where a part of a figure stands, as fractions of it, and the number of its axes."""

    x: tuple[float, float]
    y: tuple[float, float]
    axis: str


def add_bars(fig: go.Figure, rows: Bars, names: Sequence[str], look: Look, panel: Panel) -> None:
    """Named rows with their bars: of one sample with its numbers, of several with dots."""
    x, y = f"x{panel.axis}", f"y{panel.axis}"
    traces = bars(rows, names, xaxis=x, yaxis=y)
    axis = dict(domain=panel.x, anchor=y, title_text=rows.words.units, zeroline=True)
    if len(names) == 1:
        ends = rows.values[:, 0]
        axis["range"] = _room_beside(rows, ends, look)
        words = dict(textposition="outside", textfont_size=10, cliponaxis=False)
        traces[0].update(text=[number(end) for end in ends], **words)
    fig.add_traces(traces)
    vertical = charts.ledger_axis(rows.labels) | dict(domain=panel.y, anchor=x)
    fig.update_layout({f"xaxis{panel.axis}": axis, f"yaxis{panel.axis}": vertical})
