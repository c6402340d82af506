"""The neurons of a layer: how active all of them are, and curves over candidates of the largest."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from tl_dla.figures import charts, theme
from tl_dla.figures.charts import PLAIN, Heading, Look, Sizes
from tl_dla.figures.text import in_template, safe, visible


@dataclass(frozen=True, eq=False)
class CurvesView:
    """What is drawn of a layer's neurons.

    Attributes:
        layer: the layer.
        labels: the neurons that have a curve, the first the largest.
        chosen: where they are among all.
        activations: of all neurons.
        curves: what those with a curve write, in logits.
        candidates: to what.
        share: of the activations of all, that the most active hold, as many as have a curve.
    """

    layer: int
    labels: Sequence[str]
    chosen: Sequence[int]
    activations: Float[np.ndarray, " neuron"]
    curves: Float[np.ndarray, "curve candidate"]
    candidates: Sequence[str]
    share: float


def curves(view: CurvesView, look: Look = PLAIN) -> go.Figure:
    """Activations of all neurons, the most active first, and a curve for each of the largest."""
    fig, sizes = go.Figure(), np.abs(view.activations)
    order = np.argsort(-sizes, kind="stable")
    rank = np.empty(len(order), dtype=int)
    rank[order] = np.arange(1, len(order) + 1)
    fig.add_scatter(
        x=np.arange(1, len(order) + 1),
        y=sizes[order],
        mode="lines",
        line=dict(color=theme.NEUTRAL, width=1.5),
        fill="tozeroy",
        fillcolor="rgba(128,128,128,0.15)",
        customdata=[f"L{view.layer}N{i}" for i in order],
        hovertemplate="%{customdata}: %{y:.4f}<extra></extra>",
        showlegend=False,
        name="all neurons",
    )
    names = [safe(visible(name)) for name in view.candidates]
    for i, (label, place) in enumerate(zip(view.labels, view.chosen, strict=True)):
        colour, dash = theme.stroke(i)
        group = dict(legendgroup=label, name=label)
        activation = f"activation {view.activations[place]:+.3f}"
        fig.add_scatter(
            x=[rank[place]],
            y=[sizes[place]],
            mode="markers",
            marker=dict(color=colour, size=8),
            hovertemplate=f"<b>{label}</b><br>{activation}, place {rank[place]}<extra></extra>",
            showlegend=False,
            **group,
        )
        fig.add_scatter(
            x=list(range(len(names))),
            y=view.curves[i],
            mode="lines+markers" if len(names) > 1 else "markers",
            line=dict(color=colour, width=2, dash=dash),
            xaxis="x2",
            yaxis="y2",
            customdata=[in_template(repr(name)) for name in view.candidates],
            hovertemplate=f"<b>{label}</b> ({activation})<br>%{{customdata}}: %{{y:+.4f}} logits"
            "<extra></extra>",
            **group,
        )
    # Beside each other, or below where there is no room.
    left, lower = ([0.0, 1.0], [0.62, 1.0]) if look.narrow else ([0.0, 0.34], [0.0, 1.0])
    right, upper = ([0.0, 1.0], [0.0, 0.38]) if look.narrow else ([0.44, 1.0], [0.0, 1.0])
    candidates = dict(tickmode="array", tickvals=list(range(len(names))), ticktext=names)
    fig.update_layout(
        xaxis=dict(domain=left, title_text="neurons, the most active first", zeroline=False),
        yaxis=dict(domain=lower, title_text="|activation|", rangemode="tozero"),
        xaxis2=dict(domain=right, anchor="y2", zeroline=False) | candidates,
        yaxis2=dict(domain=upper, anchor="x2", title_text="logits", zeroline=True),
    )
    k, n = len(view.labels), len(view.activations)
    heading = Heading(
        f"Neurons of layer {view.layer}: how active they are, and what {k} of them write",
        f"the {k} most active of {n:,} hold {view.share:.0%} of all |activation|; "
        "activation × weights is the row of a neuron",
    )
    return charts.styled(fig, heading, look, Sizes(600 if look.narrow else 330, 46))
