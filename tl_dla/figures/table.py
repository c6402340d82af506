"""A result as a small HTML table with bars: what a notebook shows, and a report's numbers."""

from html import escape
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from tl_dla.figures import charts, theme
from tl_dla.figures.charts import number
from tl_dla.figures.view import View, certificate, fold, logit_name, read, through

if TYPE_CHECKING:
    from tl_dla.core.result import DirectLogitAttribution

_WIDTH, _HEIGHT = 150, 16
_CELL = "padding:1px 10px;text-align:right;white-space:nowrap;border:0;background:none"
_MOST_CANDIDATES = 6
_MOST_DOTS = 24  # more prompts are drawn as their range


def notebook_html(result: "DirectLogitAttribution", k: int = 12) -> str:
    """The table, what is attributed above it and the certificate below."""
    view = read(result)
    return (
        '<div style="font-family:system-ui,sans-serif;font-size:13px;line-height:1.5">'
        f"<div><b>{escape(result.target + through(result))}</b> by {escape(result.unit)}"
        f'<span style="opacity:.7"> · {escape(_over(view))}</span></div>'
        f"{table_html(result, k)}<div>{certificate(result)}</div></div>"
    )


def _over(view: View) -> str:
    if len(view.samples) == 1:
        return view.samples[0]
    n_prompts = len(set(view.prompt_of))
    places = "" if n_prompts == len(view.samples) else f"{len(view.samples)} positions of "
    prompts = f"{n_prompts} prompts" if n_prompts > 1 else "one prompt"
    drawn = "each a dot" if len(view.samples) <= _MOST_DOTS else "and their range"
    return f"mean over {places}{prompts}, {drawn}"


def table_html(result: "DirectLogitAttribution", k: int | None = 12) -> str:
    """The k rows of largest mean magnitude, then the sum of the others and the model's own logit.

    All rows in their order for k=None. One bar and number a candidate; the number is the mean
    where there are several prompts, whose values are the dots, or whose range is the line.
    """
    view = read(result)
    shown = min(len(view.candidates), _MOST_CANDIDATES)
    labels, values = list(result.labels), view.values
    if k is not None:
        labels, values = _largest(result, view, k)
    own = view.logit[None]
    rows = [
        _row(label, row, view, values, shown) for label, row in zip(labels, values, strict=True)
    ]
    rows.append(_row(logit_name(result), own[0], view, own, shown, total=True))
    head = ""
    if view.candidates != [""]:
        names = "".join(
            f'<th colspan="2" style="{_CELL}">{escape(repr(name))}</th>'
            for name in view.candidates[:shown]
        )
        hidden = len(view.candidates) - shown
        more = f'<th style="{_CELL}">and {hidden} more candidates</th>' if hidden else ""
        head = f'<tr><th style="{_CELL}"></th>{names}{more}</tr>'
    style = "border-collapse:collapse;margin:4px 0;font-size:13px;color:inherit"
    return f'<table style="{style}">{head}{"".join(rows)}</table>'


def _largest(
    result: "DirectLogitAttribution", view: View, k: int
) -> tuple[list[str], Float[np.ndarray, "shown sample candidate"]]:
    """The largest rows first, then the sum of the others.

    The readings of a stream are no parts of a sum: there the others are left out.
    """
    n_rows, *rest = view.values.shape
    labels, values = fold(result.labels, view.values.reshape(n_rows, -1), k)
    values = values.reshape(-1, *rest)
    folded = len(labels) < n_rows
    n_named = len(labels) - folded
    order = list(np.argsort(-np.abs(values[:n_named]).mean((1, 2)), kind="stable"))
    if folded and result.unit != "layer":
        order.append(n_named)
    return [labels[i] for i in order], values[order]


def _row(
    label: str,
    row: Float[np.ndarray, "sample candidate"],
    view: View,
    scale_of: Float[np.ndarray, "row sample candidate"],
    shown: int,
    total: bool = False,
) -> str:
    """A line of the table: a bar, a number and, for one value, its share of the logit."""
    largest = float(np.abs(scale_of).max()) or 1.0
    cells = []
    for c in range(shown):
        mean = float(row[:, c].mean())
        colour = theme.NEUTRAL if total else theme.POSITIVE if mean >= 0 else theme.NEGATIVE
        cells.append(f'<td style="{_CELL}">{_bar(row[:, c], largest, colour)}</td>')
        cells.append(f'<td style="{_CELL};font-variant-numeric:tabular-nums">{number(mean)}</td>')
    if len(view.samples) == 1 and shown == 1 and not total:
        share = row[0, 0] / view.logit[0, 0] if view.logit[0, 0] else np.nan
        words = f"{share:.0%}" if np.isfinite(share) else "–"
        cells.append(f'<td style="{_CELL};opacity:.65">{words.replace("-", "−")}</td>')
    weight = "font-weight:600;border-top:1px solid rgba(128,128,128,.4)" if total else ""
    name = f'<td style="{_CELL};font-family:ui-monospace,monospace">{escape(label)}</td>'
    return f'<tr style="{weight}">{name}{"".join(cells)}</tr>'


def _bar(values: Float[np.ndarray, " sample"], largest: float, colour: str) -> str:
    """A bar from 0, in the middle, to the mean; several values as dots, or as their range."""
    middle, mean = _WIDTH / 2, float(values.mean())
    reach = (_WIDTH / 2 - 4) / largest
    x, width = min(middle, middle + mean * reach), abs(mean) * reach
    dots = ""
    if len(values) > _MOST_DOTS:
        low, high = middle + values.min() * reach, middle + values.max() * reach
        dots = (
            f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{_HEIGHT / 2}" y2="{_HEIGHT / 2}"'
            f' stroke="{theme.DOT}"><title>from {number(values.min())} to'
            f" {number(values.max())}</title></line>"
        )
    elif len(values) > 1:
        places = charts.spread(_HEIGHT / 2, len(values), _HEIGHT / 2)
        dots = "".join(
            f'<circle cx="{middle + v * reach:.1f}" cy="{y:.1f}" r="1.8" fill="{theme.DOT}"'
            ' stroke="#fff" stroke-width=".6"/>'
            for v, y in zip(values, places, strict=True)
        )
    return (
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" role="img" style="vertical-align:middle">'
        f'<rect class="bar" x="{x:.2f}" y="3" width="{width:.2f}" height="{_HEIGHT - 6}"'
        f' fill="{colour}"/><line x1="{middle}" x2="{middle}" y1="0" y2="{_HEIGHT}"'
        f' stroke="currentColor" stroke-opacity=".35"/>{dots}</svg>'
    )
