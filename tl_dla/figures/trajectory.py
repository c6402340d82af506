"""The figure of `layer` rows: the stream's reading, step by step, up to the model's logit."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from tl_dla.errors import ArgumentError
from tl_dla.figures import charts, theme
from tl_dla.figures.charts import PLAIN, Look, Sizes
from tl_dla.figures.text import in_template, number, percent, safe
from tl_dla.figures.view import View

_STEP_COLOURS = {"attention": "#8a63a8", "MLP": "#c98a2b", "state space": "#4a9aa5"}
_BODY = 340  # pixels
_MOST_NAMED = 20  # lines that are named at their ends


@dataclass(frozen=True, eq=False)
class _Readings:
    """The stations of the stream with their places on the axis, and what is read there."""

    names: list[str]
    places: list[int]
    levels: Float[np.ndarray, "station sample candidate"]
    writers: list[str]

    @property
    def keys(self) -> list[str]:
        """The stations as plotly reads them."""
        return [safe(name) for name in self.names]

    @property
    def axis(self) -> list[str]:
        """The stations with what stands between them, which has no name."""
        at = dict(zip(self.places, self.keys, strict=True))
        return [at.get(i, "\u200b" * (i + 1)) for i in range(self.places[-1] + 1)]


def trajectory(view: View, look: Look = PLAIN) -> go.Figure:
    """The stream's reading from the embeddings to the model's own logit, in steps.

    The steps of the line are coloured by what wrote them. Several prompts are thin lines behind
    their mean; several positions of a prompt a line each, with no mean, and several candidates a
    line each.

    The final norm's scale is frozen, so that a step is what was written there; the logit lens
    (`lens_grid`) computes it afresh at each point.

    Raises:
        ArgumentError: for a view of another unit.
    """
    if view.unit != "layer":
        raise ArgumentError(
            f'A unit="{view.unit}" result has no trajectory: attribute with unit="layer".'
        )
    readings = _read(view)
    named: list[tuple[str, float]] = []
    if len(view.candidates) > 1:
        traces = _candidate_lines(readings, view)
        ends = readings.levels[-1].mean(0)
        named = [(repr(name), end) for name, end in zip(view.candidates, ends, strict=True)]
    elif view.several_positions:
        traces = _position_lines(readings, view)
        named = [
            (s.short, end) for s, end in zip(view.samples, readings.levels[-1, :, 0], strict=True)
        ]
    else:
        traces = _prompt_lines(readings, view) + _steps(readings, view)
    fig = go.Figure(traces)
    few = 0 < len(named) <= _MOST_NAMED
    beside = 20 + max([6.5 * len(_named(*one)) for one in named if few] or [44])  # pixels
    points = [name for name in readings.keys if not name.endswith("_mid")]
    layers = [name for name in points if name.endswith("_pre")]
    most = max(3, (look.room - 160) // 30)
    ticks = layers[:: -(-len(layers) // most)] + [name for name in points if name not in layers]
    fig.update_xaxes(
        type="category",
        categoryarray=readings.axis,
        tickmode="array",
        tickvals=ticks,
        ticktext=[name.removesuffix("_pre").removesuffix("_post") for name in ticks],
        title_text="before layer",
        range=[-0.3, readings.places[-1] + 0.1],
        showgrid=False,
        zeroline=False,
    )
    unit = "logits" if look.narrow else "logits, read with the scale of the final norm"
    fig.update_yaxes(title_text=unit, zeroline=True)
    if few:
        _name_ends(fig, readings, named)
        fig.update_layout(hovermode="x unified")
    elif named:
        for line in fig.select_traces(lambda trace: trace.hovertemplate):
            line.hovertemplate = f"<b>%{{x}}</b><br>{line.hovertemplate}"
    at = zip(readings.names, readings.places, strict=True)
    marks = {name: ("x", "paper", place - 0.5, place + 0.5, 0.0, 1.0) for name, place in at}
    fig.update_layout(meta=dict(marks=marks))
    heading = charts.heading_of("Reading of the stream for", view)
    legend = 16 if named else 56 if look.narrow else 34
    return charts.styled(fig, heading, look, Sizes(_BODY, legend, 64, right=int(beside)))


def _read(view: View) -> _Readings:
    """The stream's readings, then the reading with each bias added: the last is the logit.

    The biases stand apart, so that there is room for their names.
    """
    points, biases = view.rows("residual"), view.rows("bias")
    levels = [*view.values[points]]
    for row in biases:
        levels.append(levels[-1] + view.values[row])
    gap, last = max(1, round(len(points) / 10)), len(points) - 1
    return _Readings(
        names=[view.labels[row] for row in [*points, *biases]],
        places=[*range(len(points)), *(last + gap * i for i in range(1, len(biases) + 1))],
        levels=np.stack(levels),
        writers=[view.writers.get(view.labels[row], "block") for row in points]
        + ["bias" for _ in biases],
    )


def _line(readings: _Readings, y: Float[np.ndarray, " station"], **options: Any) -> go.Scatter:
    """A line through all stations."""
    return go.Scatter(x=readings.keys, y=y, mode="lines", **options)


def _prompt_lines(readings: _Readings, view: View) -> list[go.Scatter]:
    """A thin line for each of several prompts."""
    if len(view.samples) == 1:
        return []
    style = dict(
        line=dict(color=theme.NEUTRAL, width=0.8),
        opacity=0.55 if len(view.samples) <= 12 else 0.2,
        name="each prompt",
        legendgroup="each prompt",
    )
    levels = readings.levels[..., 0]
    return [
        _line(
            readings,
            levels[:, i],
            showlegend=i == 0,
            hovertemplate=f"<b>%{{x}}</b><br>%{{y:+.4f}} logits<br>{in_template(name)}"
            "<extra></extra>",
            **style,
        )
        for i, name in enumerate(view.names)
    ]


def _position_lines(readings: _Readings, view: View) -> list[go.Scatter]:
    """A line for each position, the later the darker."""
    last = max(sample.position for sample in view.samples) or 1
    return [
        _line(
            readings,
            readings.levels[:, i, 0],
            hovertemplate=f"{in_template(view.samples[i].short)}: %{{y:+.4f}}<extra></extra>",
            line=dict(color=theme.POSITIVE, width=1.6),
            opacity=0.25 + 0.75 * view.samples[i].position / last,
            name=safe(name),
            showlegend=False,
        )
        for i, name in enumerate(view.names)
    ]


def _candidate_lines(readings: _Readings, view: View) -> list[go.Scatter]:
    """A line for each candidate, and a thin one for each of its samples."""
    traces, n_samples = [], len(view.samples)
    mean = "mean, " if n_samples > 1 else ""
    for c, name in enumerate(view.candidates):
        style = dict(
            line_color=theme.PALETTE[c % len(theme.PALETTE)],
            legendgroup=name,
            showlegend=len(view.candidates) > _MOST_NAMED,
            name=safe(repr(name)),
        )
        levels = readings.levels[..., c]
        if n_samples > 1:
            thin = dict(showlegend=False, line_width=0.8, opacity=0.4, hoverinfo="skip")
            traces += [_line(readings, levels[:, i], **style | thin) for i in range(n_samples)]
        hover = f"{mean}{in_template(repr(name))}: %{{y:+.4f}}<extra></extra>"
        bold = dict(line_width=2.5, hovertemplate=hover)
        traces.append(_line(readings, levels.mean(1), **style, **bold))
    return traces


def _name_ends(fig: go.Figure, readings: _Readings, ends: list[tuple[str, float]]) -> None:
    """Each line's name at its end, moved apart where they would be printed over each other."""
    low, high = float(readings.levels.min()), float(readings.levels.max())
    per_logit = 0.9 * _BODY / ((high - low) or 1.0)
    ends = sorted(ends, key=lambda one: one[1])
    places = np.array([end * per_logit for _, end in ends])
    steps = 14 * np.arange(len(ends))
    apart = np.maximum.accumulate(places - steps) + steps  # pushed up by those below
    ceiling = high * per_logit + 10 - steps[::-1]
    apart = np.minimum(apart, ceiling)  # and down again, from the top
    for (name, end), place, moved in zip(ends, places, apart, strict=True):
        fig.add_annotation(
            text=safe(_named(name, end)),
            x=readings.places[-1],
            y=float(end),
            ax=14,
            ay=float(place - moved),
            xanchor="left",
            arrowhead=0,
            arrowwidth=0.7,
            arrowcolor=theme.NEUTRAL,
            standoff=2,
            font_size=11,
        )


