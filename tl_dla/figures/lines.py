"""Lines over named places, a mean for each series and a thin line for every prompt behind it.

    profile      rows along the stream, a line for each candidate
    lens_lines   what the logit lens reads of a token, point by point

One hover for all lines: what every series is at the place under the pointer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from tl_dla.errors import ArgumentError
from tl_dla.figures import charts, theme
from tl_dla.figures.charts import PLAIN, Heading, Look, Sizes
from tl_dla.figures.text import in_template, safe
from tl_dla.figures.view import View, require_few


@dataclass(frozen=True, eq=False)
class Series:
    """One line: its name, and its values at every place, of every sample."""

    name: str
    values: Float[np.ndarray, "place sample"]


@dataclass(frozen=True)
class Scale:
    """The vertical axis: its title, how hover writes a number, and whether steps are factors."""

    title: str = "logits"
    number: str = "+.3f"
    log: bool = False


def lines(
    places: Sequence[str],
    series: Sequence[Series],
    heading: Heading,
    look: Look = PLAIN,
    scale: Scale = Scale(),  # noqa: B008  (frozen)
    x_title: str = "",
) -> go.Figure:
    """A line for each series over the places, from left to right.

    Args:
        places: their names, all different.
        series: what is drawn; several samples are thin lines behind their mean.
        heading: above the figure.
        look: title and size in place of the figure's own.
        scale: of the values.
        x_title: what the places are.

    Example:
        >>> import numpy as np
        >>> one = Series("both", np.array([[0.0, 1.0], [2.0, 3.0]]))
        >>> [len(trace.y) for trace in lines(["a", "b"], [one], Heading("two")).data]
        [6, 2]
    """
    keys, fig = [safe(name) for name in places], go.Figure()
    for s, one in enumerate(series):
        colour, dash = theme.stroke(s)
        count = one.values.shape[1]
        if count > 1:  # all of them one trace, with breaks
            fig.add_scatter(
                x=[*keys, None] * count,
                y=[y for sample in one.values.T for y in (*sample, None)],
                mode="lines",
                line=dict(color=colour, width=0.8),
                opacity=0.45 if count <= 12 else 0.15,
                hoverinfo="skip",
                name="each prompt",
                showlegend=len(series) == 1,
                legendgroup=safe(one.name),
            )
        mean = "mean, " if count > 1 else ""
        fig.add_scatter(
            x=keys,
            y=one.values.mean(1),
            mode="lines+markers",
            line=dict(color=colour, width=2.4, dash=dash),
            marker=dict(size=5),
            hovertemplate=f"{mean}{in_template(one.name)}: %{{y:{scale.number}}}<extra></extra>",
            name=f"{mean}{safe(one.name)}",
            legendgroup=safe(one.name),
            showlegend=len(series) > 1 or count > 1,
        )
    most = max(4, (look.room - 120) // 16)
    fig.update_xaxes(
        type="category",
        categoryarray=keys,
        tickmode="array",
        tickvals=keys[:: max(1, math.ceil(len(keys) / most))],
        tickangle=-60 if len(places) > 6 else 0,
        title_text=x_title,
        zeroline=False,
        showgrid=False,
    )
    fig.update_yaxes(title_text=scale.title, zeroline=not scale.log)
    if scale.log:
        fig.update_yaxes(type="log", autorange="reversed", dtick=1)
    fig.update_layout(hovermode="x unified")
    per_line = max(1, look.room // 150)
    legend = 22 * math.ceil(len(series) / per_line) + 12 if len(series) > 1 else 34
    return charts.styled(fig, heading, look, Sizes(320, legend, 96))


def profile(
    view: View,
    layers: Sequence[int] | int | None = None,
    contrast: bool = False,
    look: Look = PLAIN,
) -> go.Figure:
    """What the rows wrote, along the stream, with a line for each candidate.

    Args:
        view: what to draw.
        layers: only rows of these layers, negative ones from the end; rows of no layer are then
            left out.
        contrast: what a row says of a candidate and not of all: less its mean over them.
        look: title and size in place of the figure's own.

    Raises:
        ArgumentError: for layers of which there is no row, or a contrast of one candidate.
    """
    require_few(view)
    rows = list(range(len(view.labels)))
    if layers is not None:
        listed = [layers] if isinstance(layers, int) else list(layers)
        n = 1 + max((layer for layer in view.layers if layer is not None), default=-1)
        wanted = {layer + n if layer < 0 else layer for layer in listed}
        rows = [i for i in rows if view.layers[i] in wanted]
        if not rows:
            raise ArgumentError(f"layers must be of 0 to {n - 1}; {layers!r} was given.")
    values = view.values[rows]
    if contrast:
        if len(view.candidates) < 2:
            raise ArgumentError(
                "contrast=True is for several candidates: attribute with candidate_tokens."
            )
        values = values - values.mean(-1, keepdims=True)
    names = (
        [repr(name) for name in view.candidates] if view.over_candidates else [view.words.target]
    )
    series = [Series(name, values[..., c]) for c, name in enumerate(names)]
    what = (
        "What each row says of one candidate and not of all:"
        if contrast
        else (f"What each row wrote to the {view.words.what} of")
    )
    scale = Scale(view.words.units + (", less the mean over candidates" if contrast else ""))
    labels = [view.labels[row] for row in rows]
    return lines(labels, series, charts.heading_of(what, view), look, scale)


@dataclass(frozen=True, eq=False)
class LensLines:
    """What a lens reads along the stream.

    Attributes:
        points: the points of the stream.
        series: what is read there, of every prompt and position.
        target: the tokens that are read, in words.
        where: of which prompts and positions, in words.
    """

    points: Sequence[str]
    series: Sequence[Series]
    target: str
    where: str


LENS_SCALES = {
    "difference": Scale("logits"),
    "logit": Scale("logits"),
    "probability": Scale("probability", ".2%"),
    "rank": Scale("rank (1 is the prediction)", ".1f", log=True),
}


def lens_lines(view: LensLines, read: str, look: Look = PLAIN) -> go.Figure:
    """What the lens reads of tokens, point by point: a mean, and every prompt behind it."""
    title = f"Logit lens: {'logit difference' if read == 'difference' else read} of"
    about = "each point is read with norm statistics of its own (not contributions)"
    heading = Heading(f"{title} {safe(view.target)}", f"{safe(view.where)}; {about}")
    return lines(view.points, view.series, heading, look, LENS_SCALES[read], "point of the stream")
