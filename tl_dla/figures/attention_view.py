"""Attention patterns shown with circuitsvis, from its installed script: no network, ever.

circuitsvis itself asks a web site whether there is a network each time it is displayed, and its
`show_code()` and `str()` load their script from a CDN. Here its own bundle is put into the page,
once a page. In a notebook the page is a frame of fixed height, so that nothing in it can shrink as
it is drawn again (CircuitsVis issue 61).
"""

import tempfile
import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from os import PathLike
from pathlib import Path
from typing import Literal, get_args

from jaxtyping import Float
from torch import Tensor

from tl_dla.errors import ArgumentError
from tl_dla.figures import embedded

AttentionStyle = Literal["patterns", "heads"]
_ELEMENTS = {"patterns": "AttentionPatterns", "heads": "AttentionHeads"}
# Draws every element of a page; circuitsvis must have been unpacked.
DRAW = """
function drawAttention() {
  // Its tensors are small, and by WebGL each waits for the graphics driver: a second without one.
  window._tfengine?.setBackend("cpu");
  for (const data of document.querySelectorAll("script.attention-data")) {
    const view = JSON.parse(data.textContent);
    CircuitsVis.render(view.name, CircuitsVis[view.element], view.props);
  }
}"""


@dataclass(frozen=True, eq=False)
class AttentionView:
    """Attention patterns of named heads over the same tokens; displays itself in a notebook.

    Attributes:
        tokens: the prompt's tokens.
        attention: `[head, dest, src]`, each row a probability distribution over `src`.
        labels: the heads' names.
        style: `"patterns"` shows tokens coloured by attention, `"heads"` a grid of heatmaps.
        groups: headings, each with how many of the heads, in order, stand under it; none by
            default.
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
    groups: Sequence[tuple[str, int]] = ()
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

        if self.groups and sum(n for _, n in self.groups) != len(self.labels):
            raise ArgumentError(
                f"groups must hold {len(self.labels)} heads; {self.groups!r} do not."
            )

    def element(self, name: str) -> str:
        """A div of that id with its data, which `drawAttention()` draws; one for each group."""
        if not self.groups:
            return self._element(name)
        found, start = [], 0
        for i, (heading, n) in enumerate(self.groups):
            part = slice(start, start := start + n)
            some = replace(
                self, attention=self.attention[part], labels=self.labels[part], groups=()
            )
            found.append(f"<h3>{escape(heading)}</h3>\n{some._element(f'{name}-{i}')}")
        return "\n".join(found)

    def _element(self, name: str) -> str:
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
        data = {"name": name, "element": _ELEMENTS[self.style], "props": props}
        return (
            f'<div class="attention" id="{escape(name)}"></div>\n<script type="application/json"'
            f' class="attention-data">{embedded.as_json(data)}</script>'
        )

    def page(self) -> str:
        """A whole page with nothing but this view."""
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            f"<title>{escape(', '.join(self.labels))}</title>"
            "<style>body{margin:8px;font-family:system-ui,sans-serif;background:#fff;color:#222}"
            f"</style>{embedded.circuitsvis()}</head><body>{self.element('attention')}"
            f"<script>{embedded.UNPACK}{DRAW}\n"
            'unpack("circuitsvis").then(drawAttention);</script></body></html>'
        )

    def save(self, path: str | PathLike[str]) -> Path:
        """Write the page to a file, which opens with no network; returns its path."""
        path = Path(path)
        path.write_text(self.page(), encoding="utf-8")
        return path

    def open(self) -> Path:
        """Show the page in the browser, from a temporary file; returns its path."""
        path = self.save(Path(tempfile.mkdtemp(prefix="tl_dla-")) / "attention.html")
        webbrowser.open(path.as_uri())
        return path

    def _repr_html_(self) -> str:
        return (
            f'<iframe srcdoc="{escape(self.page())}" width="100%" height="{self.height}"'
            ' style="border:0;background:#fff" title="attention patterns"></iframe>'
        )