def _named(name: str, end: float) -> str:
    return f"{name} {number(float(end))}"


def _steps(readings: _Readings, view: View) -> list[go.Scatter]:
    """The line, or the mean of several, in pieces coloured by what wrote them, and its points."""
    mean, places = readings.levels[..., 0].mean(1), readings.keys
    pieces: dict[str, list[int]] = {}
    for i, writer in enumerate(readings.writers):
        if i:
            pieces.setdefault(writer, []).append(i)
    traces = []
    for name, ends in pieces.items():
        x = [place for i in ends for place in (places[i - 1], places[i], None)]
        y = [level for i in ends for level in (mean[i - 1], mean[i], None)]
        line = dict(color=_STEP_COLOURS.get(name, theme.NEUTRAL), width=2.5)
        traces.append(go.Scatter(x=x, y=y, mode="lines", line=line, name=name, hoverinfo="skip"))
    whose = "mean " if len(view.samples) > 1 else ""
    logit = mean[-1] or np.nan
    hover = [
        f"<b>{safe(name)}</b><br>{whose}{level:+.4f} logits ({percent(level / logit)})"
        f"<br>step {step:+.4f} from {writer}"
        for name, writer, level, step in zip(
            readings.names, readings.writers, mean, [0.0, *np.diff(mean)], strict=True
        )
    ]
    hover[0] = f"<b>{safe(readings.names[0])}</b><br>{whose}{mean[0]:+.4f} logits"
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
        name=view.words.logit,
    )
    return [*traces, dots, end]
