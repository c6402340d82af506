"""Code written for `transformer_lens.tools.analysis` runs with its import changed.

What differs by design, each held to below:

* Weights as published are attributed, exactly, where TransformerLens's tool refuses them (a norm's
  γ or β that is not folded, a bridge without compatibility mode, blocks of several kinds).
* Two more rows, `ln_final.b` and `b_U`, so that the rows add up to the logit itself.
  `include_bias=False` leaves them out.
* `unit="head"` gives a row for everything else too; `include_remainder=True` adds those up.
* An answer that is not one token, or a shape that fits in two ways, is an error that says so.
"""

import re

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
    biases = whole.kinds.index("bias", n) if "bias" in whole.kinds[n:] else len(whole)
    biases = next((i for i, x in enumerate(whole.labels) if x in ("ln_final.b", "b_U")), len(whole))
    assert one.labels == [*whole.labels[:n], "remainder", *whole.labels[biases:]]
    torch.testing.assert_close(one.attribution[:n], whole.attribution[:n], atol=0, rtol=0)
    rest = whole.attribution[n:biases].sum(0)
    torch.testing.assert_close(one["remainder"], rest, atol=1e-5, rtol=1e-4)
    assert one.reconstruction.passed and one.kinds[n] == "remainder"
    again = tl_dla.direct_effect_recomputed(one)
    assert bool(again.isfinite().all())
    with pytest.raises(ArgumentError, match='include_remainder is for unit="head"'):
        direct_logit_attribution(model, tokens(), 5, include_remainder=True)


def test_chosen_layers_and_heads_have_rows_and_the_others_are_added_up():
    model = load("llama")
    whole = direct_logit_attribution(model, tokens(), 5, 7, unit="head")
    parts = direct_logit_attribution(model, tokens(), 5, 7)
    some = direct_logit_attribution(model, tokens(), 5, 7, unit="head", layers=1)
    named = direct_logit_attribution(model, tokens(), 5, 7, unit="head", heads=["L1H2", "L1H0"])
    assert [x for x in some.labels if x.startswith("L")] == [f"L1H{h}" for h in range(4)]
    for label in ("0_attn_out", "2_attn_out"):
        torch.testing.assert_close(some[label], parts[label], **EXACT)
    assert [x for x in named.labels if x.startswith("L")] == ["L1H0", "L1H2"]
    others = whole["L1H1"] + whole["L1H3"]
    torch.testing.assert_close(named["1_other_heads"], others, **EXACT)
    for result in (some, named):
        assert result.reconstruction.passed and result.kinds.count("head") in (2, 4)
        torch.testing.assert_close(result.attribution.sum(0), whole.logit, **EXACT)


# ---- the result class ----------------------------------------------------------------------------


def test_a_result_can_be_made_of_numbers_and_labels():
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
        assert len(result.to_dataframe()) == 6 and result.plot().data
    for shape in [(4,), (4, 2), (4, 2, 3)]:
        values = torch.randn(shape)
        result = DirectLogitAttribution(values, list("abcd"), "head")
        assert torch.equal(result.attribution, values) and result.labels == list("abcd")
        flat = values.reshape(4, -1).mean(1)
        assert [value for _, value in result.top(9)] == pytest.approx(sorted(flat.tolist())[::-1])
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
        with pytest.raises(ValueError, match="input"):
            tool(model, None, 5)


@pytest.mark.usefixtures("unchecked")
def test_another_unit_is_a_value_error_in_both():
    for tool in (their_own, direct_logit_attribution):
        with pytest.raises(ValueError, match="unit must be one of"):
            tool(load("gpt2", folded=True), tokens(), 5, unit="word")
