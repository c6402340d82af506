"""Answers, baselines and candidates: the many ways to say them, each the plain model's logits."""

import numpy as np
import pytest
import torch

from tests.support.models import counted, load, spaced, with_tokenizer
from tests.zoo.build import tokens
from tl_dla import TokenError, direct_logit_attribution


@pytest.fixture(scope="module")
def model():
    return load("gpt2")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (5, [5, 5]),
        ("w5", [5, 5]),
        (["w5", "w9"], [5, 9]),
        (["w5", 9], [5, 9]),
        ((5, 9), [5, 9]),
        (np.array([5, 9]), [5, 9]),
        (torch.tensor([5, 9]), [5, 9]),
        (torch.tensor([[5], [9]]), [5, 9]),
        ([["w5"], ["w9"]], [5, 9]),
        (torch.tensor([5, 9], dtype=torch.int32), [5, 9]),
        (np.int64(5), [5, 5]),
    ],
    ids=str,
)
def test_an_answer_can_be_said_in_many_ways(model, answer, expected):
    own = model(tokens())[[0, 1], -1, expected].detach()
    for options in ({}, {"incorrect_tokens": 30}):
        result = direct_logit_attribution(model, tokens(), answer, **options)
        want = own - model(tokens())[:, -1, 30].detach() if options else own
        torch.testing.assert_close(result.logit, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("incorrect", "expected"),
    [
        ([["w7", "w8"], ["w9", "w30"]], [[7, 8], [9, 30]]),
        (torch.tensor([[7, 8, 20], [9, 10, 11]]), [[7, 8, 20], [9, 10, 11]]),
        (torch.tensor([[7, 8, 20]]), [[7, 8, 20], [7, 8, 20]]),
        (["w7", "w9"], [[7], [9]]),
    ],
    ids=["words", "ids", "shared", "one each"],
)
def test_several_incorrect_answers_are_a_mean(model, incorrect, expected):
    logits = model(tokens())[:, -1].detach()
    baseline = logits.gather(1, torch.tensor(expected)).mean(1)
    result = direct_logit_attribution(model, tokens(), 5, incorrect)
    torch.testing.assert_close(result.logit, logits[:, 5] - baseline, atol=1e-5, rtol=0)


def test_one_prompt_takes_a_list_as_several_incorrect_answers(model):
    logits = model(tokens()[:1])[0, -1].detach()
    result = direct_logit_attribution(model, tokens()[0], "w5", ["w7", "w9", "w31"])
    expected = logits[5] - logits[[7, 9, 31]].mean()
    torch.testing.assert_close(result.logit[0], expected, atol=1e-5, rtol=0)


def test_one_candidate_is_one_token():
    model = with_tokenizer("gpt2", spaced())
    result = direct_logit_attribution(model, "dog", candidate_tokens=" cat")
    own = model("dog")[0, -1, model.to_single_token(" cat")].detach()
    assert result.logit.shape == (1, 1)
    torch.testing.assert_close(result.logit[0, 0], own, atol=1e-5, rtol=0)


def test_an_answer_without_its_space_is_questioned():
    model = with_tokenizer("gpt2", spaced())
    with pytest.warns(UserWarning, match="'cat' has no leading space.*' cat'.*id 12"):
        direct_logit_attribution(model, "dog", "cat")
    # After a space, or as an id, it is what was meant.
    direct_logit_attribution(model, "dog ", "cat")
    direct_logit_attribution(model, "dog", 12)


def test_an_answer_of_several_tokens_says_which_and_what_to_do():
    model = with_tokenizer("gpt2", spaced())
    with counted(model) as shapes:
        with pytest.raises(
            TokenError, match=r"'owl' is 3 tokens \('o', 'w', 'l'\): with a leading"
        ):
            direct_logit_attribution(model, "dog", "owl")
        with pytest.raises(TokenError, match=r"2 tokens \(' owl', ' cat'\): attribute its first"):
            direct_logit_attribution(model, "dog", " owl cat")
    assert shapes == []
