"""The rows that matter as a table: as text, and as HTML for a notebook or a page.

`table` decides which rows are shown, in which order, and what is added up; `text` and `html` write
that down.
"""

from dataclasses import dataclass
from html import escape
from typing import Literal

import numpy as np
from jaxtyping import Float

from tl_dla.figures import theme
from tl_dla.figures.text import number
from tl_dla.figures.view import View, largest, smaller, spread

_WIDTH, _HEIGHT = 150, 16
_CELL = "padding:1px 10px;text-align:right;white-space:nowrap;border:0;background:none"
_MOST_CANDIDATES = 6
_PARTS = ("row", "rest")  # what has a bar: totals are larger, and would leave none for the rows
_MOST_DOTS = 24  # more prompts are drawn as their range


@dataclass(frozen=True, eq=False)
class Line:
    """A row, the sum of those left out, the sum of all, or the model's own logit."""

    label: str
    values: Float[np.ndarray, "sample candidate"]
    role: Literal["row", "rest", "sum", "logit"] = "row"

    @property
    def mean(self) -> Float[np.ndarray, " candidate"]:
        """Over prompts and positions: the number that is shown."""
        return self.values.mean(0)


@dataclass(frozen=True, eq=False)
class Table:
    """Lines in the order shown, what they are, and the candidates that have a column."""

    lines: list[Line]
    caption: str
    candidates: list[str]
    hidden: int  # candidates that have none
    units: str = "logits"

    @property
    def largest(self) -> float:
        """The largest magnitude of the rows' values, for bars of one scale."""
        shown = [line.values for line in self.lines if line.role in _PARTS]
        return max(float(np.abs(values).max()) for values in shown) or 1.0

    @property
    def share(self) -> Float[np.ndarray, " line"] | None:
        """Each line's share of the logit, where each has one value."""
        values = np.stack([line.values for line in self.lines])
        if values[0].size > 1 or not values[-1]:
            return None
        return values[:, 0, 0] / values[-1, 0, 0]


