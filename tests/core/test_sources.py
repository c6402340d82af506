"""Source tokens and paths: against the attention of plain modules, autograd, and each other."""

import pytest
import torch

from tests.support.gradients import gradients, inputs_of
from tests.support.models import all_in_float64, either, load, of_4, strong
from tests.zoo.build import ANSWERS, INCORRECT, boot, tokens
from tl_dla import (
    TokenError,
    UnsupportedModelError,
    ablate,
    attribute_path,
    copy_suppression,
    direct_effect_recomputed,
    direct_logit_attribution,
    erasures,
    required_hooks,
    self_repair,
    top_heads_with_patterns,
)
from tl_dla.errors import ArgumentError

LAYER, HEAD, SOURCE = 2, 1, 4
# Grouped heads with biases; norms after sublayers and a soft cap; multipliers; attention sinks; a
# gate on the mixed values (per coordinate, per head); one norm over all heads.
PLAIN = ["llama_bias", "gemma2", "granite_bias", "gpt_oss", "afmoe", "laguna", "bitnet"]


def attribute(model, **options):
    options = dict(unit="source", pos=None) | options
    return direct_logit_attribution(model, tokens(), ANSWERS, INCORRECT, **options)


class PlainAttention:
    """Pattern, values and W_O of one layer of a plain module, from its own forward pass."""

    def __init__(self, plain, layer):
        self.block = plain.model.layers[layer]
        attn = self.block.self_attn
        seen = inputs_of(plain, {"attn": self.block.input_layernorm, "o": attn.o_proj}, tokens())
        patterns = []
        handle = attn.register_forward_hook(lambda _m, _a, out: patterns.append(out[1]))
        with torch.no_grad(), all_in_float64():
            plain(tokens(), output_attentions=True)
            handle.remove()
            normed = self.block.input_layernorm(seen["attn"][0])
            v = attn.v_proj(normed)
        self.pattern, self.z = patterns[0], seen["o"][0]
        d_head = attn.head_dim
        self.n_heads = self.z.shape[-1] // d_head
        self.group = self.n_heads // (v.shape[-1] // d_head)
        self.v = v.unflatten(-1, (-1, d_head)).repeat_interleave(self.group, 2)
        self.W_O = attn.o_proj.weight.T.unflatten(0, (self.n_heads, d_head))
        self.stream, self.normed = seen["attn"][0], normed
        self.gate = self._gate(attn, normed)

    def _gate(self, attn, normed):
        """What multiplies the mixed values, by the model's own definition."""
        shape = (self.n_heads, attn.head_dim)
        with torch.no_grad():
            if hasattr(attn, "gate_proj"):
                return torch.sigmoid(attn.gate_proj(normed)).unflatten(-1, shape)
            if hasattr(attn, "g_proj"):
                return torch.nn.functional.softplus(attn.g_proj(normed))[..., None]
            if hasattr(attn, "attn_sub_norm"):
                mixed = torch.einsum("bhqk,bkhd->bqhd", self.pattern, self.v).flatten(2)
                eps = attn.attn_sub_norm.variance_epsilon
                scale = (mixed.square().mean(-1, keepdim=True) + eps).sqrt()
                return (attn.attn_sub_norm.weight / scale).unflatten(-1, shape)
        return torch.ones(1, 1, 1, 1, dtype=torch.float64)


@of_4
@pytest.mark.parametrize("name", PLAIN)
def test_a_source_is_worth_attention_times_what_the_logit_feels_of_its_value(name):
    bridge, plain = strong(name)
    felt = gradients(plain, tokens(), ANSWERS, INCORRECT)[f"{LAYER}_attn_out"]
    attn = PlainAttention(plain, LAYER)
    along = torch.einsum("hdm,bqm->bqhd", attn.W_O, felt) * attn.gate
    expected = torch.einsum("bhqk,bkhd,bqhd->hkbq", attn.pattern, attn.v, along)
    with all_in_float64():
        result = attribute(bridge)
    for head in range(attn.n_heads):
        rows = [result[f"L{LAYER}H{head}←{source}"] for source in range(11)]
        torch.testing.assert_close(torch.stack(rows), expected[head], atol=1e-9, rtol=1e-7)
    assert result.reconstruction.passed
    assert f"the source tokens of L{LAYER}H0" in result.reconstruction.parts


