"""Code written for `transformer_lens.tools.analysis` runs with its import changed.

What differs by design, each held to below:

* Weights as published are attributed, exactly, where TransformerLens's tool refuses them (a norm's
  γ or β that is not folded, a bridge without compatibility mode, blocks of several kinds).
* Two more rows, `ln_final.b` and `b_U`, so that the rows add up to the logit itself.
  `include_bias=False` leaves them out.
* `unit="head"` gives a row for everything else too; `include_remainder=True` adds those up.
* `unit="neuron"` is a unit, and a block that is not attention and MLP has rows.
* An answer that is not one token, or a shape that fits in two ways, is an error that says so.
"""

import pickle
import re
from dataclasses import replace

import pytest
import torch
from transformer_lens.tools.analysis import direct_logit_attribution as their_own

import tl_dla
from tests.support.models import load, of_4
from tests.zoo.build import ANSWERS, INCORRECT, tokens
from tl_dla import DirectLogitAttribution, direct_logit_attribution
from tl_dla.core.by_hand import key_of_label
from tl_dla.errors import ArgumentError

pytestmark = of_4
EXACT = dict(atol=2e-5, rtol=1e-4)

UNITS = {"component": {}, "layer": {}, "head": {"include_remainder": True}}


# ---- the same calls, the same numbers ------------------------------------------------------------


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("pos", [-1, None, [0, 4]])
def test_results_are_transformer_lens_own_value_by_value(unit, pos):
    model = load("gpt2", folded=True)
    more = dict(include_bias=False, **UNITS[unit])
    for answers in [(5,), (5, 7), (ANSWERS, INCORRECT)]:
        theirs = their_own(model, tokens(), *answers, unit=unit, pos=pos)
        ours = direct_logit_attribution(model, tokens(), *answers, unit=unit, pos=pos, **more)
        assert ours.labels == theirs.labels and ours.unit == theirs.unit
        torch.testing.assert_close(ours.attribution, theirs.attribution, **EXACT)
        for (label, value), (their_label, their_value) in zip(
            ours.top(4), theirs.top(4), strict=True
        ):
            assert label == their_label and value == pytest.approx(their_value, abs=2e-5)


def test_a_cache_gives_what_transformer_lens_makes_of_it():
    model = load("gpt2", folded=True)
    for remove in (False, True):
        _, cache = model.run_with_cache(tokens()[:1], remove_batch_dim=remove)
        theirs = their_own(model, None, 5, cache=cache)
        ours = direct_logit_attribution(model, None, 5, cache=cache, include_bias=False)
        torch.testing.assert_close(ours.attribution, theirs.attribution, **EXACT)


def test_the_example_of_the_documentation_page_runs(capsys):
    """A call with a prompt and two words, then a line for each row."""
    model = tl_dla.load_model("demo")
    result = direct_logit_attribution(
        model,
        "The Eiffel Tower is in the city of",
        answer_tokens=" Paris",
        incorrect_tokens=" London",
        unit="component",
    )
    for label, value in zip(result.labels, result.attribution.squeeze(), strict=True):
        print(f"{label:>12}: {value.item():+.3f}")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(result.labels)
    assert all(re.fullmatch(r" *\S+: [+-]\d+\.\d{3}", line) for line in lines)


def test_the_remainder_is_everything_but_the_heads():
    model = load("gemma2")
    options = dict(unit="head", pos=None)
    whole = direct_logit_attribution(model, tokens(), ANSWERS, INCORRECT, **options)
    one = direct_logit_attribution(
        model, tokens(), ANSWERS, INCORRECT, include_remainder=True, **options
    )
    n = whole.kinds.count("head")
    assert one.labels == [*whole.labels[:n], "remainder"] and one.kinds[n] == "remainder"
    torch.testing.assert_close(one.attribution[:n], whole.attribution[:n], atol=0, rtol=0)
    torch.testing.assert_close(one["remainder"], whole.attribution[n:].sum(0), **EXACT)
    assert one.reconstruction.passed
    with pytest.raises(ArgumentError, match='include_remainder is for unit="head"'):
        direct_logit_attribution(model, tokens(), 5, include_remainder=True)


