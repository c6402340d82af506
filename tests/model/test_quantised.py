"""Weights that are kept quantised: dequantised by their own class, or read off their own module."""

import importlib.util

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.models import load, of_3, of_4, words
from tests.zoo.bases import LL, NEOX
from tests.zoo.build import ANSWERS, INCORRECT, build, hf_reference, perturb, tokens
from tl_dla import attribute_inputs, direct_logit_attribution, load_model
from tl_dla.errors import UnsupportedModelError


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


def gguf_linear(linear: nn.Linear) -> nn.Module:
    """8-bit blocks, as transformers keeps those of a GGUF file where its kernels can read them."""
    from gguf import GGMLQuantizationType, quants
    from transformers.integrations.gguf.utils import GgufLinear

    kind, has_bias = GGMLQuantizationType.Q8_0, linear.bias is not None
    module = GgufLinear(linear.in_features, linear.out_features, int(kind), has_bias)
    module.weight.data = torch.from_numpy(quants.quantize(linear.weight.detach().numpy(), kind))
    module.bias = linear.bias
    return module


def dense_gguf(module: nn.Module) -> torch.Tensor:
    from gguf import GGMLQuantizationType, quants

    return torch.from_numpy(quants.dequantize(module.weight.numpy(), GGMLQuantizationType.Q8_0))


def converted(model: nn.Module, convert) -> nn.Module:
    """The plain model with every linear map of its blocks converted."""
    for block in model.model.layers:
        for owner in (block.self_attn, block.mlp):
            for name, child in list(owner.named_children()):
                if hasattr(child, "in_features"):
                    setattr(owner, name, convert(child))
    return model


def plain(child: nn.Module, dense) -> nn.Linear:
    """The same numbers in a plain linear map."""
    linear = nn.Linear(child.in_features, child.out_features, child.bias is not None)
    linear.weight.data, linear.bias = dense(child), child.bias
    return linear


def attribute(model: nn.Module, unit: str):
    tokenizer = AutoTokenizer.from_pretrained(build("llama_bias")[1])
    wrapped = load_model(model, tokenizer)
    return direct_logit_attribution(wrapped, tokens(), ANSWERS, INCORRECT, unit=unit, pos=None)


@of_4
@pytest.mark.parametrize("unit", ["component", "head", "neuron", "source"])
@pytest.mark.parametrize(
    "pack, dense", [(PackedLinear, PackedLinear.dense), (gguf_linear, dense_gguf)]
)
def test_packed_weights_are_read_off_their_modules(unit, pack, dense):
    if pack is gguf_linear:
        pytest.importorskip("gguf")
        pytest.importorskip("transformers.integrations.gguf", reason="transformers unpacks GGUF")
    model, unpacked = (converted(hf_reference("llama_bias"), pack) for _ in range(2))
    converted(unpacked, lambda child: plain(child, dense))
    if pack is gguf_linear:  # the unembedding too
        model.lm_head = pack(model.lm_head)
        unpacked.lm_head = plain(model.lm_head, dense)
    found, expected = attribute(model, unit), attribute(unpacked, unit)
    assert found.labels == expected.labels and found.reconstruction.passed
    assert found.reconstruction.tolerance.max() < 1e-3
    torch.testing.assert_close(found.attribution, expected.attribution, atol=1e-5, rtol=1e-4)


@of_4
@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("unit", ["component", "head", "neuron", "source"])
@pytest.mark.parametrize("rounds", [False, True], ids=["weights", "activations too"])
def test_weights_of_torchao_are_dequantised(unit, rounds):
    """int8, the unembedding too, against plain weights of the same numbers."""
    from torchao import quantization

    config = "Int8DynamicActivationInt8WeightConfig" if rounds else "Int8WeightOnlyConfig"
    quantised, plain = hf_reference("llama_bias"), hf_reference("llama_bias")
    quantization.quantize_(quantised, getattr(quantization, config)())
    numbers = dict(quantised.named_parameters())
    for name, parameter in plain.named_parameters():
        if type(numbers[name]) is not nn.Parameter:
            parameter.data = numbers[name].dequantize()
    found, expected = attribute(quantised, unit), attribute(plain, unit)
    assert found.labels == expected.labels and found.reconstruction.passed
    assert (found.reconstruction.tolerance.max() < 1e-4) != rounds
    near = dict(atol=0.1, rtol=0.1) if rounds else dict(atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.attribution, expected.attribution, **near)


