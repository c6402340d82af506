"""The view of a result: letters of any script survive being cut into tokens."""

import pytest

from tests.support.pages import PROMPTS, bridge
from tl_dla import attribute_attention, direct_logit_attribution, top_heads_with_patterns
from tl_dla.core.view import view_of
from tl_dla.inputs.text import pieces, text_of
from tl_dla.inputs.tokens import token_strings
from tl_dla.loading import load_model


@pytest.mark.parametrize(
    "text", ["a 🎉 b", "日本語です", "שלום עולם", "naïve 👩‍🚀!", "plain words"]
)
def test_letters_that_several_tokens_spell_are_shown_once(text):
    model = load_model("demo")
    ids = model.to_tokens(text, prepend_bos=False)[0]
    tokens = pieces(model, ids)
    assert len(tokens) == len(ids) and not any("\ufffd" in token for token in tokens)
    whole = [token for token in tokens if not token.startswith("⟨")]
    assert "".join(whole) == text_of(model, ids) == text
    if text.isascii():
        assert len(whole) == len(tokens)


def test_bytes_that_are_no_letter_are_shown_as_bytes():
    model = load_model("demo")
    ids = model.to_tokens("🎉", prepend_bos=False)[0]
    assert len(ids) > 1
    shown = pieces(model, ids[:1])
    assert token_strings(model, ids[:1]) == shown
    assert shown == [f"⟨{'🎉'.encode()[: len(bytes.fromhex(shown[0][1:-1]))].hex(' ').upper()}⟩"]


def test_results_of_heads_name_tokens_so_that_no_letter_is_lost():
    model, text = load_model("demo"), "a 🎉 b"
    tokens = pieces(model, model.to_tokens(text)[0])
    result = direct_logit_attribution(model, text, " the", unit="head")
    [head] = top_heads_with_patterns(result, heads="L1H1")
    assert head.tokens == [tokens] and "🎉" in "".join(tokens)
    asked = attribute_attention(model, text, "L1H1", key=2, versus=1)
    assert asked.tokens == [(tokens[-1], tokens[2], tokens[1])]


def test_samples_say_where_they_are():
    result = direct_logit_attribution(bridge(), PROMPTS, "mat", pos=[0, -1])
    view = view_of(result, prompt=-1)
    assert view.names == ["prompt 2, position 0 '[BOS]': [BOS] a dog",
                          "prompt 2, position 2 'dog': [BOS] a dog"]  # fmt: skip
    assert view.n_prompts == 1 and view.several_positions and not view.over_candidates