@pytest.mark.parametrize("name", either("gpt2", "gptj", "phi", "ln", "grouped", "sinks", "moe"))
def test_sources_add_up_to_heads(name):
    """To float32 rounding, where the heads come from another run."""
    model = load(name)
    heads, sources = attribute(model, unit="head"), attribute(model)
    for label, kind in zip(heads.labels, heads.kinds, strict=True):
        if kind == "head":
            rows = [sources[f"{label}←{s}"] for s in range(11)]
            torch.testing.assert_close(torch.stack(rows).sum(0), heads[label], atol=2e-6, rtol=0)
        else:
            torch.testing.assert_close(sources[label], heads[label])


def test_no_token_is_read_before_it_is_there():
    result = attribute(load("llama"))
    for label, source in zip(result.labels, result.sources, strict=True):
        if source is not None:
            assert not bool(result[label][:, :source].any()), label
            assert bool(result[label][:, source:].all()), label


def test_heads_and_layers_choose_what_is_split():
    model = load("llama")
    full = attribute(model)
    one = attribute(model, heads=["L1H2"], pos=-1)
    assert [x for x in one.labels if "←" in x] == [f"L1H2←{s}" for s in range(11)]
    assert "L1H1" in one.labels and "L1H2" not in one.labels
    torch.testing.assert_close(one["L1H2←3"], full["L1H2←3"][:, -1])
    layer = attribute(model, layers=[0], pos=3)
    assert {x.partition("←")[0] for x in layer.labels if "←" in x} == {f"L0H{h}" for h in range(4)}
    assert max(s for s in layer.sources if s is not None) == 3
    with pytest.raises(ArgumentError, match="layer 1 has 4 heads"):
        attribute(model, heads=["L1H4"])
    with pytest.raises(ArgumentError, match="A head is written L9H9"):
        attribute(model, heads=["1.2"])


def test_a_batch_of_prompts_of_different_lengths_gives_what_each_gives_alone():
    model = load("gemma2")
    padded = torch.zeros(2, 11, dtype=torch.long)  # the second prompt is padded on its left
    padded[0], padded[1, 4:] = tokens()[0], tokens()[1, :7]
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[1, :4] = 0
    options = dict(unit="source", pos=[-1, 2])
    batch = direct_logit_attribution(model, padded, 5, 7, attention_mask=mask, **options)
    alone = direct_logit_attribution(model, tokens()[1:, :7], 5, 7, **options)
    for label in alone.labels:
        torch.testing.assert_close(batch[label][1], alone[label][0], atol=2e-6, rtol=1e-4)
    beyond = [label for label in batch.labels if label not in alone.labels]
    assert beyond and not any(bool(batch[label][1].any()) for label in beyond)


@of_4
def test_a_cache_of_prompts_padded_on_the_left_gives_the_same_sources():
    model = boot("llama")
    padded, mask = tokens().clone(), torch.ones(2, 11, dtype=torch.long)
    padded[1, :4], mask[1, :4] = 0, 0
    _, cache = model.run_with_cache(padded, attention_mask=mask)
    options = dict(unit="source", pos=-1, attention_mask=mask)
    cached = direct_logit_attribution(model, padded, 5, 7, cache=cache, **options)
    fresh = direct_logit_attribution(model, padded, 5, 7, **options)
    assert fresh.labels == [x for x in cached.labels if x in fresh.labels]
    for label in fresh.labels:
        torch.testing.assert_close(cached[label], fresh[label], atol=2e-6, rtol=1e-4)


def test_a_table_names_the_source_tokens():
    model = load("llama")
    table = attribute(model, pos=-1, heads=["L1H2"]).to_dataframe()
    row = table[(table.label == "L1H2←3") & (table.prompt == 1)].iloc[0]
    assert row.source == 3 and row.source_token == f"w{tokens()[1, 3]}"
    assert table[table.label == "embed"].source.isna().all()


# ---- paths -------------------------------------------------------------------------------------


