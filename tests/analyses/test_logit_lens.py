"""The logit lens against plain torch modules, TransformerLens's own lens, and softmaxes in full."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.models import of_3, of_4
from tests.zoo.build import ANSWERS, INCORRECT, boot, hf_reference, tokens
from tests.zoo.hooked import hooked
from tl_dla import (
    ReconstructionError,
    TokenError,
    UnsupportedModelError,
    direct_logit_attribution,
    logit_lens,
)
from tl_dla.analyses.vocabulary import read_vocabulary
from tl_dla.errors import ArgumentError
from tl_dla.model.unembedding import Unembedding

# One for each way of reading the end of the stream: LayerNorm, RMSNorm, with an offset, without
# weights, soft cap, multipliers, b_U, projection, no final norm (on the stream, or none at all), a
# stream that is rescaled, and a vocabulary of its own.
TRAITS = """gpt2 llama gemma2 gemma4_scalar olmo cohere granite gptj opt_350m openai_gpt nanochat
rwkv_rescale falcon_h1 olmo2 mamba native_none native_softcap native_attnonly""".split()
BOTH = torch.stack([ANSWERS, INCORRECT], -1)[:, None]  # [batch, 1, token]


@pytest.fixture(scope="module")
def gpt2():
    return boot("gpt2")


@pytest.fixture(scope="module")
def llama():
    return boot("llama")


def softmax_in_full(logits, ids):
    """Values, probabilities, ranks and entropy of `[..., d_vocab]`, the plain way in float64."""
    logits = logits.double()
    ids = ids.expand(*logits.shape[:-1], -1)
    values = logits.gather(-1, ids)
    p = logits.softmax(-1)
    ranks = (logits.unsqueeze(-2) > values.unsqueeze(-1)).sum(-1)
    return values, p.gather(-1, ids), ranks, -torch.special.xlogy(p, p).sum(-1)


def assert_reads(lens, layer, logits, atol=2e-6):
    values, probabilities, ranks, entropy = softmax_in_full(logits, BOTH)
    torch.testing.assert_close(lens.values[layer].double(), values, rtol=1e-6, atol=atol)
    torch.testing.assert_close(lens.probabilities[layer].double(), probabilities, rtol=0, atol=atol)
    torch.testing.assert_close(lens.entropy[layer].double(), entropy, rtol=0, atol=atol)
    assert torch.equal(lens.ranks[layer], ranks)
    top = logits.topk(5)
    assert torch.equal(lens.top_ids[layer], top.indices)
    torch.testing.assert_close(lens.top_values[layer], top.values, rtol=1e-6, atol=atol)
    expected = logits.double().softmax(-1).gather(-1, top.indices)
    torch.testing.assert_close(lens.top_probabilities[layer].double(), expected, rtol=0, atol=atol)


@of_4
@pytest.mark.parametrize("name", TRAITS)
def test_the_last_point_is_the_models_own_prediction(name):
    model = boot(name)
    lens = logit_lens(model, tokens(), ANSWERS, INCORRECT, chunk_size=13)
    with torch.no_grad():
        assert_reads(lens, -1, model(tokens()))
    assert lens.labels[0] == "0_pre" and lens.labels[-1] == "final_post"


@of_3
@pytest.mark.parametrize("name", "ln lnpre rms none final_rms softcap vocab_out post_norm".split())
def test_the_last_point_is_the_hooked_transformers_own_prediction(name):
    model = hooked(name)
    lens = logit_lens(model, tokens(), ANSWERS, INCORRECT, chunk_size=13)
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens())
        assert_reads(lens, -1, logits)
        stack, labels = cache.accumulated_resid(incl_mid=True, return_labels=True)
        assert lens.labels == labels
        for layer, state in enumerate(stack):
            raw = model.unembed(state if name == "none" else model.ln_final(state))
            assert_reads(lens, layer, torch.tanh(raw) if name == "softcap" else raw)  # a cap of 1


@of_4
def test_earlier_points_are_what_the_plain_model_would_say_there():
    """Its own norm and head, on the stream seen by torch hooks at its own layers."""
    plain = hf_reference("llama")
    seen = []
    for layer in plain.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.register_forward_hook(lambda _m, args, _o: seen.append(args[0]))
    with torch.no_grad():
        plain(tokens())
        lens = logit_lens(boot("llama"), tokens(), ANSWERS, INCORRECT)
        for layer, state in enumerate(seen):
            assert_reads(lens, layer, plain.lm_head(plain.model.norm(state)))
    assert lens.labels == "0_pre 0_mid 1_pre 1_mid 2_pre 2_mid final_post".split()
    assert not torch.allclose(lens.values[0], lens.values[1], atol=0.01)


@of_4
def test_a_soft_cap_is_applied_at_every_point():
    plain = hf_reference("gemma2")
    lens = logit_lens(boot("gemma2"), tokens(), ANSWERS, INCORRECT, incl_mid=False)
    cap = plain.config.final_logit_softcapping
    with torch.no_grad():
        states = plain(tokens(), output_hidden_states=True).hidden_states[:-1]
        for layer, state in enumerate(states):
            raw = plain.lm_head(plain.model.norm(state))
            assert_reads(lens, layer, cap * torch.tanh(raw / cap))
    assert lens.labels == ["0_pre", "1_pre", "2_pre", "final_post"]


@of_4
@pytest.mark.parametrize("name", ["gpt2", "gemma3", "granite", "cohere"])
@pytest.mark.parametrize("folded", [False, True])
def test_agrees_with_transformer_lens(name, folded):
    from transformer_lens.tools.analysis import logit_lens as theirs

    model = boot(name)
    if folded:
        model.enable_compatibility_mode(disable_warnings=True)
    ours = logit_lens(model, tokens(), ANSWERS, incl_mid=name != "cohere", top_k=4, chunk_size=10)
    options = dict(positions=None, incl_mid=name != "cohere", return_type="log_probs")
    top = theirs(model, tokens(), top_k=4, **options)
    answers = ANSWERS[:, None].expand(2, 11)
    asked = theirs(model, tokens(), targets=answers, **options)
    assert ours.labels == top.labels
    close = dict(rtol=0, atol=3e-6)
    torch.testing.assert_close(ours.entropy, top.readout.entropy, **close)
    assert torch.equal(ours.top_ids, top.readout.top_ids)
    torch.testing.assert_close(ours.top_probabilities.log(), top.values, **close)
    torch.testing.assert_close(ours.probabilities.log(), asked.values, **close)
    assert torch.equal(ours.ranks[..., 0], asked.rank_trajectory())


@of_4
def test_is_not_the_frozen_scale_of_unit_layer(gpt2):
    """Same labels and the same end; in between, the scale of each point is its own."""
    lens = logit_lens(gpt2, tokens(), ANSWERS, INCORRECT)
    frozen = direct_logit_attribution(gpt2, tokens(), ANSWERS, INCORRECT, unit="layer", pos=None)
    labels = [label for label in frozen.labels if label not in ("ln_final.b", "b_U")]
    assert labels == lens.labels
    biases = frozen.attribution[len(labels) :].sum(0)
    torch.testing.assert_close(
        lens.logit_diff[-1], frozen["final_post"] + biases, rtol=0, atol=3e-6
    )
    assert (lens.logit_diff[0] - frozen["0_pre"] - biases).abs().max() > 0.1


@of_4
@pytest.mark.parametrize("chunk_size", [1, 7, 96, 97, 5000])
def test_the_size_of_the_chunks_changes_nothing(gpt2, chunk_size):
    whole = logit_lens(gpt2, tokens(), ANSWERS, INCORRECT, top_k=9, chunk_size=97)
    lens = logit_lens(gpt2, tokens(), ANSWERS, INCORRECT, top_k=9, chunk_size=chunk_size)
    assert torch.equal(lens.top_ids, whole.top_ids) and torch.equal(lens.ranks, whole.ranks)
    for name in ("entropy", "values", "probabilities", "top_values", "top_probabilities"):
        torch.testing.assert_close(getattr(lens, name), getattr(whole, name), rtol=0, atol=2e-6)


class _Largest(TorchDispatchMode):
    """The largest number of elements of any `[2, 11, …]` tensor made inside."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor) and x.shape[:2] == (2, 11):
                self.numel = max(self.numel, x.numel())
        return out


