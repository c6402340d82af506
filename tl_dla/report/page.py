"""One self-contained HTML page of a result: figures, heads with their attention, the certificate.

The page loads nothing: plotly and circuitsvis are packed into it once, and its content policy
forbids any connection. `page.html` is a jinja2 template that escapes everything it is given, so
what a user wrote (prompts, tokens, the command) is text. The figures of other units than the
result's own come from runs of the same model on the same tokens.
"""

import json
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from os import PathLike
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from tl_dla.analyses.head_patterns import top_heads_with_patterns
from tl_dla.analyses.logit_lens import logit_lens
from tl_dla.core.result import Attribution
from tl_dla.core.run import again
from tl_dla.core.view import view_of
from tl_dla.errors import ArgumentError, UnsupportedModelError
from tl_dla.figures import embedded, plots, table, theme
from tl_dla.figures.attention_view import DRAW, AttentionStyle
from tl_dla.figures.charts import Look
from tl_dla.figures.lens import lens_grid
from tl_dla.figures.view import where
from tl_dla.inputs.selection import Unit
from tl_dla.report import fragments

_MOST_POSITIONS = 48  # of the lens, whose cells hold text
_MOST_ROWS = 200  # of a table of numbers
_UNTITLED = Look(title="")  # a figure's title is the page's business


def write_report(
    result: Attribution,
    path: str | PathLike[str],
    *,
    prompt: int = 0,
    k: int | None = None,
    attention: AttentionStyle = "patterns",
    command: str | None = None,
) -> Path:
    """Write the page and return its path.

    Args:
        result: what to report.
        path: of the HTML file; one that is there is replaced.
        prompt: the prompt of a batch whose lens and attention are shown.
        k: how many of the most positive, and of the most negative, heads to show with their
            attention; 3, or all of fewer, by default.
        attention: how circuitsvis shows it: `"patterns"` or `"heads"`.
        command: what made the page, as it is to be shown; the call of this method by default.

    Raises:
        ArgumentError: for a path that cannot be written, a prompt that the result does not have, or
            more heads than there are.
    """
    path = Path(path)
    _require_writable(path)
    n_prompts = len(result.prompts.tokens)
    if not -n_prompts <= prompt < n_prompts:
        raise ArgumentError(f"prompt must be one of the result's {n_prompts}; {prompt} was given.")
    page = _page(result, prompt % n_prompts, k, attention, command or f'result.report("{path}")')
    try:
        _replace(path, page)
    except OSError as error:
        raise _unwritable(path, f"{error.strerror}") from error
    return path


def _replace(path: Path, text: str) -> None:
    """Write aside, then rename: a full disk leaves no half page, and what was there stays."""
    path = path.resolve()  # a link stays a link
    if path.exists() and not path.is_file():  # a pipe
        path.write_text(text, encoding="utf-8")
        return
    aside = path.with_name(f".tl_dla_{os.getpid()}_{threading.get_ident()}.html")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _require_writable(path: Path) -> None:
    """Fail before the model runs, not after."""
    try:
        is_folder, has_folder = path.is_dir(), path.parent.is_dir()
    except OSError as error:
        raise _unwritable(path, f"{error.strerror}") from error
    if is_folder:
        raise _unwritable(path, "it is a folder; name a file")
    if not has_folder:
        raise _unwritable(path, f"there is no folder {path.parent}")


def _unwritable(path: Path, reason: str) -> ArgumentError:
    return ArgumentError(f"The report cannot be written to {path}: {reason}.")


# ---- the page ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawn:
    """A figure of the page: its element, its size in pixels, and what it shows in words."""

    name: str
    width: int
    height: int
    label: str


@dataclass(frozen=True)
class Section:
    """A section of the page; of `refusal` and the rest, only what there is.

    Attributes:
        title: its heading.
        text: what one sees.
        note: which prompts the figure is of, and whether its rows add up.
        figure: drawn by plotly.
        numbers: the table behind the figure, with what it holds.
        heads: cards of heads.
        refusal: why the model has no such section.
    """

    title: str
    text: str
    note: list[str] = field(default_factory=list)
    figure: Drawn | None = None
    numbers: tuple[str, Markup] | None = None
    heads: fragments.Heads | None = None
    refusal: str = ""

    @property
    def id(self) -> str:
        """The address of the section in the page."""
        return self.title.lower().replace(" ", "-")


class _Figures:
    """The figures of a page, each in an element of its own."""

    def __init__(self) -> None:
        self.drawn: dict[str, Any] = {}

    def add(self, figure: go.Figure, label: str) -> Drawn:
        """The element for a figure."""
        name, layout = f"figure-{len(self.drawn)}", figure.layout
        wanted, height = (layout.meta or {}).get("least", 330), layout.height
        right = max(4, layout.margin.r - 16)
        figure.update_layout(width=None, margin_l=4, margin_r=right, template=None)
        self.drawn[name] = json.loads(figure.to_json())
        return Drawn(name, wanted, height, label)


