"""Chromium without a window or a network, spoken to over its own pipe: no driver, no package.

    with Browser() as browser:
        page = browser.open(path_of_an_html_file)
        page.evaluate("document.title")
        page.errors, page.requests     # what the console complained of, what was asked of a network

The protocol is Chrome's DevTools protocol: JSON messages, each closed by a zero byte.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
    " --disable-background-networking --disable-component-update --hide-scrollbars"
    " --disable-software-rasterizer --remote-debugging-pipe --force-color-profile=srgb"
).split()
LIMIT_S = 40.0


class Browser:
    """One Chromium with a profile of its own, closed and removed at the end."""

    def __enter__(self) -> "Browser":
        assert CHROMIUM is not None
        self._profile = tempfile.TemporaryDirectory(prefix="tl_dla_chromium_")
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        # Chromium reads descriptor 3 and writes descriptor 4.
        shell = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        arguments = [CHROMIUM, *_FLAGS, f"--user-data-dir={self._profile.name}", "about:blank"]
        self._process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *arguments],
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._read, self._write = ours_in, ours_out
        self._buffer, self._next = b"", 0
        self.events: list[dict[str, Any]] = []
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.send("Browser.close")
            self._process.wait(20)
        finally:
            self._process.kill()
            self._process.wait()
            os.close(self._read)
            os.close(self._write)
            self._profile.cleanup()

    def send(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its answer; events that arrive before it are kept."""
        self._next += 1
        message: dict[str, Any] = {"id": self._next, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + LIMIT_S
        while True:
            answer = self._receive(deadline)
            if answer.get("id") == self._next:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError("Chromium did not answer.")
            chunk = os.read(self._read, 1 << 20)
            if not chunk:
                raise RuntimeError("Chromium ended.")
            self._buffer += chunk
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def open(
        self,
        path: Path | str,
        *,
        address: str = "",
        width: int = 1100,
        height: int = 900,
        dark: bool = False,
    ) -> "Page":
        """Open a file, at an address within it, with the network off; wait until it has loaded."""
        url = Path(path).resolve().as_uri() + (f"#{address}" if address else "")
        return Page(self, url, width, height, dark)

    def trace(self, path: Path | str, ready: str) -> "Trace":
        """Chromium's own trace of a page from its address to where a condition holds."""
        categories = ["toplevel", "devtools.timeline", "loading", "__metadata"]
        self.send("Tracing.start", traceConfig={"includedCategories": categories})
        Page(self, Path(path).resolve().as_uri(), 1100, 900, False, watched=False).wait(ready)
        self.send("Tracing.end")
        deadline = time.monotonic() + LIMIT_S
        while not any(event["method"] == "Tracing.tracingComplete" for event in self.events):
            self.events.append(self._receive(deadline))
        found = [e for e in self.events if e["method"] == "Tracing.dataCollected"]
        return Trace([one for event in found for one in event["params"]["value"]])


class Trace:
    """What the page's main thread did, as Chromium recorded it.

    Attributes:
        first_paint: seconds of its work until something was painted.
        longest: seconds of its longest task.
        total: seconds of all of its tasks.
    """

    def __init__(self, events: list[dict[str, Any]]) -> None:
        paint = next(e for e in events if e["name"] == "firstPaint")
        main = (paint["pid"], paint["tid"])
        # Of the processor, not of the clock: a machine has other work as well.
        tasks = [e for e in events if e["name"].endswith("RunTask") and "tdur" in e]
        own = [e for e in tasks if (e["pid"], e["tid"]) == main]
        # A task may come without its time: what it did has one.
        self.longest = max(e.get("tdur", 0) for e in events if (e["pid"], e["tid"]) == main) / 1e6
        self.total = sum(e["tdur"] for e in own) / 1e6
        self.first_paint = sum(e["tdur"] for e in own if e["ts"] < paint["ts"]) / 1e6


class Page:
    """A tab. Nothing but the file itself may be loaded."""

    def __init__(
        self,
        browser: Browser,
        url: str,
        width: int,
        height: int,
        dark: bool,
        watched: bool = True,
    ) -> None:
        self._browser, self._url = browser, url.partition("#")[0]
        self._target = browser.send("Target.createTarget", url="about:blank")["targetId"]
        attached = browser.send("Target.attachToTarget", targetId=self._target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", *(("Runtime", "Log") if watched else ())):
            self.send(f"{domain}.enable")
        if watched:  # without where in its scripts an error arose, for which all are read again
            self.send("Runtime.setMaxCallStackSizeToCapture", size=0)
        offline = dict(offline=True, latency=0, downloadThroughput=0, uploadThroughput=0)
        self.send("Network.emulateNetworkConditions", **offline)
        self.size(width, height)
        self.theme(dark)
        self.send("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.send(method, self._session, **params)

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression; promises are awaited."""
        answer = self.send(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"].get("exception", answer)))
        return answer["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until a JavaScript condition holds."""
        deadline = time.monotonic() + LIMIT_S
        while not self.evaluate(condition):
            if time.monotonic() > deadline:
                raise TimeoutError(f"The page never came to {condition}")
            time.sleep(0.05)

    def count(self, selector: str) -> int:
        """How many elements a CSS selector finds."""
        return int(self.evaluate(f"document.querySelectorAll({json.dumps(selector)}).length"))

    def size(self, width: int, height: int) -> None:
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )

    def theme(self, dark: bool) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(
        self, path: Path | str, clip: tuple[float, float, float, float] | None = None
    ) -> None:
        """A PNG of the page, as long as it is, or of x, y, width and height of it."""
        part = {}
        if clip is not None:
            part["clip"] = dict(zip(("x", "y", "width", "height"), clip, strict=True), scale=1)
        answer = self.send(
            "Page.captureScreenshot", format="png", captureBeyondViewport=True, **part
        )
        Path(path).write_bytes(base64.b64decode(answer["data"]))

    def press(self, x: float, y: float) -> None:
        """Press and release the left button at a place of the window."""
        self.hover(x, y)
        for kind in ("mousePressed", "mouseReleased"):
            where = dict(x=x, y=y, button="left", clickCount=1)
            self.send("Input.dispatchMouseEvent", type=kind, **where)

    def frame(self) -> "Frame":
        """The one frame inside the page, where it has a process of its own."""
        deadline = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline:
            for info in self._browser.send("Target.getTargets")["targetInfos"]:
                if info["type"] == "iframe":
                    return Frame(self._browser, info["targetId"])
            time.sleep(0.05)
        raise TimeoutError("The page has no frame.")

    def hover(self, x: float, y: float) -> None:
        """Move the mouse to a place of the window."""
        for step in (-2, -1, 0):
            self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x + step, y=y)

    def close(self) -> None:
        """A tab that is open takes its time, looked at or not."""
        self._browser.send("Target.closeTarget", targetId=self._target)

    def pdf(self, path: Path | str) -> None:
        """The page as printed."""
        data = self.send("Page.printToPDF", printBackground=True)["data"]
        Path(path).write_bytes(base64.b64decode(data))

    def _events(self, method: str) -> list[dict[str, Any]]:
        return [
            event["params"]
            for event in self._browser.events
            if event.get("sessionId") == self._session and event["method"] == method
        ]

    @property
    def errors(self) -> list[str]:
        """What the console reported as an error or a warning, exceptions included."""
        self.evaluate("1")  # lets pending events arrive
        found = [
            str(event["exceptionDetails"]) for event in self._events("Runtime.exceptionThrown")
        ]
        for event in self._events("Runtime.consoleAPICalled"):
            if event["type"] in ("error", "warning", "assert"):
                found.append(" ".join(str(a.get("value", a)) for a in event["args"]))
        for event in self._events("Log.entryAdded"):
            if event["entry"]["level"] in ("error", "warning"):
                found.append(f"{event['entry']['text']} {event['entry'].get('url', '')}")
        return found

    @property
    def requests(self) -> list[str]:
        """Every address asked for, other than the file itself and what it carries."""
        self.evaluate("1")
        asked = [event["request"]["url"] for event in self._events("Network.requestWillBeSent")]
        return [u for u in asked if u != self._url and not u.startswith(("data:", "blob:"))]


class Frame(Page):
    """An isolated frame of a page."""

    def __init__(self, browser: Browser, target: str) -> None:
        self._browser, self._url = browser, "about:srcdoc"
        attached = browser.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")


@contextmanager
def opening(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens pages; in the end, none may have loaded anything or written to the console."""
    opened: list[Page] = []

    def open_page(path: Path | str, **options: Any) -> Page:
        opened.append(browser.open(path, **options))
        return opened[-1]

    yield open_page
    for page in opened:
        assert page.errors == [] and page.requests == []
        page.close()
