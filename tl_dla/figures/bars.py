"""Rows as bars from 0, with a dot for every value behind a mean."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from tl_dla.figures import charts
from tl_dla.figures.text import percent, safe
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
