"""Make the pictures of the README: `python -m tests.support.pictures` writes docs/images/*.png.

Needs Chromium. The model is the bundled demo, and once SmolLM2-135M.
"""

import tempfile
from pathlib import Path
from typing import Any

from tests.support.browser import Browser, Page
from tl_dla import direct_logit_attribution
from tl_dla.analyses.logit_lens import logit_lens
from tl_dla.loading import load_model

FOLDER = Path(__file__).parents[2] / "docs" / "images"
PROMPT = "When John and Mary went to the shops, John gave the bag to"
PROMPTS = [
    PROMPT,
    "When Mary and John went to the shops, Mary gave the bag to",
    "When Tom and James went to the park, James gave the ball to",
    "When James and Tom went to the park, Tom gave the ball to",
]
ANSWERS, INCORRECT = [" Mary", " John", " Tom", " James"], [" John", " Mary", " James", " Tom"]


def picture(browser: Browser, figure: Any, name: str, width: int) -> None:
    """A figure as it is drawn, without the buttons."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figure.html"
        figure.write_html(path, include_plotlyjs=True, config={"displayModeBar": False})
        page = browser.open(path, width=width)
        page.wait("document.querySelector('.cartesianlayer .subplot') !== null")
        page.evaluate("document.body.style.margin = 0")
        save(page, name, (0, 0, figure.layout.width or width, figure.layout.height))


def save(page: Page, name: str, clip: tuple[float, float, float, float]) -> None:
    path = FOLDER / f"{name}.png"
    page.screenshot(path, clip)
    if page.errors or page.requests:
        raise SystemExit(f"{name}: {page.errors} {page.requests}")


def main() -> None:
    """Write every picture."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    model = load_model("demo")

    def attribute(unit: str) -> Any:
        return direct_logit_attribution(model, PROMPT, " Mary", " John", unit=unit)

    with Browser() as browser:
        picture(browser, attribute("head").plot(), "heads", 900)
        real = direct_logit_attribution(
            load_model("smollm2"), PROMPT, " Mary", " John", unit="head"
        )
        picture(browser, real.plot(), "smollm2", 900)
        picture(browser, attribute("component").plot(), "components", 900)
        picture(browser, attribute("layer").plot(), "layers", 900)
        batch = direct_logit_attribution(model, PROMPTS, ANSWERS, INCORRECT)
        picture(browser, batch.plot(), "batch", 900)
        picture(browser, logit_lens(model, PROMPT).plot(), "lens", 1000)
        with tempfile.TemporaryDirectory() as folder:
            report = attribute("head").report(Path(folder) / "page.html", command="tl-dla report …")
            for name, dark in (("report", False), ("report-dark", True)):
                page = browser.open(report, width=1000, dark=dark)
                page.wait("'drawn' in document.documentElement.dataset")
                page.evaluate("document.querySelectorAll('.modebar').forEach(e => e.remove())")
                save(page, name, (0, 0, 1000, 1150))


if __name__ == "__main__":
    main()