@of_4
@pytest.mark.parametrize("name", ["llama_bias", "gemma2", "granite_bias", "gpt_oss"])
def test_a_path_is_the_stream_read_through_the_heads_values(name):
    """Every part of the stream times γ/s of the norm below, W_V, the pattern and what W_O feels."""
    bridge, plain = strong(name)
    felt = gradients(plain, tokens(), ANSWERS, INCORRECT)[f"{LAYER}_attn_out"][:, -1]
    attn, norm = PlainAttention(plain, LAYER), plain.model.layers[LAYER].input_layernorm
    W_V = attn.block.self_attn.v_proj.weight.unflatten(0, (-1, attn.v.shape[-1]))
    along = felt @ attn.W_O[HEAD].T * attn.pattern[:, HEAD, -1, SOURCE, None]
    into = along @ W_V[HEAD // attn.group]
    eps = getattr(norm, "variance_epsilon", None) or norm.eps
    scale = (attn.stream[:, SOURCE].square().mean(-1, keepdim=True) + eps).sqrt()
    into = into * (norm.weight + (1.0 if name == "gemma2" else 0.0)) / scale
    with all_in_float64():
        result = attribute(bridge, pos=-1)
        path = attribute_path(result, f"L{LAYER}H{HEAD}", SOURCE, unit="component")
    for label, written in written_by(plain, name).items():
        expected = (written[:, SOURCE] * into).sum(-1)
        torch.testing.assert_close(path[label], expected, atol=1e-10, rtol=1e-7)
    torch.testing.assert_close(path.logit, result[f"L{LAYER}H{HEAD}←{SOURCE}"], atol=1e-12, rtol=0)
    torch.testing.assert_close(path.attribution.sum(0), path.logit, atol=1e-10, rtol=0)
    bias = attn.block.self_attn.v_proj.bias
    if bias is not None:
        expected = along @ bias.unflatten(0, (-1, attn.v.shape[-1]))[HEAD // attn.group]
        torch.testing.assert_close(path[f"{LAYER}_b_V"], expected, atol=1e-10, rtol=1e-7)


def written_by(plain, name):
    """What the embedding and the sublayers of the earlier layers add to the stream."""
    written, handles = {}, []

    def keep(module, label, factor=1.0):
        def hook(_module, _args, output):
            output = output[0] if isinstance(output, tuple) else output
            written[label] = factor * output

        handles.append(module.register_forward_hook(hook))

    after = {"attn": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}
    before = {"attn": "self_attn", "mlp": "mlp"}
    parts = after if name == "gemma2" else before
    factor = plain.config.residual_multiplier if name.startswith("granite") else 1.0
    for i, layer in enumerate(plain.model.layers[:LAYER]):
        for part, module in parts.items():
            keep(layer.get_submodule(module), f"{i}_{part}_out", factor)
    first = plain.model.layers[0].register_forward_pre_hook(
        lambda _m, args: written.update(embed=args[0])
    )
    with torch.no_grad(), all_in_float64():
        plain(tokens())
    for handle in [*handles, first]:
        handle.remove()
    return written


@of_4
def test_a_path_has_the_constant_of_the_norm_it_reads_through():
    """GPT-2: β of ln1, through W_V and W_O, times the attention paid."""
    bridge, plain = strong("gpt2")
    felt = gradients(plain, tokens(), ANSWERS, INCORRECT)[f"{LAYER}_attn_out"][:, -1]
    block = plain.transformer.h[LAYER]
    d, heads = 32, slice(HEAD * 8, HEAD * 8 + 8)
    along = felt @ block.attn.c_proj.weight[heads].T
    with torch.no_grad(), all_in_float64():
        attentions = plain(tokens(), output_attentions=True).attentions[LAYER]
        result = attribute(bridge, pos=-1)
        path = attribute_path(result, f"L{LAYER}H{HEAD}", SOURCE, unit="component")
    along = along * attentions[:, HEAD, -1, SOURCE, None]
    W_V = block.attn.c_attn.weight[:, 2 * d :][:, heads]
    b_V = block.attn.c_attn.bias[2 * d :][heads]
    torch.testing.assert_close(path[f"{LAYER}_ln1.b"], along @ (block.ln_1.bias @ W_V))
    torch.testing.assert_close(path[f"{LAYER}_b_V"], along @ b_V)
    assert {"embed", "pos_embed", "0_attn_out", "1_mlp_out"} < set(path.labels)


@pytest.mark.parametrize(
    "name",
    either("llama", "gpt2", "gemma2", "gptj", "falcon_h1", "ln", "sandwich", "grouped", "attn_in"),
)
def test_a_path_goes_one_step_further_back(name):
    """What a head wrote to the path is what it moved there from every token that it read."""
    model = load(name)
    result = attribute(model, unit="head", pos=[-1, 6])
    path = attribute_path(result, "L2H1", [5, 4])
    torch.testing.assert_close(path.attribution.sum(0), path.logit, atol=1e-6, rtol=0)
    steps = [attribute_path(path, "L1H3", source) for source in range(5)]
    assert steps[2].path == ("L2H1←source", "L1H3←2")
    total = torch.stack([step.logit for step in steps]).sum(0)
    torch.testing.assert_close(total[1], path["L1H3"][1], atol=1e-7, rtol=1e-4)
    for step in steps:
        assert step.reconstruction.passed
        assert float(step.logit.abs().max()) > 0
    through = attribute_path(path, "L0H0", 1, unit="component")
    assert through.reconstruction.passed and "0_ln1.b" not in through.labels[:1]


def test_a_path_may_be_split_into_neurons_and_sources_of_its_own():
    model = load("gemma2")
    result = attribute(model, unit="component", pos=-1)
    heads = attribute_path(result, "L2H1", 5)
    neurons = attribute_path(result, "L2H1", 5, unit="neuron", top_neurons=3)
    sources = attribute_path(result, "L2H1", 5, unit="source", heads=["L1H0"])
    assert sum("N" in label for label in neurons.labels) == 3
    rows = [sources[f"L1H0←{s}"] for s in range(6)]
    torch.testing.assert_close(torch.stack(rows).sum(0), heads["L1H0"], atol=1e-7, rtol=1e-4)
    candidates = direct_logit_attribution(model, tokens(), candidate_tokens=[5, 7, 9], pos=-1)
    path = attribute_path(candidates, "L2H1", 5)
    for i, candidate in enumerate([5, 7, 9]):
        alone = direct_logit_attribution(model, tokens(), candidate, pos=-1)
        torch.testing.assert_close(
            path.attribution[..., i], attribute_path(alone, "L2H1", 5).attribution
        )


def test_a_path_says_what_it_is():
    model = load("llama")
    result = attribute(model, unit="head", pos=-1)
    path = attribute_path(result, "L2H1", 5)
    assert "through L2H1←5" in repr(path) and "row L2H1←5" in repr(path)
    with pytest.raises(ArgumentError, match="A path's rows are read out through its head"):
        _ = path.readout
    text = f"w{tokens()[0, 5]}"
    alone = direct_logit_attribution(model, tokens()[:1], 5, unit="head")
    assert attribute_path(alone, "L2H1", text).path == ("L2H1←5",)


def test_what_is_asked_of_the_final_stream_is_not_asked_of_a_path(tmp_path):
    """Its rows were written at the source token; its page is its rows alone."""
    path = attribute_path(attribute(load("gpt2"), unit="head", pos=-1), "L2H1", 3, unit="head")
    for ask in (
        lambda: path.audit(progress=False),
        lambda: ablate(path, ["L0H1"]),
        lambda: self_repair(path, "L0H1"),
        lambda: erasures(path),
        lambda: copy_suppression(path),
        lambda: direct_effect_recomputed(path),
        lambda: top_heads_with_patterns(path),
        lambda: path.neuron_curves(0),
    ):
        with pytest.raises(ArgumentError, match=r"read by a head \(L2H1←3\), not at"):
            ask()
    page = path.report(tmp_path / "path.html").read_text(encoding="utf-8")
    assert "A path through L2H1←3: nothing else was run." in page
    assert 'id="heads"' in page and 'id="logit-lens"' not in page


def test_sources_that_are_not_there_are_refused():
    model = load("llama")
    result = attribute(model, unit="head", pos=-1)
    with pytest.raises(TokenError, match="Source 11 is outside prompt 0, which has 11 tokens"):
        attribute_path(result, "L2H1", 11)
    with pytest.raises(TokenError, match="'nowhere' is 0 times a token of prompt 0"):
        attribute_path(result, "L2H1", "nowhere")
    with pytest.raises(TokenError, match="3 positions were given as source for 2 prompts"):
        attribute_path(result, "L2H1", [1, 2, 3])
    path = attribute_path(result, "L1H1", 5)
    with pytest.raises(UnsupportedModelError, match="L2H1 wrote nothing to the stream"):
        attribute_path(path, "L2H1", 3)
    _, cache = model.run_with_cache(tokens(), names_filter=required_hooks(model))
    cached = direct_logit_attribution(model, None, ANSWERS, cache=cache)
    with pytest.raises(ArgumentError, match="made from a cache without its input"):
        attribute_path(cached, "L2H1", 3)


@of_4
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("olmo_clip", "clips its values"),
        ("gemma4_kvshare", "takes its values from another layer"),
        ("jetmoe", "hook_z"),
        ("mamba", "no attention layer"),
    ],
)
def test_what_is_no_mixture_of_values_is_refused_by_name(name, why):
    with pytest.raises(UnsupportedModelError, match=why) as error:
        attribute(boot(name))
    assert "work" in str(error.value) and "\n" not in str(error.value)


@of_4
@pytest.mark.parametrize("name", ["deepseek_v3", "gemma4_text"])
def test_values_that_are_no_linear_map_of_the_stream_are_refused_by_name(name):
    result = attribute(boot(name), unit="head", pos=-1)
    with pytest.raises(UnsupportedModelError, match='more on the way; unit="source" works'):
        attribute_path(result, "L1H1", 3)
