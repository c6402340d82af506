"""Prompts and positions: what they are taken for, and the sentences that refuse them.

A prompt in a batch, whatever the padding, gives what it gives alone; every refusal comes before
the model has run.
"""

import numpy as np
import pytest
import torch

from tests.support.models import counted, either, load, with_tokenizer, words
from tests.zoo.build import tokens
from tl_dla import TlDlaError, TokenError, direct_logit_attribution
from tl_dla.errors import ArgumentError
from tl_dla.inputs.tokens import read_prompts

# No word starts with w0, w1 or w2: those are special tokens, found first.
TEXTS = ["w5 w7 w9 w31 w30", "w8 w6", "w40 w41 w42 w8"]
IDS = [[1, 5, 7, 9, 31, 30], [1, 8, 6], [1, 40, 41, 42, 8]]
LENGTHS = torch.tensor([6, 3, 5])


# ---- prompts of different lengths --------------------------------------------------------------


@pytest.fixture(scope="module", params=["w0", "w1", "w2", "w96"])
def reader(request):
    """A model whose padding token is that for unknown words, BOS, EOS, or one of its own."""
    return with_tokenizer("gpt2", words(request.param))


@pytest.fixture(scope="module")
def model():
    return load("gpt2")


def alone(model, unit="component", pos=-1, ids=IDS):
    """Each prompt by itself, without padding or text."""
    return [
        direct_logit_attribution(model, torch.tensor(row), 5, 7, unit=unit, pos=pos) for row in ids
    ]


def check_alone(result, model, unit="component", pos=-1, ids=IDS):
    for row, expected in enumerate(alone(model, unit, pos, ids)):
        got, want = result.attribution[:, row], expected.attribution[:, 0]
        if got.ndim == 2:
            assert got[:, want.shape[1] :].isnan().all()
            got = got[:, : want.shape[1]]
        torch.testing.assert_close(got, want, atol=2e-6, rtol=0)
        assert result.labels == expected.labels


def padded(side, pad, ids=IDS, width=None):
    width = width or max(map(len, ids))
    rows = [[pad] * (width - len(row)) + row for row in ids]
    if side == "right":
        rows = [row + [pad] * (width - len(row)) for row in ids]
    return torch.tensor(rows)


@pytest.mark.parametrize("unit", ["component", "layer", "head"])
@pytest.mark.parametrize("pos", [-1, [0, -2], slice(1, None), None])
def test_texts_of_different_lengths_give_what_each_gives_alone(model, unit, pos):
    result = direct_logit_attribution(model, TEXTS, 5, 7, unit=unit, pos=pos)
    check_alone(result, model, unit, pos)
    assert result.prompts.length.tolist() == [6, 3, 5]


def test_texts_are_told_from_any_padding(reader):
    check_alone(direct_logit_attribution(reader, TEXTS, 5, 7), reader)