def table(view: View, k: int | None = 12) -> Table:
    """The k rows that matter, the largest first, the sum of the others, of all, and the logit.

    All rows in their order for k=None. The readings of a stream (`unit="layer"`) are in the order
    of depth, evenly thinned where they are many; they do not add up: the last of them and the
    biases do.
    """
    count = min(len(view.candidates), _MOST_CANDIDATES)
    values, labels = view.values[..., :count], view.labels
    rows = list(range(len(labels)))
    added = rows
    if view.unit == "layer":
        points, biases = view.rows("residual"), view.rows("bias")
        step = 1 if k is None else -(-len(points) // (2 * k + 2))
        rows, added = sorted(points[::-step]) + biases, [points[-1], *biases]
    elif k is not None:
        rows = list(largest(values.mean(1), k if len(rows) > k + 1 else len(rows)))
    lines = [Line(labels[row], values[row]) for row in rows]
    rest = sorted(set(added) - set(rows))
    if rest:
        lines.append(Line(smaller(len(rest)), values[rest].sum(0), "rest"))
    whole = "all rows"
    if view.unit == "layer":
        whole = f"{labels[added[0]]} and the biases" if len(added) > 1 else labels[added[0]]
    lines.append(Line(whole, values[added].sum(0), "sum"))
    lines.append(Line(view.words.logit, view.logit[:, :count], "logit"))
    named = view.candidates[:count] if view.over_candidates else []
    hidden = len(view.candidates) - count
    return Table(lines, _caption(view, len(rows), k), named, hidden, view.words.units)


def _caption(view: View, shown: int, k: int | None) -> str:
    """Which rows the lines are, and what their numbers."""
    total = len(view.labels)
    which = f"the {shown} largest of {total} rows" if shown < total else f"all {total} rows"
    if view.unit == "layer":
        which = f"{shown} of {total} rows" if shown < total else which
        which += " in the order of the stream"
    over = ["prompts"] * (view.n_prompts > 1) + ["positions"] * view.several_positions
    mean = f", mean over {' and '.join(over)}" if over else ""
    if view.samples[0].mean_over:
        mean = f", {view.names[0]}"
    return f"{which} ({view.words.units}{mean})"


# ---- text --------------------------------------------------------------------------------------


def text(table: Table) -> str:
    """The table in plain text, a column for each candidate."""
    width = max(len(line.label) for line in table.lines)
    lines = [f"  {table.caption}:"]
    columns = [max(9, len(repr(name))) for name in table.candidates] or [9]
    if table.candidates:
        names = [f"{name!r:>{w}}" for name, w in zip(table.candidates, columns, strict=True)]
        more = f"  and {table.hidden} more candidates" * bool(table.hidden)
        lines.append(f"  {'':>{width}}  {'  '.join(names)}{more}")
    for line in table.lines:
        cells = [f"{value:+{w}.4f}" for value, w in zip(line.mean, columns, strict=True)]
        lines.append(f"  {line.label:>{width}}  {'  '.join(cells)}")
    return "\n".join(lines)


# ---- a notebook, and a page --------------------------------------------------------------------


def notebook_html(view: View, k: int = 12) -> str:
    """The table, what is attributed above it and the certificate below."""
    drawn = "" if len(view.samples) == 1 else f"; {_drawn(view)}"
    place = view.names[0] if len(view.samples) == 1 else f"{view.n_prompts} prompts"
    shown = table(view, k)
    return (
        '<div style="font-family:system-ui,sans-serif;font-size:13px;line-height:1.5">'
        f"<div><b>{escape(view.words.target)}</b> by {escape(view.unit)}"
        f'<span style="opacity:.7"> · {escape(place)}</span></div>'
        f'<div style="opacity:.7">{escape(shown.caption + drawn)}</div>{html(shown)}'
        f"<div>{escape(view.words.certificate, quote=False)}</div></div>"
    )


def _drawn(view: View) -> str:
    return "each a dot" if len(view.samples) <= _MOST_DOTS else "and their range"


def html(table: Table) -> str:
    """The table with a bar and a number a candidate; several values are dots, or their range."""
    head = ""
    if table.candidates:
        names = "".join(
            f'<th scope="col" colspan="2" style="{_CELL}">{escape(repr(name))}</th>'
            for name in table.candidates
        )
        more = f'<th style="{_CELL}">and {table.hidden} more candidates</th>' * bool(table.hidden)
        head = f'<thead><tr><td style="{_CELL}"></td>{names}{more}</tr></thead>'
    share = table.share
    lines = "".join(
        _row(line, table, None if share is None else float(share[i]))
        for i, line in enumerate(table.lines)
    )
    style = "border-collapse:collapse;margin:4px 0;font-size:13px;color:inherit"
    return f'<table style="{style}">{head}<tbody>{lines}</tbody></table>'


def _row(line: Line, table: Table, share: float | None) -> str:
    """A line of the table: a bar, a number and, for one value, its share of the logit."""
    total, opacity = line.role not in _PARTS, theme.PALE if line.role == "rest" else 1.0
    cells = []
    for values, mean in zip(line.values.T, line.mean.tolist(), strict=True):
        bar = "" if total else _bar(values, table.largest, table.units, opacity)
        cells.append(f'<td style="{_CELL}">{bar}</td>')
        cells.append(f'<td style="{_CELL};font-variant-numeric:tabular-nums">{number(mean)}</td>')
    if share is not None and not total:
        words = f"{share:.0%}".replace("-", "−")
        cells.append(f'<td style="{_CELL};opacity:.65">{words}</td>')
    weight = "font-weight:600" if total else "font-weight:400"
    name = (
        f'<th scope="row" style="{_CELL};{weight};font-family:ui-monospace,monospace">'
        f"{escape(line.label)}</th>"
    )
    rule = ";border-top:1px solid rgba(128,128,128,.4)" if line.role == "sum" else ""
    return f'<tr style="{weight}{rule}">{name}{"".join(cells)}</tr>'


def _bar(values: Float[np.ndarray, " sample"], largest: float, units: str, opacity: float) -> str:
    """A bar from 0, in the middle, to the mean; several values as dots, or as their range."""
    middle, mean = _WIDTH / 2, float(values.mean())
    reach = (_WIDTH / 2 - 4) / largest
    colour = theme.POSITIVE if mean >= 0 else theme.NEGATIVE
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
        places = spread(_HEIGHT / 2, len(values), _HEIGHT / 2)
        dots = "".join(
            f'<circle cx="{middle + v * reach:.1f}" cy="{y:.1f}" r="1.8" fill="{theme.DOT}"'
            ' stroke="#fff" stroke-width=".6"/>'
            for v, y in zip(values, places, strict=True)
        )
    return (
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" role="img" aria-label="{number(mean)} {units}"'
        f' style="vertical-align:middle"><rect class="bar" x="{x:.2f}" y="3" width="{width:.2f}"'
        f' height="{_HEIGHT - 6}" fill="{colour}" opacity="{opacity}"/><line x1="{middle}"'
        f' x2="{middle}" y1="0" y2="{_HEIGHT}"'
        f' stroke="currentColor" stroke-opacity=".35"/>{dots}</svg>'
    )
