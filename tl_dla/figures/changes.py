"""Two runs side by side: a line from a's value to b's for each row, a map of the heads' changes.

Numbers and words come from a `Comparison`; the table of a notebook or a terminal is here too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from tl_dla.figures import charts, theme
from tl_dla.figures.charts import LOGITS, PLAIN, Heading, Look, Sizes
from tl_dla.figures.head_map import head_cells, head_grid, map_axes, room_for_numbers
from tl_dla.figures.text import number, safe, shorten
from tl_dla.figures.view import View, fold, largest, require_some, smaller

Values = Float[np.ndarray, "row sample candidate"]
COLUMNS = ("a", "b", "change", "wrote", "read")
_ROW, _GAP = 20, 56  # pixels: of a line, between the lines and the map


@dataclass(frozen=True, eq=False)
class Changes:
    """What figures and tables of a comparison show.

    Attributes:
        view: the changes, with the names of rows and samples.
        a: a's rows.
        b: b's rows.
        wrote: what parts wrote differently.
        read: the change of the readout.
        logit_a: a's own logit.
        logit_b: b's.
        sides: what a and b are, in words.
    """

    view: View
    a: Values
    b: Values
    wrote: Values
    read: Values
    logit_a: Float[np.ndarray, "sample candidate"]
    logit_b: Float[np.ndarray, "sample candidate"]
    sides: tuple[str, str]

    @property
    def means(self) -> Float[np.ndarray, "row column"]:
        """Over samples: a, b, change, wrote and read of each row."""
        every = (self.a, self.b, self.view.values, self.wrote, self.read)
        return np.stack([x[..., 0].mean(1) for x in every], 1)


@dataclass(frozen=True, eq=False)
class Line:
    """A row, what is left of them, or the logit: a, b, change, wrote and read; NaN for none."""

    label: str
    values: Float[np.ndarray, " column"]
    total: bool = False


def lines(changes: Changes, k: int | None = 12) -> list[Line]:
    """The k rows that changed most, what the others add up to, and the logit.

    The readings of a stream are in its order, and add up to nothing.
    """
    view, means = changes.view, changes.means
    order = list(largest(means[:, 2:3], len(means) if k is None else k))
    if k is None or view.unit == "layer":
        order = sorted(order)
    found = [Line(view.labels[i], means[i]) for i in order]
    rest = [i for i in range(len(means)) if i not in set(order)]
    if rest and view.unit != "layer":
        found.append(Line(smaller(len(rest)), means[rest].sum(0)))
    a, b = changes.logit_a[:, 0].mean(), changes.logit_b[:, 0].mean()
    added = [i for i, kind in enumerate(view.kinds) if kind != "residual"]
    added += view.rows("residual")[-1:]
    terms = means[added, 3:].sum(0)
    return [*found, Line(view.words.logit, np.array([a, b, b - a, *terms]), True)]


# ---- figures -----------------------------------------------------------------------------------


def plot(changes: Changes, k: int = 30, look: Look = PLAIN) -> go.Figure:
    """A map of the heads' changes where there are heads, and a line for each of the k rows.

    Args:
        changes: what to draw; several samples as their means.
        k: how many rows have a line.
        look: title and size in place of the figure's own.

    Raises:
        ArgumentError: for k < 1.
    """
    require_some(k)
    view = changes.view
    shown = _in_order(changes, k)
    fig = go.Figure(_arrows(shown, changes.sides))
    body = _ROW * len(shown) + 20
    split, above = 0.0, 30
    if "head" in view.kinds:
        grid = head_grid(view, changes.means[:, 2])
        height = len(grid) * max(14, min(26, 500 // len(grid)))
        total = height + _GAP + body
        split, above = body / total, 58
        _add_map(fig, changes, grid, look, (height, total))
        body = total
    reach = [x for line in shown for x in line.values[:2]]
    low, high = min(0.0, *reach), max(0.0, *reach)
    room = 0.06 * ((high - low) or 1.0)
    axis = dict(range=[low - room, high + room], title_text="logits", zeroline=True, anchor="y")
    rows = charts.ledger_axis([line.label for line in shown])
    fig.update_layout(xaxis=axis, yaxis=rows | dict(domain=[0, split or 1.0], anchor="x"))
    return charts.styled(fig, _heading(changes), look, Sizes(body, above))


def _heading(changes: Changes) -> Heading:
    view = changes.view
    title = f"What changed in the logit of {safe(shorten(view.words.target))}"
    sides = [safe(shorten(side)) for side in changes.sides if len(side) > 1]
    return Heading(title, "<br>".join([*sides, *over(view), safe(view.words.certificate)]))


def over(view: View) -> list[str]:
    """What the means are over, where there are several numbers."""
    prompts = f"{view.n_prompts} prompts" if view.n_prompts > 1 else "one prompt"
    if view.several_positions:
        return [f"mean over {len(view.samples)} positions of {prompts}"]
    return [f"mean over {prompts}"] if view.n_prompts > 1 else []


def _in_order(changes: Changes, k: int) -> list[Line]:
    """The k rows that changed most in the order of the stream, the others, and the logit."""
    order = changes.view.stream_order
    labels, means = [changes.view.labels[i] for i in order], changes.means[order]
    if changes.view.unit != "layer":
        labels, means = fold(labels, means, means[:, 2:3], k)
    return [*map(Line, labels, means), lines(changes, 1)[-1]]


def _arrows(shown: Sequence[Line], sides: Sequence[str]) -> list[go.Scatter]:
    """A grey line from a hollow dot, a's value, to a full one, b's: blue where it rose."""
    places = np.arange(len(shown))
    a, b = (np.array([line.values[i] for line in shown]) for i in (0, 1))
    gaps = np.full(len(shown), np.nan)
    hover = [
        f"<b>{safe(line.label)}</b><br>a {line.values[0]:+.4f} → b {line.values[1]:+.4f} logits"
        f"<br>change {line.values[2]:+.4f} = wrote {line.values[3]:+.4f}"
        f" and read {line.values[4]:+.4f}"
        for line in shown
    ]
    between = go.Scatter(
        x=np.stack([a, b, gaps], 1).flatten(),
        y=np.repeat(places, 3),
        mode="lines",
        line=dict(width=2, color=theme.NEUTRAL),
        hoverinfo="skip",
        showlegend=False,
    )
    start = go.Scatter(
        x=a,
        y=places,
        mode="markers",
        marker=dict(size=8, symbol="circle-open", color=theme.NEUTRAL, line=dict(width=2)),
        hovertext=hover,
        hoverinfo="text",
        name="a",
    )
    ends = [
        go.Scatter(
            x=b[rows],
            y=places[rows],
            mode="markers",
            marker=dict(size=9, color=colour),
            hovertext=[hover[i] for i in rows.nonzero()[0]],
            hoverinfo="text",
            name=name,
        )
        for name, rows, colour in (
            ("b, more", b > a, theme.POSITIVE),
            ("b, less", b < a, theme.NEGATIVE),
            ("b, the same", b == a, theme.NEUTRAL),
        )
        if rows.any()
    ]
    return [between, start, *ends]


def _add_map(
    fig: go.Figure,
    changes: Changes,
    grid: Float[np.ndarray, "layer head"],
    look: Look,
    sizes: tuple[int, int],
) -> None:
    """Layer × head above the lines, coloured by the change."""
    view, means, (height, total) = changes.view, changes.means, sizes
    terms = [head_grid(view, means[:, i]) for i in (0, 1, 3, 4)]
    words = "a %{customdata[0]:+.4f} → b %{customdata[1]:+.4f} logits<br>change %{z:+.4f}"
    words += " = wrote %{customdata[2]:+.4f} and read %{customdata[3]:+.4f}"
    worded, detail = look.room >= room_for_numbers(grid), np.stack(terms, -1)
    fig.add_trace(head_cells(grid, words, detail, worded, xaxis="x2", yaxis="y2"))
    across, down = map_axes(grid, look.room - 150)
    fig.update_layout(
        coloraxis=LOGITS.axis(grid, height) | dict(showscale=not look.narrow),
        meta=dict(scale="diverging", least=330),
        xaxis2=across | dict(anchor="y2", title_text="head"),
        yaxis2=down | dict(anchor="x2", domain=[1 - height / total, 1]),
        legend=dict(y=(total - height - _GAP + 2) / total),
    )


# ---- tables ------------------------------------------------------------------------------------


def text(changes: Changes, k: int = 12) -> str:
    """The rows that changed most in plain text, and the certificate."""
    shown = lines(changes, k)
    width = max(len(line.label) for line in shown)
    found = [f"  {side}" for side in changes.sides if len(side) > 1]
    found += [f"  {_caption(changes, k)}", f"  {'':>{width}}  {_columns(COLUMNS)}"]
    found += [
        f"  {line.label:>{width}}  {_columns([f'{x:+.4f}' for x in line.values])}" for line in shown
    ]
    return "\n".join([*found, f"  {changes.view.words.certificate}"])


def _columns(cells: Sequence[str]) -> str:
    return "  ".join(f"{cell:>9}" for cell in cells)


def _caption(changes: Changes, k: int) -> str:
    view = changes.view
    total = len(view.labels)
    which = f"the {k} of {total} rows that changed most" if total > k else f"all {total} rows"
    return f"{', '.join([f'{which} (logits', *over(view)])}):"


def html(changes: Changes, k: int = 12) -> str:
    """The same for a notebook."""
    cell = "padding:1px 10px;text-align:right;white-space:nowrap;border:0;background:none"
    head = "".join(f'<th scope="col" style="{cell}">{name}</th>' for name in ("", *COLUMNS))
    rows = []
    for line in lines(changes, k):
        bold = "font-weight:600" if line.total else "font-weight:400"
        rule = ";border-top:1px solid rgba(128,128,128,.4)" if line.total else ""
        name = f"{bold};font-family:ui-monospace,monospace"
        numbers = "".join(
            f'<td style="{cell};font-variant-numeric:tabular-nums{_ink(i, x)}">{number(x)}</td>'
            for i, x in enumerate(line.values)
        )
        rows.append(
            f'<tr style="{bold}{rule}"><th scope="row" style="{cell};{name}">{escape(line.label)}'
            f"</th>{numbers}</tr>"
        )
    view = changes.view
    sides = "".join(f"<div>{escape(shorten(s))}</div>" for s in changes.sides if len(s) > 1)
    style = "border-collapse:collapse;margin:4px 0;font-size:13px;color:inherit"
    return (
        '<div style="font-family:system-ui,sans-serif;font-size:13px;line-height:1.5">'
        f"<div><b>What changed in the logit of {escape(view.words.target)}</b>"
        f' by {escape(view.unit)}</div>{sides}<div style="opacity:.7">'
        f'{escape(_caption(changes, k))}</div><table style="{style}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
        f"<div>{escape(view.words.certificate, quote=False)}</div></div>"
    )


def _ink(column: int, value: float) -> str:
    """The change in the colour of its sign."""
    if column != 2:
        return ""
    return f";color:{theme.POSITIVE if value >= 0 else theme.NEGATIVE};font-weight:600"
