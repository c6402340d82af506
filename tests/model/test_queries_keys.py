"""Scores put together from what is read, held to the model's own patterns, on every decoder."""

from functools import cache

import pytest
import torch

from tests.model.test_architectures import BOOTS, REFUSED
from tests.support.models import load, of_4
from tests.zoo.build import tokens
from tests.zoo.configs import CLASSES
from tl_dla import UnsupportedModelError
from tl_dla.model.hooks import Site
from tl_dla.model.norms import Norm
from tl_dla.model.projections import Beside, HeadNorm, Linear, Projection, Rotate
from tl_dla.model.reader import ModelReader

NO_ATTENTION = [
    *("mamba", "mamba2", "falcon_mamba", "nemotron_h"),
    *("rwkv", "rwkv_rescale", "zamba2", "recurrent_gemma"),
]
NOT_READ = {
    "olmo_clip": "clips its queries and keys",
    "gemma4_kvshare": "takes its keys from another layer",
    "jetmoe": "no one W_Q and W_K",
    "native_rms": "rotates inside NativeAttention",
}
READ = [name for name in BOOTS if name not in {*REFUSED, *NO_ATTENTION, *NOT_READ}]

pytestmark = of_4


def attention_layers(reader):
    found = range(reader.n_layers)
    return [i for i in found if reader.site(f"blocks.{i}.hook_attn_out") and reader.attention(i)]


def kept(model, sites):
    """What each place shows in one forward pass, by key."""
    values, handles = {}, []

    def read_output(key):
        return lambda _module, _args, output: values.update({key: output.detach().clone()})

    def read_argument(key, name):
        return lambda _module, _args, kwargs: values.update({key: kwargs.get(name)})

    for key, site in sites.items():
        if site.argument is None:
            handles.append(site.module.register_forward_hook(read_output(key)))
        else:
            read = read_argument(key, site.argument)
            handles.append(site.module.register_forward_pre_hook(read, with_kwargs=True))
    with torch.no_grad():
        model(tokens())
    for handle in handles:
        handle.remove()
    return values


@cache
def layers_of(name):
    """Each layer's reading with what its places show."""
    reader = ModelReader(load(name))
    parts = {layer: reader.queries_and_keys(layer) for layer in attention_layers(reader)}
    sites = {}
    for layer, part in parts.items():
        sites |= {(layer, "x"): part.site, (layer, "pattern"): part.pattern}
        sites |= {(layer, "rotary"): part.rotary.site} if part.rotary else {}
        sites |= {(layer, f"bias {i}"): site for i, (site, _) in enumerate(part.biases)}
        if part.norm is not None:
            sites[layer, "scale"] = part.norm.site
            sites[layer, "stream"] = reader.site(f"blocks.{layer}.hook_resid_pre")
    values = kept(reader.model, sites)
    return [
        (part, {key[1]: value for key, value in values.items() if key[0] == layer})
        for layer, part in parts.items()
    ]


@pytest.mark.parametrize("name", READ)
def test_the_softmax_of_the_scores_is_the_models_own_pattern(name):
    assert layers_of(name)
    for part, seen in layers_of(name):
        biases = [seen[f"bias {i}"] for i in range(len(part.biases))]
        scores = part.scores(seen["x"], seen.get("rotary"), biases)
        pattern = seen["pattern"].float()
        scores = scores.masked_fill(pattern == 0, -torch.inf)
        if part.sinks is not None:
            sinks = part.sinks[None, :, None, None].expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, sinks], -1)
        ours = scores.softmax(-1)[..., : pattern.shape[-1]]
        torch.testing.assert_close(ours, pattern, atol=5e-6, rtol=1e-4)


