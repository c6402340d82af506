"""What a page that loads nothing carries in itself: libraries, packed, and data, escaped.

A library is a script element of base64 gzip that the browser unpacks (a third of its size:
`DecompressionStream`, in every browser since 2023). `UNPACK` holds the functions
that do it: `unpacked(name)` gives the text, `unpack(name)` runs it.
"""

import base64
import gzip
import json
from functools import cache
from html import escape
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

UNPACK = """
async function unpacked(name) {
  const packed = atob(document.getElementById(name).textContent);
  const bytes = new Uint8Array(packed.length);
  for (let i = 0; i < packed.length; i++) bytes[i] = packed.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}
async function unpack(name) {
  const script = document.createElement("script");
  script.src = URL.createObjectURL(new Blob([await unpacked(name)], {type: "text/javascript"}));
  await new Promise(done => { script.onload = done; document.head.append(script); });
  URL.revokeObjectURL(script.src);
}"""

# Chromium compiles the whole script beside the page's own thread, which it would block otherwise.
_EAGER = "//# allFunctionsCalledOnLoad\n"


@cache
def plotly() -> str:
    """The installed plotly.js as a packed element `plotly`."""
    from plotly.offline import get_plotlyjs

    return packed("plotly", _EAGER + get_plotlyjs())


@cache
def circuitsvis() -> str:
    """The installed circuitsvis bundle as a packed element `circuitsvis`."""
    path = files("circuitsvis") / "dist" / "cdn" / "iife.js"
    return packed("circuitsvis", _EAGER + path.read_text(encoding="utf-8"))


def packed(name: str, script: str) -> str:
    """A script as an element for `unpack(name)`, without its source map's address."""
    lines = [line for line in script.splitlines() if not line.startswith("//# sourceMappingURL")]
    data = base64.b64encode(gzip.compress("\n".join(lines).encode(), mtime=0)).decode()
    return f'<script type="text/plain" id="{name}">{data}</script>'


def as_json(value: Any) -> str:
    """JSON that can stand inside a script element, whatever text it holds."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def frame(page: str, title: str, height: int) -> str:
    """A whole page inside a notebook's: it runs its scripts, and reaches nothing around it."""
    return (
        f'<iframe srcdoc="{escape(page)}" width="100%" height="{height}" sandbox="allow-scripts'
        f' allow-downloads allow-modals" style="border:0" title="{escape(title)}"></iframe>'
    )


@cache
def template(package: str, name: str) -> Template:
    """A page's jinja2 template, which escapes everything it is given."""
    pages = Environment(
        loader=PackageLoader(package, "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    return pages.get_template(name)
