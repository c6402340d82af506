"""Conversations as the tokenizer's own template writes them, and the role behind each token."""

import pytest
import torch

from tests.support.models import with_tokenizer, words
from tl_dla import TokenError, attribute_completion

TEMPLATE = (
    "w1 {% for m in messages %}w90 {{ m.role.replace('system', 'w91').replace('user', 'w92')"
    ".replace('assistant', 'w93') }} {{ m.content | trim }} w94 {% endfor %}"
    "{% if add_generation_prompt %}w90 w93 {% endif %}"
)
MESSAGES = [
    {"role": "system", "content": "w5 w6"},
    {"role": "user", "content": " w7 w8 w5 "},
]
ROLES = ["template"] * 3 + ["system"] * 2 + ["template"] * 3 + ["user"] * 3 + ["template"] * 3


@pytest.fixture(scope="module")
def model():
    model = with_tokenizer("gpt2", words())
    model.tokenizer.chat_template = TEMPLATE
    return model


def test_a_conversation_is_laid_out_by_the_template_and_its_tokens_are_named(model):
    found = attribute_completion(model, MESSAGES, max_new_tokens=3, stop_at_eos=False)
    ids = model.tokenizer.apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_dict=False
    )
    packed = found.steps.prompts.packed[0]
    assert packed[: len(ids)].tolist() == ids
    assert found.segments == [ROLES + ["assistant"] * 3]
    with torch.no_grad():
        assert int(model(torch.tensor([ids]))[0, -1].argmax()) == int(
            found.steps.targets.ids[0, 0, 0]
        )


def test_the_last_message_of_the_assistant_is_the_completion(model):
    said = [*MESSAGES, {"role": "assistant", "content": "w30 w31"}]
    found = attribute_completion(model, said)
    assert found.answers == [["w30", "w31"]]
    assert found.segments == [ROLES + ["assistant"] * 2]
    same = attribute_completion(model, MESSAGES, "w30 w31")
    assert torch.equal(same.attribution, found.attribution)


def test_what_is_no_message_is_refused(model):
    with pytest.raises(TokenError, match="A message is a dict with role and content"):
        attribute_completion(model, [{"role": "user"}])
    with pytest.raises(TokenError, match="The last message is empty"):
        attribute_completion(model, [*MESSAGES, {"role": "assistant", "content": ""}])
