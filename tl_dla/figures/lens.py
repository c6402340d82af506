"""The logit lens as a grid: the most likely token at each point of the stream and each position.

Each point is read through the final norm with statistics of its own, so the grid's steps are not
contributions; those are in the `layer` unit, whose scale is frozen.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from tl_dla.errors import ArgumentError
from tl_dla.figures import charts
from tl_dla.figures.charts import PLAIN, Colours, Grid, Heading, Look
from tl_dla.figures.text import safe, visible

LensColour = Literal["probability", "entropy", "rank", "logit"]


@dataclass(frozen=True, eq=False)
class LensView:
    """What a lens shows of one prompt.

    Attributes:
        points: the names of the points of the stream, the first on top.
        tokens: the prompt's tokens at the positions read.
        positions: those positions.
        prompt: the prompt in words.
        predictions: the most likely tokens, `[point][pos][k]`.
        probabilities: theirs.
        entropy: of the softmax, in nats.
        followed: the tokens that were asked for; there may be none.
        logits, chances, ranks: of the tokens asked for.
    """

    points: list[str]
    tokens: list[str]
    positions: list[int]
    prompt: str
    predictions: list[list[list[str]]]
    probabilities: Float[np.ndarray, "point pos k"]
    entropy: Float[np.ndarray, "point pos"]
    followed: list[str]
    logits: Float[np.ndarray, "point pos token"]
    chances: Float[np.ndarray, "point pos token"]
    ranks: Float[np.ndarray, "point pos token"]


def lens_grid(
    view: LensView,
    colour: LensColour = "probability",
    token: int = 0,
    look: Look = PLAIN,
) -> go.Figure:
    """The classic grid: a prediction in every cell, and in its hover the next most likely tokens.

    Args:
        view: what the lens read.
        colour: the prediction's probability, the softmax's entropy (in nats), or the rank or the
            logit of a token asked for. Ranks are on a logarithmic scale, the first the strongest.
        token: which of the tokens asked for.
        look: title and size in place of the figure's own.

    Raises:
        ArgumentError: for a rank or logit of a token where none was asked for, or another colour.
    """
    values, colours = _coloured(view, colour, token)
    about = f" of {view.followed[token]!r}" if colour in ("rank", "logit") else ""
    title = "Logit lens: the prediction at each point of the stream"
    subtitle = (
        f"{safe(view.prompt)}<br>coloured by the {colour}{safe(about)};"
        " each point is read with norm statistics of its own (not contributions)"
    )
    places = zip(view.tokens, view.positions, strict=True)
    grid = Grid(
        values=values,
        rows=view.points,
        columns=[visible(token) for token in view.tokens],
        where=[f"after {token!r}, position {at}" for token, at in places],
        cells=[[visible(names[0]) for names in line] for line in view.predictions],
        detail=_details(view),
        hover="<b>%{y}</b> %{x}<br>%{customdata}",
        positions=view.positions,
    )
    return charts.table(grid, Heading(title, subtitle), look, colours, cell_width=54)


def _details(view: LensView) -> np.ndarray:
    """A cell's hover: the most likely tokens, the entropy, and the tokens asked for."""
    detail = np.empty(view.entropy.shape, dtype=object)
    for i, line in enumerate(view.predictions):
        for p, names in enumerate(line):
            chances = zip(names, view.probabilities[i, p], strict=True)
            lines = [f"{safe(repr(name))} {chance:.1%}" for name, chance in chances]
            lines.append(f"entropy {view.entropy[i, p]:.2f} nats")
            for t, name in enumerate(view.followed):
                lines.append(
                    f"asked for: {safe(repr(name))} {view.chances[i, p, t]:.1%},"
                    f" rank {view.ranks[i, p, t]:.0f}, logit {view.logits[i, p, t]:+.3f}"
                )
            detail[i, p] = "<br>".join(lines)
    return detail


def _coloured(
    view: LensView, colour: str, token: int
) -> tuple[Float[np.ndarray, "point pos"], Colours]:
    """The quantity that colours the grid, and its colours."""
    if colour == "probability":
        return view.probabilities[..., 0], Colours(colour, "sequential")
    if colour == "entropy":
        return view.entropy, Colours("entropy, nats", "sequential")
    if colour not in ("rank", "logit"):
        raise ArgumentError(
            f'colour must be "probability", "entropy", "rank" or "logit"; {colour!r} was given.'
        )
    if not view.followed:
        raise ArgumentError(
            f"The lens was not given a token whose {colour} to show: pass answer_tokens to"
            " logit_lens."
        )
    if not 0 <= token < len(view.followed):
        raise ArgumentError(
            f"token must be the index of one of the {len(view.followed)} asked for; {token} was"
            " given."
        )
    if colour == "logit":
        return view.logits[..., token], Colours("logits")
    ranks = view.ranks[..., token]
    ticks = [0, *(10**i for i in range(8) if 10**i <= np.nanmax(ranks))]
    marks = dict(tickvals=[np.log10(1 + x) for x in ticks], ticktext=[f"{x:,}" for x in ticks])
    return np.log10(1 + ranks), Colours("rank", "sequential", options=marks, strong_is_low=True)
