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
    # As an id, it is what was meant.
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


def test_words_without_their_space_are_questioned_once():
    model = with_tokenizer("gpt2", spaced())
    with pytest.warns(UserWarning, match=r"'cat' has no .* \(also without: 'dog'\);") as told:
        direct_logit_attribution(model, "dog", "cat", "dog")
    assert len(told) == 1


def test_a_prompt_that_ends_with_a_space_is_questioned():
    model = with_tokenizer("gpt2", spaced())
    with pytest.warns(UserWarning, match="prompt 'dog ' ends with a space, which is a token"):
        direct_logit_attribution(model, "dog ", "cat")


def test_an_answer_that_is_the_incorrect_one_is_questioned(model):
    with pytest.warns(UserWarning, match=r"answer of prompt 1 and .* one token, 'w9' \(id 9\)"):
        result = direct_logit_attribution(model, tokens(), [5, 9], [7, 9])
    assert float(result.logit[1].abs()) < 1e-6 < float(result.logit[0].abs())
    with pytest.warns(UserWarning, match="The answer and its incorrect answer are one token"):
        direct_logit_attribution(model, tokens()[:1], 5, 5)


def two_ways(model, pos):
    """The logits of tokens 5 and 9 at the positions, `[batch, pos]` each."""
    logits = model(tokens()).detach()[:, pos]
    return logits[..., 5], logits[..., 9]


PAIRS = torch.tensor([[5, 9], [5, 9]])


@pytest.mark.parametrize("pos", [[-1], [-1, 3, 4]], ids=str)
@pytest.mark.parametrize("pairs", [PAIRS, PAIRS[:, None], [[5, 9], ["w5", "w9"]]], ids=str)
@pytest.mark.usefixtures("unchecked")
def test_columns_are_an_answer_and_an_incorrect_one(model, pos, pairs):
    right, wrong = two_ways(model, pos)
    result = direct_logit_attribution(model, tokens(), pairs, pos=pos)
    torch.testing.assert_close(result.logit, right - wrong, atol=1e-5, rtol=0)
    one = direct_logit_attribution(model, tokens()[:1], pairs[:1], pos=pos)
    torch.testing.assert_close(one.logit, (right - wrong)[:1], atol=1e-5, rtol=0)


def test_columns_at_two_positions_must_say_what_they_are(model):
    right, wrong = two_ways(model, [3, -1])
    with pytest.raises(TokenError, match=r"\(2, 2\) may be one per position, or an answer and an"):
        direct_logit_attribution(model, tokens(), PAIRS, pos=[3, -1])
    each = direct_logit_attribution(model, tokens(), PAIRS[:, :, None], pos=[3, -1])
    expected = torch.stack([right[:, 0], wrong[:, 1]], 1)
    torch.testing.assert_close(each.logit, expected, atol=1e-5, rtol=0)
    columns = direct_logit_attribution(model, tokens(), PAIRS[:, None], pos=[3, -1])
    torch.testing.assert_close(columns.logit, right - wrong, atol=1e-5, rtol=0)
    # With incorrect answers of their own, they are one per position as those are.
    both = direct_logit_attribution(model, tokens(), PAIRS, PAIRS.flip(1), pos=[3, -1])
    expected = torch.stack([(right - wrong)[:, 0], (wrong - right)[:, 1]], 1)
    torch.testing.assert_close(both.logit, expected, atol=1e-5, rtol=0)


def test_incorrect_answers_as_many_as_positions_must_say_what_they_are(model):
    right, wrong = two_ways(model, [2, 3, -1])
    third = model(tokens()).detach()[:, [2, 3, -1], 20]
    several = torch.tensor([[5, 9, 20], [5, 9, 20]])
    with pytest.raises(TokenError, match=r"\(2, 3\) may be one per position, or 3 incorrect"):
        direct_logit_attribution(model, tokens(), 7, several, pos=[2, 3, -1])
    with pytest.raises(TokenError, match=r"\(1, 3\) may be one per position"):
        direct_logit_attribution(model, tokens()[:1], 7, [5, 9, 20], pos=[2, 3, -1])
    own = model(tokens()).detach()[:, [2, 3, -1], 7]
    mean = direct_logit_attribution(model, tokens(), 7, several[:, None], pos=[2, 3, -1])
    expected = own - (right + wrong + third) / 3
    torch.testing.assert_close(mean.logit, expected, atol=1e-5, rtol=0)
    each = direct_logit_attribution(model, tokens(), 7, several[:, :, None], pos=[2, 3, -1])
    expected = own - torch.stack([right[:, 0], wrong[:, 1], third[:, 2]], 1)
    torch.testing.assert_close(each.logit, expected, atol=1e-5, rtol=0)


def test_one_answer_per_position_is_shared_by_the_prompts(model):
    """As TransformerLens reads one axis that is not the batch's."""
    result = direct_logit_attribution(model, tokens(), torch.tensor([5, 9, 20]), pos=[2, 3, -1])
    logits = model(tokens()).detach()
    expected = torch.stack([logits[:, 2, 5], logits[:, 3, 9], logits[:, -1, 20]], 1)
    torch.testing.assert_close(result.logit, expected, atol=1e-5, rtol=0)