def test_biases_are_not_in_the_remainder_and_it_can_be_asked_on():
    model = load("gptj")
    whole = direct_logit_attribution(model, tokens(), 5, unit="head")
    one = direct_logit_attribution(model, tokens(), 5, unit="head", include_remainder=True)
    n = whole.kinds.count("head")
    assert one.labels[n:] == ["remainder", "ln_final.b", "b_U"]
    torch.testing.assert_close(one["remainder"], whole.attribution[n:-2].sum(0), **EXACT)
    torch.testing.assert_close(one.attribution.sum(0), model(tokens())[:, -1, 5], **EXACT)
    effects = tl_dla.direct_effect_recomputed(one)
    others = tl_dla.direct_effect_recomputed(whole)
    torch.testing.assert_close(effects[:n], others[:n], **EXACT)
    assert len(one.audit(3, progress=False).to_dataframe()) == 3 and one.plot().data
    with pytest.raises(ArgumentError, match="not written at one place"):
        tl_dla.ablate(one, ["remainder"], progress=False)


def test_what_is_not_understood_is_no_part_of_the_remainder():
    model = load("gpt2")
    _, cache = model.run_with_cache(tokens())
    for point in ("blocks.2.hook_in", "ln_final.hook_in"):
        cache.cache_dict[point] = cache.cache_dict[point].clone()
        cache.cache_dict[point][..., 7] += 0.25
    options = dict(unit="head", cache=cache, include_bias=False)
    whole = direct_logit_attribution(model, None, 5, **options)
    one = direct_logit_attribution(model, None, 5, include_remainder=True, **options)
    n = whole.kinds.count("head")
    assert one.labels[n:] == ["1_rest", "remainder"]
    assert "1_rest" in one.reconstruction.unexplained
    torch.testing.assert_close(one["1_rest"], whole["1_rest"], atol=0, rtol=0)
    torch.testing.assert_close(one.attribution.sum(0), whole.attribution.sum(0), **EXACT)


def test_chosen_layers_and_heads_have_rows_and_the_others_are_added_up():
    model = load("llama")
    whole = direct_logit_attribution(model, tokens(), 5, 7, unit="head")
    parts = direct_logit_attribution(model, tokens(), 5, 7)
    some = direct_logit_attribution(model, tokens(), 5, 7, unit="head", layers=1)
    named = direct_logit_attribution(model, tokens(), 5, 7, unit="head", heads=["L1H2", "L1H0"])
    assert [x for x in some.labels if x.startswith("L")] == [f"L1H{h}" for h in range(4)]
    for label in ("0_attn_out", "2_attn_out"):
        torch.testing.assert_close(some[label], parts[label], **EXACT)
        torch.testing.assert_close(named[label], parts[label], **EXACT)
    assert [x for x in named.labels if x.startswith("L")] == ["L1H0", "L1H2"]
    for label in ("L1H0", "L1H2"):
        torch.testing.assert_close(named[label], whole[label], atol=0, rtol=0)
    others = whole["L1H1"] + whole["L1H3"]
    torch.testing.assert_close(named["1_other_heads"], others, **EXACT)
    for result in (some, named):
        assert result.reconstruction.passed and list(result.reconstruction.parts) == [
            "the heads of 1_attn_out"
        ]
        torch.testing.assert_close(result.attribution.sum(0), whole.logit, **EXACT)
        assert result.plot().data


def test_columns_of_answers_are_answer_and_foil_and_neurons_are_ranked_alone():
    """TransformerLens's demonstrations keep both answers of a prompt in one tensor."""
    model = load("gpt2")
    columns = torch.stack([torch.as_tensor(ANSWERS), torch.as_tensor(INCORRECT)], 1)
    both = direct_logit_attribution(model, tokens(), columns, unit="neuron", top_neurons=3)
    logits, rows = model(tokens())[:, -1], [0, 1]
    torch.testing.assert_close(both.logit, logits[rows, ANSWERS] - logits[rows, INCORRECT], **EXACT)
    ranked = [label for label, _ in both.top(9, kind="neuron", by="magnitude")]
    assert len(ranked) == 3 and all(re.fullmatch(r"L\d+N\d+", label) for label in ranked)


# ---- the result class ----------------------------------------------------------------------------


