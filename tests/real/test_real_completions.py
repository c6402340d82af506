"""A chat with SmolLM2-Instruct: every token's rows, against a call on the prompt up to it."""

import pytest
import torch

from tl_dla import attribute_completion, direct_logit_attribution
from tl_dla.loading import load_model

pytestmark = [pytest.mark.real, pytest.mark.slow]

MESSAGES = [
    {"role": "system", "content": "Answer in one short sentence."},
    {"role": "user", "content": "What is the capital of France?"},
]


@pytest.mark.parametrize("unit", ["component", "head"])
def test_each_token_of_an_answer_has_the_rows_of_a_call_of_its_own(unit):
    model = load_model("smollm2", device="cpu")
    found = attribute_completion(model, MESSAGES, max_new_tokens=6, unit=unit)
    [said] = found.answers
    text = model.tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    ids = model.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    assert len(said) >= 4 and "Paris" in "".join(said)
    for step in range(len(said)):
        with torch.no_grad():
            logits = model(ids)[0, -1]
        token = int(logits.argmax())  # greedy: the model's own next token
        assert model.tokenizer.decode([token]) == said[step]
        assert found.ranks[0, step] == 0
        log_prob = logits.double().log_softmax(-1)[token]
        assert float(found.log_probs[0, step]) == pytest.approx(float(log_prob), abs=1e-4)
        alone = direct_logit_attribution(model, ids, token, unit=unit)
        assert alone.labels == found.steps.labels
        rows = found.steps.attribution[:, 0, step]
        torch.testing.assert_close(rows, alone.attribution[:, 0], atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(rows.sum(), logits[token], atol=2e-4, rtol=1e-5)
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
    assert found.segments[0][-1] == "assistant" and "system" in found.segments[0]
    assert found.reconstruction.passed