@of_4
def test_no_more_logits_exist_than_one_chunk_of_one_point(llama):
    unembed = Unembedding(llama, logit_stream(llama), chunk_size=40)
    states = [torch.randn(2, 11, 32) for _ in range(5)]
    with _Largest() as largest:
        read_vocabulary(unembed, states, None, top_k=3)
    assert largest.numel == 2 * 11 * 40


def logit_stream(model):
    from tl_dla.model.reader import ModelReader

    return ModelReader(model).stream()


@of_4
@pytest.mark.parametrize("size", [1e-3, 1.0, 300.0])
def test_statistics_of_very_flat_and_very_sharp_softmaxes(llama, size):
    """The entropy of a certain prediction is 0 and not the difference of large numbers."""
    generator = torch.Generator().manual_seed(0)
    unembed = Unembedding(llama, logit_stream(llama), chunk_size=10)
    unembed.W_U = torch.randn(32, 97, generator=generator)
    state = size * torch.randn(1, 6, 32, generator=generator)
    read = read_vocabulary(unembed, [state], None, top_k=1)
    *_, entropy = softmax_in_full(state @ unembed.W_U, torch.zeros(1, 1, 1, dtype=torch.long))
    torch.testing.assert_close(read.entropy[0].double(), entropy, rtol=1e-4, atol=2e-6)
    assert bool((read.entropy >= 0).all())