@of_3
@pytest.mark.parametrize("name, unit", [("W_O", "head"), ("W_out", "neuron")])
def test_a_hooked_transformer_that_packs_its_matrices_is_refused(name, unit):
    """As `load_in_4bit` leaves them: one column of bytes."""
    model = load.__wrapped__("ln")
    block = model.blocks[1]
    owner = block.attn if name == "W_O" else block.mlp
    packed = torch.zeros(getattr(owner, name).numel() // 2, 1, dtype=torch.uint8)
    setattr(owner, name, nn.Parameter(packed, requires_grad=False))
    with pytest.raises(UnsupportedModelError, match=rf"needs {name} as numbers.*packs it"):
        direct_logit_attribution(model, tokens(), 5, unit=unit)


# ---- bitsandbytes, whose kernels round more than the model does --------------------------------

of_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
BLOCKS = dict(hidden_size=128, intermediate_size=192)  # blocks of 64 weights share a scale
PACKED = {
    "4 bit": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "4 bit, twice": dict(load_in_4bit=True, bnb_4bit_use_double_quant=True),
    "8 bit": dict(load_in_8bit=True),
}


def of_folder(folder, dtype, **options):
    """The model in that folder, packed as it is loaded."""
    config = transformers.BitsAndBytesConfig(**options)
    kwargs = dict(quantization_config=config, device_map="cpu", dtype=dtype)
    return AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", **kwargs
    ).eval()


def saved(config_class, kwargs, folder):
    config = getattr(transformers, config_class)(**kwargs | BLOCKS)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float()
    perturb(model)
    model.save_pretrained(folder)
    return folder


@of_4
@of_bitsandbytes
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("packing", PACKED)
def test_weights_of_bitsandbytes_are_read_off_their_modules(tmp_path, packing, dtype):
    """Against plain weights of the same numbers, but for what its kernels round."""
    folder = saved("LlamaConfig", LL | dict(attention_bias=True, mlp_bias=True), tmp_path)
    found = load_model(of_folder(folder, dtype, **PACKED[packing]), words())
    plain = load_model(of_folder(folder, dtype, **PACKED[packing]).dequantize(), words())
    for unit in ("component", "head", "neuron", "source"):
        question = (tokens(), ANSWERS, INCORRECT)
        ours, expected = (
            direct_logit_attribution(model, *question, unit=unit, pos=None)
            for model in (found, plain)
        )
        assert ours.labels == expected.labels and ours.reconstruction.passed
        miss = (ours.attribution - expected.attribution).square().mean().sqrt()
        assert miss < 0.1 * expected.attribution.square().mean().sqrt()
        exact = dtype == torch.float32 and unit == "component"  # no packed weight is read
        assert (ours.reconstruction.tolerance.max() < 1e-4) == exact
    assert attribute_inputs(found, *question).reconstruction.passed


@of_4
@of_bitsandbytes
@pytest.mark.filterwarnings("ignore")
def test_a_joint_weight_that_is_packed_is_refused_with_the_remedy(tmp_path):
    model = of_folder(saved("GPTNeoXConfig", NEOX, tmp_path), torch.float32, load_in_4bit=True)
    with pytest.raises(UnsupportedModelError, match=r"pass hf_model.dequantize\(\)"):
        load_model(model, words())
    loaded = load_model(model.dequantize(), words())
    assert direct_logit_attribution(loaded, tokens(), 5, unit="head").reconstruction.passed
