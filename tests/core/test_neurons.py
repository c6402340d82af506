"""Neurons and experts: against plain modules, autograd and `stack_neuron_results`."""

import re

import pytest
import torch

from tests.support.gradients import gradients, inputs_of
from tests.support.models import all_in_float64, either, load, of_4, strong
from tests.zoo.build import ANSWERS, INCORRECT, boot, tokens
from tl_dla import UnsupportedModelError, direct_logit_attribution
from tl_dla.errors import ArgumentError

# Where the map from neurons to the stream is, in the plain module.
W_OUT = {
    "gpt2": "transformer.h.{}.mlp.c_proj",
    "llama_bias": "model.layers.{}.mlp.down_proj",
    "gemma2": "model.layers.{}.mlp.down_proj",
    "granite_bias": "model.layers.{}.mlp.down_proj",
    "bitnet": "model.layers.{}.mlp.down_proj",
    "gptj": "transformer.h.{}.mlp.fc_out",
    "falcon_h1": "model.layers.{}.feed_forward.down_proj",
    "gemma4_scalar": "model.layers.{}.mlp.down_proj",
}


def attribute(model, **options):
    options = dict(unit="neuron", pos=None) | options
    return direct_logit_attribution(model, tokens(), ANSWERS, INCORRECT, **options)


def by_layer(result, kind, letter):
    """Rows of a kind as `{layer: [row, batch, pos]}`."""
    found = {}
    for label, own, value in zip(result.labels, result.kinds, result.attribution, strict=True):
        match = re.fullmatch(rf"L(\d+){letter}(\d+)", label)
        if own == kind and match:
            assert len(found.setdefault(int(match[1]), [])) == int(match[2])
            found[int(match[1])].append(value)
    return {layer: torch.stack(rows) for layer, rows in found.items()}


@of_4
@pytest.mark.parametrize("name", W_OUT)
def test_a_neuron_is_worth_its_activation_times_what_the_logit_feels_along_its_weights(name):
    bridge, plain = strong(name)
    felt = gradients(plain, tokens(), ANSWERS, INCORRECT)
    maps = {f"{i}": plain.get_submodule(W_OUT[name].format(i)) for i in range(3)}
    seen = inputs_of(plain, maps, tokens())
    with all_in_float64():
        result = attribute(bridge)
    rows = by_layer(result, "neuron", "N")
    for layer in range(3):
        w_out = maps[f"{layer}"]
        weight = w_out.weight if name == "gpt2" else w_out.weight.T
        expected = seen[f"{layer}"][0] * (felt[f"{layer}_mlp_out"] @ weight.T)
        if name == "falcon_h1":
            expected = expected * plain.model.layers[layer].feed_forward.down_multiplier
        torch.testing.assert_close(rows[layer].movedim(0, -1), expected, atol=1e-9, rtol=1e-7)
        if w_out.bias is not None:
            bias = felt[f"{layer}_mlp_out"] @ w_out.bias
            torch.testing.assert_close(result[f"{layer}_mlp_bias"], bias, atol=1e-9, rtol=1e-7)
    assert result.reconstruction.passed and len(result.reconstruction.parts) == 3


@of_4
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen2_moe", "laguna", "flex_olmo"])
def test_an_expert_is_worth_what_is_lost_when_its_output_is_zeroed(name):
    """The plain mixture of experts runs on its own inputs, one expert's down-projection at 0."""
    bridge, plain = strong.__wrapped__(name)
    layers = [layer.mlp for layer in plain.model.layers]
    sparse = {i: mlp for i, mlp in enumerate(layers) if hasattr(mlp, "experts")}
    if name == "laguna":  # what its routed experts are multiplied by after the router's weights
        for i, mlp in sparse.items():
            for module in (mlp, bridge.blocks[i].mlp.original_component):
                module.routed_scaling_factor = 2.5
    felt = gradients(plain, tokens(), ANSWERS, INCORRECT)
    seen = inputs_of(plain, {f"{i}": mlp for i, mlp in sparse.items()}, tokens())
    with all_in_float64():
        result = attribute(bridge)
        rows = by_layer(result, "expert", "E")
        assert rows.keys() == sparse.keys()
        for i, mlp in sparse.items():
            whole = output(mlp, seen[f"{i}"])
            for expert in range(4):
                weights = [mlp.experts.down_proj, getattr(mlp.experts, "down_proj_bias", None)]
                kept = [None if w is None else w.data[expert].clone() for w in weights]
                for weight in weights:
                    if weight is not None:
                        weight.data[expert] = 0
                lost = whole - output(mlp, seen[f"{i}"])
                for weight, was in zip(weights, kept, strict=True):
                    if weight is not None:
                        weight.data[expert] = was
                expected = (lost * felt[f"{i}_mlp_out"]).sum(-1)
                torch.testing.assert_close(rows[i][expert], expected, atol=1e-9, rtol=1e-7)
    assert result.reconstruction.passed
    shared = [label for label in result.labels if label.endswith("shared_expert")]
    assert bool(shared) == (name in ("qwen2_moe", "laguna"))


def output(mlp, args):
    with torch.no_grad():
        result = mlp(*args)
    result = result[0] if isinstance(result, tuple) else result
    return result.reshape(args[0].shape)


