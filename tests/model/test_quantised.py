"""Weights that are kept quantised: dequantised by their own class, or read off their own module."""

import importlib.util

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

from tests.support.models import of_4
from tests.zoo.build import ANSWERS, INCORRECT, build, hf_reference, tokens
from tl_dla import direct_logit_attribution, load_model


class PackedLinear(nn.Module):
    """8-bit weights, packed in rows of their own; `weight` is no matrix, as in bitsandbytes."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        packed = (linear.weight.detach() / scale).round().to(torch.int8)
        self.weight = nn.Parameter(packed.flatten(), requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def dense(self) -> torch.Tensor:
        return self.weight.unflatten(0, (-1, self.in_features)) * self.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.dense(), self.bias)


def packed(model: nn.Module) -> nn.Module:
    """The plain model with every map of its blocks packed."""
    for block in model.model.layers:
        for owner in (block.self_attn, block.mlp):
            for name, child in list(owner.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(owner, name, PackedLinear(child))
    return model


def dequantised(model: nn.Module) -> nn.Module:
    """The same numbers in plain linear maps."""
    for block in model.model.layers:
        for owner in (block.self_attn, block.mlp):
            for name, child in list(owner.named_children()):
                if isinstance(child, PackedLinear):
                    plain = nn.Linear(child.in_features, child.out_features, child.bias is not None)
                    plain.weight.data, plain.bias = child.dense(), child.bias
                    setattr(owner, name, plain)
    return model


def attribute(model: nn.Module, unit: str):
    tokenizer = AutoTokenizer.from_pretrained(build("llama_bias")[1])
    wrapped = load_model(model, tokenizer)
    return direct_logit_attribution(wrapped, tokens(), ANSWERS, INCORRECT, unit=unit, pos=None)


@of_4
@pytest.mark.parametrize("unit", ["component", "head", "neuron", "source"])
def test_packed_weights_are_read_off_their_modules(unit):
    found = attribute(packed(hf_reference("llama_bias")), unit)
    expected = attribute(dequantised(packed(hf_reference("llama_bias"))), unit)
    assert found.labels == expected.labels and found.reconstruction.passed
    torch.testing.assert_close(found.attribution, expected.attribution, atol=1e-5, rtol=1e-4)


@of_4
@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("unit", ["component", "head", "neuron", "source"])
def test_weights_of_torchao_are_dequantised(unit):
    """int8, weight only, the unembedding too, against plain weights of the same numbers."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantised, plain = hf_reference("llama_bias"), hf_reference("llama_bias")
    quantize_(quantised, Int8WeightOnlyConfig())
    numbers = dict(quantised.named_parameters())
    for name, parameter in plain.named_parameters():
        if type(numbers[name]) is not nn.Parameter:
            parameter.data = numbers[name].dequantize()
    found, expected = attribute(quantised, unit), attribute(plain, unit)
    assert found.labels == expected.labels and found.reconstruction.passed
    torch.testing.assert_close(found.attribution, expected.attribution, atol=1e-5, rtol=1e-4)
