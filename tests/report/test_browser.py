"""Figures, report and notebook display as a browser draws them, with the network off.

What is counted here is in the page: bars, dots, cells with their text, heads. Chromium is spoken to
by `browser.py`; without one these tests are skipped.
"""

import json

import numpy as np
import pytest
from plotly.offline import get_plotlyjs

from tests.support.browser import CHROMIUM, Browser, opening
from tests.support.pages import NASTY, PROMPTS, bridge
from tl_dla import attribute_inputs, direct_logit_attribution, self_repair
from tl_dla.analyses.head_patterns import top_heads_with_patterns
from tl_dla.analyses.logit_lens import logit_lens
from tl_dla.figures import charts
from tl_dla.figures.attention_view import AttentionView
from tl_dla.figures.text import number, visible

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome installed")

BARS, DOTS = ".bars .point path", ".scatterlayer .points path"


@pytest.fixture(scope="module")
def browser():
    with Browser() as chromium:
        yield chromium


@pytest.fixture
def show(browser, tmp_path):
    """Open a figure or a page."""
    path = tmp_path / "page.html"
    with opening(browser) as open_page:

        def shown(what, **options):
            if isinstance(what, str):
                path.write_text(what, encoding="utf-8")
                return open_page(path, **options)
            what.write_html(path, include_plotlyjs=True)
            page = open_page(path, **options)
            page.wait("document.querySelector('.cartesianlayer .subplot') !== null")
            return page

        yield shown


def attribute(prompts=PROMPTS[0], answer="mat", incorrect="cat", **options):
    return direct_logit_attribution(bridge(), prompts, answer, incorrect, **options)


def batch(**options):
    return attribute(PROMPTS, ["mat", "on", "sat"], ["cat", "dog", "the"], **options)


def texts(page, selector):
    script = f"[...document.querySelectorAll({json.dumps(selector)})].map(e => e.textContent)"
    return page.evaluate(script)


def cells(page):
    """The size of the heatmap that was drawn, and how many pictures of one there are."""
    drawn = page.evaluate(
        "(() => { const z = document.querySelector('.js-plotly-plot').calcdata[0][0].z;"
        " return [z.length, z[0].length] })()"
    )
    return drawn, page.count(".hm image")


def hover_cell(page, row, column):
    """What a cell of a heatmap says under the pointer."""
    x, y = page.evaluate(
        "(() => { const figure = document.querySelector('.js-plotly-plot'),"
        " { xaxis, yaxis } = figure._fullLayout, box = figure.getBoundingClientRect();"
        f" return [box.left + xaxis._offset + xaxis.c2p({column}),"
        f" box.top + yaxis._offset + yaxis.c2p({row})] }})()"
    )
    page.hover(x, y)
    page.wait("document.querySelector('.hovertext') !== null")
    return " ".join(texts(page, ".hovertext text"))


def no_overlap(page, selector):
    """Whether the boxes of neighbouring texts stay apart, allowing a pixel."""
    boxes = page.evaluate(
        f"[...document.querySelectorAll({json.dumps(selector)})]"
        ".map(e => e.getBoundingClientRect()).map(r => [r.left, r.top, r.right, r.bottom])"
    )
    return all(
        a[2] <= b[0] + 1 or b[2] <= a[0] + 1 or a[3] <= b[1] + 1 or b[3] <= a[1] + 1
        for a, b in zip(boxes, boxes[1:], strict=False)
    )


# ---- figures -----------------------------------------------------------------------------------


def test_the_ledger_draws_a_bar_a_row_with_its_number(show):
    result = attribute()
    page = show(result.plot())
    assert page.count(BARS) == len(result) + 1
    assert texts(page, ".ytick text") == [*result.labels, "model's own logit"]
    own = [*result.attribution[:, 0].tolist(), float(result.logit[0])]
    assert texts(page, ".bars .point text") == [number(value) for value in own]
    # A bar is as long as its value: pixels per logit are the same for all.
    width = page.evaluate(
        f"[...document.querySelectorAll({json.dumps(BARS)})].map(e => e.getBBox().width)"
    )
    per_logit = width[-1] / abs(own[-1])
    np.testing.assert_allclose(width, per_logit * np.abs(own), atol=2)


