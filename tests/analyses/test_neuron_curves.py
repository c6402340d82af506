"""Neurons with their activations: against the cache and the plain weights; the figure."""

import numpy as np
import pytest
import torch

from tests.support.models import load
from tests.zoo.build import hf_reference, tokens
from tl_dla import direct_logit_attribution
from tl_dla.errors import ArgumentError

CANDIDATES = [5, 7, 11, 30]


@pytest.fixture(scope="module")
def llama():
    model = load("llama")
    options = dict(candidate_tokens=CANDIDATES, unit="neuron", layers=1, pos=[3, -1])
    result = direct_logit_attribution(model, tokens(), **options)
    _, cache = model.run_with_cache(tokens())
    return result, cache, result.neuron_curves()


def test_a_curve_is_activation_times_weights(llama):
    """Written out: act(gate) × up, W_out, γ / the scale of the final norm, W_U."""
    _, cache, neurons = llama
    plain = hf_reference("llama")
    mlp, seen = plain.model.layers[1].mlp, {}
    handles = [
        mlp.down_proj.register_forward_hook(lambda _m, args, _o: seen.update(z=args[0])),
        plain.model.norm.register_forward_hook(lambda _m, args, _o: seen.update(x=args[0])),
    ]
    with torch.no_grad():
        plain(tokens())
        z = seen["z"][:, [3, -1]].flatten(0, 1)  # [sample, neuron]
        square = seen["x"].square().mean(-1) + plain.model.norm.variance_epsilon
        scale = square.sqrt()[:, [3, -1]].flatten()
        weights = mlp.down_proj.weight.T * plain.model.norm.weight
        effect = weights @ plain.lm_head.weight[CANDIDATES].T  # [neuron, candidate]
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(neurons.activations, z.T, atol=1e-6, rtol=1e-5)
    expected = z.T[..., None] * effect[:, None] / scale[:, None]
    torch.testing.assert_close(neurons.contributions, expected, atol=1e-6, rtol=1e-4)
    order = z.abs().mean(0).argsort(descending=True)
    assert [label for label, _ in neurons.top(3)] == [f"L1N{i}" for i in order[:3]]
    assert neurons.top(1)[0][1] == pytest.approx(float(z[:, order[0]].mean()), abs=1e-6)
    sizes = z.abs().mean(0)[order]
    assert neurons.share(5) == pytest.approx(float(sizes[:5].sum() / sizes.sum()), rel=1e-5)
    contrast = (expected - expected.mean(-1, keepdim=True)).abs().mean((1, 2))
    assert neurons.top(1, by="contrast")[0][0] == f"L1N{int(contrast.argmax())}"
    table = neurons.to_dataframe()
    assert list(table.columns[2:]) == neurons.candidates and len(table) == len(order)
    np.testing.assert_allclose(table.iloc[:, 2], expected[..., 0].mean(1), atol=1e-6)


def test_the_figure_shows_all_activations_and_the_largest_curves(llama):
    _, _, neurons = llama
    figure = neurons.plot(3)
    every, *pairs = figure.data
    sizes = neurons.activations.mean(1).abs().sort(descending=True).values
    np.testing.assert_allclose(every.y, sizes, atol=1e-6)
    for (label, _), curve in zip(neurons.top(3), pairs[1::2], strict=True):
        assert curve.name == label
        row = neurons.contributions[neurons.labels.index(label)].mean(0)
        np.testing.assert_allclose(curve.y, row, atol=1e-6)
    assert f"{neurons.share(3):.0%} of all |activation|" in figure.layout.title.text
    below = neurons.plot(3, width=400).layout
    assert below.yaxis.domain[0] > below.yaxis2.domain[1]


def test_a_cache_is_read_and_what_cannot_be_is_refused(llama):
    result, cache, neurons = llama
    calls = []
    handle = result.model.unembed.register_forward_hook(lambda *_: calls.append(1))
    again = result.neuron_curves(cache=cache)
    handle.remove()
    assert not calls
    torch.testing.assert_close(again.activations, neurons.activations, atol=1e-6, rtol=1e-5)
    model = result.model
    few = direct_logit_attribution(model, tokens(), 5, unit="neuron", layers=1, top_neurons=4)
    every = direct_logit_attribution(model, tokens(), 5, 7, unit="neuron")
    with pytest.raises(ArgumentError, match="all have a row"):
        few.neuron_curves()
    with pytest.raises(ArgumentError, match="name the layer; those of \\[0, 1, 2\\]"):
        every.neuron_curves()
    assert every.neuron_curves(2).candidates == [every.target]
    with pytest.raises(ArgumentError, match="all have a row"):
        direct_logit_attribution(load("mixtral"), tokens(), 5, unit="neuron").neuron_curves(1)