@pytest.mark.parametrize("name", READ)
def test_what_attention_reads_is_the_stream_through_its_norm(name):
    for part, seen in layers_of(name):
        if part.norm is not None:
            x = part.norm.forward(seen["stream"], part.norm.scale(seen["scale"])) * part.factor
            torch.testing.assert_close(x.flatten(2), seen["x"].flatten(2), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3", "olmo2", "cohere_qkn", "deepseek_v3", "phi"])
def test_queries_and_keys_are_linear_once_frozen(name):
    for part, seen in layers_of(name):
        rotation = part.rotary.matrix(seen["rotary"]).double()
        for projection in part.query, part.key:
            check_linear(projection, seen["x"].double(), rotation)


def check_linear(projection, x, rotation):
    frozen = projection.freeze(x, rotation)
    direction = torch.randn_like(frozen.value)
    heads = range(direction.shape[-2])
    back = torch.stack([frozen.back(direction[..., h, :], h) for h in heads], -2)
    ours = torch.einsum("...hd,...d->...h", back, x)
    expected = (direction * (frozen.value - frozen.constant)).sum(-1)
    torch.testing.assert_close(ours, expected, atol=1e-10, rtol=1e-9)


def test_frozen_projections_are_the_derivative_with_every_scale_held():
    """All kinds of steps at once, against autograd through the same formula, written out."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    W, b = torch.randn(1, 6, 4, dtype=torch.float64), torch.randn(1, 4, dtype=torch.float64)
    up = torch.randn(2, 4, 3, dtype=torch.float64)
    side = torch.randn(1, 6, 2, dtype=torch.float64)
    gamma, beta = torch.randn(2, 4, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(2, 3, 5, 5, dtype=torch.float64)).Q
    norm = Norm("n", Site("n", torch.nn.Identity()), gamma, beta, True, 1e-5)
    latent = (Linear(W, b), HeadNorm(norm), Linear(up))
    projection = Projection((Beside((latent, (Linear(side),))), Rotate()))
    frozen = projection.freeze(x.detach(), rotation)

    y = x @ W[0] + b[0]
    y = y - y.mean(-1, keepdim=True)
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt().detach() * gamma + beta
    heads = torch.stack([torch.cat([y @ up[h], x @ side[0]], -1) for h in (0, 1)], 2)
    heads = torch.einsum("bpij,bphj->bphi", rotation, heads)
    torch.testing.assert_close(frozen.value, heads.detach())
    direction = torch.randn_like(heads)
    for head in 0, 1:
        chosen = (heads[:, :, head] * direction[:, :, head]).sum()
        [gradient] = torch.autograd.grad(chosen, x, retain_graph=True)
        back = frozen.back(direction[:, :, head], head)
        torch.testing.assert_close(back, gradient)


def test_rounding_is_felt_at_every_step():
    """‖v ⊙ w‖² of what each step gives; a rotation adds two products, which may cancel."""
    x = torch.tensor([[[1.0, 2.0]]], dtype=torch.float64)
    W = torch.tensor([[[3.0, 0.0], [0.0, 1.0]]], dtype=torch.float64)
    turn = torch.tensor([[[[0.6, -0.8], [0.8, 0.6]]]], dtype=torch.float64)
    frozen = Projection((Linear(W), Rotate())).freeze(x, turn)  # (3, 2), then (0.2, 3.6)
    direction = torch.tensor([[[1.0, 10.0]]], dtype=torch.float64)
    rotated = (0.6 * 3 + 0.8 * 2) ** 2 + (10 * (0.8 * 3 + 0.6 * 2)) ** 2
    linear = (3 * (0.6 + 8.0)) ** 2 + (2 * (-0.8 + 6.0)) ** 2
    assert frozen.felt(direction, 0).item() == pytest.approx(rotated + linear)


@pytest.mark.parametrize("name", NOT_READ)
def test_what_is_not_read_is_refused_by_name(name):
    reader = ModelReader(load(name))
    with pytest.raises(UnsupportedModelError, match=NOT_READ[name]) as error:
        for layer in range(reader.n_layers):
            reader.queries_and_keys(layer)
    assert 'unit="head" works' in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", NO_ATTENTION)
def test_a_layer_without_attention_has_no_scores(name):
    with pytest.raises(UnsupportedModelError, match="has no attention"):
        ModelReader(load(name)).queries_and_keys(0)


def test_the_survey_of_scores():
    assert len([name for name in CLASSES if name in READ]) == 74
