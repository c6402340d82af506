"""One self-contained HTML page of a result: figures, heads with their attention, the certificate.

The page loads nothing: plotly's and circuitsvis's scripts are put into it once, and its content
policy forbids any connection. Everything that a user wrote (prompts, tokens, the command) is
escaped. The figures of other units than the result's own come from runs of the same model on the
same tokens.
"""

import json
import platform
import re
from collections.abc import Callable
from html import escape
from importlib import metadata
from importlib.resources import files
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go
import torch
from plotly.offline import get_plotlyjs

from tl_dla import charts, plots
from tl_dla.attention_view import AttentionStyle, circuitsvis_script, inline_json, inline_script
from tl_dla.attribution import assemble, make_plan
from tl_dla.charts import number
from tl_dla.errors import ArgumentError, UnsupportedModelError
from tl_dla.lens import LogitLens, logit_lens
from tl_dla.recording import run
from tl_dla.table import table_html
from tl_dla.tokens import token_strings
from tl_dla.units import Unit

if TYPE_CHECKING:
    from tl_dla.result import DirectLogitAttribution

_PACKAGES = ("tl-dla", "transformer-lens", "torch", "transformers", "plotly", "circuitsvis")
_MOST_POSITIONS = 48  # of the lens, whose cells hold text
_MOST_TOKENS = 160  # of the attention patterns, whose size grows with their square


def write_report(
    result: "DirectLogitAttribution",
    path: str | PathLike[str],
    *,
    prompt: int = 0,
    k: int = 3,
    attention: AttentionStyle = "patterns",
    command: str | None = None,
) -> Path:
    """Write the page and return its path.

    Args:
        result: what to report.
        path: of the HTML file; one that is there is replaced.
        prompt: the prompt of a batch whose lens and attention are shown.
        k: how many of the most positive, and of the most negative, heads to show with attention.
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
        raise ArgumentError(f"The report cannot be written to {path}: {error}.") from error
    return path


def _require_writable(path: Path) -> None:
    """Fail before the model runs, not after."""
    if path.is_dir():
        raise ArgumentError(f"The report cannot be written to {path}: it is a folder; name a file.")
    if not path.parent.is_dir():
        raise ArgumentError(
            f"The report cannot be written to {path}: there is no folder {path.parent}."
        )


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
    k: int,
    attention: AttentionStyle,
    command: str,
) -> str:
    figures = _Figures()
    sections = _sections(result, prompt, k, attention, figures)
    title = f"What wrote the logit of {result.target}"
    if "CircuitsVis.render" in sections:
        circuitsvis = f"<script>{circuitsvis_script()}</script>"
    else:
        circuitsvis = ""
    passed = result.reconstruction.passed
    parts = {
        "title": escape(title),
        "model": escape(_model(result)),
        "prompts": _prompts(result),
        "logit": _logit(result),
        "passed": "passed" if passed else "failed",
        "certificate": escape(f"{'✓' if passed else '✗'} {result.reconstruction}"),
        "sections": sections + _certificate(result) + _made_by(command),
        "figures": inline_json(figures.drawn),
        "themes": inline_json(_themes()),
        "plotly": inline_script(get_plotlyjs()),
        "circuitsvis": circuitsvis,
    }
    template = (files("tl_dla") / "report.html").read_text(encoding="utf-8")
    # In one pass, so that nothing that was put in is searched for names.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _themes() -> dict[str, Any]:
    return {
        theme: {
            "template": json.loads(json.dumps(charts.template(theme).to_plotly_json())),
            "scales": {name: _stops(scale[theme]) for name, scale in charts.SCALES.items()},
            "ink": charts.INK[theme],
        }
        for theme in ("light", "dark")
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


def _sections(
    result: "DirectLogitAttribution",
    prompt: int,
    k: int,
    attention: AttentionStyle,
    figures: _Figures,
) -> str:
    known = {
        "component": (
            "Components",
            "What each attention and MLP output wrote, in the order of the residual stream, up to"
            " the model’s own logit.",
        ),
        "head": (
            "Heads",
            "Blue heads push the answer up, red ones down. Beside each layer stands what else was"
            " written there.",
        ),
        "layer": (
            "Layer by layer",
            "The residual stream read with the final norm’s own scale: each step is what was"
            " written there.",
        ),
    }
    units = [unit for unit in known if unit == result.unit or has_tokens(result)]
    parts = []
    if result.unit not in known:
        own = (f"By {result.unit}", "The rows of this result.")
        parts.append(_section(*own, lambda: figures.add(result.plot()) + _numbers(result)))
    by_unit = {}
    for unit in units:

        def body(unit: Unit = unit) -> str:
            by_unit[unit] = of_unit(result, unit)
            return figures.add(by_unit[unit].plot()) + _numbers(by_unit[unit])

        parts.append(_section(*known[unit], body))
    if has_tokens(result):
        lens = (
            "Logit lens",
            "The model’s prediction at each point of the stream, after each token of prompt"
            f" {prompt}. The norm’s statistics are computed afresh at each point, so these are not"
            " contributions.",
        )
        parts.append(_section(*lens, lambda: _lens(result, prompt, figures)))
    else:
        parts.append('<p class="soft">Made from a cache: nothing else was run.</p>')
    return "\n".join(parts)


def has_tokens(result: "DirectLogitAttribution") -> bool:
    """Whether the model can be run again: not so for a result of a cache without its input."""
    return result.seen.logits is not None


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


# ---- its parts ---------------------------------------------------------------------------------


def _model(result: "DirectLogitAttribution") -> str:
    cfg, reader = result.model.cfg, result.plan.reader
    name = str(getattr(cfg, "model_name", None) or "")
    # A hub id is an owner and a name; of a folder's path only the last part is shown.
    words = [name if name.count("/") == 1 else name.rpartition("/")[2]] if name else []
    words += [reader.architecture, f"{reader.n_layers} layers", f"{cfg.n_heads} heads"]
    words += [f"d_model {cfg.d_model}", str(reader.dtype).removeprefix("torch.")]
    return " · ".join([*words, f"TransformerLens {type(result.model).__name__}"])


def _tokens(result: "DirectLogitAttribution", prompt: int) -> list[str]:
    length = int(result.prompts.length[prompt])
    return token_strings(result.model, result.prompts.packed[prompt, :length])


def _prompts(result: "DirectLogitAttribution") -> str:
    """Every prompt with its attributed positions marked."""
    if not has_tokens(result):
        return '<p class="soft">from a cache</p>'
    lines = []
    for b in range(len(result.prompts.tokens)):
        marked = set(result.positions.index[b][result.positions.valid[b]].tolist())
        spans = "".join(
            f'<span class="{"token read" if i in marked else "token"}" title="position {i}">'
            f"{escape(token)}</span>"
            for i, token in enumerate(_tokens(result, b))
        )
        lines.append(f'<p class="prompt" title="prompt {b}">{spans}</p>')
    return f'<div class="many">{"".join(lines)}</div>'


def _logit(result: "DirectLogitAttribution") -> str:
    """The model's own logit in words, and its range where there are several."""
    own = result.logit[~result.logit.isnan()].double()
    what = "logit difference" if result.targets.weights.shape[1] > 1 else "logit"
    if not result.plan.include_bias:
        what += " without its biases"
    if own.numel() == 1:
        return f"The model’s own {what}: <b>{number(float(own))}</b>"
    return (
        f"The model’s own {what}: mean <b>{number(float(own.mean()))}</b>, from"
        f" {number(float(own.min()))} to {number(float(own.max()))} over {own.numel()} values"
    )


