"""Figures of results: `plot(result)` picks the right one for the unit; returned, never shown.

    component, and any other unit   `ledger`       bars from 0 to the model's own logit
    head                            `heads`        layer × head, the other rows beside
    layer                           `trajectory`   the stream's reading, attention and MLP steps
    over candidates                 `candidates`   row × candidate, or a line for each
    one prompt, several positions   `positions`    row × token

Several prompts are drawn as their mean with every prompt's own value beside it. Every value comes
from `result.attribution`, in logits; `share` is the value over the model's own logit.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from torch import Tensor

from tl_dla.errors import ArgumentError
from tl_dla.figures import charts, theme
from tl_dla.figures.charts import number, safe
from tl_dla.figures.head_map import heads
from tl_dla.figures.trajectory import trajectory
from tl_dla.figures.view import View, bars, fold, headings, logit_name, read

if TYPE_CHECKING:
    from tl_dla.analyses.logit_lens import LogitLens
    from tl_dla.core.result import DirectLogitAttribution


def plot(
    result: "DirectLogitAttribution",
    *,
    prompt: int | None = None,
    candidate: str | int | None = None,
    k: int = 40,
) -> go.Figure:
    """The figure for the result's unit.

    Args:
        result: what to draw.
        prompt: only this prompt of a batch.
        candidate: only this one of several candidate tokens, by its text or its index.
        k: how many rows a ledger names; the smaller ones are added up in a row of their own.

    Raises:
        ArgumentError: for a prompt or candidate that the result does not have, or k < 1.
    """
    view = read(result, prompt, candidate)
    if len(view.candidates) > 1:
        return candidates(result, prompt=prompt, k=k)
    if result.unit == "layer":
        return trajectory(result, prompt=prompt, candidate=candidate)
    if len(set(view.prompt_of)) == 1 and len(view.samples) > 1:
        return positions(result, prompt=prompt, candidate=candidate, k=k)
    if result.unit == "head":
        return heads(result, prompt=prompt, candidate=candidate)
    return ledger(result, prompt=prompt, candidate=candidate, k=k)


# ---- the ledger --------------------------------------------------------------------------------


def ledger(
    result: "DirectLogitAttribution",
    *,
    prompt: int | None = None,
    candidate: str | int | None = None,
    k: int = 40,
) -> go.Figure:
    """The rows in the order of the stream, the smallest ones added up, then the model's own logit.

    One prompt is a waterfall from 0 to the logit; several are bars from 0 for the means, with a dot
    for each prompt.

    Raises:
        ArgumentError: for k < 1, or a `layer` result, whose rows are no parts of a sum.
    """
    if result.unit == "layer":
        raise ArgumentError("Readings of a stream are no parts of a sum: draw their trajectory.")
    view = read(result, prompt, candidate)
    values, logit = view.only()
    labels, values = fold(result.labels, values, k)
    total = logit_name(result)
    title, subtitle = headings(result, "What wrote the logit of", view)
    names = [*labels, total]
    share = np.vstack([values, logit]) / np.where(logit == 0, np.nan, logit)
    if len(view.samples) == 1:
        fig = go.Figure(_waterfall(names, values[:, 0], float(logit[0]), share[:, 0], view))
        ends = [0.0, *np.cumsum(values[:, 0]), logit[0]]
        room = 0.18 * (max(ends) - min(ends))  # for the numbers beside the bars
        fallen = [end for end, value in zip(ends[1:], values[:, 0], strict=False) if value < 0]
        left = min([min(ends) - 0.3 * room, *(end - room for end in fallen)])
        fig.update_xaxes(range=[left, max(ends) + room])
    else:
        every = np.vstack([values, logit])
        fig = go.Figure(bars(names, every, view, share))
        fig.data[0].marker.color = [*charts.signs(values.mean(1)), theme.NEUTRAL]
    fig.update_yaxes(charts.ledger_axis(names))
    fig.update_xaxes(title_text="logits", zeroline=True)
    return charts.styled(fig, title, subtitle, height=170 + 20 * len(names))


def _waterfall(
    labels: list[str],
    values: Float[np.ndarray, " row"],
    logit: float,
    share: Float[np.ndarray, " shown"],
    view: View,
) -> go.Waterfall:
    ends = [*np.cumsum(values), logit]
    hover = [
        f"<b>{safe(label)}</b><br>{value:+.4f} logits ({charts.percent(part)})"
        f"<br>{end:+.4f} so far<br>{safe(view.samples[0])}"
        for label, value, part, end in zip(labels, [*values, logit], share, ends, strict=True)
    ]
    return go.Waterfall(
        orientation="h",
        y=np.arange(len(labels)),
        x=[*values, logit],
        measure=["relative"] * len(values) + ["absolute"],
        increasing_marker_color=theme.POSITIVE,
        decreasing_marker_color=theme.NEGATIVE,
        totals_marker_color=theme.NEUTRAL,
        connector_line=dict(width=0.6, color=theme.NEUTRAL),
        text=[number(value) for value in [*values, logit]],
        textposition="outside",
        textfont_size=10,
        cliponaxis=False,
        width=0.66,
        hovertext=hover,
        hoverinfo="text",
        showlegend=False,
    )


# ---- tables of rows ----------------------------------------------------------------------------


def candidates(
    result: "DirectLogitAttribution", *, prompt: int | None = None, k: int = 40
) -> go.Figure:
    """Row × candidate: the k largest rows and the sum of the others.

    A line for each candidate for `unit="layer"`. Several prompts have a column each beside the mean
    of each candidate.

    Raises:
        ArgumentError: for a result that is not over candidates.
    """
    if result.targets.candidates is None:
        raise ArgumentError("The result is not over candidates: attribute with candidate_tokens.")
    if result.unit == "layer":
        return trajectory(result, prompt=prompt)
    view = read(result, prompt)
    n_samples = len(view.samples)
    columns, values, logits, where = [], [], [], []
    for c, name in enumerate(view.candidates):
        if n_samples > 1:
            columns.append(f"{name!r} mean")
            values.append(view.values[..., c].mean(1))
            logits.append(view.logit[:, c].mean())
            where.append(f"{name!r}, mean over {n_samples}")
        for i, sample in enumerate(view.samples):
            columns.append(f"{view.prompt_of[i]}" if n_samples > 1 else repr(name))
            values.append(view.values[:, i, c])
            logits.append(view.logit[i, c])
            where.append(f"{name!r}, {sample}")
    title, subtitle = headings(result, "What wrote the logits of", view)
    return _rows(result, np.stack(values, 1), np.array(logits), columns, where, k, title, subtitle)


def positions(
    result: "DirectLogitAttribution",
    *,
    prompt: int | None = None,
    candidate: str | int | None = None,
    k: int = 40,
) -> go.Figure:
    """Row × token of one prompt, the k largest rows and the sum of the others."""
    view = read(result, prompt, candidate)
    values, logit = view.only()
    title, subtitle = headings(result, "What wrote the logit of", view)
    return _rows(
        result, values, logit, [visible(t) for t in view.tokens], view.samples, k, title, subtitle
    )


def _rows(
    result: "DirectLogitAttribution",
    values: Float[np.ndarray, "row column"],
    logit: Float[np.ndarray, " column"],
    columns: Sequence[str],
    where: Sequence[str],
    k: int,
    title: str,
    subtitle: str,
) -> go.Figure:
    """The rows as a heatmap; the model's own logit is in each column's hover, and its name."""
    labels, values = fold(result.labels, values, k)
    share = values / np.where(logit == 0, np.nan, logit)
    few = len(columns) <= 12
    if few:
        columns = [f"{name}\n{number(x)}" for name, x in zip(columns, logit, strict=True)]
    return charts.table(
        values,
        labels,
        columns,
        where=[f"{name} ({x:+.4f} logits)" for name, x in zip(where, logit, strict=True)],
        detail=share,
        cells=[[number(value) for value in line] for line in values] if few else None,
        hover="<b>%{y}</b><br>%{z:+.4f} logits (%{customdata:.1%} of the logit)<br>%{x}",
        title=title,
        subtitle=subtitle,
    )


# ---- the logit lens ----------------------------------------------------------------------------


def lens_grid(
    lens: "LogitLens",
    *,
    prompt: int = 0,
    colour: Literal["probability", "entropy", "rank", "logit"] = "probability",
    token: int = 0,
) -> go.Figure:
    """The classic grid: the most likely token at each point of the stream and each position.

    Each point is read through the final norm with statistics of its own, so the grid's steps are
    not contributions; those are in the `layer` unit, whose scale is frozen.

    Args:
        lens: of `logit_lens`.
        prompt: which prompt.
        colour: the prediction's probability, the softmax's entropy (in nats), or the rank or the
            logit of the token asked for.
        token: which of the tokens asked for.

    Raises:
        ArgumentError: for a prompt that the lens does not have, or a rank or logit of a token where
            none was asked for.
    """
    n_prompts = lens.entropy.shape[1]
    if not -n_prompts <= prompt < n_prompts:
        raise ArgumentError(f"prompt must be one of the lens's {n_prompts}; {prompt} was given.")
    prompt %= n_prompts
    valid = lens.positions.valid[prompt].nonzero()[:, 0].tolist()
    index = lens.positions.index[prompt].tolist()
    words = [lens.tokens[prompt][p] for p in valid]
    top = [[lens.top_tokens[layer][prompt][p] for p in valid] for layer in range(len(lens))]
    values = _lens_colour(lens, colour, token)[:, prompt, valid].detach().cpu().double().numpy()
    probability = lens.top_probabilities[:, prompt, valid].detach().cpu().tolist()
    detail = [
        [
            "<br>".join(
                f"{safe(repr(name))} {p:.1%}" for name, p in zip(names, chances, strict=True)
            )
            for names, chances in zip(line, probabilities, strict=True)
        ]
        for line, probabilities in zip(top, probability, strict=True)
    ]
    unit = {"entropy": "nats", "rank": "rank", "logit": "logits"}.get(colour, colour)
    return charts.table(
        values,
        lens.labels,
        [visible(word) for word in words],
        where=[f"after {w!r}, position {index[p]}" for w, p in zip(words, valid, strict=True)],
        detail=np.array(detail, dtype=object),
        cells=[[visible(names[0]) for names in line] for line in top],
        hover=f"<b>%{{y}}</b> %{{x}}<br>{colour} %{{z:.4~g}}<br>%{{customdata}}",
        scale="diverging" if colour == "logit" else "sequential",
        title="Logit lens: the prediction at each point of the stream",
        subtitle="each point is read with norm statistics of its own (not contributions)",
        unit=unit,
        cell_width=54,
    )


def visible(token: str) -> str:
    """A token for a small cell: line breaks shown, shortened."""
    text = token.replace("\n", "↵").replace("\t", "⇥")
    text = text if text.strip() else repr(text.replace(" ", "␣"))[1:-1] or "''"
    return text if len(text) <= 10 else f"{text[:9]}…"


def _lens_colour(lens: "LogitLens", colour: str, token: int) -> Float[Tensor, "layer batch pos"]:
    """The quantity that colours the grid."""
    if colour == "probability":
        return lens.top_probabilities[..., 0]
    if colour == "entropy":
        return lens.entropy
    asked = {"rank": lens.ranks, "logit": lens.values}
    if colour not in asked:
        raise ArgumentError(
            f'colour must be "probability", "entropy", "rank" or "logit"; {colour!r} was given.'
        )
    chosen = asked[colour]
    if chosen is None:
        raise ArgumentError(
            f"The lens was not given a token whose {colour} to show: pass answer_tokens to"
            " logit_lens."
        )
    if not 0 <= token < chosen.shape[-1]:
        raise ArgumentError(
            f"token must be the index of one of the {chosen.shape[-1]} asked for; {token} was"
            " given."
        )
    return chosen[..., token].double()
