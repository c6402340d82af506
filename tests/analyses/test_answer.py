"""What an answer's attribution shows: tokens across, sums, and the text behind a click."""

import json
import re

import pytest
import torch

from tests.support.browser import CHROMIUM, Browser
from tests.support.models import load
from tests.zoo.build import tokens
from tl_dla import ArgumentError, attribute_answer, attribute_completion, load_model


@pytest.fixture(scope="module")
def found():
    return attribute_completion(load("gpt2"), tokens(1, 6), [5, 40, 9], unit="head")


def test_the_figure_has_the_answers_tokens_across_and_rows_down(found):
    [heat] = [trace for trace in found.plot(k=100).data if trace.type == "heatmap"]
    assert list(heat.y) == found.labels
    assert torch.allclose(torch.tensor(heat.z), found.steps.attribution[:, 0].double(), atol=1e-6)
    ticks = found.plot().layout.xaxis.ticktext
    assert [tick.split("<br>")[0] for tick in ticks] == ["w5", "w40", "w9"]


def test_a_baseline_is_subtracted_in_the_figure_and_never_averaged_in():
    found = attribute_answer(load("gpt2"), tokens(1, 6), [5, 40], [7, 20])
    figure = found.plot(k=100)
    assert "mean over" not in figure.layout.title.text
    [bars] = [trace for trace in figure.data if trace.type == "bar"]
    assert list(bars.x[:-1]) == pytest.approx(found.attribution[:, 0].tolist(), abs=1e-6)
    assert bars.x[-1] == pytest.approx(float(found.logit[0]), abs=1e-6)
    assert found.steps.plot().data and "of 2 prompts" not in found.steps.plot().layout.title.text
    assert found.baseline_steps.attribution.shape == (len(found), 1, 2)


def test_the_page_holds_every_number_and_loads_nothing(found, tmp_path):
    page = found.report(tmp_path / "page.html").read_text()
    data = json.loads(re.search(r"const shown = (.*);\n", page)[1])
    assert data["tokens"] == ["w5", "w40", "w9"] and len(data["prompt"]) == 6
    for label, values in zip(data["labels"], data["values"], strict=True):
        own = found.steps.attribution[found.labels.index(label), 0].tolist()
        assert values == pytest.approx(own, abs=1e-5)
    assert len(data["labels"]) == len(found) and data["ranks"] == found.ranks[0].tolist()
    assert "default-src 'none'" in page and "http" not in page.replace("http-equiv", "")
    with pytest.raises(ArgumentError, match="there is no folder"):
        found.report(tmp_path / "none" / "page.html")


def test_the_page_names_what_its_numbers_are_of(tmp_path):
    """A text as baseline is subtracted from the sums alone; the mean from every token."""
    titles = []
    for baseline in ([7, 20], "mean"):
        found = attribute_answer(load("gpt2"), tokens(1, 6), [5, 40], baseline)
        page = found.report(tmp_path / "page.html").read_text(encoding="utf-8")
        titles.append(re.search(r"<h1>(.*?)</h1>", page)[1])
        what = re.search(r"blue raises the token’s (.*?), red", page)[1]
        assert what == ("logit difference" if baseline == "mean" else "logit")
    assert titles == [
        "What wrote &#39;w5w40&#39;, token by token",
        "What wrote &#39;w5w40&#39; − mean of the vocabulary, token by token",
    ]


def test_the_largest_rows_are_ranked_by_magnitude_and_other_kinds_refused(found):
    values = {label: float(found[label][0]) for label in found.labels}
    heads = [label for label in found.labels if found.kinds[found.labels.index(label)] == "head"]
    for kind, labels in ((None, found.labels), ("head", heads)):
        order = sorted(labels, key=lambda label: -abs(values[label]))
        assert found.top(4, kind=kind) == [(x, pytest.approx(values[x])) for x in order[:4]]
    for wrong in ({"kind": "neuron"}, {"k": 0}):
        with pytest.raises(ArgumentError, match="kinds here are|k must be"):
            found.top(**wrong)


def test_the_table_and_the_notebook_say_what_the_model_says(found):
    table = found.to_dataframe()
    one = table[table.step == 1]
    assert set(one["rank"]) == {int(found.ranks[0, 1])}
    assert one.log_prob.iloc[0] == pytest.approx(float(found.log_probs[0, 1]))
    html = found._repr_html_()
    assert f"rank {int(found.ranks[0, 2])}" in html and "rows add up to" in html
    assert f"{float(found.log_probs.sum()):+9.4f}" in repr(found)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome installed")
def test_on_a_phone_no_number_of_the_page_is_broken(tmp_path):
    found = attribute_answer(load_model("demo"), "The Eiffel Tower is in the city of", " Paris.")
    path = found.report(tmp_path / "page.html")
    with Browser() as browser:
        page = browser.open(path, width=400, height=900)
        numbers = page.evaluate(
            "[...document.querySelectorAll('td:last-child')].map(cell => {"
            " const text = document.createRange(); text.selectNodeContents(cell);"
            " return text.getClientRects().length; })"
        )
        assert len(numbers) == len(found) + 1 and set(numbers) == {1}
        assert page.evaluate("document.documentElement.scrollWidth") == 400
        assert page.errors == [] and page.requests == []