def test_a_batch_draws_a_dot_for_each_prompt(show):
    result = batch()
    page = show(result.plot())
    assert page.count(BARS) == len(result) + 1
    assert page.count(DOTS) == 3 * (len(result) + 1)


def test_heads_are_cells_and_other_rows_are_bars(show):
    result = attribute(unit="head")
    page = show(result.plot())
    assert cells(page) == ([3, 5], 1)
    assert page.count(BARS) == len(result) - 15 + 1  # and the model's own logit
    hover = hover_cell(page, 2, 4)
    value = float(result["L2H4"][0])
    assert "L2H4" in hover and f"{value:+.4f}" in hover.replace("−", "-")
    assert "of the logit" in hover and PROMPTS[0] in hover


def test_the_trajectory_draws_every_reading(show):
    result = attribute(unit="layer")
    page = show(result.plot())
    assert page.count(DOTS) == len(result) + 1  # the last one twice: as a reading, and as the logit
    assert set(texts(page, ".legendtext")) == {"attention", "MLP", "bias", "model's own logit"}


def test_the_lens_writes_a_token_in_every_cell(show):
    lens = logit_lens(bridge(), PROMPTS[0])
    page = show(lens.plot())
    assert cells(page) == ([7, 9], 1)
    written = texts(page, ".heatmap-label")
    top = [[visible(names[0]) for names in layer[0]] for layer in lens.top_tokens]
    assert written == [word for line in top for word in line]


def test_candidates_and_positions_are_drawn(show):
    over = direct_logit_attribution(bridge(), PROMPTS[0], candidate_tokens=["mat", "cat", "on"])
    page = show(over.plot())
    assert cells(page) == ([len(over), 3], 1) and page.count(".heatmap-label") == 3 * len(over)
    everywhere = attribute(pos=None)
    assert cells(show(everywhere.plot())) == ([len(everywhere), 9], 1)
    lines = direct_logit_attribution(
        bridge(), PROMPTS[0], candidate_tokens=["mat", "cat"], unit="layer"
    )
    page = show(lines.plot())
    named = [text.rpartition(" ")[0] for text in texts(page, ".annotation-text")]
    assert sorted(named) == ["'cat'", "'mat'"]
    x, y = page.evaluate(
        "(f => { const { xaxis } = f._fullLayout, box = f.getBoundingClientRect();"
        " return [box.left + xaxis._offset + xaxis.c2p(3), box.top + box.height / 2] })"
        "(document.querySelector('.js-plotly-plot'))"
    )
    page.hover(x, y)
    page.wait("document.querySelector('.hoverlayer .legend') !== null")
    hover = " ".join(texts(page, ".hoverlayer text"))
    values = [float(lines["1_mid"][0, c]) for c in range(2)]
    assert all(f"{value:+.4f}" in hover.replace("−", "-") for value in values) and "1_mid" in hover


def test_intervals_are_drawn(show):
    mean = np.array([1.0, -2.0, 0.5])
    page = show(
        charts.intervals(["a", "b", "c"], mean, mean - 0.2, mean + 0.3, heading=charts.Heading(""))
    )
    assert page.count(BARS) == 3 and page.count(".errorbar") == 3


def test_user_text_is_shown_as_text(show):
    page = show(attribute(NASTY, "<script>alert(1)</script>").plot())
    assert "'<script>alert(1)</script>'" in texts(page, ".gtitle")[0]
    page = show(logit_lens(bridge(), NASTY).plot())
    assert any("<script>" in name for name in texts(page, ".xtick text"))
    page = show(attribute(NASTY, unit="head").plot())
    assert "%{x} $& <!--" in hover_cell(page, 2, 4)


@pytest.fixture
def large(unchecked):
    """60 layers of 64 heads, a hundred prompts."""
    model = bridge(n_layers=60, n_heads=64, d_head=1)
    words = ["the", "cat", "dog", "sat", "mat", "on", "a"]
    prompts = [" ".join(words[(i * j) % 7] for j in range(1, 4 + i % 5)) for i in range(100)]
    return {
        unit: direct_logit_attribution(model, prompts, "mat", "cat", unit=unit)
        for unit in ("component", "head", "layer")
    }


