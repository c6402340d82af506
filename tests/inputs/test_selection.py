"""Which rows are split: what may be said, and the sentences that refuse the rest."""

import numpy as np
import pytest
import torch

from tests.support.models import counted, load
from tests.zoo.build import tokens
from tl_dla import ArgumentError, direct_logit_attribution

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture(scope="module")
def model():
    return load("gpt2")


def same(a, b):
    return a.labels == b.labels and a.attribution.equal(b.attribution)


def attribute(model, unit, **options):
    return direct_logit_attribution(model, tokens(), 5, 7, unit=unit, **options)


def test_one_head_may_be_a_string(model):
    expected = attribute(model, "source", heads=["L2H0"])
    assert same(attribute(model, "source", heads="L2H0"), expected)
    assert same(attribute(model, "source", heads=("L2H0",)), expected)


@pytest.mark.parametrize("one", [2, np.int64(2), -1, range(2, 3), torch.tensor([2]), np.array(2)])
def test_one_layer_may_be_a_number(model, one):
    expected = attribute(model, "neuron", layers=[2], top_neurons=3)
    assert same(attribute(model, "neuron", layers=one, top_neurons=np.int64(3)), expected)


def test_heads_of_some_layers_leave_the_others_whole(model):
    some = attribute(model, "head", layers=1)
    heads, whole = attribute(model, "head"), attribute(model, "component")
    assert [x for x in some.labels if "H" in x] == ["L1H0", "L1H1", "L1H2", "L1H3"]
    for label in some.labels:
        of = heads if "H" in label or label.endswith("attn_bias") else whole
        torch.testing.assert_close(some[label], of[label], atol=1e-6, rtol=0)
    torch.testing.assert_close(some.attribution.sum(0), some.logit, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("unit", "options", "fragment"),
    [
        ("neuron", {"layers": []}, "layers is empty, so nothing would be split"),
        ("source", {"heads": []}, "heads is empty, so nothing would be split"),
        ("neuron", {"layers": 3}, "Layer 3 was asked for; the model has layers 0 to 2"),
        ("neuron", {"layers": [1.0]}, "layers must be an integer.*1.0"),
        ("neuron", {"layers": "1"}, "layers must be an integer.*'1'"),
        ("neuron", {"layers": True}, "layers must be an integer.*True"),
        ("source", {"heads": "L9H9"}, "L9H9 was asked for; the model has 3 layers"),
        ("source", {"heads": [(2, 0)]}, r"A head is written L9H9 .* \(2, 0\) was given"),
        ("source", {"heads": 3}, "A head is written L9H9 .* 3 was given"),
        ("component", {"layers": [1]}, 'layers is for unit="head" or unit="neuron"'),
        ("neuron", {"top_neurons": 0}, "top_neurons must be at least 1; 0"),
        ("neuron", {"top_neurons": 1.5}, "top_neurons must be at least 1; 1.5"),
    ],
    ids=str,
)
def test_what_cannot_be_split_is_one_sentence_before_the_model_runs(model, unit, options, fragment):
    with counted(model) as shapes, pytest.raises(ArgumentError, match=fragment):
        attribute(model, unit, **options)
    assert shapes == []