@of_4
def test_equal_logits_share_a_rank_and_tokens_ruled_out_do_no_harm(llama):
    unembed = Unembedding(llama, logit_stream(llama), chunk_size=2)
    unembed.W_U = torch.tensor([[3.0, 1.0, 3.0, 2.0, 1.0]])
    unembed.b_U = torch.tensor([0.0, 0.0, 0.0, 0.0, -torch.inf])
    unembed.d_vocab = 5
    from tl_dla.inputs.targets import Targets

    targets = Targets(torch.tensor([[[0, 2, 3, 1, 4]]]), torch.eye(5))
    read = read_vocabulary(unembed, [torch.ones(1, 1, 1)], targets, top_k=5)
    assert read.ranks.flatten().tolist() == [0, 0, 2, 3, 4]
    p = torch.tensor([3.0, 1.0, 3.0, 2.0]).softmax(0)
    torch.testing.assert_close(read.entropy.item(), -(p * p.log()).sum().item())
    torch.testing.assert_close(
        read.probabilities.flatten(), torch.cat([p[[0, 2, 3, 1]], p.new_zeros(1)])
    )


@of_4
def test_prompts_of_different_lengths_read_as_alone(llama):
    prompts = ["w3 w4 w5 w6 w7", "w8 w9", "w42"]
    answers = ["w5", "w8", "w40"]
    batch = logit_lens(llama, prompts, answers, "w7")
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        alone = logit_lens(llama, prompt, answer, "w7")
        n = alone.entropy.shape[-1]
        torch.testing.assert_close(batch.values[:, row, :n], alone.values[:, 0], rtol=0, atol=2e-6)
        torch.testing.assert_close(
            batch.entropy[:, row, :n], alone.entropy[:, 0], rtol=0, atol=2e-6
        )
        assert batch.tokens[row][:n] == alone.tokens[0]
        assert bool(
            batch.values[:, row, n:].isnan().all() and batch.entropy[:, row, n:].isnan().all()
        )
        assert bool(
            (batch.ranks[:, row, n:] == -1).all() and (batch.top_ids[:, row, n:] == -1).all()
        )
        assert {t for layer in batch.top_tokens for p in layer[row][n:] for t in p} <= {""}
    last = logit_lens(llama, prompts, answers, "w7", pos=-1)
    lengths = batch.prompts.length
    expected = batch.values[:, torch.arange(3), lengths - 1]
    torch.testing.assert_close(last.values[:, :, 0], expected, rtol=0, atol=2e-6)
    two = logit_lens(llama, prompts[0], pos=[1, -2])
    torch.testing.assert_close(two.entropy[:, 0], batch.entropy[:, 0][:, [1, 4]], rtol=0, atol=2e-6)


@of_4
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_runs_in_other_dtypes(dtype):
    model = boot("gpt2", dtype)
    lens = logit_lens(model, tokens(), ANSWERS)
    assert lens.values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    with torch.no_grad():
        own = model(tokens()).gather(-1, ANSWERS[:, None, None].expand(2, 11, 1))
    scale = own.abs().max().item()
    error = (lens.values[-1] - own).abs().max().item()
    assert error <= torch.finfo(dtype).eps * scale * 4


@of_4
def test_one_forward_pass_that_unembeds_one_position_a_prompt(gpt2):
    calls, shapes = [], []
    first = gpt2.original_model.transformer.h[0]
    handles = [
        first.register_forward_hook(lambda *_: calls.append(1)),
        gpt2.unembed.register_forward_hook(lambda _m, _a, out: shapes.append(out.shape)),
    ]
    logit_lens(gpt2, tokens(), ANSWERS)
    for handle in handles:
        handle.remove()
    assert calls == [1] and shapes == [(2, 1, 97)]


