"""What rows promote, the mean of the vocabulary, token maps and the unembedding's geometry."""

import numpy as np
import pytest
import torch

from tests.support.models import either, load, of_4
from tests.zoo.build import ANSWERS, boot, hf_reference, tokens
from tl_dla import (
    UnsupportedModelError,
    attribute_path,
    direct_logit_attribution,
    token_map,
    unembedding_pca,
)
from tl_dla.analyses.promotion import most_moved
from tl_dla.errors import ArgumentError

CONSTANTS = {"ln_final.b", "b_U"}
UNITS = ["component", "head", "neuron", "source"]


def attribute(model, prompts=None, **options):
    prompts = tokens()[:1] if prompts is None else prompts
    return direct_logit_attribution(model, prompts, 5, **options)


# ---- promoted tokens ---------------------------------------------------------------------------


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", either("gpt2", "gptj", "gemma2", "cohere", "softcap", "sandwich"))
def test_what_all_rows_do_to_the_vocabulary_is_the_models_own_logits(name, unit):
    model = load(name)
    options = {"neuron": dict(layers=[1]), "source": dict(heads=["L1H2"])}.get(unit, {})
    result = attribute(model, unit=unit, **options)
    if unit in ("neuron", "source"):  # too many to run one by one: what they add up to is certified
        rows = [x for x in result.labels if x in ("L1N3", "L1N40", "L1H2←4", "L1H2←10", "L2H0")]
    else:
        rows = result.labels
    promoted = {label: result.promoted_tokens(label, 3) for label in rows}
    for label, found in promoted.items():  # at the attributed token, the row itself
        torch.testing.assert_close(found.effect[5], result[label][0], atol=2e-6, rtol=1e-4)
    if rows is result.labels:
        total = torch.stack([found.effect for found in promoted.values()]).sum(0)
        torch.testing.assert_close(total, model(tokens()[:1])[0, -1], atol=1e-5, rtol=0)


