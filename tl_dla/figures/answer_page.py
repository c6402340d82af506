"""An answer as text: coloured by what a row wrote to each token, with a ledger behind a click."""

import math
from collections.abc import Sequence
from html import escape

import numpy as np
from markupsafe import Markup

from tl_dla.figures import theme
from tl_dla.figures.embedded import as_json, template
from tl_dla.figures.text import number
from tl_dla.figures.view import View, largest, smaller

_MOST_ROWS = 300  # that a page names


def page(
    view: View,
    *,
    prompt: Sequence[str],
    segments: Sequence[str],
    log_probs: Sequence[float],
    ranks: Sequence[int],
) -> str:
    """The page; its rows are the ones that matter, the others added up.

    Args:
        view: rows by the answer's tokens.
        prompt: the tokens before the answer.
        segments: what each token is, those of the prompt first.
        log_probs: of the answer's tokens, in nats.
        ranks: how many tokens are likelier than each.
    """
    values, logit = view.only()
    labels = view.labels
    order = np.arange(len(labels)) if view.unit == "layer" else largest(values, len(labels))
    kept, rest = order[:_MOST_ROWS], order[_MOST_ROWS:]
    names, shown = [labels[i] for i in kept], values[kept]
    if len(rest) and view.unit != "layer":
        names, shown = [*names, smaller(len(rest))], np.vstack([shown, values[rest].sum(0)])
    data = {
        "prompt": list(zip(prompt, segments, strict=False)),
        "tokens": [sample.token for sample in view.samples],
        "labels": names,
        "values": np.round(shown, 5).tolist(),
        "mean": np.round(shown.mean(1), 5).tolist(),
        "logits": [f"{x:.3f}" for x in logit],
        "log_probs": [f"{x:.3f}" for x in log_probs],
        "ranks": list(ranks),
        "total": view.words.logit,
        "adds": view.unit != "layer",  # readings of the stream do not
    }
    return template("tl_dla.figures", "answer_page.html").render(
        title=f"What wrote {view.words.target}, token by token",
        certificate=view.words.certificate,
        what=view.words.what,
        data=Markup(as_json(data)),
        font=Markup(theme.FONT),
        positive=theme.POSITIVE,
        negative=theme.NEGATIVE,
        light=theme.of_page("light"),
        dark=theme.of_page("dark"),
    )


def likelihoods(tokens: Sequence[str], log_probs: Sequence[float], ranks: Sequence[int]) -> str:
    """The answer for a notebook: what the model found unlikely is marked, numbers on hover."""
    spans = []
    for token, log_prob, rank in zip(tokens, log_probs, ranks, strict=True):
        share = 0 if math.isnan(log_prob) else round(60 * (1 - math.exp(log_prob)))
        title = f"log-prob {number(log_prob)} nats, rank {rank}"
        colour = f"color-mix(in srgb, {theme.NEGATIVE} {share}%, transparent)"
        spans.append(
            f'<span title="{escape(title)}" style="background:{colour}">{escape(token)}</span>'
        )
    return (
        '<div style="font-family:system-ui,sans-serif;font-size:14px;line-height:1.8;'
        f'white-space:pre-wrap">{"".join(spans)}</div><div style="font-family:system-ui,sans-serif;'
        'font-size:12px;opacity:.7">the redder, the less likely the model found it</div>'
    )