@of_4
def test_table_holds_every_number(gpt2):
    lens = logit_lens(gpt2, ["w3 w4 w5", "w8 w9"], ["w5", "w8"], "w7", top_k=2)
    table = lens.to_dataframe()
    assert len(table) == len(lens) * (4 + 3) * (2 + 2)  # a BOS before each prompt
    for _, line in table.sample(40, random_state=0).iterrows():
        layer, b, p = lens.labels.index(line.label), line.prompt, line.position
        assert line.token == lens.tokens[b][p]
        assert line.entropy == pytest.approx(lens.entropy[layer, b, p].item())
        if line["read"] == "top":
            assert line.read_token == lens.top_tokens[layer][b][p][line["rank"]]
            assert line.logit == pytest.approx(lens.top_values[layer, b, p, line["rank"]].item())
        else:
            t = 0 if line.read_token == ["w5", "w8"][b] else 1
            assert line.read_token in (["w5", "w8"][b], "w7")
            assert line.logit == pytest.approx(lens.values[layer, b, p, t].item())
            assert line["rank"] == lens.ranks[layer, b, p, t]
            assert line.probability == pytest.approx(lens.probabilities[layer, b, p, t].item())


@of_4
def test_shown_as_text(gpt2):
    text = repr(logit_lens(gpt2, "w3 w4 w5", candidate_tokens=["w5", "w8"]))
    assert "statistics of its own" in text and "after 'w5'" in text and "nats" in text
    assert text.count("\n") == 1 + 7


@of_4
def test_a_hook_after_the_final_norms_input_is_noticed():
    model = boot("llama")
    model.add_hook("unembed.hook_out", lambda x, hook: x * 1.5)
    with pytest.raises(ReconstructionError, match="final_post up to .* away from the model's own"):
        logit_lens(model, tokens())


@of_4
@pytest.mark.parametrize(
    "name, part",
    [
        ("opt_proj", "project_out"),
        ("modernbert_decoder", "prediction_head"),
        ("deepseek_v4", "hc_head"),
    ],
)
def test_refuses_what_it_does_not_understand(name, part):
    with pytest.raises(UnsupportedModelError, match=part):
        logit_lens(boot(name), tokens())


@of_4
@pytest.mark.parametrize(
    "options, error, words",
    [
        (dict(top_k=0), ArgumentError, "top_k must be 1 to 97"),
        (dict(top_k=98), ArgumentError, "98 was given"),
        (dict(chunk_size=0), ArgumentError, "chunk_size must be at least 1"),
        (dict(answer_tokens=5, incorrect_tokens="mean"), ArgumentError, '"mean" is no token'),
        (dict(incorrect_tokens=5), ArgumentError, "answer_tokens is required"),
        (dict(answer_tokens="w3 w4"), TokenError, "2 tokens"),
        (dict(pos=40), TokenError, "40"),
    ],
)
def test_bad_arguments_get_one_sentence(llama, options, error, words):
    with pytest.raises(error, match=words):
        logit_lens(llama, tokens(), **options)


@of_4
def test_needs_an_answer_for_a_difference_and_evaluation_mode(llama):
    with pytest.raises(ArgumentError, match="pass answer_tokens"):
        _ = logit_lens(llama, tokens()).logit_diff
    model = boot("llama").train()
    with pytest.raises(ArgumentError, match="training mode"):
        logit_lens(model, tokens())


@pytest.mark.real
def test_smollm2_says_paris_at_the_end():
    from tl_dla.loading import load_model

    model = load_model("smollm2")
    prompt = "The Eiffel Tower is in the city of"
    lens = logit_lens(model, prompt, " Paris", pos=-1)
    with torch.no_grad():
        own = model(prompt)[0, -1].float()
    assert lens.top_tokens[-1][0][0][0] == " Paris" and lens.ranks[-1].item() == 0
    assert lens.ranks[0].item() > 10
    p = own.double().softmax(-1)
    assert lens.entropy[-1].item() == pytest.approx(-(p * p.log()).sum().item(), abs=1e-4)
    assert lens.values[-1].item() == pytest.approx(
        own[int(lens.top_ids[-1, 0, 0, 0])].item(), abs=1e-4
    )
