"""`effects`: activation times derivative, frozen and not, by autograd on plain modules."""

import pytest
import torch

from tests.support.frozen import effects_of
from tests.support.models import all_in_float64, either, load, of_4, strong
from tests.zoo.build import ANSWERS, INCORRECT, tokens
from tl_dla import attribute_inputs
from tl_dla.analyses.total_effects import effects
from tl_dla.core.network import readouts
from tl_dla.errors import ArgumentError

# What W_O and W_out are given, in plain modules.
GIVEN = {
    "gpt2": ("transformer.h", "attn.c_proj", "mlp.c_proj"),
    "gpt_neox": ("gpt_neox.layers", "attention.dense", "mlp.dense_4h_to_h"),
    "llama_bias": ("model.layers", "self_attn.o_proj", "mlp.down_proj"),
    "gemma2": ("model.layers", "self_attn.o_proj", "mlp.down_proj"),
    "afmoe": ("model.layers", "self_attn.o_proj", None),
}
N_HEADS = 4


def given(name, plain, unit):
    """A plain model's layers, and the module in each that is given its heads or neurons."""
    layers, heads, neurons = GIVEN[name]
    path = heads if unit == "head" else neurons
    every = plain.get_submodule(layers)
    return {str(i): layer.get_submodule(path) for i, layer in enumerate(every)}


@of_4
@pytest.mark.parametrize("lines", ["frozen", "tangent"])
@pytest.mark.parametrize(
    ("name", "unit"),
    [(name, "head") for name in GIVEN] + [(name, "neuron") for name in GIVEN if name != "afmoe"],
)
def test_an_effect_is_the_activation_times_what_the_logit_feels_of_it(name, unit, lines):
    bridge, plain = strong(name)
    with all_in_float64():
        result = attribute_inputs(bridge, tokens(), ANSWERS, INCORRECT)
        found = result.effects(unit, lines)
    rule = "half" if lines == "frozen" else None
    expected = effects_of(plain, tokens(), ANSWERS, INCORRECT, rule, given(name, plain, unit))
    for layer, own in expected.items():
        by_row = own.unflatten(2, (N_HEADS, -1)).sum(-1) if unit == "head" else own
        letter = "H" if unit == "head" else "N"
        rows = [found[f"L{layer}{letter}{i}"] for i in range(by_row.shape[2])]
        torch.testing.assert_close(torch.stack(rows, -1), by_row, atol=1e-9, rtol=1e-8)


@of_4
@pytest.mark.parametrize("name", ["gpt2", "gemma2", "granite_bias", "mixtral"])
def test_what_heads_and_their_bias_write_is_what_their_layer_writes(name):
    """Frozen: a component is linear in its parts, and the embeddings are their rows."""
    model, _ = strong(name)
    with all_in_float64():
        result = attribute_inputs(model, tokens(), ANSWERS, INCORRECT)
        parts, heads = result.effects("component", "frozen"), result.effects("head", "frozen")
    for layer in range(3):
        every = sum(heads[f"L{layer}H{head}"].sum(-1) for head in range(N_HEADS))
        label = f"{layer}_attn_bias"
        every = every + (result[label] if label in result.labels else 0.0)
        torch.testing.assert_close(parts[f"{layer}_attn_out"].sum(-1), every)
    if name == "gpt2":
        for start in ("embed", "pos_embed"):
            rows = torch.stack([result[f"{start}←{i}"] for i in range(11)], -1)
            torch.testing.assert_close(parts[start], rows)


@pytest.mark.parametrize("lines", ["frozen", "tangent"])
@pytest.mark.parametrize("name", either("gpt2", "opt", "rms"))
def test_positions_candidates_and_lengths_are_each_what_they_are_alone(monkeypatch, name, lines):
    monkeypatch.setattr(readouts, "_AT_ONCE", 2 * 2 * 11 * 64)  # in parts of two targets
    model = load(name)
    prompts = [tokens()[0].tolist(), tokens()[1, :6].tolist()]
    result = attribute_inputs(model, prompts, candidate_tokens=[5, 9], pos=[1, -1])
    together = result.effects("component", lines)
    assert together.attribution.shape == (len(together.labels), 2, 2, 2, 11)
    for i, prompt in enumerate(prompts):
        for p, pos in enumerate([1, -1]):
            for c, token in enumerate([5, 9]):
                one = attribute_inputs(model, torch.tensor([prompt]), token, pos=pos)
                alone = one.effects("component", lines)
                assert alone.labels == together.labels
                own = together.attribution[:, i, p, c]
                n = alone.attribution.shape[-1]
                torch.testing.assert_close(
                    own[:, :n], alone.attribution[:, 0], atol=2e-5, rtol=2e-4
                )
                assert not own[:, n:].any()


@pytest.mark.parametrize("frozen", [True, False])
def test_gradients_of_parameters_are_left_alone(frozen):
    model = load.__wrapped__("gpt2")
    model.requires_grad_(not frozen)
    result = attribute_inputs(model, tokens(), ANSWERS, INCORRECT)
    with torch.no_grad():
        found = result.effects("head", "tangent")
    assert bool(found.attribution.any()) and not found.attribution.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad is not frozen for parameter in model.parameters())


def test_rows_are_ranked_and_tabulated():
    result = attribute_inputs(load("gpt2"), tokens(), ANSWERS, INCORRECT)
    found = result.effects("component", "frozen")
    assert found.labels[:4] == ["embed", "pos_embed", "0_attn_out", "0_mlp_out"]
    totals = found.attribution.sum(-1).mean(1)
    [(label, value), *_] = found.top(2, kind="mlp")
    mlps = [i for i, kind in enumerate(found.kinds) if kind == "mlp"]
    assert value == pytest.approx(float(totals[found.labels.index(label)]))
    assert abs(value) == pytest.approx(float(totals[mlps].abs().max()))
    frame = found.to_dataframe()
    assert len(frame) == len(found.labels) * 2 * 11
    line = frame[(frame.label == "1_mlp_out") & (frame.prompt == 1) & (frame.source == 4)]
    assert line.effect.item() == pytest.approx(float(found["1_mlp_out"][1, 4]))
    assert 'unit="component", lines="frozen"' in repr(found)
    with pytest.raises(KeyError, match="No row 'L9H9'"):
        found["L9H9"]
    with pytest.raises(ArgumentError, match="No row is of kind 'head'"):
        found.top(2, kind="head")


def test_each_unit_takes_the_lines_that_predict_it_best():
    result = attribute_inputs(load("gpt2"), tokens(), ANSWERS, INCORRECT, mlp="gate")
    assert result.effects().unit == "head" and result.effects().lines == "tangent"
    assert result.effects("component").lines == result.effects("neuron").lines == "frozen"


def test_a_model_without_the_unit_is_said():
    result = attribute_inputs(load("mixtral"), tokens(), ANSWERS, INCORRECT)
    for lines in ("frozen", "tangent"):
        with pytest.raises(ArgumentError, match='no rows of unit="neuron"'):
            effects(result, "neuron", lines, "half")


@pytest.mark.parametrize("lines", ["frozen", "tangent"])
def test_inference_mode_changes_no_effect(lines):
    model = load("llama")
    expected = attribute_inputs(model, tokens(), ANSWERS, INCORRECT).effects("head", lines)
    with torch.inference_mode():
        result = attribute_inputs(model, tokens().clone(), ANSWERS.clone(), INCORRECT.clone())
        inside = result.effects("head", lines)
    for found in (inside, result.effects("head", lines)):
        torch.testing.assert_close(found.attribution, expected.attribution)
