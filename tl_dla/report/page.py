"""One self-contained HTML page of a result: figures, heads with their attention, the certificate.

The page loads nothing: plotly and circuitsvis are packed into it once, and its content policy
forbids any connection. Everything that a user wrote (prompts, tokens, the command) is
escaped. The figures of other units than the result's own come from runs of the same model on the
same tokens.
"""

import json
import re
from collections.abc import Callable
from functools import partial
from html import escape
from importlib.resources import files
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go

from tl_dla.analyses.head_patterns import top_heads_with_patterns
from tl_dla.analyses.logit_lens import logit_lens
from tl_dla.attribution import assemble, make_plan
from tl_dla.core.taps import run
from tl_dla.errors import ArgumentError, UnsupportedModelError
from tl_dla.figures import plots, theme
from tl_dla.figures.attention_view import DRAW, AttentionStyle
from tl_dla.figures.view import certificate, headings, read, through
from tl_dla.inputs.selection import Unit
from tl_dla.report import embedded, fragments

if TYPE_CHECKING:
    from tl_dla.core.result import DirectLogitAttribution

_MOST_POSITIONS = 48  # of the lens, whose cells hold text


def write_report(
    result: "DirectLogitAttribution",
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
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise _unwritable(path, f"{error.strerror}") from error
    return path


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


class _Figures:
    """The figures of a page, each in a div of its own."""

    def __init__(self) -> None:
        self.drawn: dict[str, Any] = {}

    def add(self, figure: go.Figure) -> str:
        """The div for a figure, whose title is the page's business."""
        name = f"figure-{len(self.drawn)}"
        layout = figure.layout
        cut = min(layout.margin.t - 24, 70)
        wanted = layout.width or 330
        figure.update_layout(
            title_text="",
            width=None,
            height=layout.height - cut,
            margin_t=layout.margin.t - cut,
            margin_l=4,
            margin_r=4,
            template=None,
        )
        self.drawn[name] = json.loads(figure.to_json())
        return (
            f'<div class="figure"><div id="{name}" style="min-width:{wanted}px;'
            f'height:{layout.height}px"></div></div>'
        )


def _page(
    result: "DirectLogitAttribution",
    prompt: int,
    k: int | None,
    attention: AttentionStyle,
    command: str,
) -> str:
    figures = _Figures()
    sections = _sections(result, prompt, k, attention, figures)
    title = f"What wrote the logit of {result.target}{through(result)}"
    has_attention = 'class="attention"' in sections
    passed = result.reconstruction.passed
    parts = {
        "title": escape(title),
        "model": escape(fragments.model(result)),
        "prompts": fragments.prompts(result),
        "logit": fragments.logit(result),
        "passed": "passed" if passed else "failed",
        "certificate": escape(f"{'✓' if passed else '✗'} {result.reconstruction}"),
        "sections": sections + fragments.certificate(result) + fragments.made_by(command),
        "figures": embedded.as_json(figures.drawn),
        "themes": embedded.as_json(_themes()),
        "plotly": embedded.plotly(),
        "circuitsvis": embedded.circuitsvis() if has_attention else "",
        "scripts": embedded.UNPACK + DRAW,
    }
    template = (files("tl_dla.report") / "page.html").read_text(encoding="utf-8")
    # In one pass, so that nothing that was put in is searched for names.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


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


def _section(title: str, explanation: str, body: Callable[[], str]) -> str:
    """A section, or in its place the sentence that says why the model has none."""
    try:
        content = body()
    except UnsupportedModelError as error:
        content = f'<p class="soft">Not for this model: {escape(str(error))}</p>'
    return f'<section><h2>{escape(title)}</h2><p class="soft">{explanation}</p>{content}</section>'


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
        " there.",
    ),
}


def _sections(
    result: "DirectLogitAttribution",
    prompt: int,
    k: int | None,
    attention: AttentionStyle,
    figures: _Figures,
) -> str:
    def of(unit: Unit) -> str:
        return _drawn(of_unit(result, unit), figures)

    def top_heads() -> str:
        own = of_unit(result, "head")
        wanted = min(3, own.kinds.count("head")) if k is None else k
        return fragments.heads(top_heads_with_patterns(own, wanted), prompt, attention)

    alone = result.seen.logits is None  # from a cache, which may have come without its input
    parts = []
    if result.unit not in _UNITS:
        own = (f"By {result.unit}", "The rows of this result.")
        parts.append(_section(*own, lambda: _drawn(result, figures)))
    for unit, (title, explanation) in _UNITS.items():
        if unit == result.unit or not alone:
            parts.append(_section(title, explanation, partial(of, unit)))
    if alone:
        return "\n".join([*parts, '<p class="soft">Made from a cache: nothing else was run.</p>'])
    which = f" Prompt {prompt}." if len(result.prompts.tokens) > 1 else ""
    if result.targets.candidates is None:
        explanation = (
            "The heads farthest above and below 0: where they look, and what they move from there."
            " Tokens are coloured by their contribution; a head’s contributions add up to its"
            f" value.{which}"
        )
        parts.append(_section("Heads and what they read", explanation, top_heads))
    explanation = (
        "The model’s prediction at each point of the stream, after each token. The norm’s"
        f" statistics are computed afresh at each point: these are not contributions.{which}"
    )
    parts.append(_section("Logit lens", explanation, partial(_lens, result, prompt, figures)))
    return "\n".join(parts)


def _drawn(result: "DirectLogitAttribution", figures: _Figures) -> str:
    """The figure, what it is of, its own certificate, and its numbers."""
    view = read(result)
    words = certificate(result) if len(view.samples) == 1 else headings(result, "", view)[1]
    return f'<p class="soft">{words}</p>{figures.add(result.plot())}{fragments.numbers(result)}'


def _lens(result: "DirectLogitAttribution", prompt: int, figures: _Figures) -> str:
    """The token grid; the last positions of a long prompt."""
    length = int(result.prompts.length[prompt])
    tokens = result.prompts.packed[prompt : prompt + 1, :length]
    last = slice(max(0, length - _MOST_POSITIONS), length)
    return figures.add(plots.lens_grid(logit_lens(result.model, tokens, pos=last)))


def of_unit(result: "DirectLogitAttribution", unit: Unit) -> "DirectLogitAttribution":
    """The same prompts, positions and targets, attributed to another unit."""
    if result.unit == unit:
        return result
    reader, targets = result.plan.reader, result.targets
    plan = make_plan(reader, targets, unit, result.plan.include_bias)
    seen = run(result.model, result.prompts, result.positions, plan.probes, targets)
    return assemble(
        plan, seen, result.prompts, result.positions, targets, check="off", from_cache=False
    )
