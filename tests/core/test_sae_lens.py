"""The dictionaries of sae-lens, where it is installed (it needs TransformerLens 2 or 3).

Each latent is held to what is lost when it alone is set to 0 and the dictionary decodes again.
"""

import importlib.util
import warnings

import pytest
import torch

from tests.support.models import load
from tests.zoo.build import ANSWERS, INCORRECT, tokens
from tl_dla import direct_logit_attribution

if importlib.util.find_spec("sae_lens") is None:
    pytest.skip("sae-lens is not installed", allow_module_level=True)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from sae_lens import saes

D_SAE = 40
MLP, POST = "blocks.1.hook_mlp_out", "blocks.1.hook_resid_post"
BY_NAME = {
    "standard": saes.StandardSAEConfig,
    "gated": saes.GatedSAEConfig,
    "jumprelu": saes.JumpReLUSAEConfig,
    "topk": saes.TopKSAEConfig,
    "transcoder": saes.TranscoderConfig,
    "skip_transcoder": saes.SkipTranscoderConfig,
    "jumprelu_transcoder": saes.JumpReLUTranscoderConfig,
}


def dictionary(name, d, **options):
    """One of sae-lens's, every weight random."""
    if "transcoder" in name:  # it subtracts no bias of another width
        options |= dict(d_out=d, apply_b_dec_to_input=False)
    config = BY_NAME[name](d_in=d, d_sae=D_SAE, **options)
    sae = saes.sae.get_sae_class(name)[0](config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return sae


def without(sae, x, latent):
    """What the dictionary gives with one latent at 0, normalised as it was."""
    latents = sae.encode(x)
    latents = latents.to_dense() if latents.is_sparse else latents.clone()
    latents[..., latent] = 0
    return sae.decode(latents)


@torch.no_grad()
def check(model, hook, sae, reads=None):
    result = direct_logit_attribution(
        model,
        tokens(),
        ANSWERS,
        INCORRECT,
        unit="latent",
        pos=None,
        dictionaries={hook if reads is None else (reads, hook): sae},
    )
    assert result.reconstruction.passed
    place = {MLP: "1_mlp_out", POST: "1_post"}.get(hook, "1_z")
    _, cache = model.run_with_cache(tokens())
    x = cache[hook if reads is None else reads]
    readout = direct_logit_attribution(model, tokens(), ANSWERS, INCORRECT, pos=None).readout

    def wrote(vectors):
        if place == "1_z":
            vectors = torch.einsum("bphd,hdm->bpm", vectors.view_as(cache[hook]), model.W_O[1])
        return readout.of(vectors[None])[0]

    whole = sae.decode(sae.encode(x))
    n = 0
    for latent in range(D_SAE):
        expected = wrote(whole - without(sae, x, latent))
        label = f"{place}:{latent}"
        if label in result.labels:
            torch.testing.assert_close(result[label], expected, atol=1e-5, rtol=1e-4)
            n += 1
        else:
            assert not expected.any()
    assert n >= 5
    error = wrote(cache[hook] - sae(x).view_as(cache[hook]))
    torch.testing.assert_close(result[f"{place}:error"], error, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "name, options",
    [
        ("standard", {}),
        ("standard", dict(apply_b_dec_to_input=False, normalize_activations="layer_norm")),
        ("standard", dict(normalize_activations="constant_norm_rescale")),
        ("gated", {}),
        ("jumprelu", dict(normalize_activations="layer_norm")),
        ("topk", dict(k=7)),
        ("topk", dict(k=7, rescale_acts_by_decoder_norm=True)),
    ],
)
def test_autoencoders_of_the_stream_with_their_own_conventions(name, options):
    model = load("ln")
    check(model, POST, dictionary(name, model.cfg.d_model, **options))


@pytest.mark.parametrize("name, options", [("standard", {}), ("topk", dict(k=7))])
def test_autoencoders_of_mixed_values_reshape_them_themselves(name, options):
    model = load("ln")
    z = model.cfg.n_heads * model.cfg.d_head
    sae = dictionary(name, z, reshape_activations="hook_z", **options)
    check(model, "blocks.1.attn.hook_z", sae)


@pytest.mark.parametrize("name", ["transcoder", "skip_transcoder", "jumprelu_transcoder"])
def test_transcoders(name):
    model = load("ln")
    transcoder = dictionary(name, model.cfg.d_model)
    check(model, MLP, transcoder, reads="blocks.1.ln2.hook_normalized")


def test_an_autoencoder_of_what_an_mlp_adds_to_a_bridge():
    model = load("gpt2")
    check(model, MLP, dictionary("standard", model.cfg.d_model))
