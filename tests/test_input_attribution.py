"""`attribute_inputs`: each row against autograd on plain frozen modules, and what must fail."""

import re
from dataclasses import replace
from functools import cache

import pytest
import torch

from tests.support.frozen import rows_of
from tests.support.models import all_in_float64, either, load, of_4, strong
from tests.zoo.build import ANSWERS, INCORRECT, tokens
from tests.zoo.reference import zoo_reference
from tl_dla import (
    UnsupportedModelError,
    attribute_inputs,
    input_attribution,
)
from tl_dla.core import run
from tl_dla.core.network import calls, readouts
from tl_dla.core.network.pull import Network
from tl_dla.core.taps import Kept
from tl_dla.errors import ArgumentError, ReconstructionError

# LayerNorm and positions; parallel, one matrix for q, k and v; grouped heads and every bias; norms
# behind sublayers and a soft cap; norms on queries and keys; parallel with a logit scale; gate and
# up in one matrix; a parallel block that shares its norm; ReLU; a norm on the stream's start;
# multipliers; experts; experts with biases, sinks and a clip; a latent and a shared expert; gates
# on the mixed values, per coordinate; norms inside sublayers.
NAMES = [
    *("gpt2", "gpt_neox", "llama_bias", "gemma2", "gemma3", "cohere", "phi3", "gptj", "opt"),
    *("bloom", "granite_bias", "mixtral", "gpt_oss", "deepseek_v3", "afmoe", "bitnet"),
]
GATED = ["llama_bias", "gemma2", "phi3", "granite_bias", "mixtral", "gpt_oss", "deepseek_v3"]
CASES = [(name, "half") for name in NAMES] + [(name, "gate") for name in GATED]


@cache
def reference(name, rule):
    return rows_of(strong(name)[1], tokens(), ANSWERS, INCORRECT, rule)


def rows_by_place(result):
    """The rows, every embedding of a place as one, and what gpt-oss adds to a clip as one."""
    found = {}
    for label, value in zip(result.labels, result.attribution, strict=True):
        label = re.sub(r"^(pos_embed|embed_rest)", "embed", label)
        found[label] = found.get(label, 0.0) + value
    return found


def offsets_added(rows):
    """gpt-oss adds 1 to each expert's up-projection: a constant beside the bias."""
    found = {}
    for label, value in rows.items():
        label = re.sub(r"_(E\d+_b_in|offset)$", "_b_in", label)
        found[label] = found.get(label, 0.0) + value
    return found


@of_4
def test_a_stream_without_a_final_norm_is_read_at_every_position():
    """Its end is what the unembedding is given, which sees the attributed positions alone."""
    model = load("openai_gpt")
    whole = attribute_inputs(model, tokens(), ANSWERS, INCORRECT, pos=None)
    last = attribute_inputs(model, tokens(), ANSWERS, INCORRECT)
    logits = zoo_reference("openai_gpt").logit
    torch.testing.assert_close(last.attribution.sum(0), logits[:, -1].float(), atol=1e-5, rtol=0)
    torch.testing.assert_close(last.attribution, whole.attribution[..., -1], atol=1e-5, rtol=0)


@of_4
@pytest.mark.parametrize(("name", "rule"), CASES)
def test_every_row_is_what_autograd_finds_in_a_frozen_plain_module(name, rule):
    model, _ = strong(name)
    with all_in_float64():
        result = attribute_inputs(model, tokens(), ANSWERS, INCORRECT, mlp=rule)
    (expected, flow), found = reference(name, rule), rows_by_place(result)
    if name == "gpt_oss":
        expected, found = offsets_added(expected), offsets_added(found)
    assert set(expected) <= set(found)  # more where an expert is chosen for nothing at the end
    for label, value in found.items():
        own = expected.get(label, torch.zeros_like(value))
        torch.testing.assert_close(value, own, atol=1e-9, rtol=1e-8, msg=label)
    torch.testing.assert_close(result.flow[:-1], flow, atol=1e-9, rtol=1e-8)
    assert result.reconstruction.passed and result.reconstruction.relative_error < 1e-12
    assert list(result.reconstruction.parts) == ["0_pre", "1_pre", "2_pre", "final_post"]


# ---- the forms of a question -------------------------------------------------------------------


def attribute(name="llama_bias", dtype=torch.float32, ids=None, answers=(ANSWERS, INCORRECT), **o):
    return attribute_inputs(load(name, dtype), tokens() if ids is None else ids, *answers, **o)