@cache
def _template() -> Template:
    pages = Environment(
        loader=PackageLoader("tl_dla.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    return pages.get_template("page.html")


def _page(
    result: Attribution,
    prompt: int,
    k: int | None,
    attention: AttentionStyle,
    command: str,
) -> str:
    figures = _Figures()
    sections = _sections(result, prompt, k, attention, figures)
    return _template().render(
        title=f"What wrote the logit of {view_of(result).words.target}",
        model=fragments.model(result),
        prompts=fragments.prompts(result),
        logit=fragments.logit(result),
        passed=result.reconstruction.passed,
        certificate=result.reconstruction,
        sections=sections,
        from_cache=not result.numbers.ran,
        certificates=fragments.certificates(result),
        command=command,
        versions=fragments.versions(),
        figures=Markup(embedded.as_json(figures.drawn)),
        themes=Markup(embedded.as_json(_themes())),
        plotly=Markup(embedded.plotly()),
        circuitsvis=Markup(embedded.circuitsvis()) if any(s.heads for s in sections) else "",
        scripts=Markup(embedded.UNPACK + DRAW),
    )


def _themes() -> dict[str, Any]:
    """What the page's script needs to draw the figures in light and in dark."""
    names: tuple[theme.Theme, ...] = ("light", "dark")
    return {
        name: {
            "template": theme.template(name).to_plotly_json(),
            "scales": {kind: _stops(scale[name]) for kind, scale in theme.SCALES.items()},
            "ink": theme.INK[name],
        }
        for name in names
    }


def _stops(colours: list[str]) -> list[list[Any]]:
    return [[i / (len(colours) - 1), colour] for i, colour in enumerate(colours)]


# Each unit's section: what it is called, and what one sees.
_UNITS: dict[Unit, tuple[str, str]] = {
    "component": (
        "Components",
        "What each attention and MLP output wrote, in the order of the residual stream, and what"
        " that adds up to.",
    ),
    "head": (
        "Heads",
        "Blue heads push the answer up, red ones down. Beside each layer stands what else was"
        " written there.",
    ),
    "layer": (
        "Layer by layer",
        "The residual stream read with the final norm’s own scale: each step is what was written"
        " there, and the last reading and the biases are the logit.",
    ),
}


def _sections(
    result: Attribution,
    prompt: int,
    k: int | None,
    attention: AttentionStyle,
    figures: _Figures,
) -> list[Section]:
    """The sections with figures, or in place of one the sentence why the model has none."""

    def section(title: str, text: str, body: Callable[[], dict[str, Any]]) -> Section:
        try:
            return Section(title, text, **body())
        except UnsupportedModelError as error:
            return Section(title, text, refusal=str(error))

    def of(unit: Unit) -> dict[str, Any]:
        return _drawn(of_unit(result, unit), figures)

    def top_heads() -> dict[str, Any]:
        own = of_unit(result, "head")
        wanted = min(3, own.kinds.count("head")) if k is None else k
        patterns = top_heads_with_patterns(own, wanted)
        return {"heads": fragments.heads(own, patterns, prompt, attention)}

    def lens() -> dict[str, Any]:
        return {"figure": _lens(result, prompt, figures)}

    alone = not result.numbers.ran  # from a cache, which may have come without its input
    found = []
    if result.unit not in _UNITS:
        of_own = partial(_drawn, result, figures)
        found.append(section(f"By {result.unit}", "The rows of this result.", of_own))
    for unit, (title, text) in _UNITS.items():
        if unit == result.unit or not alone:
            found.append(section(title, text, partial(of, unit)))
    if alone:
        return found
    which = f" Prompt {prompt}." if len(result.prompts.tokens) > 1 else ""
    if result.targets.candidates is None:
        text = (
            "The heads farthest above and below 0: where they look, and what they move from there."
            " Tokens are coloured by their contribution; a head’s contributions add up to its"
            f" value.{which}"
        )
        found.append(section("Heads and what they read", text, top_heads))
    text = (
        "The model’s prediction at each point of the stream, after each token. The norm’s"
        f" statistics are computed afresh at each point: these are not contributions.{which}"
    )
    found.append(section("Logit lens", text, lens))
    return found


def _drawn(result: Attribution, figures: _Figures) -> dict[str, Any]:
    """The figure, what it is of, its own certificate, and its numbers."""
    view, n_rows = view_of(result), len(result)
    several = len(view.samples) > 1
    which = "all rows" if n_rows <= _MOST_ROWS else f"the {_MOST_ROWS} largest of {n_rows} rows"
    shown = table.table(view, None if n_rows <= _MOST_ROWS else _MOST_ROWS)
    return {
        "note": [*[where(view)] * several, view.words.certificate],
        "figure": figures.add(plots.plot(view, look=_UNTITLED), f"by {view.unit}, {where(view)}"),
        "numbers": (f"{which} in numbers", Markup(table.html(shown))),
    }


def _lens(result: Attribution, prompt: int, figures: _Figures) -> Drawn:
    """The grid, with the answer and its foil followed; the last positions of a long prompt."""
    length = int(result.prompts.length[prompt])
    tokens = result.prompts.packed[prompt : prompt + 1, :length]
    last = slice(max(0, length - _MOST_POSITIONS), length)
    ids = result.targets.ids[prompt % len(result.targets.ids), -1]
    lens = logit_lens(result.model, tokens, candidate_tokens=ids, pos=last)
    return figures.add(lens_grid(lens.view(), look=_UNTITLED), f"logit lens, prompt {prompt}")


def of_unit(result: Attribution, unit: Unit) -> Attribution:
    """The same prompts, positions and targets, attributed to another unit."""
    return result if result.unit == unit else again(result, unit).result(type(result))
