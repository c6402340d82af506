"""Neurons, source tokens, paths and candidates on real weights, against plain `transformers`."""

import functools
import gc

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.gradients import gradients, inputs_of
from tl_dla import attribute_answer, attribute_path, direct_logit_attribution, token_map
from tl_dla.loading import gguf, load_model

pytestmark = [pytest.mark.real, pytest.mark.slow]

PROMPT, ANSWER, INCORRECT = "The Eiffel Tower is in the city of", " Paris", " London"
both = pytest.mark.parametrize("name", ["smollm2", "gemma3"])


@functools.cache
def loaded(name):
    """The model, and the plain module with its prompt's tokens and answers."""
    model = load_model(name, device="cpu")
    [folder] = (gguf.cache_folder() / "models").glob(f"{name}-*")
    plain = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def ids(text):
        return tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids

    prompt = torch.cat([torch.tensor([[tokenizer.bos_token_id]]), ids(PROMPT)], 1)
    return model, plain, prompt, ids(ANSWER)[0], ids(INCORRECT)[0]


@functools.cache
def attributed(name, unit):
    model, _, prompt, *_ = loaded(name)
    result = direct_logit_attribution(model, PROMPT, ANSWER, INCORRECT, unit=unit)
    assert torch.equal(result.prompts.packed, prompt)
    return result


@pytest.fixture(autouse=True, scope="module")
def forgotten():
    yield
    loaded.cache_clear()
    attributed.cache_clear()
    gc.collect()


def plain_difference(name):
    _, plain, prompt, answer, incorrect = loaded(name)
    with torch.no_grad():
        logits = plain(prompt).logits[0, -1]
    return logits[answer] - logits[incorrect]


def close(one, other, atol):
    torch.testing.assert_close(one, other, atol=atol, rtol=1e-3)


@both
@pytest.mark.parametrize("unit", ["neuron", "source"])
def test_the_rows_add_up_to_the_plain_modules_logit_difference(name, unit):
    result = attributed(name, unit)
    close(result.attribution.sum(0), plain_difference(name), 5e-4)
    parts = result.reconstruction.parts
    heads = attributed(name, "head").heads
    n_layers, n_heads = heads.shape[:2]
    assert result.reconstruction.passed
    assert len(parts) == n_layers * (1 if unit == "neuron" else 1 + n_heads)
    if unit == "source":
        sources = result.attribution[[kind == "source" for kind in result.kinds]]
        close(sources.unflatten(0, (n_layers, n_heads, -1)).sum(2), heads, 1e-4)


