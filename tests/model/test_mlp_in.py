"""Neurons and experts made from the stream as it is read, held to the model's own activations."""

from functools import cache

import pytest
import torch

from tests.model.test_architectures import BOOTS, REFUSED
from tests.support.models import load, of_4
from tests.zoo.build import tokens
from tests.zoo.configs import CLASSES
from tl_dla import UnsupportedModelError
from tl_dla.model.mlp_in import ExpertsIn, MLPIn
from tl_dla.model.reader import ModelReader

NO_MLP = [
    *("mamba", "mamba2", "falcon_mamba", "nemotron_h", "zamba2"),
    *("rwkv", "rwkv_rescale", "native_attnonly"),
]
NOT_READ = {
    "recurrent_gemma": "hides them",
    "gemma4_moe": "adds a mixture of experts and an MLP",
    "jetmoe": "not stacked matrices",
    "llama4_text": "not stacked matrices",
}
READ = [name for name in BOOTS if name not in {*REFUSED, *NO_MLP, *NOT_READ}]

pytestmark = of_4


def sublayers(reader):
    """The sublayers that are MLPs: the write, its name below the block."""
    for write in reader.stream().writes:
        name = write.label.partition("_")[2].removesuffix("_out")
        if write.kind == "mlp" and name in ("mlp", "moe", "shared_mlp"):
            yield write, name


@cache
def parts_of(name):
    """Each MLP's way in and way out, with the stream that it reads and what it makes of it."""
    reader = ModelReader(load(name))
    found, seen, handles = [], {}, []

    def keep(key, inputs=False):
        def hook(_module, args, output):
            seen[key] = [x.clone() for x in args] if inputs else output.clone()

        return hook

    for write, inside in sublayers(reader):
        layer = write.layer
        way_in, way_out = reader.mlp_in(layer, inside), reader.mlp(write)
        found.append((write, way_in, way_out))
        point = "pre" if way_in.parallel else "mid"
        stream = reader.site(f"blocks.{layer}.hook_resid_{point}")
        places = {"made": (way_out.site, way_out.site.inputs), "x": (stream, False)}
        if way_in.norm is not None:
            places["scale"] = way_in.norm.site, False
        for key, (site, inputs) in places.items():
            hook = keep((write.label, key), inputs)
            handles.append(site.module.register_forward_hook(hook))
    with torch.no_grad():
        reader.model(tokens())
    for handle in handles:
        handle.remove()
    return [(*part, {k[1]: v for k, v in seen.items() if k[0] == part[0].label}) for part in found]


def read(reader_norm, seen):
    x = seen["x"]
    return x if reader_norm is None else reader_norm.forward(x, reader_norm.scale(seen["scale"]))


# Norms that are steps of the stream lie between the point that is seen and the MLP.
@pytest.mark.parametrize("name", [n for n in READ if n not in ("opt_350m", "bloom_resid")])
def test_neurons_are_what_the_model_makes_of_the_stream(name):
    for _, way_in, way_out, seen in parts_of(name):
        x = read(way_in.norm, seen)
        if isinstance(way_in, MLPIn):
            ours, own = way_in.post(x), seen["made"]
            own = own[0] if isinstance(own, list) else own
            torch.testing.assert_close(ours.flatten(), own.flatten(), **CLOSE)
        else:
            check_experts(way_in, way_out, x.flatten(0, 1), seen["made"])


CLOSE = dict(atol=2e-5, rtol=2e-5)


def check_experts(way_in, way_out, x, made):
    """The module's own sum over the experts chosen, and what they are given."""
    given, chosen, weights = made
    torch.testing.assert_close(x, given, **CLOSE)
    ours = torch.zeros_like(x)
    for index in range(way_in.n_experts):
        expert = way_in.expert(index)
        wrote = expert.way_in.post(x) @ expert.W_out
        wrote = wrote if expert.b_out is None else wrote + expert.b_out
        ours += wrote * (weights * (chosen == index)).sum(-1, keepdim=True)
    with torch.no_grad():
        own = way_out.site.module(given, chosen, weights)
    torch.testing.assert_close(ours, own, **CLOSE)
    assert (way_out.shared is None) == (way_in.shared is None)


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen2_moe", "ernie4_5_moe", "afmoe", "glm4_moe"])
def test_the_shared_expert_is_read_too(name):
    layers = {w.layer: (i, s) for w, i, _, s in parts_of(name) if isinstance(i, ExpertsIn)}
    blocks = load(name).blocks
    for layer, (way_in, seen) in layers.items():
        moe = blocks[layer].mlp.original_component
        shared = getattr(moe, "shared_experts", None) or moe.shared_expert
        x = seen["made"][0]
        ours = way_in.shared.way_in.post(x) @ way_in.shared.W_out
        with torch.no_grad():
            torch.testing.assert_close(ours, shared(x), **CLOSE)
            if way_in.shared_gate is not None:
                own = moe.shared_expert_gate(x)[..., 0]
                torch.testing.assert_close(x @ way_in.shared_gate, own, **CLOSE)


@pytest.mark.parametrize("name", NOT_READ)
def test_what_is_not_read_is_refused_by_name(name):
    reader = ModelReader(load(name))
    with pytest.raises(UnsupportedModelError, match=NOT_READ[name]) as error:
        for layer in range(reader.n_layers):
            reader.mlp_in(layer)
    assert "work" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", NO_MLP)
def test_a_block_without_an_mlp_has_no_way_in(name):
    reader = ModelReader(load(name))
    assert [reader.mlp_in(layer) for layer in range(reader.n_layers)] == [None] * reader.n_layers


def test_the_survey_of_mlps():
    assert len([name for name in CLASSES if name in READ]) == 73
