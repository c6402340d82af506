"""What a page that loads nothing carries in itself: libraries, packed, and data, escaped.

A library is a script element of base64 gzip that the browser unpacks (a third of its size:
`DecompressionStream`, in every browser since 2023). `UNPACK` is the function that does it.
"""

import base64
import gzip
import json
from functools import cache
from importlib.resources import files
from typing import Any

UNPACK = """
async function unpack(name) {
  const packed = atob(document.getElementById(name).textContent);
  const bytes = Uint8Array.from(packed, letter => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
}"""


@cache
def plotly() -> str:
    """The installed plotly.js as a packed element `plotly`."""
    from plotly.offline import get_plotlyjs

    return packed("plotly", get_plotlyjs())


@cache
def circuitsvis() -> str:
    """The installed circuitsvis bundle as a packed element `circuitsvis`."""
    path = files("circuitsvis") / "dist" / "cdn" / "iife.js"
    return packed("circuitsvis", path.read_text(encoding="utf-8"))


def packed(name: str, script: str) -> str:
    """A script as an element that `unpack(name)` runs, without its source map's address."""
    lines = [line for line in script.splitlines() if not line.startswith("//# sourceMappingURL")]
    data = base64.b64encode(gzip.compress("\n".join(lines).encode(), mtime=0)).decode()
    return f'<script type="text/plain" id="{name}">{data}</script>'


def as_json(value: Any) -> str:
    """JSON that can stand inside a script element, whatever text it holds."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")
