"""The figure of a `layer` result: the stream's reading, step by step, up to the model's logit."""

from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from tl_dla.errors import ArgumentError
from tl_dla.figures import charts, theme
from tl_dla.figures.charts import number, safe
from tl_dla.figures.view import View, headings, logit_name, read
from tl_dla.model.reader import Point, Write

if TYPE_CHECKING:
    from tl_dla.core.result import DirectLogitAttribution

_STEPS = {"attn": "attention", "mlp": "MLP", "ssm": "state space"}
_STEP_COLOURS = {"attention": "#8a63a8", "MLP": "#c98a2b", "state space": "#4a9aa5"}


def trajectory(
    result: "DirectLogitAttribution",
    *,
    prompt: int | None = None,
    candidate: str | int | None = None,
) -> go.Figure:
    """The stream's reading from the embeddings to the model's own logit, in steps.

    The steps of the line are coloured by what wrote them. Several prompts are thin lines behind
    their mean, several candidates a line each.

    The final norm's scale is frozen, so that a step is what was written there; the logit lens
    (`lens_grid`) computes it afresh at each point.

    Raises:
        ArgumentError: for a result of another unit.
    """
    if result.unit != "layer":
        raise ArgumentError(
            f'A unit="{result.unit}" result has no trajectory: attribute with unit="layer".'
        )
    view = read(result, prompt, candidate)
    stations, levels = _levels(result, view)
    if len(view.candidates) > 1:
        traces = _candidate_lines(stations, levels, view)
    else:
        traces = _lines(stations, levels[..., 0], view)
        mean = levels[..., 0].mean(1)
        traces += _steps(result, stations, mean, several=len(view.samples) > 1)
    fig = go.Figure(traces)
    title, subtitle = headings(result, "Reading of the stream for", view)
    named = [label for label in stations if not label.endswith("_mid")]
    layers = [label for label in named if label.endswith("_pre")]
    ticks = layers[:: -(-len(layers) // 20)] + [label for label in named if label not in layers]
    fig.update_xaxes(
        tickmode="array",
        tickvals=[stations[label] for label in ticks],
        ticktext=[safe(label.removesuffix("_pre").removesuffix("_post")) for label in ticks],
        title_text="before layer",
        range=[-0.5, max(stations.values()) * 1.06 + 0.5],
        showgrid=False,
        zeroline=False,
    )
    fig.update_yaxes(title_text="logits, read with the scale of the final norm", zeroline=True)
    charts.styled(fig, title, subtitle, height=480)
    return fig.update_layout(margin_t=120)


def _levels(
    result: "DirectLogitAttribution", view: View
) -> tuple[dict[str, float], Float[np.ndarray, "station sample candidate"]]:
    """The stream's readings, then the reading with each bias added: the last is the logit.

    The stations come with their places on the axis, the biases with room for their names.
    """
    points = [row for row, kind in enumerate(result.kinds) if kind == "residual"]
    biases = [row for row, kind in enumerate(result.kinds) if kind == "bias"]
    levels = [*view.values[points]]
    for row in biases:
        levels.append(levels[-1] + view.values[row])
    gap, last = max(1.0, len(points) / 10), len(points) - 1
    places = {result.labels[row]: float(i) for i, row in enumerate(points)}
    places |= {result.labels[row]: last + gap * i for i, row in enumerate(biases, 1)}
    return places, np.stack(levels)


def _lines(
    stations: dict[str, float], levels: Float[np.ndarray, "station sample"], view: View
) -> list[go.Scatter]:
    """A thin line for each of several samples."""
    if len(view.samples) == 1:
        return []
    return [
        go.Scatter(
            x=list(stations.values()),
            y=levels[:, i],
            text=[safe(station) for station in stations],
            mode="lines",
            line=dict(color=theme.NEUTRAL, width=0.8),
            opacity=0.55 if len(view.samples) <= 12 else 0.2,
            name="each prompt",
            legendgroup="each prompt",
            showlegend=i == 0,
            hovertemplate="<b>%{text}</b><br>%{y:+.4f} logits"
            f"<br>{charts.in_template(sample)}<extra></extra>",
        )
        for i, sample in enumerate(view.samples)
    ]


def _steps(
    result: "DirectLogitAttribution",
    stations: dict[str, float],
    mean: Float[np.ndarray, " station"],
    several: bool,
) -> list[go.Scatter]:
    """The line, in pieces coloured by what wrote them, and its points."""
    written = _written_between(result)
    pieces: dict[str, list[int]] = {}
    for i, label in enumerate(stations):
        if i:
            pieces.setdefault(written.get(label, "bias"), []).append(i)
    traces, places = [], list(stations.values())
    for name, ends in pieces.items():
        x = [place for i in ends for place in (places[i - 1], places[i], None)]
        y = [level for i in ends for level in (mean[i - 1], mean[i], None)]
        line = dict(color=_STEP_COLOURS.get(name, theme.NEUTRAL), width=2.5)
        traces.append(go.Scatter(x=x, y=y, mode="lines", line=line, name=name, hoverinfo="skip"))
    steps = [0.0, *np.diff(mean)]
    logit = mean[-1] or np.nan
    hover = [
        f"<b>{safe(label)}</b><br>{'mean ' * several}{level:+.4f} logits"
        f" ({charts.percent(level / logit)})<br>step {step:+.4f} from {written.get(label, 'bias')}"
        for label, level, step in zip(stations, mean, steps, strict=True)
    ]
    hover[0] = f"<b>{safe(next(iter(stations)))}</b><br>{'mean ' * several}{mean[0]:+.4f} logits"
    dots = go.Scatter(
        x=places,
        y=mean,
        mode="markers",
        marker=dict(size=5, color=theme.NEUTRAL),
        hovertext=hover,
        hoverinfo="text",
        showlegend=False,
        name="readings",
    )
    end = go.Scatter(
        x=places[-1:],
        y=[mean[-1]],
        mode="markers+text",
        marker=dict(size=11, symbol="diamond", color=theme.NEUTRAL),
        text=[number(float(mean[-1]))],
        textposition="middle right",
        cliponaxis=False,
        hovertext=hover[-1:],
        hoverinfo="text",
        name=logit_name(result),
    )
    return [*traces, dots, end]


def _written_between(result: "DirectLogitAttribution") -> dict[str, str]:
    """What was written since the point before, for each point of the stream."""
    written: dict[str, str] = {}
    kinds: list[str] = []
    for step in result.plan.stream.steps:
        if isinstance(step, Write):
            kinds.append(_STEPS.get(step.kind, step.kind))
        elif isinstance(step, Point):
            written[step.label] = " and ".join(dict.fromkeys(kinds)) or "norm"
            kinds = []
    return written


def _candidate_lines(
    stations: dict[str, float], levels: Float[np.ndarray, "station sample candidate"], view: View
) -> list[go.Scatter]:
    """A line for each candidate, and a thin one for each of its samples."""
    traces = []
    for c, name in enumerate(view.candidates):
        colour = theme.PALETTE[c % len(theme.PALETTE)]
        group = dict(legendgroup=name, line_color=colour, mode="lines")
        if len(view.samples) > 1:
            for line in _lines(stations, levels[..., c], view):
                traces.append(line.update(showlegend=False, line_width=0.8, **group))
        traces.append(
            go.Scatter(
                x=list(stations.values()),
                y=levels[..., c].mean(1),
                name=safe(repr(name)),
                line_width=2.5,
                text=[safe(station) for station in stations],
                hovertemplate=f"<b>%{{text}}</b><br>{charts.in_template(repr(name))}"
                "<br>%{y:+.4f} logits<extra></extra>",
                **group,
            )
        )
    return traces
