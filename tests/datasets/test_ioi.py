"""IOI prompts: the answer is the name not repeated, groups are matched, names are single tokens."""

import re

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tl_dla.datasets.ioi import NAMES, TEMPLATES, classic_prompts, ioi_prompts
from tl_dla.errors import TokenError
from tl_dla.loading import load_model


def tokenizer_of(names, unk_token=None):
    """A tokenizer in which exactly these names are single tokens; the rest is bytes, or unknown."""
    units = [unk_token] if unk_token else sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {unit: i for i, unit in enumerate([*units, *(f"Ġ{name}" for name in names)])}
    if unk_token:
        bpe = Tokenizer(models.WordLevel(vocab, unk_token))
    else:
        bpe = Tokenizer(models.BPE(vocab, [], ignore_merges=True))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token=unk_token)


EVERY_NAME = tokenizer_of(NAMES)


def test_the_answer_occurs_once_and_the_incorrect_name_twice():
    for prompt in ioi_prompts(EVERY_NAME, 60):
        words = re.findall(r" \w+", prompt["prompt"])
        assert words.count(prompt["answer"]) == 1
        assert words.count(prompt["incorrect"]) == 2
        assert words[-1] in (" to", " for")


def test_groups_are_the_order_of_the_names():
    for prompt in ioi_prompts(EVERY_NAME, 60):
        letters = {prompt["answer"].strip(): "A", prompt["incorrect"].strip(): "B"}
        order = "".join(letters.get(word, "") for word in re.findall(r"\w+", prompt["prompt"]))
        assert order + "A" == prompt["group"]


def test_neighbours_differ_in_the_order_of_the_names_only():
    prompts = ioi_prompts(EVERY_NAME, 60)
    for abba, baba in zip(prompts[::2], prompts[1::2], strict=True):
        assert (abba["group"], baba["group"]) == ("ABBA", "BABA")
        assert abba["answer"] == baba["answer"] and abba["incorrect"] == baba["incorrect"]
        assert abba["template"] == baba["template"]
        assert abba["prompt"] != baba["prompt"]
        assert sorted(abba["prompt"].split()) == sorted(baba["prompt"].split())


def test_a_seed_fixes_the_prompts_and_another_changes_them():
    assert ioi_prompts(EVERY_NAME, 20, seed=1) == ioi_prompts(EVERY_NAME, 20, seed=1)
    assert ioi_prompts(EVERY_NAME, 20, seed=1) != ioi_prompts(EVERY_NAME, 20, seed=2)
    assert ioi_prompts(EVERY_NAME, 20, seed=1)[:7] == ioi_prompts(EVERY_NAME, 7, seed=1)


def test_every_template_and_most_names_come_up():
    prompts = ioi_prompts(EVERY_NAME, 400)
    assert {prompt["template"] for prompt in prompts} == set(TEMPLATES)
    assert len({prompt["answer"] for prompt in prompts}) > len(NAMES) * 0.9


@pytest.mark.parametrize("unk_token", [None, "<unk>"])
def test_names_that_are_not_single_tokens_are_left_out(unk_token):
    tokenizer = tokenizer_of(["Mary", "Tom"], unk_token)
    prompts = ioi_prompts(tokenizer, 20)
    assert {prompt["answer"] for prompt in prompts} == {" Mary", " Tom"}
    with pytest.raises(TokenError, match="of the 2 given, this tokenizer has 1: pass names="):
        ioi_prompts(tokenizer, 4, names=["Tom", "John"])


def test_names_and_templates_of_ones_own():
    (prompt,) = ioi_prompts(
        tokenizer_of(["Ada", "Bo"]),
        1,
        names=["Ada", "Bo", "Ada"],
        templates=["As {first} and {second} slept, {subject} sang for"],
    )
    assert prompt["prompt"] in {
        "As Ada and Bo slept, Bo sang for",
        "As Bo and Ada slept, Ada sang for",
    }


@pytest.mark.parametrize(
    "template", ["{first} and {second}", "{first} {second} {subject} {animal}", ""]
)
def test_a_template_without_the_fields_is_refused(template):
    with pytest.raises(TokenError, match=r"A template has the fields {first}, {second} and"):
        ioi_prompts(EVERY_NAME, 1, templates=[template])


def test_a_model_without_a_tokenizer_is_refused():
    class Model:
        tokenizer = None

    with pytest.raises(TokenError, match="the model given has none"):
        ioi_prompts(Model(), 1)


def test_the_classic_prompts_are_those_of_the_demo():
    assert [tuple(prompt.values())[:4] for prompt in classic_prompts()] == [
        ("When John and Mary went to the shops, John gave the bag to", " Mary", " John", "BABA"),
        ("When John and Mary went to the shops, Mary gave the bag to", " John", " Mary", "ABBA"),
        ("When Tom and James went to the park, James gave the ball to", " Tom", " James", "ABBA"),
        ("When Tom and James went to the park, Tom gave the ball to", " James", " Tom", "BABA"),
        ("When Dan and Sid went to the shops, Sid gave an apple to", " Dan", " Sid", "ABBA"),
        ("When Dan and Sid went to the shops, Dan gave an apple to", " Sid", " Dan", "BABA"),
        ("After Martin and Amy went to the park, Amy gave a drink to", " Martin", " Amy", "ABBA"),
        (
            "After Martin and Amy went to the park, Martin gave a drink to",
            " Amy",
            " Martin",
            "BABA",
        ),
    ]


def test_the_classic_prompts_keep_the_pairs_that_a_tokenizer_has():
    assert len(classic_prompts(EVERY_NAME)) == 6  # Sid is not among NAMES
    two = classic_prompts(tokenizer_of(["Mary", "John", "Tom"]))
    assert [prompt["answer"] for prompt in two] == [" Mary", " John"]
    with pytest.raises(TokenError, match="only Mary, Tom, of different pairs: use ioi_prompts"):
        classic_prompts(tokenizer_of(["Mary", "Tom"]))
    with pytest.raises(TokenError, match="this tokenizer has 1"):
        classic_prompts(tokenizer_of(["Mary"]))


@pytest.mark.real
@pytest.mark.slow
def test_smollm2_solves_the_task():
    model = load_model("smollm2")
    classic = classic_prompts(model)
    assert len(classic) == 8
    solved = []
    for prompt in classic + ioi_prompts(model, 16):
        logits = model(model.to_tokens(prompt["prompt"]))[0, -1].detach()
        answer, incorrect = (model.to_single_token(prompt[key]) for key in ("answer", "incorrect"))
        solved.append(bool(logits[answer] > logits[incorrect]))
    assert all(solved[:8])
    assert sum(solved[8:]) >= 14  # measured: 15 of 16