@of_4
def test_a_component_promotes_what_its_output_says_in_a_plain_model():
    """The whole vocabulary of LLaMA: γ ⊙ (what the MLP wrote) / s @ W_U, position by position."""
    plain, wrote = hf_reference("llama"), {}
    layer, norm = plain.model.layers[1], plain.model.norm
    layer.mlp.register_forward_hook(lambda _m, _a, out: wrote.update(mlp=out))
    norm.register_forward_pre_hook(lambda _m, args: wrote.update(stream=args[0]))
    with torch.no_grad():
        plain(tokens())
    result = attribute(load("llama"), tokens(), pos=[-1, 4])
    scale = (wrote["stream"].square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
    logits = wrote["mlp"] * norm.weight / scale @ plain.lm_head.weight.T
    for prompt, position, place in ((0, 0, -1), (1, 1, 4)):
        found = result.promoted_tokens("1_mlp_out", 4, prompt=prompt, position=position)
        torch.testing.assert_close(found.effect, logits[prompt, place].detach(), atol=2e-6, rtol=0)
        order = logits[prompt, place].argsort(descending=True)
        assert [token for token, _ in found.raised] == [f"w{i}" for i in order[:4]]
        assert [token for token, _ in found.lowered] == [f"w{i}" for i in order.flip(0)[:4]]
        values = [value for _, value in found.raised]
        assert values == pytest.approx(logits[prompt, place][order[:4]].tolist(), abs=2e-6)
    assert "1_mlp_out moves the vocabulary" in repr(found)
    assert found.to_dataframe().shape == (8, 5)


@pytest.mark.parametrize("name", either("gpt2", "gemma2", "sandwich"))
def test_all_rows_at_once_promote_what_each_promotes_alone(name):
    """At two positions, over parts of the vocabulary smaller than what is asked for."""
    result = attribute(load(name), unit="head", pos=[3, -1])
    parts = attribute(load(name), pos=[3, -1])
    every = most_moved(result.query, 4, chunk_size=3)
    assert len(every) == 2
    for position, moved in enumerate(every):
        assert (
            set(moved) >= {x for x in parts.labels + result.labels if "bias" not in x} - CONSTANTS
        )
        for label in ("L0H1", "L2H0", "1_mlp_out", "1_attn_out", "embed"):
            own = parts if "_" in label or label == "embed" else result
            alone = own.promoted_tokens(label, 4, position=position)
            for side, expected in zip(moved[label], (alone.raised, alone.lowered), strict=True):
                assert [token for token, _ in side] == [token for token, _ in expected]
                values = [value for _, value in expected]
                np.testing.assert_allclose([x for _, x in side], values, rtol=1e-4, atol=1e-6)


def test_the_vocabulary_is_read_in_chunks():
    from tl_dla.analyses.promotion import promoted_tokens

    result = attribute(load("gemma2"))
    whole, parts = (promoted_tokens(result, "embed", chunk_size=n) for n in (1000, 10))
    torch.testing.assert_close(whole.effect, parts.effect)
    assert [token for token, _ in whole.raised] == [token for token, _ in parts.raised]


def test_experts_biases_and_rests_promote_too():
    for name, rows in {
        "qwen2_moe": ["L1E2", "1_shared_expert"],
        "gpt2": ["1_mlp_bias", "1_attn_bias", "ln_final.b"],
        "gemma4_scalar": ["0_per_layer_input_out"],
    }.items():
        model = load(name)
        for unit in ("neuron", "head"):
            result = attribute(model, unit=unit)
            for label in rows:
                if label in result.labels:
                    found = result.promoted_tokens(label)
                    torch.testing.assert_close(
                        found.effect[5], result[label][0], atol=2e-6, rtol=1e-4
                    )


def test_what_cannot_be_meant_is_refused():
    model = load("llama")
    result = attribute(model, tokens(), unit="head", pos=[-1, 4])
    with pytest.raises(ArgumentError, match="The result has 2 prompts: say which one"):
        result.promoted_tokens("L1H2")
    with pytest.raises(ArgumentError, match="The result has 2 attributed positions"):
        result.promoted_tokens("L1H2", prompt=0)
    with pytest.raises(KeyError, match="No row .*L9H9"):
        result.promoted_tokens("L9H9")
    with pytest.raises(ArgumentError, match="k and chunk_size must be at least 1"):
        result.promoted_tokens("L1H2", 0, prompt=0, position=0)
    path = attribute_path(result, "L1H2", 3)
    with pytest.raises(ArgumentError, match="not written to the final stream by one part"):
        path.promoted_tokens("embed", prompt=0, position=0)


# ---- candidates, and the mean of the vocabulary ------------------------------------------------


def test_a_row_over_candidates_is_what_they_share_and_what_tells_them_apart():
    model = load("gemma2")
    result = direct_logit_attribution(model, tokens(), candidate_tokens=[5, 7, 9], unit="head")
    torch.testing.assert_close(result.common, result.attribution.mean(-1))
    torch.testing.assert_close(result.common[..., None] + result.contrast, result.attribution)
    pair = direct_logit_attribution(model, tokens(), 5, 9, unit="head")
    difference = result.contrast[..., 0] - result.contrast[..., 2]
    torch.testing.assert_close(difference, pair.attribution, atol=1e-6, rtol=1e-4)
    with pytest.raises(ArgumentError, match="candidate_tokens"):
        _ = pair.common


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("unit", ["component", "head"])
@pytest.mark.parametrize("name", either("gpt2", "gptj", "cohere", "gemma2", "nanochat", "softcap"))
def test_the_mean_of_the_vocabulary_is_the_mean_over_all_candidates(name, unit, cached):
    """Each with its own soft cap frozen; the candidates are attributed one by one."""
    model, options = load(name), dict(unit=unit, pos=[-1, 4])
    every = direct_logit_attribution(model, tokens(), candidate_tokens=range(97), **options)
    if cached:
        options["cache"] = model.run_with_cache(tokens())[1]
    result = direct_logit_attribution(model, tokens(), ANSWERS, "mean", **options)
    assert result.reconstruction.passed
    for i, answer in enumerate(ANSWERS.tolist()):
        expected = every.attribution[:, i, :, answer] - every.attribution[:, i].mean(-1)
        torch.testing.assert_close(result.attribution[:, i], expected, atol=2e-6, rtol=1e-4)


def test_a_cache_gives_the_logit_without_biases_too():
    for name in ("gptj", "gpt2", "gemma2"):
        model = load(name)
        options = dict(include_bias=False, cache=model.run_with_cache(tokens())[1])
        cached = direct_logit_attribution(model, tokens(), ANSWERS, **options)
        fresh = direct_logit_attribution(model, tokens(), ANSWERS, include_bias=False)
        torch.testing.assert_close(cached.logit, fresh.logit, atol=1e-5, rtol=0)


# ---- token maps --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", either("llama", "gpt2", "gemma2", "granite", "nanochat", "falcon_h1", "ln", "sandwich")
)
def test_the_map_of_a_paths_own_token_is_the_paths_embedding(name):
    model, targets = load(name), [5, 9, 20]
    source = int(tokens()[0, 4])
    result = direct_logit_attribution(model, tokens()[:1], candidate_tokens=targets)
    path = attribute_path(result, "L2H3", 4, unit="component")
    frozen = token_map(model, 2, 3, path=path)
    got = frozen([source], targets)[0]
    capped = name in ("gemma2", "nanochat")  # the map is of the logits before the cap
    expected = path["embed"][0] / (path.numbers.ratio[0, 0] if capped else 1.0)
    torch.testing.assert_close(got, expected, atol=1e-7, rtol=1e-4)
    free = token_map(model, 2, 3)
    torch.testing.assert_close(
        free([source], targets)[0] * frozen.factor, got, atol=1e-7, rtol=1e-4
    )


