"""The one table: which rows it shows, in which order, and that text and HTML say the same."""

import re

import numpy as np
import pytest

from tests.support.pages import PROMPTS, bridge
from tl_dla import direct_logit_attribution
from tl_dla.core.view import view_of
from tl_dla.figures.table import html, table, text


def batch(unit="head", **options):
    answers, incorrect = ["mat", "on", "sat"], ["cat", "dog", "the"]
    return direct_logit_attribution(bridge(), PROMPTS, answers, incorrect, unit=unit, **options)


def test_rows_are_ranked_by_the_magnitude_of_what_is_shown():
    result = batch()
    means = result.attribution.double().numpy().mean(1)
    order = np.argsort(-np.abs(means), kind="stable")
    lines = table(view_of(result), 5).lines
    assert [line.label for line in lines[:5]] == [result.labels[i] for i in order[:5]]
    np.testing.assert_allclose([line.mean[0] for line in lines[:5]], means[order[:5]], rtol=1e-12)
    assert lines[5].label == f"{len(means) - 5} smaller rows"
    np.testing.assert_allclose(lines[5].mean[0], means[order[5:]].sum(), rtol=1e-9)
    np.testing.assert_allclose(lines[6].mean[0], means.sum(), rtol=1e-9)
    np.testing.assert_allclose(lines[7].mean[0], float(result.logit.double().mean()), rtol=1e-12)


@pytest.mark.parametrize("unit", ["component", "head", "layer"])
@pytest.mark.parametrize("k", [3, None])
def test_text_and_html_have_the_same_lines(unit, k):
    shown = table(view_of(batch(unit)), k)
    for line in shown.lines:
        number = f"{line.mean[0]:+.4f}"
        assert re.search(rf"{re.escape(line.label)} +{re.escape(number)}", text(shown))
    names = re.findall(r"<th scope=\"row\"[^>]*>(.*?)</th>", html(shown))
    assert [name.replace("&#x27;", "'") for name in names] == [line.label for line in shown.lines]


def test_one_row_too_many_is_not_added_up_alone():
    view = view_of(batch("component"))
    n = len(view.labels)
    assert [line.role for line in table(view, n - 1).lines] == ["row"] * n + ["sum", "logit"]
    assert [line.role for line in table(view, n - 2).lines][-3:] == ["rest", "sum", "logit"]


def test_readings_stay_in_the_order_of_depth_and_end_at_the_logit():
    result = batch("layer")
    *points, bias = result.labels
    for k, kept in ((12, points), (1, points[::-2][::-1])):
        lines = table(view_of(result), k).lines
        assert [line.label for line in lines[:-2]] == [*kept, bias]
        assert lines[-2].label == "final_post and the biases"
        values = result.attribution.double().numpy()
        np.testing.assert_allclose(lines[-2].mean[0], values[-2:].sum(0).mean(), rtol=1e-12)
        np.testing.assert_allclose(lines[-2].mean[0], lines[-1].mean[0], rtol=1e-4)
