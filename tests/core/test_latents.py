"""Latents: against plain modules and autograd, with dictionaries of random weights."""

import re

import pytest
import torch

from tests.support.dictionaries import RandomDictionary, Squashing
from tests.support.gradients import gradients, inputs_of
from tests.support.models import all_in_float64, either, load, of_4, strong
from tests.zoo.build import ANSWERS, INCORRECT, tokens
from tl_dla import compare, direct_logit_attribution, required_hooks
from tl_dla.errors import ReconstructionError


def attribute(model, dictionaries, **options):
    options = dict(unit="latent", pos=None) | options
    return direct_logit_attribution(
        model, tokens(), ANSWERS, INCORRECT, dictionaries=dictionaries, **options
    )


def width(model, hook):
    """Numbers that a hook shows at a position."""
    _, cache = model.run_with_cache(tokens(), names_filter=[hook])
    return cache[hook].flatten(2).shape[-1]


def random_at(model, *hooks, dtype=torch.float32):
    return {hook: RandomDictionary(width(model, hook), dtype=dtype) for hook in hooks}


# Of each model: the block's parts in the plain module, as what they are given and what they give.
PLAIN = {
    "gpt2": ("transformer.h.1.attn.c_proj", "transformer.h.1.mlp", "transformer.h.2"),
    "llama_bias": ("model.layers.1.self_attn.o_proj", "model.layers.1.mlp", "model.layers.2"),
    "granite_bias": ("model.layers.1.self_attn.o_proj", "model.layers.1.mlp", "model.layers.2"),
    "gptj": ("transformer.h.1.attn.out_proj", "transformer.h.1.mlp", "transformer.h.2"),
}


def outputs_of(plain, path):
    kept = []
    module = plain.get_submodule(path)
    handle = module.register_forward_hook(lambda _m, _a, output: kept.append(output))
    try:
        inputs_of(plain, {}, tokens())
    finally:
        handle.remove()
    return kept[0][0] if isinstance(kept[0], tuple) else kept[0]


@of_4
@pytest.mark.parametrize(
    "name, place",
    [
        *(("gpt2", "z"), ("gpt2", "post"), ("llama_bias", "mlp_out"), ("granite_bias", "z")),
        *(("granite_bias", "attn_out"), ("granite_bias", "post"), ("gptj", "post")),
    ],
)
def test_a_latent_is_worth_its_activation_times_what_the_logit_feels_of_its_decoder(name, place):
    bridge, plain = strong(name)
    o_proj, mlp, block = PLAIN[name]
    felt = gradients(plain, tokens(), ANSWERS, INCORRECT)
    multiplier = getattr(plain.config, "residual_multiplier", 1.0)
    if place == "z":
        seen = inputs_of(plain, {"z": plain.get_submodule(o_proj)}, tokens())["z"][0]
        weight = plain.get_submodule(o_proj).weight
        feels = felt["1_attn_out"] @ (weight.T if name == "gpt2" else weight)
    elif place == "post":
        seen = inputs_of(plain, {"post": plain.get_submodule(block)}, tokens())["post"][0]
        feels = felt["2_mlp_out"] / multiplier
    else:  # the hook shows what is added, already multiplied
        seen = outputs_of(plain, mlp if place == "mlp_out" else o_proj) * multiplier
        feels = felt[f"1_{place}"] / multiplier
    hook = {"z": "attn.hook_z", "post": "hook_resid_post"}.get(place, f"hook_{place}")
    sae = RandomDictionary(seen.shape[-1], dtype=torch.float64)
    with all_in_float64():
        result = attribute(bridge, {f"blocks.1.{hook}": sae})
    latents = torch.relu(seen @ sae.W_enc + sae.b_enc).detach()
    expected = latents * (feels @ sae.W_dec.T).detach()
    rows = {i: result[f"1_{place}:{i}"] for i in range(50) if f"1_{place}:{i}" in result.labels}
    assert 30 < len(rows) <= 50
    for i in range(50):
        if i in rows:
            torch.testing.assert_close(rows[i], expected[..., i], atol=1e-9, rtol=1e-7)
        else:
            assert not expected[..., i].any()
    error = seen - (latents @ sae.W_dec + sae.b_dec)
    for row, vector in (("b_dec", sae.b_dec.expand_as(error)), ("error", error)):
        value = (vector * feels).sum(-1).detach()
        torch.testing.assert_close(result[f"1_{place}:{row}"], value, atol=1e-9, rtol=1e-7)
    before = [label for label in result.labels if label.startswith(("0_", "embed", "pos_embed"))]
    assert bool(before) == (place != "post")
    assert result.reconstruction.passed
    assert list(result.reconstruction.parts) == [
        "the latents of " + (f"1_{place}" if place != "z" else "1_attn_out")
    ]


@pytest.mark.parametrize(
    "dtype, narrow",
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.bfloat16),
        (torch.float64, torch.float32),
    ],
)
@pytest.mark.parametrize("name", ["gemma2", *either("ln", "rms")])
def test_latents_of_several_places_add_up_whatever_the_dtypes(name, dtype, narrow):
    model = load(name, dtype)
    hooks = [f"blocks.1.{hook}" for hook in ("hook_resid_mid", "hook_mlp_out")]
    dictionaries = random_at(model, *hooks, "blocks.2.attn.hook_z", dtype=narrow)
    result = attribute(model, dictionaries)
    assert result.reconstruction.passed and len(result.reconstruction.parts) == 3
    assert result.labels.count("1_mlp_out") == result.labels.count("2_attn_out") == 0
    plain = direct_logit_attribution(model, tokens(), ANSWERS, INCORRECT, pos=None)
    mine = [i for i, x in enumerate(result.labels) if x.startswith("1_mlp_out:")]
    whole = result.attribution[mine].sum(0)
    near = 1e-4 if dtype != torch.bfloat16 and narrow != torch.bfloat16 else 0.1
    torch.testing.assert_close(whole, plain["1_mlp_out"].to(whole), atol=near, rtol=near)