@pytest.mark.slow
def test_a_large_model_stays_readable(show, large, tmp_path):
    for unit, result in large.items():
        page = show(result.plot())
        for axis in (".ytick text", ".xtick text", ".y9tick text"):
            assert no_overlap(page, axis), (unit, axis)
    page = show(large["head"].plot())
    assert cells(page) == ([60, 64], 1)
    assert page.count(DOTS) == 100 * (10 + len(large["head"]) - 60 * 64 + 1)
    page = show(large["component"].plot())
    assert page.count(BARS) == 42 and page.count(DOTS) == 42 * 100
    assert "smaller rows" in texts(page, ".ytick text")[-2]
    path = large["component"].report(tmp_path / "large.html")
    assert path.stat().st_size < 8_000_000


@pytest.mark.parametrize("width", [400, 1200])
def test_nothing_is_printed_over_anything_else(show, width):
    words = ".gtitle, .xtick text, .ytick text, .y8tick text, .y9tick text, .annotation-text"
    shown = [attribute(unit=unit) for unit in ("component", "head", "layer")]
    shown += [batch(unit=unit) for unit in ("component", "head", "layer")]
    shown += [attribute(unit="layer", pos=None), attribute(pos=None)]
    for candidates in ("component", "layer"):
        options = dict(candidate_tokens=["mat", "cat", "on"], unit=candidates)
        shown.append(direct_logit_attribution(bridge(), PROMPTS[0], **options))
    shown += [batch(unit="head").audit(k=6, progress=False), self_repair(shown[1], "L2H4")]
    shown += [attribute_inputs(bridge(), PROMPTS[0], "mat", "cat")]
    drawn = [
        result.plot(width=width).to_html(full_html=False, include_plotlyjs=False)
        for result in shown
    ]
    divs = "".join(f'<div id="figure-{i}">{figure}</div>' for i, figure in enumerate(drawn))
    page = show(notebook(f"<script>{get_plotlyjs()}</script>{divs}"), width=width)
    page.wait(f"document.querySelectorAll('.cartesianlayer').length === {len(shown)}")
    for i, result in enumerate(shown):
        within = f"#figure-{i} :is"
        assert boxes_of(page, f"{within}({words})"), result
        assert apart(page, f"{within}({words})"), result
        assert inside(page, f"{within}({words}, .legendtext)", width), result
        assert apart(page, f"{within}(.ytick, .y8tick, .bars .point) text"), result


def apart(page, selector):
    """Whether no two texts share more than a sliver: turned ones are boxes larger than they are."""
    boxes = [box for box in boxes_of(page, selector) if box[3] - box[1] < 20]
    return not any(
        min(a[2], b[2]) - max(a[0], b[0]) > 2 and min(a[3], b[3]) - max(a[1], b[1]) > 3
        for i, a in enumerate(boxes)
        for b in boxes[:i]
    )


def inside(page, selector, width):
    return all(box[0] > -1 and box[2] < width + 9 for box in boxes_of(page, selector))


def boxes_of(page, selector):
    return page.evaluate(
        f"[...document.querySelectorAll({json.dumps(selector)})].filter(e => e.textContent)"
        ".map(e => e.getBoundingClientRect()).map(r => [r.left, r.top, r.right, r.bottom])"
    )


# ---- the report --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reports")
    nasty = attribute(NASTY).report(folder / "nasty.html", k=2)
    return {"nasty": nasty, "plain": attribute().report(folder / "plain.html")}


@pytest.fixture
def read(browser, reports):
    """Open a report."""
    with opening(browser) as open_page:

        def drawn(name, **options):
            page = open_page(reports[name], **options)
            page.wait("'drawn' in document.documentElement.dataset")
            return page

        yield drawn


