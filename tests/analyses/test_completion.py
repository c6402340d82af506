"""Answers of several tokens: against one run for each token of them."""

import pytest
import torch

from tests.support.models import either, load
from tests.zoo.build import tokens
from tl_dla import TokenError, attribute_answer, direct_logit_attribution
from tl_dla.errors import ArgumentError

ANSWER, BASELINE = [5, 40, 9], [7, 20]


@pytest.mark.parametrize("unit", ["component", "head", "neuron", "source"])
@pytest.mark.parametrize("name", either("gpt2", "gemma2", "ln"))
def test_each_step_is_the_attribution_of_one_more_token(name, unit):
    model, prompts = load(name), tokens()[:, :6]
    result = attribute_answer(model, prompts, ANSWER, unit=unit)
    total = {}
    for step, answer in enumerate(ANSWER):
        before = torch.tensor(ANSWER[:step], dtype=torch.long).expand(2, -1)
        grown = torch.cat([prompts, before], 1)
        alone = direct_logit_attribution(model, grown, answer, unit=unit)
        for label in alone.labels:
            at = result.steps[label][:, step]
            torch.testing.assert_close(at, alone[label], atol=2e-6, rtol=1e-4)
            total[label] = total.get(label, 0) + alone[label]
    assert total.keys() == set(result.labels)
    for label, expected in total.items():
        torch.testing.assert_close(result[label], expected, atol=5e-6, rtol=1e-4)
    assert result.reconstruction.passed


@pytest.mark.parametrize("name", either("gpt2", "gemma2", "cohere", "ln"))
def test_a_baseline_of_another_length_is_subtracted(name):
    """In logits, against the model's own on each of the two texts."""
    model, prompts = load(name), tokens()[:, :6]
    result = attribute_answer(model, prompts, ANSWER, BASELINE)
    own = torch.zeros(2)
    for answer, sign in ((ANSWER, 1.0), (BASELINE, -1.0)):
        text = torch.cat([prompts, torch.tensor(answer).expand(2, -1)], 1)
        with torch.no_grad():
            logits = model(text)[:, 5:-1]
        own += sign * logits.gather(-1, text[:, 6:, None]).sum((1, 2))
    torch.testing.assert_close(result.logit, own, atol=1e-5, rtol=0)
    torch.testing.assert_close(result.attribution.sum(0), own, atol=1e-5, rtol=0)
    whole = attribute_answer(model, prompts, ANSWER).attribution
    less = attribute_answer(model, prompts, BASELINE).attribution
    torch.testing.assert_close(result.attribution, whole - less, atol=5e-6, rtol=1e-4)


def test_prompts_and_answers_may_all_differ_in_length():
    model = load("gemma2")
    texts = [" ".join(f"w{i}" for i in tokens()[0]), " ".join(f"w{i}" for i in tokens()[1, :7])]
    answers, baselines = [[5, 40, 9], [12]], [[7], [20, 21]]
    both = attribute_answer(model, texts, answers, baselines, unit="head")
    assert both.answers == [["w5", "w40", "w9"], ["w12"]] and both.baselines[1] == ["w20", "w21"]
    for i in range(2):
        alone = attribute_answer(model, texts[i], answers[i], baselines[i], unit="head")
        torch.testing.assert_close(
            both.attribution[:, i], alone.attribution[:, 0], atol=5e-6, rtol=0
        )
    table = both.to_dataframe()
    sums = table.assign(sign=table.answer.map({"answer": 1, "baseline": -1}))
    sums = sums[(sums.prompt == 0) & (sums.label == "L1H2")]
    assert float((sums.attribution * sums.sign).sum()) == pytest.approx(
        float(both["L1H2"][0]), abs=1e-5
    )
    assert list(sums.token) == ["w5", "w40", "w9", "w7"]


def test_an_answer_of_one_token_is_the_plain_attribution():
    model = load("gpt2")
    one = attribute_answer(model, tokens(), [5], [7])
    plain = direct_logit_attribution(model, tokens(), 5, 7)
    torch.testing.assert_close(one.attribution, plain.attribution, atol=2e-6, rtol=1e-4)
    label, value = one.top(1, prompt=1)[0]
    assert (label, pytest.approx(value, abs=1e-5)) == plain.top(1, by="magnitude", prompt=1)[0]
    assert "AnswerAttribution: 'w5' − 'w7'" in repr(one)


def test_what_is_no_answer_is_refused():
    model = load("gpt2")
    with pytest.raises(TokenError, match="The answer is no token"):
        attribute_answer(model, tokens(), "")
    with pytest.raises(TokenError, match="3 answers were given for 2 prompts"):
        attribute_answer(model, tokens(), ["w5", "w6", "w7"])
    with pytest.raises(TokenError, match="context"):
        attribute_answer(model, tokens(), [5] * 200)
    with pytest.raises(ArgumentError, match="say which, with prompt="):
        attribute_answer(model, tokens(), [5, 6]).top()
