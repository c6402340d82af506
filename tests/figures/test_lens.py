"""The grid of the lens: predictions in its cells, the tokens asked for in its colours and hover."""

import numpy as np
import pytest
import torch

from tests.support.pages import PROMPTS, bridge
from tl_dla.analyses.logit_lens import logit_lens
from tl_dla.figures.text import safe, visible


def test_the_lens_grid_shows_the_prediction_and_its_probability():
    lens = logit_lens(bridge(), PROMPTS[:2], ["mat", "on"])
    figure = lens.plot(prompt=1)
    cells, z = np.array(figure.data[0].text), np.asarray(figure.data[0].z)
    assert cells.shape == z.shape == (len(lens), 6)
    with torch.no_grad():
        own = bridge()(bridge().to_tokens(PROMPTS[1]))[0].softmax(-1)
    words = [bridge().tokenizer.decode([int(i)]) for i in own.argmax(-1)]
    assert [safe(visible(word)) for word in words] == list(cells[-1])
    np.testing.assert_allclose(z[-1], own.max(-1).values, rtol=1e-5)
    assert list(figure.data[0].y) == lens.labels
    ranks = lens.plot(prompt=1, colour="rank").data[0].z
    rank = (own[-1] > own[-1, bridge().to_single_token("on")]).sum()
    assert ranks[-1][-1] == pytest.approx(np.log10(1 + int(rank)))


def test_whitespace_tokens_are_made_visible():
    assert visible("\n") == "↵" and visible("  ") == "␣␣" and visible("") == "''"
    assert visible(" Paris") == " Paris" and visible("\xa0") == r"\xa0"


def test_the_tokens_asked_for_are_followed_in_every_hover():
    lens = logit_lens(bridge(), PROMPTS[:2], ["mat", "on"])
    with torch.no_grad():
        own = bridge()(bridge().to_tokens(PROMPTS[1]))[0, -1]
    wanted = bridge().to_single_token("on")
    rank = int((own > own[wanted]).sum())
    hover = lens.plot(prompt=1).data[0].customdata[-1][-1]
    assert f"asked for: 'on' {float(own.softmax(-1)[wanted]):.1%}, rank {rank}, logit" in hover
    figure = lens.plot(prompt=1, colour="rank")
    assert "rank of 'on'" in figure.layout.title.text and PROMPTS[1] in figure.layout.title.text
    assert figure.layout.coloraxis.reversescale  # the first has the strongest colour
