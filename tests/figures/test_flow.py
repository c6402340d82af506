"""The picture of the flow: its numbers, its lines, what stands beside it."""

import numpy as np
import pytest

from tests.support.models import load
from tests.zoo.build import ANSWERS, INCORRECT, tokens
from tl_dla import attribute_inputs
from tl_dla.core.view import view_of
from tl_dla.errors import ArgumentError

LAYERS = ["0_pre", "1_pre", "2_pre", "final_post"]


def attribute(name, **options):
    return attribute_inputs(load(name), tokens(), ANSWERS, INCORRECT, **options)


def test_each_line_of_the_picture_adds_up_to_the_logit():
    result = attribute("gpt2", pos=[4, -1])
    figure = result.plot_flow(prompt=1, position=0)
    drawn = figure.data[0]
    assert list(drawn.y) == LAYERS and drawn.z.shape == (4, 5 + 1)
    np.testing.assert_allclose(drawn.z[:, :5], result.flow[:, 1, 0, :5].numpy(), atol=1e-6)
    np.testing.assert_allclose(drawn.z.sum(1), float(result.logit[1, 0]), atol=1e-5)
    shares = drawn.z / float(result.logit[1, 0])
    np.testing.assert_allclose(drawn.customdata, shares, rtol=1e-4)
    assert [tick.strip() for tick in figure.layout.xaxis.ticktext][-1] == "biases"
    assert figure.layout.coloraxis.cmin == -figure.layout.coloraxis.cmax
    assert "each line adds up to" in figure.layout.title.text
    assert "position 4" in figure.layout.title.text and "✓" in figure.layout.title.text


def test_a_model_without_biases_has_no_column_for_them():
    result = attribute("llama")
    figure = result.plot_flow(candidate=0, title="", width=400)
    assert figure.data[0].z.shape == (4, 11) and figure.layout.width == 400
    assert figure.layout.title.text in (None, "")


def test_candidates_have_a_picture_each():
    result = attribute_inputs(load("gpt2"), tokens(), candidate_tokens=[5, 9])
    figure = result.plot_flow(candidate=1)
    np.testing.assert_allclose(figure.data[0].z[:, :11], result.flow[:, 0, 1].numpy(), atol=1e-6)


def test_what_is_not_there_is_not_drawn():
    result = attribute_inputs(load("gpt2"), ["w3 w4 w5", "w7"], 5, 9, pos=slice(0, 3))
    with pytest.raises(ArgumentError, match="position must be one of the result's 2"):
        result.plot_flow(prompt=1, position=2)
    with pytest.raises(ArgumentError, match="prompt must be one of the result's 2"):
        result.plot_flow(prompt=2)
    _, cache = load("gpt2").run_with_cache(tokens())
    del cache.cache_dict["embed.hook_in"]
    alone = attribute_inputs(load("gpt2"), None, ANSWERS, INCORRECT, cache=cache)
    with pytest.raises(ArgumentError, match="as `input` beside it"):
        alone.plot_flow()


def test_rows_of_tokens_are_named_with_their_text():
    ids = tokens()[:1]
    one = attribute_inputs(load("llama"), ids, ANSWERS[:1], INCORRECT[:1])
    named = [f"embed←{i} 'w{token}'" for i, token in enumerate(ids[0].tolist())]
    assert [label.replace("' w", "'w") for label in view_of(one).labels] == named
    assert view_of(attribute("llama")).labels == one.labels  # of several prompts: places alone
    assert view_of(attribute("llama"), 0).labels == view_of(one).labels