def _numbers(result: "DirectLogitAttribution") -> str:
    """All rows in numbers; the 200 largest of more."""
    k = None if len(result) <= 200 else 200
    which = "all rows" if k is None else f"the {k} largest of {len(result)} rows"
    table = f'<div class="scroll">{table_html(result, k)}</div>'
    return f"<details><summary>{which} in numbers</summary>{table}</details>"


def _lens(result: "DirectLogitAttribution", prompt: int, figures: _Figures) -> str:
    lens = _lens_of(result, prompt)
    return figures.add(plots.lens_grid(lens))


def _lens_of(result: "DirectLogitAttribution", prompt: int) -> LogitLens:
    length = int(result.prompts.length[prompt])
    tokens = result.prompts.packed[prompt : prompt + 1, :length]
    return logit_lens(result.model, tokens, pos=slice(max(0, length - _MOST_POSITIONS), length))


def _certificate(result: "DirectLogitAttribution") -> str:
    """Every certificate of the result as a table: the whole, and each refined row."""
    whole = result.reconstruction
    named = [(f"rows against {whole.against}", whole), *whole.parts.items()]
    lines = []
    for name, part in named:
        worst = int((part.error - part.tolerance).nan_to_num(-torch.inf).argmax())
        values = [x.flatten()[worst] for x in (part.expected, part.reconstructed)]
        errors = [x.flatten()[worst] for x in (part.error, part.tolerance)]
        cells = [f"{float(x):.6g}" for x in values] + [f"{float(x):.2g}" for x in errors]
        numbers = "".join(f'<td class="n">{cell}</td>' for cell in cells)
        mark = "✓" if bool((part.error <= part.tolerance.nan_to_num(0.0)).all()) else "✗"
        lines.append(f"<tr><td>{mark} {escape(name)}</td>{numbers}</tr>")
    columns = ("", "expected", "rows", "error", "rounding explains")
    head = "<tr>" + "".join(f"<th>{name}</th>" for name in columns) + "</tr>"
    table = f'<table class="plain">{head}{"".join(lines)}</table>'
    return (
        '<section><h2>Certificate</h2><p class="soft">The rows against what the model returned, at'
        " the position where they are farthest apart.</p>"
        f'<div class="scroll many">{table}</div></section>'
    )


def _made_by(command: str) -> str:
    versions = [("Python", platform.python_version())]
    versions += [(name, metadata.version(name)) for name in _PACKAGES]
    lines = "".join(f"<tr><td>{escape(a)}</td><td>{escape(b)}</td></tr>" for a, b in versions)
    return (
        f"<section><h2>How this page was made</h2><pre>{escape(command)}</pre>"
        f'<div class="scroll"><table class="plain">{lines}</table></div></section>'
    )
