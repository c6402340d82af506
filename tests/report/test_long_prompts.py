"""A page of a thousand tokens, by Chromium's own trace: what is painted first, and what blocks."""

import random

import pytest

from tests.support.browser import CHROMIUM, Browser
from tests.support.pages import WORDS, bridge
from tl_dla import direct_logit_attribution

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome installed")


@pytest.mark.slow
def test_a_page_of_a_thousand_tokens_is_painted_at_once_and_never_blocks(tmp_path, unchecked):
    model = bridge(n_layers=12, n_heads=12, n_positions=1024)
    text = " ".join(random.Random(0).choices(WORDS, k=999))
    result = direct_logit_attribution(model, text, "mat", "cat", unit="head")
    assert int(result.prompts.length) == 1000
    path = result.report(tmp_path / "page.html")
    assert path.stat().st_size < 5_000_000
    with Browser() as browser:
        trace = browser.trace(path, "'drawn' in document.documentElement.dataset")
    # Seconds of the processor on a slow machine: 0.13 for the largest figure, 0.6 for all.
    assert trace.first_paint < 1.0
    assert trace.longest < 0.2
    assert trace.total < 2.0
