"""The page of a comparison: its numbers are the result's, text is text, and nothing is loaded."""

import json
import re

import pytest
import torch

from tests.support.browser import CHROMIUM, Browser
from tests.support.models import load
from tests.zoo.build import ANSWERS, tokens
from tl_dla import ArgumentError, compare, direct_logit_attribution, load_model
from tl_dla.figures import changes_page
from tl_dla.figures.text import number


def compared(unit="head", **options):
    model, both = load("gpt2"), (tokens(), tokens(2, 18)[:, 11:])
    answers = {} if "candidate_tokens" in options else {"answer_tokens": ANSWERS}
    given = {"unit": unit, **answers, **options}
    return compare(*(direct_logit_attribution(model, ids, **given) for ids in both))


def rows_of(page):
    """The table: the cells of each row, by its label."""
    lines = re.findall(r'<tr[^>]*><th scope="row">(.*?)</th>(.*?)</tr>', page)
    return {label: re.findall("<td>(.*?)</td>", cells) for label, cells in lines}


@pytest.mark.parametrize("unit", ["component", "head", "layer"])
def test_the_page_holds_every_number(unit, tmp_path):
    found = compared(unit)
    page = found.report(tmp_path / "page.html", k=len(found)).read_text()
    rows = rows_of(page)
    terms = [getattr(found, name) for name in ("a", "b", "change", "wrote", "read")]
    for i, label in enumerate(found.labels):
        assert rows[label] == [number(float(x[i].double().mean())) for x in terms]
    a, b = (float(x.double().mean()) for x in found.logits)
    assert list(rows.values())[-1][:3] == [number(x) for x in (a, b, b - a)]
    figure = json.loads(re.search(r"const figure = (.*), themes = ", page)[1])
    [start] = [trace for trace in figure["data"] if trace.get("name") == "a"]
    assert len(start["hovertext"]) >= len(found)
    certificate = re.search("<p>(✓ .*)</p>", page)[1]
    assert "the change of the model" in certificate and "mean over 2 prompts" in page


def test_one_prompt_and_one_candidate_are_chosen(tmp_path):
    found = compared("component", candidate_tokens=[5, 9])
    chosen = rows_of(found.report(tmp_path / "page.html", prompt=1, candidate="w9").read_text())
    first = rows_of(found.report(tmp_path / "page.html", prompt=1).read_text())
    for i, label in enumerate(found.labels):
        assert chosen[label][2] == number(float(found.change[i, 1, 1]))
        assert first[label][2] == number(float(found.change[i, 1, 0]))


def test_many_rows_are_the_largest_and_what_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(changes_page, "_MOST_ROWS", 5)
    found = compared("component")
    *kept, rest, total = rows_of(found.report(tmp_path / "page.html").read_text())
    change = found.change.mean(1)
    order = change.abs().argsort(descending=True)[:5].tolist()
    assert kept == [found.labels[i] for i in order]
    assert rest == f"{len(found) - 5} smaller rows"
    assert total == "model&#39;s own logit"


def test_a_path_that_cannot_be_written_and_a_choice_that_there_is_not(tmp_path):
    found = compared("component")
    for path in (tmp_path, tmp_path / "none" / "page.html"):
        with pytest.raises(ArgumentError, match="it is a folder; name a file|there is no folder"):
            found.report(path)
    for wrong in ({"prompt": 2}, {"k": 0}, {"candidate": "w5"}):
        with pytest.raises(ArgumentError):
            found.report(tmp_path / "page.html", **wrong)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome installed")
def test_a_browser_draws_it_without_a_network_and_text_stays_text(tmp_path):
    model = load_model("demo")
    prompts = "The <b id=evil>Eiffel</b> Tower </script> is in the city of", "The Colosseum is in"
    found = compare(
        *(direct_logit_attribution(model, text, " Paris", unit="head") for text in prompts)
    )
    path = found.report(tmp_path / "page.html")
    with Browser() as browser:
        page = browser.open(path, width=400, height=900, dark=True)
        page.wait("document.querySelector('#figure .heatmaplayer') !== null")
        assert page.count("#evil") == 0 and page.count("tbody tr") == len(found) + 1
        assert prompts[0] in page.evaluate("document.body.innerText")
        assert page.evaluate("document.documentElement.scrollWidth") == 400
        assert page.errors == [] and page.requests == []
    assert torch.isfinite(found.change).all()
