"""Figures for papers: as wide as a column or a page, black on white, as a file; their captions."""

from dataclasses import dataclass
from importlib import util
from typing import Literal

import plotly.graph_objects as go

from tl_dla.errors import ArgumentError
from tl_dla.figures import charts, plots
from tl_dla.figures.charts import Look
from tl_dla.figures.text import number, safe, shorten
from tl_dla.figures.view import View

Width = Literal["column", "page"] | float
FORMATS = ("pdf", "svg", "png")
_INCHES = {"column": 3.25, "page": 6.75}  # of the field's two-column styles
_PER_INCH = 96  # pixels as plotly counts them: a letter of 12 is one of 9 points
_DOTS = 300  # an inch, of a png

_SHOWS = {
    "component": "What each attention and MLP output wrote directly to",
    "head": "What each attention head, MLP and bias wrote directly to",
    "neuron": "What single neurons wrote directly to",
    "source": "What attention heads moved from each token to",
    "input": "What each token of the prompt gave, through all layers, to",
}
_OBSERVED = "A direct effect is what a part wrote, not what removing the part would do."


@dataclass(frozen=True)
class Sheet:
    """What a paper has room for.

    Attributes:
        width: `"column"` (3.25 inches), `"page"` (6.75 inches), or inches.
        height: inches; as high as what is drawn by default.
        certificate: whether the certificate stands above the figure, which has no title.

    Raises:
        ArgumentError: for a width or height that is none.
    """

    width: Width = "column"
    height: float | None = None
    certificate: bool = False

    def __post_init__(self) -> None:
        known = self.width in _INCHES if isinstance(self.width, str) else self.width > 0
        if not known:
            raise ArgumentError(
                f'width must be "column", "page" or a number of inches; {self.width!r} was given.'
            )
        if self.height is not None and self.height <= 0:
            raise ArgumentError(f"height must be a number of inches; {self.height!r} was given.")

    @property
    def look(self) -> Look:
        """The same in pixels."""
        inches = _INCHES[self.width] if isinstance(self.width, str) else self.width
        height = None if self.height is None else round(self.height * _PER_INCH)
        return Look("", round(inches * _PER_INCH), height)


def figure(view: View, k: int, sheet: Sheet) -> go.Figure:
    """The figure of a view as a paper prints it."""
    fig = plots.plot(view, k, sheet.look)
    fig.update_layout(font=dict(family="Helvetica, Arial, sans-serif", color="black"))
    if sheet.certificate:
        lines = charts.lines(safe(view.words.certificate), sheet.look.room, 5.6)
        above = 14 * len(lines) + 12
        total = fig.layout.height + (0 if sheet.height else above)
        fig.update_layout(
            title=dict(text="<br>".join(lines), font_size=10, y=1 - 16 / total),
            margin_t=fig.layout.margin.t + above,
            height=total,
        )
    return fig


def exported(fig: go.Figure, suffix: str) -> bytes:
    """The figure as a file of one of the `FORMATS`, by plotly's own exporter.

    Raises:
        ArgumentError: for another format.
        ImportError: kaleido, by which plotly exports, is not installed.
        RuntimeError: kaleido finds no Chrome or Chromium; plotly says how to get one.
    """
    kind = suffix.removeprefix(".").lower()
    if kind not in FORMATS:
        raise ArgumentError(f"A figure is saved as .pdf, .svg or .png; {suffix!r} was given.")
    if util.find_spec("kaleido") is None:
        raise ImportError("To save figures: pip install 'tl-dla[figures]'")
    scale = _DOTS / _PER_INCH if kind == "png" else 1
    return fig.to_image(format=kind, width=fig.layout.width, height=fig.layout.height, scale=scale)


def caption(view: View, model: str) -> str:
    """What a figure of the view shows, as the caption that a paper puts below it.

    Args:
        view: what is drawn.
        model: its name.
    """
    words, logit = view.words, view.logit
    shows = _SHOWS.get(view.unit, f"What each {view.unit} wrote directly to")
    if view.unit == "layer":
        shows = "The residual stream, read with the scale of the final norm at every layer, for"
    value = number(float(logit.mean()))
    if logit.size > 1:
        low, high = number(float(logit.min())), number(float(logit.max()))
        value = f"mean {value}, from {low} to {high} over {logit.size}"
    first = view.samples[0]
    if len(view.samples) == 1:
        token = "" if first.token is None else f" {first.token!r}"
        text = f" of “{shorten(first.text)}”" if first.text else ""
        place = f"at position {first.position}{token}{text}"
    elif view.several_positions:
        prompts = "a prompt" if view.n_prompts == 1 else f"{view.n_prompts} prompts"
        place = f"at {len(view.samples)} tokens of {prompts}"
    else:
        place = f"mean over {view.n_prompts} prompts"
    certificate = words.certificate.lstrip("✓✗ ")
    sentences = [
        f"{shows} the {words.what} of {words.target} ({value}) in {model}, {place}.",
        "" if view.unit == "layer" else "Blue raises it, red lowers it.",
        f"{certificate[:1].upper()}{certificate[1:]}.",
        "" if view.unit == "input" else _OBSERVED,
    ]
    return " ".join(filter(None, sentences))
