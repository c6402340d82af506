"""A result is kept, pickled and copied without its model, and shows what it showed."""

import copy
import json
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from tests.support.dictionaries import RandomDictionary
from tests.support.models import either, load, spaced, with_tokenizer
from tests.zoo.build import ANSWERS, INCORRECT, tokens
from tl_dla import (
    attribute_answer,
    attribute_completion,
    attribute_path,
    compare,
    direct_logit_attribution,
    load_model,
    load_result,
)
from tl_dla.core import saved
from tl_dla.core.view import prompt_tokens
from tl_dla.effects.interventions import ablate
from tl_dla.errors import ArgumentError

TEXTS = ["w5 w7 w9 w31 w30", "w8 w6", "w40 w41 w42 w8"]


def kept(how, result, folder):
    if how == "file":
        return load_result(result.save(folder / "result.safetensors"))
    return pickle.loads(pickle.dumps(result))


def shown(result):
    """Everything that a user reads off a result."""
    k = 10**6
    return [
        repr(result),
        result._repr_html_(),
        result.plot().to_json(),
        result.to_dataframe().to_csv(),
        result.top(k, by="magnitude"),
        str(result.reconstruction),
        result.path,
    ]


RESULTS = {
    unit: lambda model, unit=unit: direct_logit_attribution(
        model, TEXTS, [5, 9, 11], 7, unit=unit, pos=None
    )
    for unit in ("component", "layer", "head", "neuron", "source")
} | {
    "candidates": lambda model: direct_logit_attribution(
        model, tokens(), candidate_tokens=["w5", "w7"], incorrect_tokens="mean"
    ),
    "one": lambda model: direct_logit_attribution(model, "w5 w6", "w7", unit="head"),
    "path": lambda model: attribute_path(
        direct_logit_attribution(model, tokens(), 5, unit="source"), "L1H0", 1
    ),
    "mean": lambda model: direct_logit_attribution(model, TEXTS, 5).mean(),
    "cache": lambda model: direct_logit_attribution(
        model, None, 5, cache=model.run_with_cache(tokens())[1]
    ),
}


@pytest.mark.parametrize("how", ["file", "pickle"])
@pytest.mark.parametrize("name", RESULTS)
def test_it_shows_what_it_showed(name, how, tmp_path):
    result = RESULTS[name](load("gpt2"))
    again = kept(how, result, tmp_path)
    assert type(again) is type(result)
    assert shown(again) == shown(result)
    assert again.keys == result.keys and again.selection == result.selection
    if "head" in result.kinds:
        assert_close(again.heads, result.heads, atol=0, rtol=0, equal_nan=True)
    for own, other in zip(vars(result.numbers).values(), vars(again.numbers).values(), strict=True):
        assert own is other or torch.equal(own, other)
    assert shown(kept(how, again, tmp_path)) == shown(result)  # kept once more, without a model
    part = again.select(prompt=0) if name not in ("mean",) else again
    assert shown(kept(how, part, tmp_path)) == shown(part)


def compared(**options):
    model = load("gpt2")
    a, b = (direct_logit_attribution(model, x, **options) for x in (TEXTS, TEXTS[::-1]))
    return compare(a, b)


def tuned():
    model = load.__wrapped__("gpt2")
    with torch.no_grad():
        model.blocks[1].mlp.W_out.mul_(1.5)
        model.unembed.W_U.mul_(1.1)
    model.cfg.model_name = "tuned"
    return model


OTHERS = {
    "two prompts": lambda: compared(answer_tokens=[5, 9, 11], unit="head"),
    "candidates": lambda: compared(candidate_tokens=["w5", "w7"], pos=[0, -1]),
    "two models": lambda: compare(
        *(direct_logit_attribution(model, TEXTS, 5, 7) for model in (load("gpt2"), tuned()))
    ),
    "a text": lambda: attribute_answer(load("gpt2"), TEXTS, ["w5 w6", "w7", "w8 w9 w4"], "w9 w3"),
    "the mean": lambda: attribute_answer(load("gpt2"), TEXTS[0], "w5 w6 w9", "mean", unit="head"),
    "what it says": lambda: attribute_completion(
        load("gpt2"), TEXTS[0], max_new_tokens=4, baseline="runner-up"
    ),
}


@pytest.mark.filterwarnings("ignore:The answer of prompt")
@pytest.mark.parametrize("how", ["file", "pickle"])
@pytest.mark.parametrize("name", OTHERS)
def test_comparisons_and_answers_show_what_they_showed(name, how, tmp_path):
    result = OTHERS[name]()
    again = kept(how, result, tmp_path)
    assert type(again) is type(result) and again.nbytes < 50_000
    for other in (again, kept(how, again, tmp_path)):  # kept once more, without a model
        for ask in (
            lambda r: [repr(r), r._repr_html_(), r.plot().to_json(), r.to_dataframe().to_csv()],
            lambda r: [r.top(9, prompt=0), str(r.reconstruction), r.labels, r.kinds],
            lambda r: r.report(tmp_path / "page.html", prompt=0).read_bytes(),
        ):
            assert ask(other) == ask(result)
        assert torch.equal(other[result.labels[0]], result[result.labels[0]])


