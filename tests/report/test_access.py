"""The page for everyone: named headings, tables and controls, and colours that can be read."""

import pytest

from tests.support.browser import CHROMIUM, Browser
from tests.support.pages import PROMPTS, bridge
from tl_dla import direct_logit_attribution

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome installed")

# What has no name, or less contrast with what is behind it than 4.5 (WCAG 2.2, level AA).
FAULTS = r"""
(() => {
  const light = c => { const [r, g, b] = c.map(v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b };
  const numbers = text => text.match(/[\d.]+/g).map(Number);
  const behind = e => { for (; e; e = e.parentElement) { const c = numbers(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] > .9) return c.slice(0, 3) } return [255, 255, 255] };
  const contrast = e => { const all = [numbers(getComputedStyle(e).color).slice(0, 3), behind(e)].map(light);
    return (Math.max(...all) + .05) / (Math.min(...all) + .05) };
  const own = selector => [...document.querySelectorAll(selector)].filter(e => !e.closest('.attention'));
  const ids = own('[id]').map(e => e.id);
  return [
    ...own('main h2, main h3').filter(e => !e.id),
    ...own('th').filter(e => !e.hasAttribute('scope')),
    ...own('.figure, section, nav, aside').filter(e => !e.getAttribute('aria-label') && !e.getAttribute('aria-labelledby')),
    ...own('details svg, table svg').filter(e => !e.getAttribute('aria-label')),
    ...own('input, select').filter(e => !e.labels.length),
    ...own('button').filter(e => !e.textContent.trim() && !e.ariaLabel),
    ...own('p, h1, h2, h3, td, th, summary, code, pre, label, button, span').filter(
      e => e.offsetParent && e.textContent.trim() && contrast(e) < 4.5),
    ...[...document.querySelectorAll('select')].filter(e => contrast(e) < 4.5),
  ].map(e => e.outerHTML.slice(0, 120)).concat(ids.filter((id, i) => ids.indexOf(id) !== i));
})()
"""  # noqa: E501


def test_everything_has_a_name_and_can_be_read(tmp_path):
    answers = ["mat", "on", "sat"], ["cat", "dog", "the"]
    result = direct_logit_attribution(bridge(), PROMPTS, *answers, unit="head")
    path = result.report(tmp_path / "page.html", audit=result.audit(k=2, progress=False))
    with Browser() as browser:
        for dark in False, True:
            page = browser.open(path, dark=dark, address="row=L2H4")
            page.wait("'drawn' in document.documentElement.dataset")
            assert page.evaluate(FAULTS) == []
            assert page.count("main h3[id]") >= 6 and page.count("th[scope]") > 40