def test_several_positions_and_candidates_are_each_what_they_are_alone(monkeypatch):
    monkeypatch.setattr(readouts, "_AT_ONCE", 3 * 2 * 11 * 64)  # in parts of three
    together = attribute(answers=(), candidate_tokens=[5, 9, 7], pos=[0, 4, -1])
    assert together.attribution.shape[1:] == (2, 3, 3)
    assert together.flow.shape == (4, 2, 3, 3, 11)
    for p, pos in enumerate([0, 4, -1]):
        for c, token in enumerate([5, 9, 7]):
            alone = attribute(answers=(token,), pos=pos)
            for label, row in zip(together.labels, together.attribution, strict=True):
                own = alone[label] if label in alone.labels else torch.zeros(2)
                torch.testing.assert_close(row[:, p, c], own, atol=2e-6, rtol=2e-5)
            n = alone.flow.shape[-1]
            torch.testing.assert_close(together.flow[:, :, p, c, :n], alone.flow, **CLOSE)
            assert not together.flow[:, :, p, c, n:].any()


CLOSE = dict(atol=2e-6, rtol=2e-5)


def test_prompts_of_different_lengths_are_what_each_is_alone():
    model = load("gpt2")
    texts = ["w5 w9 w11 w4 w8", "w3 w7", "w20 w21 w22"]
    together = attribute_inputs(model, texts, 5, 7)
    assert together.reconstruction.passed
    for i, text in enumerate(texts):
        alone = attribute_inputs(model, text, 5, 7)
        for label in alone.labels:
            torch.testing.assert_close(together[label][i], alone[label][0], **CLOSE)
        n = alone.flow.shape[-1]
        torch.testing.assert_close(together.flow[:, i, :n], alone.flow[:, 0], **CLOSE)
        assert not together.flow[:, i, n:].any()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_no_row_of_its_own(side):
    ids, model = tokens(), load("gpt2")
    pad, mask = torch.zeros(2, 3, dtype=torch.long), torch.ones_like(ids)
    parts = [(pad, pad), (ids, mask)]
    parts = parts if side == "left" else parts[::-1]
    given, real = (torch.cat(x, 1) for x in zip(*parts, strict=True))
    padded = attribute_inputs(model, given, ANSWERS, INCORRECT, attention_mask=real)
    plain = attribute_inputs(model, ids, ANSWERS, INCORRECT)
    assert padded.labels == plain.labels
    torch.testing.assert_close(padded.attribution, plain.attribution, **CLOSE)


def test_a_cache_gives_what_the_model_gives():
    model = load("llama_bias")
    _, cache = model.run_with_cache(tokens())
    ran = attribute_inputs(model, tokens(), ANSWERS, INCORRECT, pos=[3, -1])
    read = attribute_inputs(model, tokens(), ANSWERS, INCORRECT, pos=[3, -1], cache=cache)
    torch.testing.assert_close(read.attribution, ran.attribution, **CLOSE)
    torch.testing.assert_close(read.flow, ran.flow, **CLOSE)
    assert "final residual stream" in str(read.reconstruction)


def test_without_the_end_s_biases_the_rows_add_up_to_the_rest():
    whole, without = attribute("gptj"), attribute("gptj", include_bias=False)
    ends = whole["ln_final.b"] + whole["b_U"]
    assert without.labels == whole.labels[:-2]
    torch.testing.assert_close(without.logit, whole.logit - ends, **CLOSE)
    assert without.reconstruction.passed