def test_an_answer_is_asked_on_once_it_has_its_model_again(tmp_path):
    model = load("gpt2")
    answer = attribute_answer(model, TEXTS[0], "w5 w6", "w9 w3")
    path = answer.save(tmp_path / "answer.safetensors")
    again = load_result(path, model)
    assert again.steps.model is again.baseline_steps.model is model
    without = [ablate(x.steps, ["embed"])["embed"].attribution for x in (answer, again)]
    assert_close(*without, equal_nan=True)
    with pytest.raises(ArgumentError, match="of another model"):
        load_result(path, load_model("demo"))
    with pytest.raises(ArgumentError, match="without its model"):
        ablate(load_result(path).steps, ["embed"])
    path = compared(answer_tokens=5).save(tmp_path / "comparison.safetensors")
    with pytest.raises(ArgumentError, match="A Comparison runs no model: load it without one"):
        load_result(path, model)


@pytest.mark.parametrize("name", either("gpt2", "ln"))
def test_no_weights_are_kept(name, tmp_path):
    model = load(name)
    result = direct_logit_attribution(model, tokens(), ANSWERS, INCORRECT, unit="head")
    text, path = pickle.dumps(result), result.save(tmp_path / "result.safetensors")
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    for size in (len(text), path.stat().st_size):
        assert result.nbytes < size < result.nbytes + 20_000 < weights / 4


def test_letters_of_several_tokens_are_kept_too():
    """`é` is two tokens of a byte each, which no token spells alone."""
    model = with_tokenizer("gpt2", spaced("Ã ©".split()))
    result = direct_logit_attribution(model, "cat é", 5, pos=None, check="off")
    again = pickle.loads(pickle.dumps(result))
    assert prompt_tokens(again, 0) == prompt_tokens(result, 0)
    assert "⟨C3⟩" in prompt_tokens(again, 0) and shown(again) == shown(result)


@pytest.mark.parametrize("how", ["mean", "pickle"])
def test_the_report_shows_what_is_known_and_says_that_nothing_was_run(how, tmp_path):
    result = direct_logit_attribution(load("gpt2"), TEXTS[:2], [5, 9], 7, unit="head")
    known = result.mean() if how == "mean" else kept(how, result, tmp_path)
    page = known.report(tmp_path / "page.html").read_text(encoding="utf-8")
    why = "A mean over 2 prompts" if how == "mean" else "Without its model"
    assert f"{why}: nothing else was run." in page and "GPT2LMHeadModel · 3 layers" in page


def test_a_copy_has_the_same_model():
    model = load("gpt2")
    result = direct_logit_attribution(model, tokens(), ANSWERS)
    for copied in (copy.deepcopy(result), copy.copy(result)):
        assert copied.model is model and shown(copied) == shown(result)
        assert_close(without_embed(copied), without_embed(result))
    assert copy.deepcopy(result).values.data_ptr() != result.values.data_ptr()


@pytest.mark.parametrize("how", ["file", "pickle"])
def test_what_needs_the_model_asks_for_it(how, tmp_path):
    model = load("gpt2")
    result = direct_logit_attribution(model, tokens(), ANSWERS, unit="head")
    again = kept(how, result, tmp_path)
    for runs in (
        lambda r: r.audit(2, progress=False),
        lambda r: r.promoted_tokens("L1H2", prompt=0),
        lambda r: r.readout,
        lambda r: ablate(r, ["L1H2"]),
        lambda r: attribute_path(r, "L1H0", 0),
    ):
        with pytest.raises(ArgumentError, match=r"without its model.*result\.with_model\(model\)"):
            runs(again)
        runs(again.with_model(model))
    assert_close(without_embed(again.with_model(model)), without_embed(result))


def without_embed(result):
    return ablate(result, ["embed"])["embed"].attribution


