"""A logit difference is a difference of log-probabilities; a logit is no log-probability."""

import pytest
import torch

from tests.support.models import load
from tests.zoo.build import ANSWERS, INCORRECT, tokens
from tl_dla import attribute_path, direct_logit_attribution
from tl_dla.errors import ArgumentError


@pytest.mark.parametrize("name", ["gptj", "gemma2"])
@pytest.mark.parametrize("pos", [-1, [0, 4]])
def test_a_difference_is_that_of_the_models_log_probabilities(name, pos):
    model = load(name)
    nats = model(tokens()).log_softmax(-1)[:, pos]
    foils = torch.tensor([[5, 9, 11]]).expand(2, -1)
    several = direct_logit_attribution(model, tokens(), 7, foils, pos=pos, include_bias=False)
    expected = nats[..., 7] - nats[..., [5, 9, 11]].mean(-1)
    torch.testing.assert_close(several.log_prob_diff, expected.detach(), atol=1e-5, rtol=1e-5)
    one = direct_logit_attribution(model, tokens(), 7, 5, pos=pos)
    torch.testing.assert_close(one.log_prob_diff, one.logit, atol=1e-6, rtol=0)


def test_a_single_logit_is_none():
    model = load("gptj")
    alone = direct_logit_attribution(model, tokens(), 7)
    many = direct_logit_attribution(model, tokens(), candidate_tokens=[5, 7])
    heads = direct_logit_attribution(model, tokens(), ANSWERS, INCORRECT, unit="head")
    for result in (alone, many, attribute_path(heads, "L1H0", 3)):
        with pytest.raises(ArgumentError, match="attribute with incorrect_tokens"):
            _ = result.log_prob_diff