@pytest.mark.parametrize("name", either("gpt2", "gemma2", "granite_bias", "ln", "rms"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_certificate_passes_in_the_precision_of_the_model(name, dtype):
    result = attribute(name, dtype, pos=None)
    reconstruction = result.reconstruction
    assert reconstruction.passed
    # Not because anything would: no more than a part of what the rows are.
    size = result.attribution.abs().sum(0).max()
    assert reconstruction.tolerance.max() < (1e-3 if dtype == torch.float32 else 1.0) * size


@pytest.mark.parametrize("folded", [False, True])
def test_folding_the_norms_changes_no_total(folded):
    result = attribute_inputs(load("gptj", folded=folded), tokens(), ANSWERS, INCORRECT)
    plain = attribute("gptj")
    torch.testing.assert_close(result.logit, plain.logit, atol=1e-4, rtol=1e-4)
    assert result.reconstruction.passed


# ---- what must fail ----------------------------------------------------------------------------


def drop_bias(part):
    value = part.values.maps[0]
    return replace(part, values=replace(part.values, maps=(replace(value, b=None),)))


def drop_output_bias(part):
    return replace(part, out=replace(part.out, b_O=None))


def change_gamma(part):
    norm = part.values.norm
    norm = replace(norm, gamma=norm.gamma * torch.tensor([1.2, *[1.0] * 31]))
    return replace(part, values=replace(part.values, norm=norm))


def drop_head(part):
    W_O = part.out.W_O.clone()
    W_O[1] = 0.0
    return replace(part, out=replace(part.out, W_O=W_O))


def drop_neuron_bias(part):
    return replace(part, way_in=replace(part.way_in, b_in=None))


def drop_gate(part):
    return replace(part, way_in=replace(part.way_in, act=torch.nn.functional.relu))


ATTENTION = [drop_bias, drop_output_bias, change_gamma, drop_head]


@pytest.mark.parametrize("mistake", [*ATTENTION, drop_neuron_bias, drop_gate])
def test_what_is_read_wrongly_fails_the_certificate(monkeypatch, mistake):
    class Wrong(Network):
        def __init__(self, reader, rule, query):
            super().__init__(reader, rule, query)
            parts = [i for i in self.parts if (self.steps[i].name == "attn_out") == attention]
            self.parts[parts[1]] = mistake(self.parts[parts[1]])

    attention = mistake in ATTENTION
    monkeypatch.setattr(input_attribution, "Network", Wrong)
    with pytest.raises(ReconstructionError, match="what each layer holds|rows") as error:
        attribute()
    assert "frozen linear map" in str(error.value)
    assert not attribute(check="off").reconstruction.passed
    with pytest.warns(UserWarning, match="FAILED"):
        attribute(check="warn")


@pytest.mark.usefixtures("unchecked")
def test_other_rules_lines_and_checks_are_refused():
    with pytest.raises(ArgumentError, match='mlp must be "gate" or "half"'):
        attribute(mlp="tangent")
    with pytest.raises(ArgumentError, match="check must be"):
        attribute(check="maybe")
    with pytest.raises(ArgumentError, match='lines must be "frozen" or "tangent"'):
        attribute().effects(lines="gate")
    with pytest.raises(ArgumentError, match="unit must be one of component, head, neuron"):
        attribute().effects("source")


def test_no_answer_and_too_many_are_refused():
    with pytest.raises(ArgumentError, match="at most 1024"):
        attribute(answers=(), candidate_tokens=torch.arange(97).repeat(12))
    with pytest.raises(ArgumentError, match="answer_tokens is required"):
        attribute(answers=())


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("mamba", "mixer_out, which cannot be frozen"),
        ("olmo_clip", "clips its values"),
        ("llama4_text", "Llama4TextMoe"),
        ("jetmoe", "hook_z"),
        ("gemma4_ple", "per_layer_input_out, which cannot be frozen"),
    ],
)
def test_what_cannot_be_frozen_is_refused_by_name(name, why):
    with pytest.raises(UnsupportedModelError, match=why) as error:
        attribute(name)
    assert "work" in str(error.value) and "\n" not in str(error.value)


# ---- long prompts ------------------------------------------------------------------------------

# Positions that are rotated, added, or added to the scores; grouped heads; a latent; a stream that
# the block of attention adds to itself.
LONG = ["gpt2", "llama_bias", "gemma3", "mpt", "falcon", "deepseek_v3", "bloom", "gpt_neo"]


@pytest.mark.parametrize("name", [*LONG, *either("ln")])
def test_attention_that_runs_again_shows_what_it_showed(monkeypatch, name):
    at_once = attribute(name, pos=[4, -1])
    monkeypatch.setattr(calls, "_PATTERNS_AT_ONCE", 0)
    monkeypatch.setattr(run, "_LOGITS_AT_ONCE", 2 * 97)  # one prompt after the other
    kept = []
    read = Kept.joined.__func__ if hasattr(Kept.joined, "__func__") else Kept.joined
    monkeypatch.setattr(Kept, "joined", staticmethod(lambda *a: kept.append(read(*a)) or kept[-1]))
    again = attribute(name, pos=[4, -1])
    assert not any("pattern" in tap.site.name for one in kept for tap in one.values)
    torch.testing.assert_close(again.attribution, at_once.attribution, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(again.flow, at_once.flow, rtol=1e-5, atol=1e-5)
    assert again.reconstruction.passed
    effects = again.effects("head", "frozen").attribution
    monkeypatch.undo()
    expected = at_once.effects("head", "frozen").attribution
    torch.testing.assert_close(effects, expected, rtol=1e-5, atol=1e-5)
