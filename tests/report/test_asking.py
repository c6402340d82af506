"""The page that can be asked, in a browser: a press, a choice or an address, and what follows."""

import numpy as np
import pytest

from tests.support.browser import CHROMIUM, Browser, opening
from tests.support.pages import NASTY, PROMPTS, bridge
from tl_dla import attribute_attention, direct_logit_attribution
from tl_dla.analyses.head_patterns import top_heads_with_patterns
from tl_dla.figures.text import number

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome installed")

ANSWERS, INCORRECT = ["mat", "on", "sat"], ["cat", "dog", "the"]
HEADS = 1  # which figure the head map is


@pytest.fixture(scope="module")
def browser():
    with Browser() as chromium:
        yield chromium


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    one, several = attribute(PROMPTS[0]), attribute()
    everywhere, over = attribute(PROMPTS[0], pos=None), candidates()
    named = {"one": one, "several": several, "everywhere": everywhere, "over": over}
    found = {name: result.report(folder / f"{name}.html") for name, result in named.items()}
    audit = one.audit(rows=["L2H4", "L0H0"], progress=False)
    return found | {"audited": one.report(folder / "audited.html", audit=audit)}


def attribute(prompts=PROMPTS, **options):
    alone = isinstance(prompts, str)
    answers = ("mat", "cat") if alone else (ANSWERS, INCORRECT)
    return direct_logit_attribution(bridge(), prompts, *answers, unit="head", **options)


def candidates():
    words = ["mat", "cat", "on"]
    return direct_logit_attribution(bridge(), PROMPTS[0], candidate_tokens=words, unit="head")


@pytest.fixture
def ask(browser, pages):
    with opening(browser) as open_page:

        def drawn(name, address="", **options):
            page = open_page(pages[name], address=address, **options)
            page.wait("'drawn' in document.documentElement.dataset")
            return page

        yield drawn


def settle(page):
    """Until every figure is of the choice."""
    page.evaluate("new Promise(done => setTimeout(done, 50))")
    page.wait(
        "Object.keys(figures).every(name => drawn[name] && drawn[name].startsWith("
        "variantOf(name) + ' '))"
    )
    page.evaluate("new Promise(done => setTimeout(done, 50))")


def panel(page):
    return page.evaluate("document.querySelector('#panel').innerText")


def cells_of(page, table):
    """The text of a table of the panel, row by row."""
    script = "[...document.querySelectorAll('#panel table')].map(t => [...t.tBodies[0].rows]"
    script += ".map(r => [...r.cells].map(c => c.textContent)))"
    return page.evaluate(script)[table]


def drawn_at(page, layer, head):
    """The number behind a cell of the head map, as plotly holds it."""
    figure = f"document.querySelector('#figure-{HEADS}')"
    return page.evaluate(f"{figure}.calcdata[0][0].z[{layer}][{head}]")


def press_cell(page, layer, head):
    """A press of the mouse on a cell of the head map."""
    page.evaluate(f"document.querySelector('#figure-{HEADS}').scrollIntoView()")
    x, y = page.evaluate(
        f"(() => {{ const figure = document.querySelector('#figure-{HEADS}'),"
        " { xaxis, yaxis } = figure._fullLayout, box = figure.getBoundingClientRect();"
        f" return [box.left + xaxis._offset + xaxis.c2p({head}),"
        f" box.top + yaxis._offset + yaxis.c2p({layer})] }})()"
    )
    page.press(x, y)
    settle(page)


def test_a_press_on_a_cell_says_all_there_is_of_the_head(ask):
    page = ask("one")
    assert page.evaluate("document.querySelector('#panel').hidden")
    press_cell(page, 2, 4)
    result = attribute(PROMPTS[0])
    value = float(result["L2H4"][0])
    shown = panel(page)
    assert shown.splitlines()[0] == "×" and "L2H4" in shown and number(value) in shown
    assert f"{value / float(result.logit[0]):.1%}".replace("-", "−") in shown
    [head] = [h for h in top_heads_with_patterns(result, k=15) if h.label == "L2H4"]
    expected = {at: (attention, moved) for _, at, attention, moved in head.reads(9)}
    for token, position, attention, moved in cells_of(page, 0):
        own = expected[int(position)]
        assert float(attention.rstrip("%")) == pytest.approx(100 * own[0], abs=0.06), token
        assert moved == number(own[1]), token
    promoted = result.promoted_tokens("L2H4", k=6)
    pairs = zip(promoted.raised, promoted.lowered, strict=True)
    assert cells_of(page, 1) == [[f"“{t}” {number(v)}" for t, v in pair] for pair in pairs]
    assert page.evaluate("location.hash") == "#row=L2H4"
    marked = page.evaluate(f"document.querySelector('#figure-{HEADS}').layout.shapes")
    assert [(m["x0"], m["x1"], m["y0"], m["y1"]) for m in marked] == [(3.5, 4.5, 1.5, 2.5)]
    # Its layer's row is marked in the ledger, and the reading after it on the way there.
    below = page.evaluate("document.querySelector('#figure-0').layout.shapes")
    labels = direct_logit_attribution(bridge(), PROMPTS[0], "mat", "cat").labels
    assert below[0]["y0"] == labels.index("2_attn_out") - 0.5
    assert len(page.evaluate("document.querySelector('#figure-2').layout.shapes")) == 1