def test_alone_is_what_the_plain_model_says(reader):
    """So that `check_alone` compares with the model and not with itself."""
    for row, result in zip(IDS, alone(reader), strict=True):
        logits = reader(torch.tensor([row]))[0, -1].detach()
        torch.testing.assert_close(result.logit[0], logits[5] - logits[7], atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_tokens_give_what_each_prompt_gives_alone(reader, side):
    pad = reader.tokenizer.pad_token_id
    result = direct_logit_attribution(reader, padded(side, pad), 5, 7, pos=-1)
    check_alone(result, reader)
    every = direct_logit_attribution(reader, padded(side, pad), 5, 7, pos=None)
    check_alone(every, reader, pos=None)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_tokens_without_bos_give_what_each_prompt_gives_alone(reader, side):
    pad, ids = reader.tokenizer.pad_token_id, [row[1:] for row in IDS]
    result = direct_logit_attribution(reader, padded(side, pad, ids), 5, 7)
    check_alone(result, reader, ids=ids)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("width", [6, 9])
def test_an_attention_mask_says_what_is_real(model, side, width):
    batch = padded(side, 50, width=width)  # 50 is a word like any other
    mask = (padded(side, -1, width=width) >= 0).long()
    for form in (mask, mask.bool()):
        result = direct_logit_attribution(model, batch, 5, 7, attention_mask=form)
        check_alone(result, model)
        every = direct_logit_attribution(model, batch, 5, 7, attention_mask=form, pos=None)
        check_alone(every, model, pos=None)
    one = direct_logit_attribution(model, batch[1], 5, 7, attention_mask=mask[1:2])
    check_alone(one, model, ids=IDS[1:2])


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padding_token_of_its_own_is_padding_everywhere(side):
    model = with_tokenizer("gpt2", words("w96"))
    result = direct_logit_attribution(model, padded(side, 96, width=9), 5, 7)
    check_alone(result, model)
    one = direct_logit_attribution(model, padded(side, 96, width=9)[:1], 5, 7)
    check_alone(one, model, ids=IDS[:1])


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_every_prompt_ends_with_is_no_padding(side):
    """EOS may close each prompt and pad it."""
    model = with_tokenizer("gpt2", words("w2"))
    ids = [[*row, 2] for row in IDS]
    result = direct_logit_attribution(model, padded(side, 2, ids), 5, 7)
    check_alone(result, model, ids=ids)
    if side == "left":  # padded on the left, one prompt may close and another not
        ids = [IDS[0], [*IDS[1], 2], IDS[2]]
        result = direct_logit_attribution(model, padded(side, 2, ids), 5, 7)
        check_alone(result, model, ids=ids)


@pytest.mark.parametrize("name", either("llama", "gptj", "gemma2", "ln", "rotary", "alibi"))
def test_positions_of_every_kind_see_no_padding(name):
    model = with_tokenizer(name, words("w0"))
    for side in ("left", "right"):
        result = direct_logit_attribution(model, padded(side, 0), 5, 7)
        check_alone(result, model)
    result = direct_logit_attribution(model, TEXTS, 5, 7, unit="head")
    check_alone(result, model, "head")


@pytest.mark.parametrize("name", either("bidirectional"))
def test_a_model_that_reads_both_ways_would_see_the_padding(name):
    model = with_tokenizer(name, words("w0"))
    with pytest.raises(NotImplementedError, match="both directions"):
        direct_logit_attribution(model, TEXTS, 5, 7)
    result = direct_logit_attribution(model, TEXTS[:1], 5, 7)
    check_alone(result, model, ids=IDS[:1])


def test_a_cache_of_padded_prompts_needs_its_input(reader):
    pad = reader.tokenizer.pad_token_id
    for side, width in [("left", 6), ("right", 6), ("right", 8)]:
        batch = padded(side, pad, width=width)
        mask = (padded(side, -1, width=width) >= 0).long()
        _, cache = reader.run_with_cache(batch, attention_mask=mask)
        for pos, unit in [(-1, "head"), (None, "component")]:
            # The padding is found, unless every row has some that may be its own.
            told = mask if width > 6 or unit == "head" else None
            result = direct_logit_attribution(
                *(reader, batch, 5, 7),
                **dict(cache=cache, pos=pos, unit=unit, attention_mask=told),
            )
            check_alone(result, reader, unit, pos)


def test_a_full_cache_knows_its_padding(reader):
    _, cache = reader.run_with_cache(padded("right", reader.tokenizer.pad_token_id))
    check_alone(direct_logit_attribution(reader, None, 5, 7, cache=cache), reader)


def test_texts_and_their_cache_are_laid_out_alike(reader):
    for side in ("left", "right"):
        reader.tokenizer.padding_side = side
        _, cache = reader.run_with_cache(TEXTS)
        result = direct_logit_attribution(reader, TEXTS, 5, 7, cache=cache)
        check_alone(result, reader)
    reader.tokenizer.padding_side = "right"


def test_bos_is_prepended_as_the_model_does_unless_told(model):
    without = direct_logit_attribution(model, TEXTS, 5, 7, prepend_bos=False)
    check_alone(without, model, ids=[row[1:] for row in IDS])
    assert read_prompts(model, TEXTS).packed[0].tolist() == IDS[0]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "form",
    [
        lambda ids: ids,
        lambda ids: [np.array(row) for row in ids],
        lambda ids: [torch.tensor(row) for row in ids],
        lambda ids: [[np.int64(i) for i in row] for row in ids],
    ],
    ids="lists arrays tensors numbers".split(),
)
def test_prompts_may_be_lists_of_ids(model, form):
    check_alone(direct_logit_attribution(model, form(IDS), 5, 7), model)
    check_alone(direct_logit_attribution(model, form(IDS)[0], 5, 7), model, ids=IDS[:1])


@pytest.mark.usefixtures("unchecked")
def test_prompts_may_be_arrays(model):
    for array in (np.array(IDS[:1]), np.array(IDS[0]), np.array(IDS[:1], dtype=np.int32)):
        check_alone(direct_logit_attribution(model, array, 5, 7), model, ids=IDS[:1])
    check_alone(direct_logit_attribution(model, np.array(TEXTS), 5, 7), model)


