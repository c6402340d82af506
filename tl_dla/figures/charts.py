"""Figures that know nothing of models: numbers and names in, a plotly figure out, never shown.

Values are in logits unless a `unit` says otherwise; colour scales are centred on 0. Nothing is
registered with plotly: each figure carries its own template (`theme`).
"""

from collections.abc import Sequence
from html import escape
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float, Shaped

from tl_dla.errors import ArgumentError
from tl_dla.figures.theme import DOT, INK, NEGATIVE, NEUTRAL, PALETTE, POSITIVE, SCALES, template


def safe(text: str) -> str:
    """Text as plotly shows it, nothing read as markup and line breaks made visible."""
    return escape(text, quote=False).replace("\n", "↵").replace("\t", "⇥")


def in_template(text: str) -> str:
    """Text inside a hover template, where `%{x}` would be read as a value."""
    return safe(text).replace("%{", "%&#123;")


def shorten(text: str, length: int = 80) -> str:
    """The start and the end of a long text."""
    if len(text) <= length:
        return text
    start, end = text[: length // 3], text[-(length - length // 3) :]
    return f"{start.rsplit(None, 1)[0]} … {end.split(None, 1)[-1]}"


def number(value: float) -> str:
    """A signed value with as many digits as matter."""
    text = f"{value:+.2f}" if abs(value) >= 10 else f"{value:+.3f}"
    return text.replace("-", "−")


def styled(
    fig: go.Figure, title: str, subtitle: str = "", *, height: int, width: int | None = None
) -> go.Figure:
    """The figure with its template, title and size. Titles are shown as they are: escape them."""
    small = f'<br><span style="font-size:12px">{subtitle}</span>' if subtitle else ""
    fig.update_layout(
        template=template(),
        title_text=f"{title}{small}",
        title_y=1 - 26 / height,
        title_yanchor="top",
        height=height,
        width=width,
        margin=dict(l=20, r=20, t=78 if subtitle else 58, b=20),
    )
    return fig


def colour_axis(
    values: Float[np.ndarray, "..."],
    scale: Literal["diverging", "sequential"] = "diverging",
    title: str = "logits",
    **options: Any,
) -> dict[str, Any]:
    """A colour axis: symmetric about 0 where it diverges, from 0 upwards where it does not."""
    finite = values[np.isfinite(values)]
    largest = float(np.abs(finite).max()) if finite.size else 0.0
    largest = largest or 1.0
    bar = dict(
        title=dict(text=title, side="right", font=dict(size=12)), thickness=10, outlinewidth=0
    )
    return dict(
        colorscale=SCALES[scale]["light"],
        cmin=-largest if scale == "diverging" else 0.0,
        cmax=largest,
        colorbar=bar | options,
    )


def signs(values: Float[np.ndarray, " row"]) -> list[str]:
    """A colour for each value: positive, negative or, for NaN, neither."""
    return [POSITIVE if v >= 0 else NEGATIVE if v < 0 else NEUTRAL for v in values]


def spread(place: float, count: int, width: float = 0.5) -> Float[np.ndarray, " sample"]:
    """Places of several points around one, in order, so that equal values stay apart."""
    if count == 1:
        return np.array([place])
    return place + width * (np.arange(count) / (count - 1) - 0.5)


def _aligned(labels: Sequence[str], **arrays: Any) -> None:
    for name, values in arrays.items():
        if values is not None and len(values) != len(labels):
            raise ArgumentError(
                f"{name} must have one entry per label: {len(labels)} labels and {len(values)}"
                f" {name} were given."
            )


def intervals(
    labels: Sequence[str],
    mean: Float[np.ndarray, " row"],
    low: Float[np.ndarray, " row"],
    high: Float[np.ndarray, " row"],
    values: Float[np.ndarray, "row sample"] | None = None,
    *,
    samples: Sequence[str] | None = None,
    details: Sequence[str] | None = None,
    title: str = "",
    subtitle: str = "",
    unit: str = "logits",
) -> go.Figure:
    """A bar for each mean, its interval from `low` to `high`, and every value behind it as a dot.

    Args:
        labels: the rows' names, the first on top.
        mean: the rows' means, in `unit`.
        low: the lower ends of their intervals.
        high: the upper ends.
        values: `[row, sample]`, drawn as dots where given.
        samples: the samples' names, for hover.
        details: a line more for each row's hover.
        title: above the figure.
        subtitle: below the title.
        unit: of the values, named on the axis.

    Raises:
        ArgumentError: where the lengths differ.

    Example:
        >>> import numpy as np
        >>> one = np.array([1.0, -2.0])
        >>> len(intervals(["L0H0", "L0H1"], one, one - 0.5, one + 0.5).data)
        1
    """
    _aligned(labels, mean=mean, low=low, high=high, values=values, details=details)
    places = np.arange(len(labels))
    lines = [f"<br>{safe(line)}" for line in details] if details else [""] * len(labels)
    hover = [
        f"<b>{safe(label)}</b><br>mean {m:+.4f} {unit}<br>interval {a:+.4f} to {b:+.4f}{more}"
        for label, m, a, b, more in zip(labels, mean, low, high, lines, strict=True)
    ]
    error = dict(
        type="data",
        symmetric=False,
        array=high - mean,
        arrayminus=mean - low,
        width=3,
        thickness=1.4,
        color=NEUTRAL,
    )
    bars = go.Bar(
        x=mean,
        y=places,
        orientation="h",
        marker_color=signs(mean),
        width=0.7,
        error_x=error,
        hovertext=hover,
        hoverinfo="text",
        showlegend=False,
        name="mean",
    )
    fig = go.Figure(bars)
    if values is not None:
        fig.add_traces(
            dots(
                labels,
                values,
                samples or [f"prompt {i}" for i in range(values.shape[1])],
                unit=unit,
            )
        )
    fig.update_yaxes(ledger_axis(labels))
    fig.update_xaxes(title_text=unit)
    return styled(fig, title, subtitle, height=110 + 22 * len(labels))


def ledger_axis(labels: Sequence[str]) -> dict[str, Any]:
    """A vertical axis with a named row at each integer, the first on top."""
    return dict(
        tickmode="array",
        tickvals=list(range(len(labels))),
        ticktext=[safe(label) for label in labels],
        range=[len(labels) - 0.4, -0.6],
        showgrid=False,
        zeroline=False,
    )


def dots(
    labels: Sequence[str],
    values: Float[np.ndarray, "row sample"],
    samples: Sequence[str],
    *,
    places: Sequence[int] | None = None,
    share: Float[np.ndarray, "row sample"] | None = None,
    unit: str = "logits",
    **axes: str,
) -> list[go.Scatter]:
    """Every value of every row as a dot at the row's place on the vertical axis.

    Each sample is a trace, so that its name is in the page once, and not once a dot.
    """
    n_samples = values.shape[1]
    size, opacity, edge = (6, 0.85, 0.8) if n_samples <= 40 else (4, 0.4, 0.0)
    offsets = spread(0.0, n_samples)
    rows = np.asarray(places if places is not None else range(len(labels)), dtype=np.float32)
    of_logit = " (%{customdata:.1%} of the logit)" if share is not None else ""
    return [
        go.Scatter(
            x=values[:, i],
            y=rows + np.float32(offsets[i]),
            customdata=None if share is None else share[:, i].astype(np.float32),
            text=[safe(label) for label in labels],
            mode="markers",
            marker=dict(
                size=size, color=DOT, opacity=opacity, line=dict(width=edge, color="#ffffff")
            ),
            hovertemplate=f"<b>%{{text}}</b><br>%{{x:+.4f}} {unit}{of_logit}"
            f"<br>{in_template(sample)}<extra></extra>",
            name=f"sample {i}",
            showlegend=False,
            **axes,
        )
        for i, sample in enumerate(samples)
    ]


def percent(share: float) -> str:
    """A share of the logit; a dash where the logit is 0 or nothing is known."""
    return f"{share:.1%} of the logit" if np.isfinite(share) else "–"


def scatter(
    coordinates: Float[np.ndarray, "token 2"],
    labels: Sequence[str],
    *,
    groups: Sequence[str] | None = None,
    axes: tuple[str, str] = ("first component", "second component"),
    title: str = "",
    subtitle: str = "",
) -> go.Figure:
    """Named points in a plane, one colour a group; both axes have the same scale.

    Raises:
        ArgumentError: where there is not one label (and group) for each point.
    """
    _aligned(labels, coordinates=coordinates, groups=groups)
    named = list(groups) if groups is not None else [""] * len(labels)
    fig = go.Figure()
    for i, group in enumerate(dict.fromkeys(named)):
        own = [j for j, name in enumerate(named) if name == group]
        fig.add_trace(
            go.Scatter(
                x=coordinates[own, 0],
                y=coordinates[own, 1],
                mode="markers+text" if len(labels) <= 60 else "markers",
                text=[safe(labels[j]) for j in own],
                textposition="top center",
                textfont_size=10,
                marker=dict(size=8, color=PALETTE[i % len(PALETTE)]),
                name=safe(group),
                showlegend=groups is not None,
                hovertemplate="<b>%{text}</b><br>%{x:.3f}, %{y:.3f}<extra></extra>",
            )
        )
    fig.update_xaxes(title_text=axes[0])
    fig.update_yaxes(title_text=axes[1], scaleanchor="x", scaleratio=1)
    return styled(fig, title, subtitle, height=560)


def table(
    values: Float[np.ndarray, "row column"],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    where: Sequence[str] | None = None,
    detail: Shaped[np.ndarray, "row column"] | None = None,
    cells: Sequence[Sequence[str]] | None = None,
    hover: str = "<b>%{y}</b><br>%{x}<br>%{z:+.4f}",
    scale: Literal["diverging", "sequential"] = "diverging",
    title: str = "",
    subtitle: str = "",
    unit: str = "logits",
    cell_width: int = 46,
) -> go.Figure:
    """A heatmap with a named row and column for each line of `values`, the first row on top.

    Args:
        values: the colours, in `unit`; NaN leaves a cell empty.
        rows: the names of the rows, all different.
        columns: the names of the columns; a line break in them is one.
        where: the columns' names for hover, all different; `columns` where left out.
        detail: what hover shows as `%{customdata}`.
        cells: the text in each cell; left out where there are too many to read.
        hover: plotly's template for it, with `%{y}` the row and `%{x}` the column.
        scale: `"diverging"` is centred on 0, `"sequential"` starts at it.
        title: above the figure.
        subtitle: below the title.
        unit: of the values, named beside the colours.
        cell_width: in pixels, where cells have text.

    Raises:
        ArgumentError: where there is not one name for each row and column.
    """
    _aligned(rows, values=values, cells=cells)
    _aligned(columns, values=values.T, where=where)
    n_rows, n_columns = values.shape
    worded = cells is not None and n_columns <= 48
    height = 22 if n_rows <= 140 else max(8, 2400 // n_rows)
    keys = [safe(key) for key in (where or columns)]
    names = [safe(row) for row in rows]
    fig = go.Figure(
        go.Heatmap(
            z=values,
            x=keys,
            y=names,
            coloraxis="coloraxis",
            xgap=1,
            ygap=1,
            hoverongaps=False,
            text=[[safe(cell) for cell in line] for line in cells] if cells and worded else None,
            texttemplate="%{text}" if worded else None,
            textfont=dict(size=10, color=INK["light"] if scale == "sequential" else None),
            customdata=detail,
            hovertemplate=f"{hover}<extra></extra>",
        )
    )
    # A tick for as many names as fit, so that they never overlap.
    tall = range(0, n_rows, -(-14 // height))
    wide = range(0, n_columns, -(-n_columns // 60))
    fig.update_yaxes(
        tickmode="array",
        tickvals=[names[i] for i in tall],
        autorange="reversed",
        showgrid=False,
        zeroline=False,
    )
    fig.update_xaxes(
        tickmode="array",
        tickvals=[keys[i] for i in wide],
        ticktext=["<br>".join(map(safe, columns[i].split("\n"))) for i in wide],
        side="top",
        tickangle=-45 if n_columns > 5 else 0,
        showgrid=False,
        zeroline=False,
    )
    above = 152 if n_columns > 5 else 120
    total = above + 20 + height * n_rows
    bar = dict(lenmode="pixels", len=min(220, height * n_rows), y=1, yanchor="top")
    fig.update_layout(coloraxis=colour_axis(values, scale, unit, **bar), meta=scale)
    wanted = max(760, 170 + cell_width * n_columns)
    styled(fig, title, subtitle, height=total, width=wanted if worded else None)
    return fig.update_layout(margin_t=above)