@both
def test_neurons_and_sources_are_what_the_logit_feels_of_them(name):
    """Activation × weights, and pattern × value × weights, times the gradient at the sublayer."""
    model, plain, prompt, answer, incorrect = loaded(name)
    felt = gradients(plain, prompt, answer, incorrect)
    neurons, sources = attributed(name, "neuron"), attributed(name, "source")
    with torch.no_grad():
        attentions = plain(prompt, output_attentions=True).attentions
    for layer in (0, 11, model.cfg.n_layers - 1):
        block = plain.model.layers[layer]
        attn = block.self_attn
        places = {"z": block.mlp.down_proj, "x": attn.v_proj}
        seen = inputs_of(plain, places, prompt)
        mlp, attention = (felt[f"{layer}_{part}_out"][0, -1] for part in ("mlp", "attn"))
        expected = seen["z"][0][0, -1] * (mlp @ block.mlp.down_proj.weight)
        rows = [neurons[f"L{layer}N{n}"] for n in range(len(expected))]
        close(torch.cat(rows), expected, 2e-5)

        with torch.no_grad():
            v = attn.v_proj(seen["x"][0])[0].unflatten(-1, (-1, attn.head_dim))
        pattern = attentions[layer][0, :, -1]
        along = (attention @ attn.o_proj.weight).unflatten(0, (-1, attn.head_dim))
        group = len(along) // v.shape[1]
        for head in range(len(along)):
            expected = pattern[head] * (v[:, head // group] @ along[head])
            rows = [sources[f"L{layer}H{head}←{s}"] for s in range(prompt.shape[1])]
            close(torch.cat(rows), expected, 2e-5)


@both
def test_a_path_from_the_head_that_writes_most_adds_up_to_its_source(name):
    sources = attributed(name, "source")
    [(row, _)] = sources.top(1, kind="source")
    head, _, source = row.partition("←")
    for unit in ("component", "head", "neuron"):
        path = attribute_path(attributed(name, "head"), head, int(source), unit=unit)
        assert path.reconstruction.passed
        close(path.attribution.sum(0), sources[row], 1e-4)


@both
def test_the_neurons_of_every_layer_that_have_no_row_share_one(name):
    model, *_ = loaded(name)
    every = attributed(name, "neuron")
    few = direct_logit_attribution(model, PROMPT, ANSWER, INCORRECT, unit="neuron", top_neurons=20)
    kept = [label for label in few.labels if label.startswith("L")]
    largest = every.top(20, kind="neuron", by="magnitude")
    assert set(kept) == {label for label, _ in largest}
    assert sum(label.endswith("_other_neurons") for label in few.labels) == model.cfg.n_layers
    close(few.attribution.sum(0), every.attribution.sum(0), 2e-4)


@both
def test_candidates_are_each_what_they_are_alone(name):
    model, plain, prompt, *_ = loaded(name)
    words = [" Paris", " London", " Rome", " Berlin", " Madrid"]
    result = direct_logit_attribution(model, PROMPT, candidate_tokens=words, unit="head")
    ids = [model.to_single_token(word) for word in words]
    with torch.no_grad():
        logits = plain(prompt).logits[0, -1]
    close(result.attribution.sum(0)[0], logits[ids], 5e-4)
    alone = direct_logit_attribution(model, PROMPT, " Rome", unit="head")
    close(result.attribution[..., 2], alone.attribution, 2e-5)
    mean = direct_logit_attribution(model, PROMPT, " Rome", "mean", unit="head")
    close(mean.attribution.sum(0), (logits[ids[2]] - logits.mean())[None], 5e-4)


@both
def test_an_answer_of_several_tokens_is_attributed_token_by_token(name):
    model, plain, prompt, *_ = loaded(name)
    answer = model.to_tokens(" Ouagadougou", prepend_bos=False)
    assert answer.shape[1] > 1
    result = attribute_answer(model, PROMPT, " Ouagadougou", unit="component")
    with torch.no_grad():
        logits = plain(torch.cat([prompt, answer], 1)).logits[0, prompt.shape[1] - 1 : -1]
    own = logits.gather(1, answer.mT)[:, 0]
    close(result.steps.attribution.sum(0)[0], own, 5e-4)
    close(result.attribution.sum(0), own.sum()[None], 1e-3)


@both
def test_a_token_map_is_made_of_the_plain_modules_weights(name):
    """Embedding, γ of the norm below, W_V, W_O, γ of the norm above, final γ, unembedding."""
    model, plain, *_ = loaded(name)
    layer, head, sources, targets = 11, 2, [" France", " Italy", " Japan"], [" Paris", " Rome"]
    block, offset = plain.model.layers[layer], 1.0 if name == "gemma3" else 0.0
    attn, above = block.self_attn, block.post_attention_layernorm.weight + offset
    d_head, at = attn.head_dim, slice(head * attn.head_dim, (head + 1) * attn.head_dim)
    group = attn.config.num_attention_heads // attn.config.num_key_value_heads
    W_V = attn.v_proj.weight.unflatten(0, (-1, d_head))[head // group]
    with torch.no_grad():
        ids = torch.tensor([model.to_single_token(word) for word in sources])
        x = plain.model.embed_tokens(ids) * (block.input_layernorm.weight + offset)
        x = x @ W_V.mT @ attn.o_proj.weight[:, at].mT * (above if name == "gemma3" else 1.0)
        x = x * (plain.model.norm.weight + offset)
        expected = x @ plain.lm_head.weight[[model.to_single_token(word) for word in targets]].mT
    close(token_map(model, layer, head)(sources, targets), expected, 1e-4)