@pytest.mark.parametrize("pad", ["w1", "w2"])
def test_one_token_that_may_be_padding_or_a_prompts_own_must_be_told(pad):
    """A BOS or EOS that also pads, where some prompts begin or end with one and others do not."""
    model, own = with_tokenizer("gpt2", words(pad)), int(pad[1:])
    for ids in ([[own, 5, 7], [8, 6, 9]], [[5, 7, own], [8, 6, 9]]):
        with pytest.raises(TokenError, match="may be its own or padding.*attention_mask"):
            direct_logit_attribution(model, torch.tensor(ids), 5, 7)
        check_alone(direct_logit_attribution(model, ids, 5, 7), model, ids=ids)
        mask = torch.ones(2, 3).long()
        told = direct_logit_attribution(model, torch.tensor(ids), 5, 7, attention_mask=mask)
        check_alone(told, model, ids=ids)


# ---- refusals ----------------------------------------------------------------------------------

LONG = "w5 " * 64  # and BOS: 65 tokens, one more than the context
REFUSED = {
    "answer of several tokens": (TEXTS[0], "w5 w7", {}, r"'w5 w7' is 2 tokens \('w5', 'w7'\)"),
    "no answer": (TEXTS[0], None, {}, "answer_tokens is required"),
    "answer of broken bytes": (TEXTS[0], "w\udcff", {}, r"'w\\udcff' is no Unicode at character 1"),
    "prompt of broken bytes": (
        TEXTS[0] + "\udcff",
        5,
        {},
        r"is no Unicode at character \d+: write",
    ),
    "empty answer": (TEXTS[0], "", {}, "'' is no token"),
    "bool answer": (TEXTS[0], True, {}, "strings or integer token ids; True"),
    "float answer": (TEXTS[0], 5.0, {}, "strings or integer token ids; 5.0"),
    "float answers": (TEXTS[0], torch.tensor([5.0]), {}, "strings or integer token ids"),
    "None among answers": (TEXTS, ["w5", None, "w7"], {}, "integer token ids; None"),
    "no answers": (TEXTS[0], [], {}, "at least one token"),
    "ragged answers": (TEXTS[0], [["w5"], ["w7", "w9"]], {}, "must form a rectangle"),
    "id too large": (TEXTS[0], 97, {}, "Token id 97 is outside the vocabulary of 97"),
    "negative id": (TEXTS[0], -1, {}, "Token id -1 is outside the vocabulary"),
    "incorrect id": (TEXTS[0], 5, {"incorrect_tokens": 200}, "Token id 200 is outside"),
    "candidate id": (TEXTS[0], None, {"candidate_tokens": [5, 97]}, "Token id 97 is outside"),
    "answer and candidates": (TEXTS[0], 5, {"candidate_tokens": [7]}, "not both"),
    "answers of another batch": (TEXTS, [5, 7], {}, r"\(2,\), which does not fit 3 prompt"),
    "incorrect of another batch": (
        *(TEXTS, 5),
        *({"incorrect_tokens": torch.ones(4, 1).long()}, r"incorrect_tokens has shape \(4, 1\)"),
    ),
    "several answers": (TEXTS, torch.ones(3, 4).long(), {}, "4 answers per prompt.*candidate"),
    "answers of no candidate": (TEXTS[0], None, {"candidate_tokens": []}, "candidate_tokens must"),
    "answers in four axes": (TEXTS, torch.ones(3, 1, 1, 1).long(), {}, "does not fit 3 prompt"),
    "doubled BOS": ("w1 w5", 5, {}, "starts with 'w1' and the model prepends another"),
    "doubled BOS in tokens": (torch.tensor([1, 1, 5]), 5, {}, "Prompt 0 starts with two BOS"),
    "empty prompt": ("", 5, {}, "prompt is empty"),
    "one empty prompt": (["w5", ""], 5, {}, "prompt is empty"),
    "no prompts": ([], 5, {}, "prompt is empty"),
    "no tokens": (torch.ones(1, 0).long(), 5, {}, "at least one token"),
    "float tokens": (torch.ones(1, 3), 5, {}, "must be integers"),
    "tokens in three axes": (torch.ones(1, 3, 2).long(), 5, {}, r"\[pos\] or \[batch, pos\]"),
    "a number": (5, 5, {}, "a list of strings or a tensor of token ids; a int"),
    "bytes": (b"w5", 5, {}, "a list of strings or a tensor of token ids; a bytes"),
    "list of numbers": ([1.5, 2.5], 5, {}, "a list held a float"),
    "text and ids": (["w5", 5], 5, {}, "a list held a int"),
    "array of floats": (np.ones((1, 3)), 5, {}, "must be integers"),
    "an empty row": ([[1, 5], []], 5, {}, "a list held no tokens"),
    "lists of lists of lists": ([[[1, 5]]], 5, {}, "a list held a list"),
    "a set": ({1, 5}, 5, {}, "a list of strings or a tensor of token ids; a set"),
    "mask for text": (
        *(TEXTS, 5, {"attention_mask": torch.ones(3, 6)}),
        "attention_mask says .* leave the mask out",
    ),
    "prompt id": (torch.tensor([1, 97]), 5, {}, "Token id 97 is outside the model's vocabulary"),
    "negative prompt id": (torch.tensor([1, -3]), 5, {}, "Token id -3 is outside the model's"),
    "too long": (LONG, 5, {}, "65 tokens, more than the model's context of 64"),
    "no input": (None, 5, {}, "Give either `input`"),
    "position": (TEXTS, 5, {"pos": 3}, "Position 3 is outside prompt 1, which has 3 tokens"),
    "negative position": (TEXTS, 5, {"pos": [-1, -4]}, "Position -4 is outside prompt 1"),
    "empty slice": (TEXTS, 5, {"pos": slice(4, 6)}, "no position of prompt 1"),
    "float position": (TEXTS, 5, {"pos": 1.0}, "pos must be an integer"),
    "bool position": (TEXTS, 5, {"pos": True}, "pos must be an integer"),
    "word position": (TEXTS, 5, {"pos": "last"}, "pos must be an integer.*'last'"),
    "no positions": (TEXTS, 5, {"pos": []}, "pos must be an integer"),
    "mask of another shape": (
        *(tokens(), 5),
        *({"attention_mask": torch.ones(2, 10).long()}, r"\(2, 11\); it has \(2, 10\)"),
    ),
    "mask with a gap": (
        *(torch.tensor([[1, 5, 7]]), 5),
        *({"attention_mask": torch.tensor([[1, 0, 1]])}, "gap inside a prompt"),
    ),
    "mask of nothing": (
        *(torch.tensor([[1, 5, 7], [1, 5, 7]]), 5),
        *({"attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])}, "prompt is empty"),
    ),
    "unknown unit": (TEXTS, 5, {"unit": "neurons"}, "unit must be one of .*'neurons'"),
    "unknown check": (TEXTS, 5, {"check": "maybe"}, "check must be .*'maybe'"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_meant_is_one_sentence_before_the_model_runs(model, case):
    prompt, answer, options, fragment = REFUSED[case]
    with counted(model) as shapes, pytest.raises(TlDlaError, match=fragment) as error:
        direct_logit_attribution(model, prompt, answer, **options)
    assert shapes == []
    assert isinstance(error.value, ValueError)
    message = str(error.value)
    assert "\n" not in message and message.endswith((".", ")")) and len(message) < 400


def test_a_prompt_of_padding_is_empty():
    model = with_tokenizer("gpt2", words("w96"))
    with pytest.raises(TokenError, match="nothing but padding"):
        direct_logit_attribution(model, torch.tensor([[1, 5], [96, 96]]), 5)


def test_training_mode_is_refused_where_it_matters():
    model = load.__wrapped__("gpt2")
    model.train()
    with counted(model) as shapes, pytest.raises(ArgumentError, match=r"training.*model.eval\(\)"):
        direct_logit_attribution(model, tokens(), 5)
    assert shapes == []


@pytest.mark.parametrize("name", either("ln"))
def test_a_hooked_transformer_has_no_dropout(name):
    model = load.__wrapped__(name)
    assert load(name)(tokens()).equal(model.train()(tokens()))
    trained = direct_logit_attribution(model, tokens(), 5)
    assert trained.attribution.equal(direct_logit_attribution(load(name), tokens(), 5).attribution)


@pytest.mark.parametrize("name", ["native_ln", *either("ln")])
def test_without_a_tokenizer_only_ids_are_read(name):
    model = load(name)
    assert model.tokenizer is None
    with pytest.raises(TokenError, match="no tokenizer, so prompts"):
        direct_logit_attribution(model, "w5", 5)
    with pytest.raises(TokenError, match="no tokenizer, so answers"):
        direct_logit_attribution(model, tokens(), "w5")
    result = direct_logit_attribution(model, tokens(), 5, 7)
    assert result.target == "'5' − '7'" or "5" in result.target
    assert set(result.to_dataframe()["token"]) == {str(int(row[-1])) for row in tokens()}
