"""The answer on its way through a model: how much of a logit each token's place holds, by layer."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from tl_dla.figures import charts
from tl_dla.figures.charts import PLAIN, Colours, Grid, Heading, Look
from tl_dla.figures.text import brief, number, safe, visible
from tl_dla.figures.view import Sample, Words, share_of


@dataclass(frozen=True, eq=False)
class FlowView:
    """What the stream holds of one logit.

    Attributes:
        held: at each token's place, before each layer and at the end.
        after: what the biases after each of them write.
        points: their names: `0_pre`, …, `final_post`.
        tokens: the prompt's tokens, up to the one that is attributed.
        sample: the prompt and position whose logit it is.
        words: what is attributed and whether it adds up.
    """

    held: Float[np.ndarray, "point source"]
    after: Float[np.ndarray, " point"]
    points: Sequence[str]
    tokens: Sequence[str]
    sample: Sample
    words: Words


def flow(view: FlowView, look: Look = PLAIN) -> go.Figure:
    """Layer × token, beside it what the biases after a layer write: each line adds up to the logit.

    The column of biases is left out where there is nothing in it.
    """
    values = np.concatenate([view.held, view.after[:, None]], 1)
    biased = bool(np.abs(view.after).max() > 1e-4 * np.abs(values).max())
    values = values if biased else view.held
    total = values.sum(1, keepdims=True)
    places = [f"at {token!r}, position {i}" for i, token in enumerate(view.tokens)]
    grid = Grid(
        values=values,
        rows=list(view.points),
        columns=[visible(token) for token in view.tokens] + ["biases"] * biased,
        where=places + ["from the biases after it"] * biased,
        cells=[[brief(value, 1) for value in line] for line in values],
        detail=share_of(total, values),
        hover="<b>%{y}</b> %{x}<br>%{z:+.4f} logits (%{customdata:.1%} of the logit)",
    )
    heading = Heading(
        f"Where the logit of {safe(view.words.target)} is held, layer by layer",
        f"{safe(str(view.sample))}; each line adds up to {number(float(total[-1, 0]))}"
        f"<br>{safe(view.words.certificate)}",
    )
    return charts.table(grid, heading, look, Colours(), cell_width=40)
