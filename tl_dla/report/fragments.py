"""The words and tables of a report, as HTML: everything in it but the figures.

What a user wrote (prompts, tokens, the command) is escaped where it enters.
"""

import platform
from html import escape
from importlib import metadata
from typing import TYPE_CHECKING

import torch

from tl_dla.figures import theme
from tl_dla.figures.attention_view import AttentionStyle, AttentionView
from tl_dla.figures.charts import number
from tl_dla.figures.table import table_html
from tl_dla.figures.view import has_tokens
from tl_dla.inputs.tokens import token_strings

if TYPE_CHECKING:
    from tl_dla.analyses.head_patterns import HeadPattern, HeadPatterns
    from tl_dla.core.result import DirectLogitAttribution

_PACKAGES = ("tl-dla", "transformer-lens", "torch", "transformers", "plotly", "circuitsvis")
_MOST_TOKENS = 160  # of an attention pattern, whose size grows with their square


def model(result: "DirectLogitAttribution") -> str:
    """The model in one line."""
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


def prompts(result: "DirectLogitAttribution") -> str:
    """Every prompt with its attributed positions marked."""
    if not has_tokens(result):
        return '<p class="soft">From a cache that came without its tokens.</p>'
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


def logit(result: "DirectLogitAttribution") -> str:
    """The model's own logit in words, and its range where there are several."""
    own = result.logit[~result.logit.isnan()].double()
    what = "logit difference" if result.targets.weights.shape[1] > 1 else "logit"
    if not result.plan.include_bias:
        what += " without its biases"
    whose = f"Row {escape(result.path[-1])} of the" if result.path else "The model’s own"
    if own.numel() == 1:
        return f"{whose} {what}: <b>{number(float(own))}</b>"
    return (
        f"{whose} {what}: mean <b>{number(float(own.mean()))}</b>, from"
        f" {number(float(own.min()))} to {number(float(own.max()))} over {own.numel()} values"
    )


def numbers(result: "DirectLogitAttribution") -> str:
    """All rows in numbers; the 200 largest of more."""
    k = None if len(result) <= 200 else 200
    which = "all rows" if k is None else f"the {k} largest of {len(result)} rows"
    table = f'<div class="scroll">{table_html(result, k)}</div>'
    return f"<details><summary>{which} in numbers</summary>{table}</details>"


def certificate(result: "DirectLogitAttribution") -> str:
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


def made_by(command: str) -> str:
    """The command that made the page, and the versions it was made with."""
    versions = [("Python", platform.python_version())]
    versions += [(name, metadata.version(name)) for name in _PACKAGES]
    lines = "".join(f"<tr><td>{escape(a)}</td><td>{escape(b)}</td></tr>" for a, b in versions)
    return (
        f"<section><h2>How this page was made</h2><pre>{escape(command)}</pre>"
        f'<div class="scroll"><table class="plain">{lines}</table></div></section>'
    )


# ---- heads with their attention ----------------------------------------------------------------


def heads(patterns: "HeadPatterns", prompt: int, style: AttentionStyle) -> str:
    """Each head with what it reads and moves, then all their patterns, drawn by circuitsvis."""
    if not patterns:
        return "<p>No head is above or below 0.</p>"
    cards = "".join(_head(head, prompt) for head in patterns)
    tokens = patterns[0].tokens[prompt]
    kept = min(len(tokens), _MOST_TOKENS)
    attention = torch.stack([head.pattern[prompt].cpu() for head in patterns])
    part = slice(len(tokens) - kept, len(tokens))
    view = AttentionView(
        tokens[part], attention[:, part, part], [head.label for head in patterns], style
    )
    cut = f" The last {kept} of {len(tokens)} tokens." if kept < len(tokens) else ""
    return (
        f'<div class="heads">{cards}</div><h3>Attention patterns</h3><p class="soft">Hover over a'
        f" head, then over a token; a click holds either.{cut}</p>"
        f'<div class="scroll">{view.element("attention")}</div>'
    )


def _head(head: "HeadPattern", prompt: int) -> str:
    """A head: its value, its kind, the prompt coloured by contribution, and what it reads most."""
    value = float(head.value.nanmean())
    named = "" if head.kind == "other" else f" ({head.scores[head.kind]:.2f})"
    reads = head.reads(len(head.tokens[prompt]), prompt=prompt)
    lines = "".join(
        f'<tr><td><code>{escape(repr(token))}</code></td><td class="n">{at}</td>'
        f'<td class="n">{attention:.1%}</td><td class="n">{number(moved)}</td></tr>'
        for token, at, attention, moved in reads[:5]
    )
    columns = ("reads", "position", "attention", "moves (logits)")
    names = "<tr>" + "".join(f"<th>{name}</th>" for name in columns) + "</tr>"
    mean = "mean " if head.value.numel() > 1 else ""
    return (
        f'<div class="head"><h3>{head.label} <span class="value">{mean}{number(value)}</span>'
        f' <span class="soft">pattern: {head.kind}{named}</span></h3>'
        f'<p class="prompt">{_coloured(reads)}</p><div class="scroll"><table class="plain">'
        f"{names}{lines}</table></div></div>"
    )


def _coloured(reads: list[tuple[str, int, float, float]]) -> str:
    """The tokens in their order, blue where the head moves the logit up from them, red down."""
    largest = max(abs(moved) for *_, moved in reads) or 1.0
    spans = []
    for token, at, attention, moved in sorted(reads, key=lambda read: read[1]):
        colour = theme.POSITIVE if moved >= 0 else theme.NEGATIVE
        share = round(80 * abs(moved) / largest)
        words = f"position {at}: attention {attention:.1%}, contribution {number(moved)}"
        spans.append(
            f'<span class="token" title="{words}" style="background:color-mix(in srgb,'
            f' {colour} {share}%, transparent)">{escape(token)}</span>'
        )
    return "".join(spans)