@of_4
def test_a_map_is_the_product_of_a_plain_models_weights():
    plain = hf_reference("llama")
    attn, norm = plain.model.layers[1].self_attn, plain.model.layers[1].input_layernorm
    head, sources, targets = 3, [7, 8, 30], [5, 6, 50, 60]
    W_V = attn.v_proj.weight.unflatten(0, (2, 8))[head // 2]
    W_O = attn.o_proj.weight[:, head * 8 : head * 8 + 8]
    embeddings = plain.model.embed_tokens.weight[sources]
    moved = (embeddings * norm.weight) @ W_V.T @ W_O.T
    expected = ((moved * plain.model.norm.weight) @ plain.lm_head.weight.T).detach()
    promote = token_map(load("llama"), 1, head)
    got = promote([f"w{i}" for i in sources], targets)
    torch.testing.assert_close(got, expected[:, targets], atol=1e-5, rtol=1e-4)
    assert promote("w8", "w50").item() == pytest.approx(float(expected[1, 50]), abs=1e-5)
    best = expected[1].argsort(descending=True)[:5]
    assert [token for token, _ in promote.top(sources[1], 5)] == [f"w{i}" for i in best]
    table = promote.to_dataframe(sources, targets)
    assert list(table.index) == ["w7", "w8", "w30"] and list(table.columns)[2] == "w50"
    assert table.loc["w8", "w50"] == pytest.approx(float(expected[1, 50]), abs=1e-5)


def test_maps_that_cannot_be_are_refused():
    model = load("llama")
    with pytest.raises(ArgumentError, match="L1H9 was asked for"):
        token_map(model, 1, 9)
    result = attribute(model)
    path = attribute_path(result, "L2H1", 3)
    with pytest.raises(ArgumentError, match="path must be a result of attribute_path through L1H1"):
        token_map(model, 1, 1, path=path)
    with pytest.raises(ArgumentError, match="path must be a result of attribute_path"):
        token_map(model, 2, 1, path=result)
    batch = attribute_path(attribute(model, tokens()), "L2H1", 3)
    with pytest.raises(ArgumentError, match="one prompt and one attributed position"):
        token_map(model, 2, 1, path=batch)


@of_4
def test_a_gate_is_no_map_of_tokens():
    with pytest.raises(UnsupportedModelError, match="by a gate"):
        token_map(boot("afmoe"), 1, 1)


# ---- unembedding geometry ----------------------------------------------------------------------


@pytest.mark.parametrize("name", either("gpt2", "llama", "gemma2", "ln"))
def test_principal_components_are_those_of_the_readout_directions(name):
    """Against numpy: eigenvalues of the covariance, and distances that no projection may change."""
    model, ids = load(name), [5, 9, 20, 33, 60]
    pca = unembedding_pca(model, ids, n_components=4)
    if name in ("gpt2", "llama", "gemma2"):
        plain = hf_reference(name)
        norm = plain.transformer.ln_f if name == "gpt2" else plain.model.norm
        gamma = norm.weight + (1.0 if name == "gemma2" else 0.0)
        directions = (plain.lm_head.weight[ids] * gamma).detach().numpy()
    else:
        directions = (model.W_U[:, ids].T * model.ln_final.w).detach().numpy()
    if name in ("gpt2", "ln"):
        directions = directions - directions.mean(1, keepdims=True)
    variance = np.linalg.eigvalsh(np.cov(directions.T))[::-1]
    shares = variance[:4] / variance.sum()
    assert pca.explained_variance.numpy() == pytest.approx(shares, rel=1e-4)
    between = np.linalg.norm(directions[:, None] - directions[None], axis=-1)
    assert torch.cdist(pca.coordinates, pca.coordinates).numpy() == pytest.approx(between, abs=1e-3)
    plane = unembedding_pca(model, ids)
    torch.testing.assert_close(plane.coordinates, pca.coordinates[:, :2])
    assert plane.to_dataframe().columns.tolist() == ["token", "id", "PC1", "PC2"]


def test_folding_a_norm_moves_no_token():
    raw, folded = (unembedding_pca(load("llama", folded=x), [5, 9, 20]) for x in (False, True))
    torch.testing.assert_close(raw.coordinates, folded.coordinates, atol=1e-4, rtol=1e-3)


def test_components_that_tokens_do_not_span_are_refused():
    with pytest.raises(ArgumentError, match="2 tokens differ along at most 1 components"):
        unembedding_pca(load("llama"), [5, 9])
