"""Answers of several tokens: against one run for each token of them."""

import pytest
import torch

from tests.support.models import either, load
from tests.zoo.build import hf_reference, tokens
from tl_dla import (
    ArgumentError,
    TokenError,
    UnsupportedModelError,
    attribute_answer,
    attribute_completion,
    direct_logit_attribution,
)
from tl_dla.core import run

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
    with pytest.warns(UserWarning, match="has 3 tokens and its baseline 2"):
        result = attribute_answer(model, prompts, ANSWER, [BASELINE] * 2)
    assert "sums over different numbers of tokens" in repr(result)
    own = torch.zeros(2)
    for answer, sign in ((ANSWER, 1.0), (BASELINE, -1.0)):
        text = torch.cat([prompts, torch.tensor(answer).expand(2, -1)], 1)
        with torch.no_grad():
            logits = model(text)[:, 5:-1]
        own += sign * logits.gather(-1, text[:, 6:, None]).sum((1, 2))
    torch.testing.assert_close(result.logit, own, atol=1e-5, rtol=0)
    torch.testing.assert_close(result.attribution.sum(0), own, atol=1e-5, rtol=0)
    whole = attribute_answer(model, prompts, ANSWER).attribution
    assert result.steps.attribution.shape[1:] == (2, 3)
    less = attribute_answer(model, prompts, [BASELINE] * 2).attribution
    torch.testing.assert_close(result.attribution, whole - less, atol=5e-6, rtol=1e-4)


def test_prompts_and_answers_may_all_differ_in_length():
    model = load("gemma2")
    texts = [" ".join(f"w{i}" for i in tokens()[0]), " ".join(f"w{i}" for i in tokens()[1, :7])]
    answers, baselines = [[5, 40, 9], [12]], [[7], [20, 21]]
    with pytest.warns(UserWarning, match="The answer of prompt 0 has 3 tokens"):
        both = attribute_answer(model, texts, answers, baselines, unit="head")
    assert both.answers == [["w5", "w40", "w9"], ["w12"]] and both.baselines[1] == ["w20", "w21"]
    for i in range(2):
        with pytest.warns(UserWarning, match="The answer has"):
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
    with pytest.raises(TokenError, match=r"may be one answer of 2 tokens, or a token for each"):
        attribute_answer(model, tokens(), [5, 6])
    with pytest.raises(TokenError, match=r"it has shape \(1, 1, 2\)"):
        attribute_answer(model, tokens(), torch.tensor([[[5, 6]]]))
    with pytest.raises(TokenError, match="3 answers were given for 2 prompts"):
        attribute_answer(model, tokens(), torch.tensor([[5, 6]] * 3))
    with pytest.raises(TokenError, match=r"'w\\udcff' is no Unicode at character 1"):
        attribute_answer(model, tokens(), "w\udcff")
    with pytest.raises(TokenError, match="The answer is no token"):
        attribute_answer(model, tokens(), "")
    with pytest.raises(TokenError, match="3 answers were given for 2 prompts"):
        attribute_answer(model, tokens(), ["w5", "w6", "w7"])
    with pytest.raises(TokenError, match="context"):
        attribute_answer(model, tokens(), [5] * 200)
    found = attribute_answer(model, tokens(), [5, 6, 7])
    with pytest.raises(ArgumentError, match="say which, with prompt="):
        found.top()
    with pytest.raises(ArgumentError, match="k must be at least 1; -1 was given"):
        found.top(-1, prompt=0)
    with pytest.raises(ArgumentError, match="prompt must be one of the result's 2; 3 was given"):
        found.top(prompt=3)


# ---- each token's own baseline, probability and rank -------------------------------------------


def plain_logits(name, text, first):
    """The plain module's logits before each token of the answer."""
    with torch.no_grad():
        return hf_reference(name)(text).logits[:, first - 1 : -1]


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_probabilities_ranks_and_baselines_are_the_plain_models(name, monkeypatch):
    """Also with the prompts run one by one."""
    model, prompts = load(name), tokens()[:, :6]
    answers = torch.tensor([[5, 40, 9], [7, 20, 11]])  # one for each prompt
    logits = plain_logits(name, torch.cat([prompts, answers], 1), 6)
    monkeypatch.setattr(run, "_LOGITS_AT_ONCE", 3 * model.cfg.d_vocab)
    own = logits.gather(-1, answers[..., None])[..., 0]
    others = logits.scatter(-1, answers[..., None], -torch.inf)
    found = attribute_answer(model, prompts, answers, "runner-up", unit="head")
    log_probs = logits.log_softmax(-1).gather(-1, answers[..., None])[..., 0]
    torch.testing.assert_close(found.log_probs, log_probs, atol=2e-5, rtol=1e-4)
    assert torch.equal(found.ranks, (logits > own[..., None]).sum(-1))
    assert torch.equal(found.odds.runner_up, others.argmax(-1))
    torch.testing.assert_close(found.steps.logit, own - others.max(-1).values, atol=3e-5, rtol=1e-4)
    mean = attribute_answer(model, prompts, answers, "mean")
    torch.testing.assert_close(mean.steps.logit, own - logits.mean(-1), atol=3e-5, rtol=1e-4)
    torch.testing.assert_close(mean.attribution.sum(0), mean.logit, atol=5e-5, rtol=1e-4)
    word = attribute_answer(model, prompts, "w5 w40", "w7 w33")  # a text is one all the same
    assert word.baselines == [["w7", "w33"]] * 2 and word.against is None