@pytest.mark.parametrize("name", either("gpt2", "gptj", "native_rms", "ln", "gated", "rms"))
def test_neurons_are_those_of_stack_neuron_results_on_a_folded_model(name):
    model = load(name, folded=True)
    _, cache = model.run_with_cache(tokens())
    stack, labels = cache.stack_neuron_results(layer=-1, pos_slice=-1, return_labels=True)
    stack = cache.apply_ln_to_stack(stack, layer=-1, pos_slice=-1)
    direction = (model.W_U[:, ANSWERS] - model.W_U[:, INCORRECT]).T
    expected = (stack * direction).sum(-1)
    result = attribute(model, pos=-1)
    neurons = [i for i, label in enumerate(labels) if "N" in label]
    assert len(neurons) == sum(kind == "neuron" for kind in result.kinds)
    for i in neurons:
        torch.testing.assert_close(result[labels[i]], expected[i], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [pytest.param("native_soluln", marks=of_4), *either("solu_ln")])
def test_solu_ln_neurons_are_read_after_their_norm(name):
    assert attribute(load(name)).reconstruction.passed


@pytest.mark.parametrize("pos", [-1, None, [0, 7]])
@pytest.mark.parametrize("name", ["gemma2", "qwen2_moe"])
def test_top_neurons_keep_their_rows_and_the_others_share_one(name, pos):
    model = load(name)
    full, top = attribute(model, pos=pos), attribute(model, pos=pos, top_neurons=7)
    neurons = [
        label for label, kind in zip(full.labels, full.kinds, strict=True) if kind == "neuron"
    ]
    size = {label: float(full[label].abs().mean()) for label in neurons}
    largest = sorted(neurons, key=lambda label: -size[label])[:7]
    own = [label for label in top.labels if re.fullmatch(r"L\d+N\d+", label)]
    assert set(own) == set(largest)
    for label in own:
        torch.testing.assert_close(top[label], full[label])
    others = [label for label in top.labels if label.endswith("_other_neurons")]
    for label in others:
        layer = label.partition("_")[0]
        rest = [n for n in neurons if n.startswith(f"L{layer}N") and n not in own]
        expected = torch.stack([full[n] for n in rest]).sum(0)
        torch.testing.assert_close(top[label], expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(top.reconstruction.reconstructed, full.logit, atol=1e-5, rtol=0)
    assert top.reconstruction.passed


@of_4
def test_where_there_are_experts_alone_top_neurons_leaves_every_row():
    model = load("mixtral")
    full, top = attribute(model), attribute(model, top_neurons=3)
    assert top.labels == full.labels and full.kinds.count("expert") == 12
    torch.testing.assert_close(top.attribution, full.attribution)


def test_positions_that_a_short_prompt_lacks_do_not_rank_neurons():
    """The junk that stands at them would count otherwise."""
    model, mask = load("llama"), torch.ones(2, 11, dtype=torch.long)
    mask[1, 2:] = 0
    options = dict(unit="neuron", pos=None, attention_mask=mask)
    result = direct_logit_attribution(model, tokens(), 5, 9, **options)
    top = direct_logit_attribution(model, tokens(), 5, 9, top_neurons=5, **options)
    size = result.attribution.abs().nansum((1, 2)) / (11 + 2)
    neurons = [i for i, kind in enumerate(result.kinds) if kind == "neuron"]
    best = sorted(neurons, key=lambda i: -float(size[i]))[:5]
    own = {label for label in top.labels if re.fullmatch(r"L\d+N\d+", label)}
    assert own == {result.labels[i] for i in best}


def test_layers_choose_which_mlps_are_split():
    result = attribute(load("llama"), layers=[1, -1])
    assert by_layer(result, "neuron", "N").keys() == {1, 2}
    assert "0_mlp_out" in result.labels and "1_mlp_out" not in result.labels


def test_candidates_have_neurons_too():
    model, candidates = load("gemma2"), [5, 9, 11]
    options = dict(unit="neuron", pos=-1)
    result = direct_logit_attribution(model, tokens(), candidate_tokens=candidates, **options)
    for i, candidate in enumerate(candidates):
        alone = direct_logit_attribution(model, tokens(), candidate, **options)
        torch.testing.assert_close(result.attribution[..., i], alone.attribution)


def test_a_cache_gives_the_same_neurons():
    model = load("gemma2")
    _, cache = model.run_with_cache(tokens())
    torch.testing.assert_close(
        attribute(model, cache=cache).attribution, attribute(model).attribution
    )


@of_4
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("jetmoe", "hands its experts the tokens"),
        ("llama4_text", "hands its experts the tokens"),
        ("gemma4_moe", "each through a norm of its own"),
        ("rwkv", "no MLP"),
        ("native_attnonly", "no MLP"),
    ],
)
def test_what_is_no_sum_of_neurons_is_refused_by_name(name, why):
    with pytest.raises(UnsupportedModelError, match=why) as error:
        attribute(boot(name))
    assert "work" in str(error.value) and "\n" not in str(error.value)


def test_choices_that_cannot_be_meant_are_refused():
    model = load("llama")
    with pytest.raises(ArgumentError, match='top_neurons is for unit="neuron"'):
        attribute(model, unit="head", top_neurons=3)
    with pytest.raises(ArgumentError, match="at least 1; 0"):
        attribute(model, top_neurons=0)
    with pytest.raises(ArgumentError, match="Layer 3 was asked for; the model has layers 0 to 2"):
        attribute(model, layers=[3])
    with pytest.raises(ArgumentError, match='heads is for unit="head" or unit="source"'):
        attribute(model, heads=["L1H1"])