def test_the_panel_says_who_wrote_a_query_and_key_or_which_call_does(ask):
    page = ask("one")
    every = top_heads_with_patterns(attribute(PROMPTS[0]), 15)
    assert len(every) == 15 and sum("because of" in head.why[0] for head in every) > 9
    for head in every:
        page.evaluate(f"choose({{row: '{head.label}'}})")
        why = head.why[0]
        assert f"{head.label} {why}." in panel(page) if why else "because of" not in panel(page)
    page = ask("several")
    carded = [head.label for head in top_heads_with_patterns(attribute(), 3)]
    [label, *_] = [f"L2H{i}" for i in range(5) if f"L2H{i}" not in carded]
    page.evaluate(f"choose({{row: '{label}', prompt: 1}})")
    call = page.evaluate("document.querySelector('#panel code').textContent")
    names = {"attribute_attention": attribute_attention, "model": bridge(), "prompts": PROMPTS}
    asked = eval(call, names)
    [head] = top_heads_with_patterns(attribute(), heads=label)
    query, key, versus = asked.places[0].tolist()
    n = len(head.tokens[1])
    assert (asked.head, query, key) == (label, n - 1, int(head.pattern[1, n - 1].argmax()))
    assert head.tokens[1][key] != head.tokens[1][versus] and asked.reconstruction.passed


def test_a_press_on_a_bar_and_on_a_token(ask):
    page = ask("one")
    page.evaluate("document.querySelector('#figure-0').scrollIntoView()")
    x, y = page.evaluate(
        "(() => { const r = [...document.querySelectorAll('#figure-0 .ytick text')]"
        ".find(e => e.textContent === '1_mlp_out').getBoundingClientRect();"
        " return [r.left + 5, r.top + 5] })()"
    )
    page.press(x, y)
    settle(page)
    assert "1_mlp_out" in panel(page) and "row=1_mlp_out" in page.evaluate("location.hash")
    page.evaluate("document.querySelector('header .token[data-position=\"2\"]').click()")
    settle(page)
    assert page.evaluate("location.hash") == "#row=1_mlp_out&token=2"
    result = attribute(PROMPTS[0])
    table = next(t for t in (cells_of(page, i) for i in (1, 0)) if t[0][0].startswith("L"))
    heads = {h.label: h for h in top_heads_with_patterns(result, k=15)}
    moved = {name: float(head.contributions[0, 2]) for name, head in heads.items()}
    best = sorted(moved, key=lambda name: -abs(moved[name]))[:10]
    assert [line[0] for line in table] == best
    assert [line[2] for line in table] == [number(moved[name]) for name in best]
    page.evaluate("document.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape'}))")
    assert page.evaluate("document.querySelector('#panel').hidden")


def test_a_chosen_prompt_changes_everything(ask):
    page = ask("several")
    result = attribute()
    mean = result.attribution.mean(1)
    at = result.index("L1H2")
    page.evaluate("choose({row: 'L1H2'})")
    settle(page)
    assert number(float(mean[at])) in panel(page) and "mean over all prompts" in panel(page)
    page.evaluate(
        "(s => { s.value = '1'; s.dispatchEvent(new Event('change')) })"
        "(document.querySelector('#ask select'))"
    )
    settle(page)
    assert page.evaluate("location.hash") == "#row=L1H2&prompt=1"
    assert number(float(result["L1H2"][1])) in panel(page)
    z = drawn_at(page, 1, 2)
    np.testing.assert_allclose(z, float(result["L1H2"][1]), rtol=1e-4)
    ledger = page.evaluate("Array.from(document.querySelector('#figure-0')._fullData[0].x)")
    alone = direct_logit_attribution(bridge(), PROMPTS[1], "on", "dog")
    np.testing.assert_allclose(ledger[:-1], alone.attribution[:, 0], rtol=1e-3, atol=1e-5)
    lens = page.evaluate("document.querySelector('#figure-3')._fullData[0].x.length")
    assert lens == len(bridge().to_tokens(PROMPTS[1])[0])
    cards = "[...document.querySelectorAll('[data-cards]')].filter(e => !e.hidden)"
    assert page.evaluate(f"{cards}.map(e => e.dataset.cards)") == ["1"]
    assert "prompt 1" in page.evaluate("document.querySelector('#figure-0-note').innerText")