@pytest.mark.parametrize("name", ["gpt2", *either("ln")])
def test_a_cache_of_the_required_hooks_gives_what_a_pass_gives(name):
    model = load(name)
    dictionaries = random_at(model, "blocks.0.hook_resid_post", "blocks.2.attn.hook_z")
    hooks = required_hooks(model, "latent", dictionaries=dictionaries)
    _, cache = model.run_with_cache(tokens(), names_filter=hooks)
    own, given = (attribute(model, dictionaries, cache=c) for c in (None, cache))
    assert own.labels == given.labels
    torch.testing.assert_close(own.attribution, given.attribution, atol=1e-6, rtol=1e-5)


def test_the_end_of_the_stream_can_be_explained():
    model = load("gpt2")
    last = attribute(model, random_at(model, "blocks.2.hook_resid_post"))
    assert all(label.startswith("2_post:") for label in last.labels[:-1])
    assert last.labels[-1] == "ln_final.b"


def test_a_transcoder_reads_another_place_than_it_explains():
    model = load("gpt2")
    read, hook = "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out"
    transcoder = RandomDictionary(model.cfg.d_model, 40)
    result = attribute(model, {(read, hook): transcoder}, pos=-1)
    _, cache = model.run_with_cache(tokens())
    latents = transcoder.encode(cache[read][:, -1])
    error = cache[hook][:, -1] - transcoder.decode(latents)
    readout = direct_logit_attribution(model, tokens(), ANSWERS, INCORRECT).readout
    expected = readout.of(error[None].detach())[0]
    torch.testing.assert_close(result["1_mlp_out:error"], expected, atol=1e-5, rtol=1e-4)
    active = {int(i) for i in latents.any(0).nonzero()}
    rows = [re.fullmatch(r"1_mlp_out:(\d+)", label) for label in result.labels]
    assert {int(row[1]) for row in rows if row} == active


def test_what_a_transcoder_passes_on_has_a_row():
    model = load("gpt2")
    transcoder = RandomDictionary(model.cfg.d_model)
    transcoder.W_skip = torch.nn.Parameter(0.1 * torch.randn(2 * transcoder.W_dec.shape[1:]))
    result = attribute(model, {"blocks.1.hook_mlp_out": transcoder}, pos=-1)
    _, cache = model.run_with_cache(tokens())
    skipped = cache["blocks.1.hook_mlp_out"][:, -1] @ transcoder.W_skip.T
    readout = direct_logit_attribution(model, tokens(), ANSWERS, INCORRECT).readout
    expected = readout.of(skipped[None].detach())[0]
    torch.testing.assert_close(result["1_mlp_out:W_skip"], expected, atol=1e-5, rtol=1e-4)
    assert result.reconstruction.passed


def test_the_largest_latents_have_rows_and_the_others_of_a_dictionary_share_one():
    model = load("gemma2")
    dictionaries = random_at(model, "blocks.0.hook_resid_post", "blocks.1.hook_mlp_out")
    full, top = (attribute(model, dictionaries, top_latents=k) for k in (None, 5))
    size = {
        label: float(full[label].abs().mean())
        for label, kind in zip(full.labels, full.kinds, strict=True)
        if kind == "latent"
    }
    own = [x for x, kind in zip(top.labels, top.kinds, strict=True) if kind == "latent"]
    assert set(own) == set(sorted(size, key=lambda label: -size[label])[:5])
    for label in own:
        torch.testing.assert_close(top[label], full[label])
    for place in ("0_post", "1_mlp_out"):
        rest = [full[x] for x in size if x.startswith(f"{place}:") and x not in own]
        others = top[f"{place}:other_latents"]
        torch.testing.assert_close(others, torch.stack(rest).sum(0), atol=1e-5, rtol=1e-4)
    assert top.reconstruction.passed


def test_latents_promote_the_tokens_of_their_decoder():
    model = load("gpt2")
    dictionaries = random_at(model, "blocks.1.hook_resid_post")
    result = attribute(model, dictionaries, pos=-1, top_latents=3)
    label = result.labels[0]
    promoted = result.promoted_tokens(label, 1, prompt=0)
    answer = promoted.effect[ANSWERS[0]] - promoted.effect[INCORRECT[0]]
    torch.testing.assert_close(answer, result[label][0], atol=1e-5, rtol=1e-4)


def test_the_latents_of_two_prompts_are_compared():
    model = load("gemma2")
    dictionaries = random_at(model, "blocks.1.hook_resid_post")
    options = dict(unit="latent", dictionaries=dictionaries)
    a, b = (direct_logit_attribution(model, tokens()[[row]], 5, 7, **options) for row in (0, 1))
    found = compare(a, b)
    latents = {label for one in (a, b) for label in one.labels}
    assert set(found.labels) == latents and found.reconstruction.passed
    for label in latents:
        own = [one[label] if label in one.labels else torch.zeros(1) for one in (a, b)]
        torch.testing.assert_close(found[label], own[1] - own[0])


def test_a_dictionary_that_is_not_affine_fails_the_certificate():
    model = load("gpt2")
    with pytest.raises(ReconstructionError, match="The rows add up to"):
        attribute(model, {"blocks.1.hook_resid_post": Squashing(model.cfg.d_model)})
