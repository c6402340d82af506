"""Why a head looks where it does, in a line: the sentence of `attribute_attention`, chosen well."""

import pytest
import torch

from tests.support.models import of_4
from tests.zoo.build import boot, tokens
from tl_dla import (
    attribute_attention,
    direct_logit_attribution,
    load_model,
    top_heads_with_patterns,
)
from tl_dla.cli import main

pytestmark = of_4

PROMPTS = [
    "When John and Mary went to the shops, John gave the bag to",
    "When Tom and James went to the park, James gave the ball to",
]


@pytest.fixture(scope="module")
def demo():
    return load_model("demo")


@pytest.fixture(scope="module")
def heads(demo):
    names = [" Mary", " Tom"], [" John", " James"]
    return top_heads_with_patterns(direct_logit_attribution(demo, PROMPTS, *names, unit="head"))


def test_the_answer_is_compared_with_the_incorrect_answer(heads):
    mover = next(head for head in heads if head.label == "L3H0")
    assert mover.why[0] == (
        "looks at ' Mary' rather than ' John' because of L2H0 in the query and 0_mlp_out in the key"
    )
    assert mover.why[1].startswith("looks at ' Tom' rather than ' James' because of")
    assert mover.why[0] in repr(mover) and mover.why[1] in list(heads.summary(1)["why"])


def test_the_token_read_most_is_compared_with_the_next_of_another_sort(demo):
    result = direct_logit_attribution(
        demo, "The Eiffel Tower is in the city of", " Paris", unit="head"
    )
    for head in top_heads_with_patterns(result, 3):
        row, ids = head.pattern[0, -1], result.prompts.packed[0]
        key = int(row.argmax())
        versus = int(torch.where(ids == ids[key], -1.0, row).argmax())
        own = attribute_attention(
            demo, "The Eiffel Tower is in the city of", head.label, key=key, versus=versus
        )
        assert head.why == [own.sentence()]


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_next"])
def test_prompts_of_different_lengths_at_several_positions(name):
    """Each prompt's last attributed position; rotations, norms, layers of other kinds."""
    model, prompts = boot(name), ["w3 w4 w5 w6 w7", "w8 w9 w4"]
    result = direct_logit_attribution(model, prompts, "w5", "w7", unit="head", pos=[0, -1])
    for head in top_heads_with_patterns(result, 2):
        for b, prompt in enumerate(prompts):
            texts = head.tokens[b]
            row = head.pattern[b, len(texts) - 1, : len(texts)]
            key = int(row.argmax())
            others = [i for i in row.argsort(descending=True).tolist() if texts[i] != texts[key]]
            if texts[key] in ("w5", "w7"):
                others = [i for i in others if texts[i] in ("w5", "w7")] or others
            own = attribute_attention(model, prompt, head.label, key=key, versus=others[0])
            assert head.why[b] == own.sentence()


def test_a_cache_gives_the_same_line_where_it_holds_the_positions():
    for name, same in ("gpt2", True), ("llama", False):
        model = boot(name)
        result = direct_logit_attribution(model, tokens(), torch.tensor([5, 9]), unit="head")
        _, cache = model.run_with_cache(tokens())
        ran = top_heads_with_patterns(result, 1)
        kept = top_heads_with_patterns(result, 1, cache=cache)
        assert all(all(head.why) for head in ran)
        assert [head.why for head in kept] == [h.why if same else ["", ""] for h in ran]


def test_where_scores_are_not_read_there_is_no_line():
    result = direct_logit_attribution(boot("native_rms"), tokens(), 5, unit="head")
    [head, *_] = top_heads_with_patterns(result, 1)
    assert head.why == ["", ""] and not repr(head).endswith("; ")


def test_the_report_says_it(tmp_path, heads):
    page = tmp_path / "page.html"
    given = ["--answer", " Mary", "--incorrect", " John", "--top", "1", "--out", str(page)]
    assert main(["report", PROMPTS[0], *given]) == 0
    said = "looks at ' Mary' rather than ' John' because of L2H0 in the query"
    assert said in page.read_text().replace("&#39;", "'")