# ---- completions -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", either("gpt2", "gemma2", "ln"))
def test_a_completion_is_what_the_model_says_and_each_token_as_if_asked_alone(name):
    model, prompt = load(name), tokens(1, 6)
    found = attribute_completion(model, prompt, max_new_tokens=4, unit="head", stop_at_eos=False)
    text = prompt
    for step in range(4):
        with torch.no_grad():
            nxt = model(text)[:, -1].argmax(-1, keepdim=True)
        alone = direct_logit_attribution(model, text, nxt[0], unit="head")
        torch.testing.assert_close(
            found.steps.attribution[:, 0, step], alone.attribution[:, 0], atol=5e-6, rtol=1e-4
        )
        text = torch.cat([text, nxt], 1)
    assert not found.ranks.any() and len(found.answers[0]) == 4
    given = attribute_completion(model, prompt, text[0, 6:].tolist(), unit="head")
    assert torch.equal(given.attribution, found.attribution)
    assert found.segments == [["prompt"] * 6 + ["answer"] * 4]


@pytest.mark.parametrize("name", either("gpt2", "ln"))
def test_a_model_whose_end_is_not_known_says_all_that_it_may(name, monkeypatch):
    model, text = load(name), tokens(1, 6)
    monkeypatch.setattr(model, "tokenizer", None)
    monkeypatch.setattr(model.cfg, "eos_token_id", None, raising=False)
    found = attribute_completion(model, text, max_new_tokens=3)
    with torch.no_grad():
        for _ in range(3):
            text = torch.cat([text, model(text)[:, -1:].argmax(-1)], 1)
    assert found.answers == [[str(token) for token in text[0, 6:].tolist()]]
    [stop] = text[0, 6:7].tolist()
    assert len(attribute_completion(model, text[:, :6], eos_token_id=stop).answers[0]) == 1


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated")  # transformers 5.24
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_what_the_model_keeps_of_earlier_tokens_is_left_alone_where_it_is_empty(name, monkeypatch):
    """As TransformerLens 4.3 keeps it with transformers 5.24."""
    model, text = load(name), tokens(1, 6)
    attention = type(model.blocks[0].attn)
    monkeypatch.setattr(attention, "_update_kv_cache", lambda self, k, v, **_: (k, v))
    options = {"max_new_tokens": 4, "stop_at_eos": False, "do_sample": False}
    forgetful = model.generate(text, return_type="tokens", verbose=False, **options)
    found = attribute_completion(model, text, **options)
    with torch.no_grad():
        for _ in range(4):
            text = torch.cat([text, model(text)[:, -1:].argmax(-1)], 1)
    assert not torch.equal(forgetful, text)
    assert torch.equal(found.steps.query.targets.ids[0, :, 0], text[0, 6:])


@pytest.mark.parametrize("name", either("gpt2", "ln"))
def test_a_text_that_the_model_would_not_say_is_refused(name, monkeypatch):
    model, text = load(name), tokens(1, 6)
    with torch.no_grad():
        for rank in (0, 2):
            chosen = model(text)[:, -1:].topk(rank + 1).indices[..., rank]
            text = torch.cat([text, chosen], 1)
    monkeypatch.setattr(model, "generate", lambda *_, **__: text)
    with pytest.raises(UnsupportedModelError, match="as token 1 of .* gives rank 2 "):
        attribute_completion(model, text[:, :6], max_new_tokens=2)


@pytest.mark.usefixtures("unchecked")
def test_options_of_generate_are_passed_on_and_what_does_not_fit_is_refused():
    model, prompt = load("gpt2"), tokens(1, 6)
    with torch.no_grad():
        stop = int(model(prompt)[0, -1].argmax())
    assert len(attribute_completion(model, prompt, eos_token_id=stop).answers[0]) == 1
    with pytest.raises(ArgumentError, match="untl= is no argument .* it has none of that name"):
        attribute_completion(model, prompt, untl="head")
    with pytest.raises(ArgumentError, match="do_sample= .* the completion is there already"):
        attribute_completion(model, prompt, "w5", do_sample=True)
    with pytest.raises(TokenError, match="max_new_tokens must be 1 to"):
        attribute_completion(model, prompt, max_new_tokens=1000)
    with pytest.raises(TokenError, match="One prompt is completed at a time; 2 were given"):
        attribute_completion(model, tokens(), "w5")
    with pytest.raises(ArgumentError, match='baseline must be None, "mean" or "runner-up"'):
        attribute_completion(model, prompt, "w5", baseline="w7")
    with pytest.raises(TokenError, match="no chat template"):
        attribute_completion(model, [{"role": "user", "content": "w5"}])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("given", [2, 2.5, [2.5], [None], {5}, b"w5", {"w5": 1}, iter([5])])
def test_what_holds_no_tokens_in_order_is_refused(given):
    model = load("gpt2")
    with pytest.raises(TokenError, match=r"completion must be a text or token ids, as \[5, 9\]"):
        attribute_completion(model, tokens()[0], given)
    with pytest.raises(TokenError, match=r"answer must be a text or token ids, as \[5, 9\]"):
        attribute_answer(model, tokens()[:1], given)