@pytest.mark.parametrize(("width", "dark"), [(1100, False), (1100, True), (390, False)])
def test_the_report_opens_alone(read, width, dark):
    page = read("nasty", width=width, dark=dark)
    page.wait("document.querySelectorAll('.attention *').length > 20")
    components, heads = attribute(NASTY), attribute(NASTY, unit="head")
    assert page.count(f"#figure-0 {BARS}") == len(components) + 1
    assert page.count(f"#figure-1 {BARS}") == len(heads) - 15 + 1
    assert page.count("#figure-1 .hm image") == 1
    n_tokens = len(bridge().to_tokens(NASTY)[0])
    assert page.count("#figure-3 .heatmap-label") == 7 * n_tokens
    top = top_heads_with_patterns(heads, k=2)
    assert texts(page, ".head h3 .value") == [number(float(h.value[0])) for h in top]
    drawn = page.evaluate("document.querySelector('#attention').innerText")
    assert all(head.label in drawn for head in top)
    # Nothing is wider than the screen: what is wide scrolls in its own box.
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("window.hacked || 0") == 0
    shown = page.evaluate("document.querySelector('.prompt').innerText")
    assert "<script>alert(1)</script>" in shown and "{{plotly}}" in shown
    ink = page.evaluate("getComputedStyle(document.querySelector('#figure-0 .ytick text')).fill")
    assert ink == ("rgb(223, 227, 234)" if dark else "rgb(35, 39, 46)")


def test_no_control_opens_a_connection_or_a_window(browser, read):
    page = read("plain")
    before = len(browser.send("Target.getTargets")["targetInfos"])
    page.evaluate("window.opened = []; window.open = (...all) => { opened.push(all); return null }")
    pressed = page.evaluate(
        "[...document.querySelectorAll('.modebar-btn, button, summary, a, [onclick]')]"
        ".filter(e => !/PNG/.test(e.dataset.title)).map(e => { e.dispatchEvent("
        "new MouseEvent('click', {bubbles: true})); return e.dataset.title || e.tagName })"
    )
    assert len(pressed) > 9 and not any("hare" in name for name in pressed)
    assert page.count(".plotly-cloud-dialog-box") == 0
    assert page.evaluate("opened") == [] and page.count("a[href]") == 0
    assert len(browser.send("Target.getTargets")["targetInfos"]) == before


def test_a_figure_alone_cannot_be_sent_anywhere(show):
    page = show(attribute().plot())
    titles = page.evaluate(
        "[...document.querySelectorAll('.modebar-btn')].map(e => e.dataset.title)"
    )
    assert any("PNG" in title for title in titles) and not any("hare" in title for title in titles)


def test_the_report_follows_a_change_of_theme_and_prints_light(read, tmp_path):
    page = read("plain", dark=True)
    ink = "getComputedStyle(document.querySelector('#figure-0 .ytick text')).fill"
    assert page.evaluate(ink) == "rgb(223, 227, 234)"
    page.theme(dark=False)
    page.wait(f"{ink} === 'rgb(35, 39, 46)'")
    page.theme(dark=True)
    page.wait(f"{ink} === 'rgb(223, 227, 234)'")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.wait(f"{ink} === 'rgb(35, 39, 46)'")
    page.pdf(tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
    page.send("Emulation.setEmulatedMedia", media="print")
    own = "[...document.querySelectorAll('.figure, .heads > *, section > p')]"
    kept = page.evaluate(f"{own}.map(e => [getComputedStyle(e).breakInside, e.offsetHeight])")
    # No figure or card is split across pages, and none is higher than what a page has room for.
    assert all(how == "avoid" and height < 977 for how, height in kept)


# ---- notebooks ---------------------------------------------------------------------------------


def notebook(html):
    return f'<!doctype html><html><head><meta charset="utf-8"></head><body>{html}</body></html>'


def test_the_notebook_table_is_drawn(show):
    result = attribute()
    page = show(notebook(result._repr_html_()))
    assert page.count("svg rect.bar") == len(result)
    assert "rows add up to the model's own logit" in page.evaluate("document.body.innerText")


@pytest.mark.parametrize("style", ["patterns", "heads"])
def test_attention_draws_every_head_and_never_shrinks(show, style):
    patterns = top_heads_with_patterns(attribute(unit="head"), k=2)
    view = patterns.show(style)
    assert isinstance(view, AttentionView)
    page = show(notebook(view._repr_html_()))
    inside = "document.querySelector('iframe').contentDocument"
    page.wait(f"{inside}.querySelectorAll('.attention *').length > 20")
    drawn = page.evaluate(f"{inside}.body.innerText")
    assert all(head.label in drawn for head in patterns)
    height = "document.querySelector('iframe').getBoundingClientRect().height"
    first = page.evaluate(height)
    for _ in range(5):
        page.evaluate("dispatchEvent(new Event('resize'))")
    assert page.evaluate(height) == first == view.height