def test_the_model_given_back_must_be_the_one(tmp_path):
    result = direct_logit_attribution(load("gpt2"), tokens(), ANSWERS)
    path = result.save(tmp_path / "result.safetensors")
    with pytest.raises(
        ArgumentError,
        match="of another model .*GPT2LMHead.*n_layers is 3, that .* is 4",
    ):
        load_result(path, load_model("demo"))
    other = load.__wrapped__("gpt2")
    with torch.no_grad():
        other.blocks[1].mlp.W_out.mul_(2)
    with pytest.raises(ArgumentError, match="does not give its logits again"):
        ablate(load_result(path, other), ["embed"])


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    """What fails in the middle leaves the file as it was."""
    result = direct_logit_attribution(load("gpt2"), tokens(), ANSWERS)
    path = result.save(tmp_path / "result.safetensors")
    before = path.read_bytes()

    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        result.mean().save(path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name] and path.read_bytes() == before


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_result_is_one_sentence(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(ArgumentError, match="There is no file .*x.safetensors"):
        load_result(path)
    path.write_bytes(b"not a file of tensors at all")
    with pytest.raises(ArgumentError, match="is no saved result, or is damaged"):
        load_result(path)
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(ArgumentError, match="holds tensors, but no result"):
        load_result(path)
    save_file({}, path, metadata={"tl_dla": json.dumps({"format": 99, "result": None})})
    with pytest.raises(ArgumentError, match="of format 99; this release reads 1"):
        load_result(path)
    for name, inner in (("tl_dla.core.rows:RowKey", {"own": 1}), ("tl_dla.none:X", [])):
        save_file({}, path, metadata={"tl_dla": json.dumps({"format": 1, "result": {name: inner}})})
        with pytest.raises(ArgumentError, match="is a result of another release, or was changed"):
            load_result(path)
    result = direct_logit_attribution(load("gpt2"), tokens(), ANSWERS)
    whole = result.save(path).read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(ArgumentError, match="is no saved result, or is damaged"):
        load_result(path)
    for place, why in ((tmp_path, "it is a folder"), (tmp_path / "no" / "x", "there is no folder")):
        with pytest.raises(ArgumentError, match=f"The result cannot be written to .*: {why}"):
            result.save(place)


def test_a_place_that_cannot_be_written_is_named_as_it_was_given(tmp_path, monkeypatch):
    """A folder that is read-only is seen before anything is made; a full disk names the file."""
    result, path = direct_logit_attribution(load("gpt2"), tokens(), ANSWERS), tmp_path / "x"

    def refused(*_, **__):
        raise PermissionError(13, "Permission denied", str(tmp_path / "hidden"))

    monkeypatch.setattr("tempfile.TemporaryFile", refused)
    for write in (result.save, result.report):
        with pytest.raises(ArgumentError, match=f"written to {path}: Permission denied"):
            write(path)
    monkeypatch.undo()
    monkeypatch.setattr(type(path), "write_bytes", refused)
    with pytest.raises(PermissionError, match=f"Permission denied: '{path}'$"):
        result.save(path)
    assert not list(tmp_path.iterdir())


def test_what_is_no_file_is_written_into_and_stays(tmp_path):
    """A pipe, where a device would be: a result that was renamed over /dev/null replaced it."""
    result = direct_logit_attribution(load("gpt2"), tokens(), ANSWERS)
    pipe, copy = tmp_path / "pipe", tmp_path / "copy.safetensors"
    os.mkfifo(pipe)
    with open(os.open(pipe, os.O_RDWR), "rb", buffering=0) as reader:
        result.save(pipe)
        assert pipe.is_fifo()
        copy.write_bytes(reader.read(1 << 16))
    assert torch.equal(load_result(copy).attribution, result.attribution)


@pytest.mark.parametrize(
    "name", ["os:system", "tl_dla.core.saved:importlib", "tl_dla.core.saved:load"]
)
def test_a_file_names_no_code(name, tmp_path):
    path = tmp_path / "x.safetensors"
    tree = {"format": 1, "result": {name: ["echo"]}}
    save_file({}, path, metadata={"tl_dla": json.dumps(tree)})
    with pytest.raises(ArgumentError, match=f"The file names '{name}'"):
        load_result(path)


# ---- memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_holds_its_numbers_and_no_more(name):
    """No tensor is a view of something larger, such as an activation."""
    result = RESULTS[name](load("gpt2"))
    tensors = []

    def visit(x):
        if isinstance(x, torch.Tensor):
            tensors.append(x)
        for one in x.values() if isinstance(x, dict) else x if isinstance(x, list | tuple) else ():
            visit(one)
        if hasattr(x, "__dataclass_fields__"):
            visit(vars(x))

    visit(result)
    numbers = sum(x.numel() * x.element_size() for x in tensors)
    assert result.nbytes <= numbers
    assert saved.nbytes(torch.zeros(1000)[:2]) == 4000


def test_latents_are_kept_without_their_dictionary(tmp_path):
    model, hook = load("gpt2"), "blocks.1.hook_mlp_out"
    options = dict(unit="latent", dictionaries={hook: RandomDictionary(32)}, top_latents=3)
    result = direct_logit_attribution(model, tokens(), ANSWERS, INCORRECT, **options)
    path = result.save(tmp_path / "latents.safetensors")
    loaded = load_result(path, model)
    assert loaded.labels == result.labels and path.stat().st_size < 20_000
    assert_close(loaded.attribution, result.attribution)
    assert_close(compare(loaded, result).change, torch.zeros_like(result.attribution))
    options["dictionaries"] = {hook: RandomDictionary(32, n=60)}
    other = direct_logit_attribution(model, tokens(), ANSWERS, INCORRECT, **options)
    with pytest.raises(ArgumentError, match=f"those of {hook} are two"):
        compare(result, other)
    label = result.top(1, kind="latent")[0][0]
    with pytest.raises(ArgumentError, match=f"without its dictionary of {hook}"):
        loaded.promoted_tokens(label, prompt=0)