def test_a_result_can_be_made_of_numbers_and_labels(tmp_path):
    numbers = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.0, 0.5]])
    labels = ["embed", "0_attn_out", "L0H3"]
    for result in (
        DirectLogitAttribution(numbers, labels, "component"),
        DirectLogitAttribution(attribution=numbers, labels=labels, unit="component"),
    ):
        assert torch.equal(result.attribution, numbers) and result.labels == labels
        assert result.unit == "component" and result.kinds == ["embed", "attn", "head"]
        assert result.top(2) == [("embed", 1.5), ("0_attn_out", 1.0)]
        assert not result.reconstruction.passed and "not certified" in repr(result)
        assert torch.equal(result.heads, torch.stack([torch.zeros(2)] * 3 + [numbers[2]])[None])
        assert "L0H3" in result.report(tmp_path / "page.html").read_text("utf-8")
        assert len(result.to_dataframe()) == 6 and result.plot().data
        assert torch.equal(pickle.loads(pickle.dumps(result)).attribution, numbers)
        assert torch.equal(replace(result).attribution, numbers)
    for shape in [(4,), (4, 2), (4, 2, 3)]:
        values = torch.randn(shape)
        result = DirectLogitAttribution(values, list("abcd"), "head")
        assert torch.equal(result.attribution, values) and result.labels == list("abcd")
        flat = values.reshape(4, -1).mean(1)
        assert [value for _, value in result.top(9)] == pytest.approx(sorted(flat.tolist())[::-1])
    with pytest.raises(ArgumentError, match="of numbers alone"):
        result.audit()
    with pytest.raises(ArgumentError, match="a label for each row"):
        DirectLogitAttribution(numbers, labels[:2], "component")


@pytest.mark.parametrize("unit", ["component", "layer", "head", "neuron", "source"])
def test_every_label_names_its_row_again(unit):
    for name in ("gpt2", "gemma2"):
        result = direct_logit_attribution(load(name), tokens(), 5, unit=unit)
        keys = [key_of_label(label) for label in result.labels]
        assert [key.label for key in keys] == result.labels
        assert [key.kind for key in keys] == result.kinds


# ---- what TransformerLens's tool refuses --------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_weights_as_published_are_refused_there_and_exact_here(name):
    model = load(name)
    with pytest.raises(ValueError, match="compatibility mode"):
        their_own(model, tokens(), 5, 7)
    result = direct_logit_attribution(model, tokens(), 5, 7)
    logits = model(tokens())[:, -1]
    torch.testing.assert_close(result.attribution.sum(0), logits[:, 5] - logits[:, 7], **EXACT)


@pytest.mark.parametrize("how", [dict(no_processing=True), dict(fold_ln=False)])
def test_a_norm_that_is_not_folded_is_refused_there_and_exact_here(how):
    model = load.__wrapped__("gpt2")
    model.enable_compatibility_mode(disable_warnings=True, **how)
    with pytest.raises(ValueError, match="identity final norm"):
        their_own(model, tokens(), 5, 7)
    result = direct_logit_attribution(model, tokens(), 5, 7)
    logits = model(tokens())[:, -1]
    torch.testing.assert_close(result.attribution.sum(0), logits[:, 5] - logits[:, 7], **EXACT)


def test_weights_edited_after_folding_are_refused_there_and_exact_here():
    model = load.__wrapped__("gpt2", folded=True)
    gamma = model.ln_final.weight
    with torch.no_grad():
        gamma[0] = 2.0
    with pytest.raises(ValueError, match="final norm"):
        their_own(model, tokens(), 5)
    result = direct_logit_attribution(model, tokens(), 5)
    torch.testing.assert_close(result.attribution.sum(0), model(tokens())[:, -1, 5], **EXACT)


def test_what_is_missing_is_a_value_error_in_both():
    model = load("gpt2", folded=True)
    for tool in (their_own, direct_logit_attribution):
        with pytest.raises(ValueError, match="answer_tokens is required"):
            tool(model, tokens())
        with pytest.raises(ValueError, match="either `input`"):
            tool(model, None, 5)


@pytest.mark.usefixtures("unchecked")
def test_another_unit_is_a_value_error_in_both():
    for tool in (their_own, direct_logit_attribution):
        with pytest.raises(ValueError, match="unit must be one of"):
            tool(load("gpt2", folded=True), tokens(), 5, unit="word")