def test_a_chosen_position_and_a_chosen_candidate_change_everything(ask):
    page = ask("everywhere", "row=L0H3&position=4")
    result = attribute(PROMPTS[0], pos=None)
    own = float(result["L0H3"][0, 4])
    assert number(own) in panel(page) and "position 4" in panel(page)
    z = drawn_at(page, 0, 3)
    np.testing.assert_allclose(z, own, rtol=1e-4)
    page = ask("over", "row=L0H3&candidate=2")
    own = float(candidates()["L0H3"][0, 2])
    assert number(own) in panel(page) and "“on”" in panel(page)
    z = drawn_at(page, 0, 3)
    np.testing.assert_allclose(z, own, rtol=1e-4)


def test_an_address_opens_the_same_state_and_a_strange_one_none(browser, pages):
    page = browser.open(pages["several"], address="row=L2H1&prompt=2")
    page.wait("'drawn' in document.documentElement.dataset")
    assert "L2H1" in panel(page) and "prompt 2" in panel(page)
    page.evaluate("location.hash = '#row=<b>&prompt=99&candidate=7'")
    page.wait("document.querySelector('#panel').hidden")
    assert page.errors == []


def test_rows_are_found_and_sorted(ask):
    page = ask("one")
    names = "[...document.querySelectorAll('#listed tbody th')].map(e => e.textContent)"
    result = attribute(PROMPTS[0])
    page.evaluate("$('find').value = 'L1'; fillRows()")
    assert page.evaluate(names) == [f"L1H{i}" for i in range(5)]
    page.evaluate(
        "(one => one.click())([...document.querySelectorAll('#listed thead button')]"
        ".find(e => e.textContent === 'logits'))"
    )
    own = sorted((f"L1H{i}" for i in range(5)), key=lambda name: -float(result[name][0]))
    assert page.evaluate(names) == own
    page.evaluate("document.querySelector('#listed tbody button').click()")
    settle(page)
    assert own[0] in panel(page) and page.count("#listed tr.chosen") == 1


def test_an_audit_is_a_table_and_in_the_panel(ask):
    page = ask("audited", "row=L2H4")
    result = attribute(PROMPTS[0])
    audit = result.audit(rows=["L2H4", "L0H0"], progress=False)
    direct, total = float(audit.direct[0]), float(audit.total[0])
    assert cells_of(page, 0)[0] == [number(x) for x in (direct, total, total - direct)]
    table = page.evaluate(
        "document.querySelector('[aria-labelledby=audit] tbody, [aria-labelledby=audit] table')"
        ".innerText"
    )
    assert "L2H4" in table and number(total) in table
    drawn = "document.querySelector('[aria-labelledby=audit] .js-plotly-plot')"
    bars = page.evaluate(f"Array.from({drawn}._fullData[0].x)")
    np.testing.assert_allclose(bars, audit.direct.flatten(), rtol=1e-5)
    assert len(page.evaluate(f"{drawn}.layout.shapes")) == 1  # the chosen row
    said = page.evaluate("document.querySelector('[aria-labelledby=audit]').innerText")
    assert all(sentence in said for sentence in audit.sentences)


@pytest.mark.parametrize(("width", "dark"), [(400, True), (1200, False)])
def test_the_panel_leaves_the_page_as_wide_as_the_screen(ask, width, dark):
    page = ask("one", "row=L2H4&token=3", width=width, dark=dark)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    figure = "document.querySelector('#figure-0')"
    assert page.evaluate(f"Math.abs({figure}._fullLayout.width - {figure}.clientWidth)") <= 1
    box = page.evaluate("(r => [r.left, r.right, r.top])($('panel').getBoundingClientRect())")
    assert box[1] <= width and (width < 1000 or box[0] >= 799)


def test_what_a_user_wrote_is_text_in_the_panel(browser, tmp_path):
    result = direct_logit_attribution(bridge(), NASTY, "<script>alert(1)</script>", unit="head")
    page = browser.open(result.report(tmp_path / "page.html"))
    page.wait("'drawn' in document.documentElement.dataset")
    page.evaluate("choose({row: 'L2H4', token: 3})")
    settle(page)
    assert "<script>alert(1)</script>" in panel(page)
    assert page.evaluate("window.hacked || 0") == 0
    assert page.errors == [] and page.requests == []


def test_a_notebook_holds_the_page_in_a_frame_of_its_own(browser, tmp_path):
    html = attribute(PROMPTS[0]).explore()._repr_html_()
    assert html.startswith("<iframe srcdoc=") and 'sandbox="allow-scripts' in html
    path = tmp_path / "notebook.html"
    path.write_text(f'<!doctype html><meta charset="utf-8"><body>{html}</body>', encoding="utf-8")
    page = browser.open(path)
    inside = page.frame()
    inside.wait("'drawn' in document.documentElement.dataset")
    inside.evaluate("choose({row: 'L2H4'})")
    settle(inside)
    assert "L2H4" in panel(inside)
    assert page.evaluate("document.querySelector('iframe').contentDocument") is None  # isolated
    assert inside.errors == [] and page.errors == [] and page.requests == []
