"""Figures for papers: their widths, their files, and captions that say what the result says."""

import re
import sys

import numpy as np
import pytest

from tests.support.browser import CHROMIUM
from tests.support.pages import PROMPTS, bridge, own_logits
from tl_dla import direct_logit_attribution
from tl_dla.core.view import view_of
from tl_dla.errors import ArgumentError
from tl_dla.figures import paper
from tl_dla.figures.paper import Sheet
from tl_dla.figures.text import number

ANSWERS, INCORRECT = ["mat", "on", "sat"], ["cat", "dog", "the"]


def attribute(prompts=PROMPTS[0], answer="mat", incorrect="cat", **options):
    return direct_logit_attribution(bridge(), prompts, answer, incorrect, **options)


@pytest.mark.parametrize(("width", "pixels"), [("column", 312), ("page", 648), (5.0, 480)])
def test_a_sheet_is_as_wide_as_a_paper_says_and_has_no_title(width, pixels):
    for unit in ("component", "head", "layer"):
        fig = paper.figure(view_of(attribute(unit=unit)), 20, Sheet(width))
        assert fig.layout.width == pixels and not fig.layout.title.text
        assert fig.layout.font.color == "black"
        tall = paper.figure(view_of(attribute(unit=unit)), 20, Sheet(width, 4.0))
        assert tall.layout.height == 384


def test_a_certificate_stands_above_where_it_is_asked_for():
    result = attribute()
    plain = paper.figure(view_of(result), 20, Sheet())
    certified = paper.figure(view_of(result), 20, Sheet(certificate=True))
    assert certified.layout.title.text.replace("<br>", " ") == f"✓ {result.reconstruction}"
    added = 14 * (1 + certified.layout.title.text.count("<br>")) + 12
    assert certified.layout.height == plain.layout.height + added
    assert certified.layout.margin.t == plain.layout.margin.t + added
    np.testing.assert_array_equal(plain.data[0].x, certified.data[0].x)


def test_a_caption_says_what_where_how_much_and_whether_it_adds_up():
    result = attribute(unit="head")
    right, wrong = own_logits(PROMPTS[0], "mat", "cat")
    caption = result.caption()
    assert caption.startswith(
        "What each attention head, MLP and bias wrote directly to the logit of 'mat' − 'cat'"
        f" ({number(right - wrong)}) in "
    )
    assert "GPT2LMHeadModel, at position 8 'cat' of “" in caption
    certificate = str(result.reconstruction)
    assert f"R{certificate[1:]}." in caption and certificate.startswith("rows add up to")
    assert "not what removing the part would do" in caption and "Blue raises it" in caption
    assert "/" not in caption.split("(")[0]


def test_a_caption_of_a_batch_has_its_mean_and_its_range():
    result = attribute(PROMPTS, ANSWERS, INCORRECT)
    triples = zip(PROMPTS, ANSWERS, INCORRECT, strict=True)
    own = [np.subtract(*own_logits(*triple)) for triple in triples]
    between = f"from {number(min(own))} to {number(max(own))} over 3"
    assert f"(mean {number(np.mean(own))}, {between}) in " in result.caption()
    assert "mean over 3 prompts." in result.caption()
    assert f"({number(own[1])}) in" in result.caption(prompt=1)
    assert "at 9 tokens of 1 prompts." not in attribute(pos=None).caption()
    assert "at 9 tokens of a prompt." in attribute(pos=None).caption()
    readings = attribute(unit="layer").caption()
    assert readings.startswith("The residual stream") and "Blue" not in readings
    assert "The last reading and the biases are the model's own logit" in readings


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("figure.gif", {}, r"saved as .pdf, .svg or .png; '.gif' was given"),
        ("figure", {}, r"saved as .pdf, .svg or .png; '' was given"),
        ("figure.pdf", {"width": 0.0}, "width must be .* 0.0 was given"),
        ("figure.pdf", {"height": -1.0}, "height must be a number of inches; -1.0"),
        ("nowhere/figure.pdf", {}, "figure cannot be written to .*: there is no folder .*nowhere"),
        ("figure.pdf", {"prompt": 3}, "prompt must be one of the result's 1"),
    ],
)
def test_what_cannot_be_saved_is_refused_in_a_sentence(tmp_path, name, options, sentence):
    with pytest.raises(ArgumentError, match=sentence):
        attribute().save_figure(tmp_path / name, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome installed")
def test_files_are_of_the_size_asked_for(tmp_path):
    pytest.importorskip("kaleido")
    result = attribute(unit="head")
    assert result.save_figure(tmp_path / "figure.pdf") == tmp_path / "figure.pdf"
    pdf = (tmp_path / "figure.pdf").read_bytes()
    box = re.search(rb"/MediaBox ?\[0 0 ([\d.]+) ([\d.]+)\]", pdf)
    assert pdf.startswith(b"%PDF") and box is not None
    assert float(box[1]) == pytest.approx(3.25 * 72, abs=1)
    svg = result.save_figure(tmp_path / "figure.svg", width="page").read_text(encoding="utf-8")
    assert 'width="648"' in svg and "model's own logit" in svg and "L" in svg
    png = result.save_figure(tmp_path / "figure.png", width=4.0, height=3.0).read_bytes()
    assert [int.from_bytes(png[i : i + 4], "big") for i in (16, 20)] == [1200, 900]
    assert sorted(one.name for one in tmp_path.iterdir()) == [
        f"figure.{kind}" for kind in ("pdf", "png", "svg")
    ]


def test_a_missing_exporter_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "kaleido", None)
    with pytest.raises(ImportError, match=r"pip install 'tl-dla\[figures\]'"):
        attribute().save_figure(tmp_path / "figure.pdf")
