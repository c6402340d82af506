"""Attention patterns shown with circuitsvis, from its installed script: no network, ever.

circuitsvis itself asks a web site whether there is a network each time it is displayed, and its
`show_code()` and `str()` load their script from a CDN. Here its own bundle is put into the page,
once a page. In a notebook the page is a frame of fixed height, so that nothing in it can shrink as
it is drawn again (CircuitsVis issue 61).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib.resources import files
from typing import Any, Literal, get_args

from jaxtyping import Float
from torch import Tensor

from tl_dla.errors import ArgumentError

AttentionStyle = Literal["patterns", "heads"]
_ELEMENTS = {"patterns": "AttentionPatterns", "heads": "AttentionHeads"}


@cache
def circuitsvis_script() -> str:
    """The installed circuitsvis bundle, as the text of a script element."""
    text = (files("circuitsvis") / "dist" / "cdn" / "iife.js").read_text(encoding="utf-8")
    return inline_script(text)


def inline_script(text: str) -> str:
    """A script that can stand inside a page: it cannot end its element or ask for a source map."""
    lines = [line for line in text.splitlines() if not line.startswith("//# sourceMappingURL")]
    return "\n".join(lines).replace("</script", "<\\/script").replace("<!--", "<\\!--")


def inline_json(value: Any) -> str:
    """JSON that can stand inside a script element, whatever text it holds."""
    return json.dumps(value).replace("<", "\\u003c")


@dataclass(frozen=True, eq=False)
class AttentionView:
    """Attention patterns of named heads over the same tokens; displays itself in a notebook.

    Attributes:
        tokens: the prompt's tokens.
        attention: `[head, dest, src]`, each row a probability distribution over `src`.
        labels: the heads' names.
        style: `"patterns"` shows tokens coloured by attention, `"heads"` a grid of heatmaps.
        height: of the frame in a notebook, in pixels.

    Raises:
        ArgumentError: for shapes that do not fit, or an unknown style.

    Example:
        >>> import torch
        >>> view = AttentionView(["a", "b"], torch.eye(2)[None], ["L0H3"])
        >>> "AttentionPatterns" in view.element("here") and "http" not in view.element("here")
        True
    """

    tokens: Sequence[str]
    attention: Float[Tensor, "head dest src"]
    labels: Sequence[str]
    style: AttentionStyle = "patterns"
    height: int = 520

    def __post_init__(self) -> None:
        if self.style not in get_args(AttentionStyle):
            raise ArgumentError(f'style must be "patterns" or "heads"; {self.style!r} was given.')
        expected = (len(self.labels), len(self.tokens), len(self.tokens))
        if tuple(self.attention.shape) != expected:
            raise ArgumentError(
                f"attention must be [head, dest, src] = {list(expected)} for {expected[0]} labels"
                f" and {expected[1]} tokens; it has shape {list(self.attention.shape)}."
            )

    def element(self, name: str) -> str:
        """A div of that id, and the call that draws into it.

        The page must hold `circuitsvis_script()` before it.
        """
        names = "headLabels" if self.style == "patterns" else "attentionHeadNames"
        rounded = (self.attention.detach().cpu().double() * 1e4).round() / 1e4
        tokens = [token.replace("\n", "↵").replace("\t", "⇥") for token in self.tokens]
        props = {
            # AttentionPatterns sets its tokens as HTML, AttentionHeads draws theirs.
            "tokens": [escape(t) for t in tokens] if self.style == "patterns" else tokens,
            "attention": rounded.tolist(),
            names: list(self.labels),
            "maskUpperTri": not bool(self.attention.triu(1).any()),  # of models that look ahead
        }
        call = f"CircuitsVis.render({inline_json(name)}, CircuitsVis.{_ELEMENTS[self.style]}"
        return (
            f'<div class="attention" id="{escape(name)}"></div>\n'
            f"<script>{call}, {inline_json(props)})</script>"
        )

    def page(self) -> str:
        """A whole page with nothing but this view."""
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            f"<title>{escape(', '.join(self.labels))}</title>"
            "<style>body{margin:8px;font-family:system-ui,sans-serif;background:#fff;color:#222}"
            f"</style><script>{circuitsvis_script()}</script></head>"
            f"<body>{self.element('attention')}</body></html>"
        )

    def _repr_html_(self) -> str:
        return (
            f'<iframe srcdoc="{escape(self.page())}" width="100%" height="{self.height}"'
            ' style="border:0;background:#fff" title="attention patterns"></iframe>'
        )
