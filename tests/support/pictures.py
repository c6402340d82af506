"""Make the pictures of the documentation: `python -m tests.support.pictures` writes docs/images.

Needs Chromium. The model is the bundled demo, and once SmolLM2-135M.
"""

import tempfile
from pathlib import Path
from typing import Any

from tests.support.browser import Browser, Page
from tl_dla import (
    attribute_attention,
    attribute_completion,
    attribute_inputs,
    attribute_path,
    compare,
    direct_logit_attribution,
    load_model,
    logit_lens,
    self_repair,
    token_map,
    unembedding_pca,
)

FOLDER = Path(__file__).parents[2] / "docs" / "images"
PROMPT = "When John and Mary went to the shops, John gave the bag to"
PROMPTS = [
    PROMPT,
    "When Mary and John went to the shops, Mary gave the bag to",
    "When Tom and James went to the park, James gave the ball to",
    "When James and Tom went to the park, Tom gave the ball to",
]
FACT, CAPITALS = "The Eiffel Tower is in the city of", [" Paris", " London", " Rome", " Berlin"]
NAMES = [" Mary", " John", " Tom", " James"]
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


def figures(model: Any) -> dict[str, Any]:
    """Every figure of the demo, by the name of its file."""

    def attribute(unit: str, prompt: str = PROMPT) -> Any:
        return direct_logit_attribution(model, prompt, " Mary", " John", unit=unit)

    def of_capitals(**options: Any) -> Any:
        return direct_logit_attribution(model, FACT, candidate_tokens=CAPITALS, **options)

    heads, sources = attribute("head"), attribute("source")
    inputs = attribute_inputs(model, PROMPT, " Mary", " John")
    other = attribute("head", PROMPT.replace("shops, John", "shops, Mary"))
    return {
        "heads": heads.plot(),
        "components": attribute("component").plot(),
        "layers": attribute("layer").plot(),
        "batch": direct_logit_attribution(model, PROMPTS, ANSWERS, INCORRECT).plot(),
        "candidates": of_capitals().plot(),
        "profile": of_capitals().plot_profile(),
        "sources": sources.plot_sources(k=8),
        "path": attribute_path(sources, "L3H0", " Mary").plot(),
        "token_map": token_map(model, 3, 0).plot(NAMES, NAMES),
        "neurons": of_capitals(unit="neuron", layers=3).neuron_curves().plot(k=6),
        "pca": unembedding_pca(model, CAPITALS).plot(),
        "attention": attribute_attention(model, PROMPT, "L3H0", key=" Mary", versus=2).plot(),
        "inputs": inputs.plot(k=8),
        "flow": inputs.plot_flow(),
        "changed": compare(heads, other).plot(k=8),
        "audit": heads.audit(progress=False).plot(),
        "repair": self_repair(heads, "L3H0").plot(),
        "completion": attribute_completion(model, FACT, max_new_tokens=4).plot(),
        "lens": logit_lens(model, PROMPT).plot(),
    }


def main() -> None:
    """Write every picture."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    model = load_model("demo")
    question = (PROMPT, " Mary", " John")
    real = direct_logit_attribution(load_model("smollm2"), *question, unit="head")
    with Browser() as browser:
        for name, figure in {**figures(model), "smollm2": real.plot()}.items():
            picture(browser, figure, name, 1000 if name == "lens" else 900)
        with tempfile.TemporaryDirectory() as folder:
            heads = direct_logit_attribution(model, *question, unit="head")
            report = heads.report(Path(folder) / "page.html", command="tl-dla report …")
            for name, dark in (("report", False), ("report-dark", True)):
                page = browser.open(report, width=1000, dark=dark)
                page.wait("'drawn' in document.documentElement.dataset")
                page.evaluate("document.querySelectorAll('.modebar').forEach(e => e.remove())")
                save(page, name, (0, 0, 1000, 1150))


if __name__ == "__main__":
    main()
