"""`attribute_attention` against plain modules: rows, pairs, and all that scores are made of."""

from functools import cache

import pytest
import torch

from tests.model.test_queries_keys import READ
from tests.support.models import all_in_float64, of_4, strong
from tests.support.scores import score_reference
from tests.zoo.build import boot, tokens
from tests.zoo.configs import BOOT_FAILS, CLASSES
from tl_dla import UnsupportedModelError, attribute_attention
from tl_dla.errors import ArgumentError, IncompleteCacheError, ReconstructionError, TokenError
from tl_dla.model.norms import Norm
from tl_dla.model.projections import HeadNorm, Linear
from tl_dla.model.reader import ModelReader

pytestmark = of_4

# What each has that others have not; every other class is in the slow part.
CASES = [
    "gpt2",  # LayerNorm, biases, positions in the stream
    "llama",  # rotary positions, grouped keys
    "qwen3",  # a norm over each head's queries and keys
    "olmo2",  # a norm over all heads together; attention reads the stream itself
    "gemma2",  # soft-capped scores, norms behind each sublayer
    "gemma3",  # layers of two kinds of rotation, sliding windows
    "gpt_neox",  # part of a head is rotated; queries, keys and values in one matrix
    "gptj",  # another order of rotated axes, scores in float32
    "bloom",  # ALiBi
    "gpt_oss",  # sinks
    "deepseek_v3",  # keys through latents, part of them shared by all heads
    "granite",  # its own scale, multipliers
    "openai_gpt",  # norms on the stream itself
    "opt_350m",  # the same in a stream that is wider than what is unembedded
]
PLACES = [9, 6, 4]
CONSTANTS = ("b_Q", "b_K", "score_bias")


def attribute(model, layer, head=1, places=PLACES, **options):
    where = dict(zip(("query", "key", "versus"), places, strict=False))
    return attribute_attention(model, tokens(), f"L{layer}H{head}", **where, **options)


@cache
def exact(name, layer, unit):
    """In float64 throughout, with γ, β and biases far from 1 and 0."""
    model, _ = strong(name)
    with all_in_float64():
        return attribute(model, layer, places=places_of(name, layer), unit=unit)


@cache
def places_of(name, layer):
    """A query and two keys that the head sees in both prompts: PLACES where it can."""
    seen = []
    with torch.no_grad():
        strong(name)[0].run_with_hooks(
            tokens(),
            fwd_hooks=[(f"blocks.{layer}.attn.hook_pattern", lambda p, hook: seen.append(p[:, 1]))],
        )
    sees = (seen[0] > 0).all(0)
    every = [PLACES, *([q, k, v] for q in range(10, 1, -1) for v in range(q) for k in range(v))]
    return next(each for each in every if all(sees[each[0], each[1:]]))


def layers(model):
    reader = ModelReader(model)
    return [i for i in range(reader.n_layers) if reader.attention(i) is not None]


# ---- rows and pairs, against the plain module --------------------------------------------------


def of_start(label):
    """Rows of the embeddings are one row in the reference."""
    return "start" if label in ("embed", "pos_embed", "embed_rest") else label


def by_label(ledger):
    rows = {}
    for label, row in zip(map(of_start, ledger.labels), ledger.attribution, strict=True):
        rows[label] = rows.get(label, 0) + row
    return rows


def check(name, unit, some=slice(-2, None), tolerance=1e-9):
    model, plain = strong(name)
    assert layers(model)
    for layer in layers(model)[some]:
        ours = exact(name, layer, unit)
        reference = score_reference(plain, tokens(), (layer, 1), places_of(name, layer), unit)
        close = dict(rtol=0, atol=tolerance * max(1.0, float(reference.score.abs().max())))
        torch.testing.assert_close(ours.score, reference.score, **close)
        assert ours.reconstruction.passed and ours.reconstruction.relative_error < 1e-9
        for ledger, rows in (ours.by_query, reference.query), (ours.by_key, reference.key):
            mine = by_label(ledger)
            own = {f"{layer}_{constant}" for constant in CONSTANTS}
            assert sum(float(row.abs().max()) > 1e-3 for row in rows.values()) >= min(3, layer + 1)
            for label in (mine.keys() - own) | rows.keys():
                got, want = (found.get(label, torch.zeros(2).double()) for found in (mine, rows))
                torch.testing.assert_close(got, want, msg=f"{name} {layer} {label}", **close)
        check_pairs(ours, reference.pairs, close)


def check_pairs(ours, expected, close):
    """Each pair of writers, and the sums over either side."""
    torch.testing.assert_close(ours.pairs.sum(1), ours.by_query.attribution, **close)
    torch.testing.assert_close(ours.pairs.sum(0), ours.by_key.attribution, **close)
    mine = {}
    for i, query in enumerate(map(of_start, ours.by_query.labels)):
        for j, key in enumerate(map(of_start, ours.by_key.labels)):
            mine[query, key] = mine.get((query, key), 0) + ours.pairs[i, j]
    assert expected
    for label, want in expected.items():
        got = mine.get(label, torch.zeros_like(want))
        torch.testing.assert_close(got, want, msg=f"{label}", **close)


@pytest.mark.parametrize("name", CASES)
def test_rows_and_pairs_are_those_of_the_plain_module(name):
    check(name, "head")


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_components_are_those_of_the_plain_module(name):
    check(name, "component")


@pytest.mark.parametrize("name, bias", [("gpt2", "c_attn"), ("qwen2", "q_proj")])
def test_the_bias_of_queries_is_what_the_score_loses_without_it(name, bias):
    """In the plain module, at one layer: nothing before it changes, and no norm comes after it."""
    model, plain = strong(name)
    layer = layers(model)[-1]
    ours = exact(name, layer, "component")
    before = score_reference(plain, tokens(), (layer, 1), PLACES, "component").score
    module = next(m for n, m in plain.named_modules() if n.endswith(f"{layer}.{_of[bias]}"))
    kept = module.bias.detach().clone()
    with torch.no_grad():
        module.bias[: model.cfg.d_model] = 0
    after = score_reference(plain, tokens(), (layer, 1), PLACES, "component").score
    with torch.no_grad():
        module.bias.copy_(kept)
    row = ours.by_query[f"{layer}_b_Q"]
    assert row.abs().min() > 1e-3
    torch.testing.assert_close(row, before - after, rtol=0, atol=1e-9)


_of = {"c_attn": "attn.c_attn", "q_proj": "self_attn.q_proj"}


def test_the_bias_of_a_score_is_a_row_of_no_writer():
    """ALiBi: the head's slope times the distance of the keys, whoever wrote them."""
    ours = exact("bloom", 2, "component")
    slope = 2.0 ** (-8 * 2 / 4)  # of the second of four heads
    expected = torch.full((2,), slope * (PLACES[1] - PLACES[2])).double()
    for side in ours.by_query, ours.by_key:
        torch.testing.assert_close(side["2_score_bias"], expected, rtol=0, atol=1e-6)
    assert ours.pairs[-1, -1].tolist() == ours.by_query["2_score_bias"].tolist()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_score_alone_is_scale_times_q_dot_k(name):
    """From what the plain module's own projections return."""
    model, plain = strong(name)
    with all_in_float64():
        ours = attribute(model, 1, places=PLACES[:2])
        q, k = plain_q_and_k(name, plain, layer=1)
    expected = (q[:, 1, PLACES[0]] * k[:, 1, PLACES[1]]).sum(-1) / 8**0.5
    torch.testing.assert_close(ours.score, expected, rtol=0, atol=1e-9)
    assert ours.reconstruction.passed and "own score" in str(ours.reconstruction)


def plain_q_and_k(name, plain, layer):
    """`[batch, head, pos, d_head]`, rotated; heads of a group share their key."""
    kept = {}
    base = plain.transformer.h if name == "gpt2" else plain.model.layers
    attention = base[layer].attn if name == "gpt2" else base[layer].self_attn
    handles = [
        part.register_forward_hook(lambda _m, _a, out, own=own: kept.update({own: out}))
        for own, part in attention.named_children()
    ]
    with torch.no_grad():
        plain(tokens())
    for handle in handles:
        handle.remove()
    if name == "gpt2":
        q, k, _ = kept["c_attn"].split(32, -1)
        return (x.unflatten(-1, (4, 8)).transpose(1, 2) for x in (q, k))
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k = (kept[x].unflatten(-1, (-1, 8)).transpose(1, 2) for x in ("q_proj", "k_proj"))
    cos, sin = plain.model.rotary_emb(q, torch.arange(q.shape[2])[None])
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    return q, k.repeat_interleave(2, 1)


# ---- forms of the question ---------------------------------------------------------------------


def test_a_token_may_be_compared_with_the_query_itself():
    model, _ = strong("llama")
    with all_in_float64():
        ours = attribute(model, 2, places=[9, 9, 3])
        opposite = attribute(model, 2, places=[9, 3, 9])
    assert ours.reconstruction.passed and ours.reconstruction.relative_error < 1e-9
    torch.testing.assert_close(opposite.by_key.attribution, -ours.by_key.attribution)


def test_a_batch_of_different_lengths_gives_what_each_prompt_gives():
    model = boot("llama")
    prompts = ["w3 w4 w5 w6 w7", "w8 w9 w4"]
    together = attribute_attention(model, prompts, "L2H1", key="w4", versus=1, unit="head")
    assert together.tokens[1] == ("w4", "w4", "w8") and together.score.shape == (2,)
    for row, prompt in enumerate(prompts):
        alone = attribute_attention(model, prompt, "L2H1", key="w4", versus=1, unit="head")
        for ours, own in (together.by_query, alone.by_query), (together.by_key, alone.by_key):
            close = dict(rtol=0, atol=1e-5)
            torch.testing.assert_close(ours.attribution[:, row], own.attribution[:, 0], **close)
        torch.testing.assert_close(together.pairs[..., row], alone.pairs[..., 0], **close)


def test_a_cache_stands_for_the_run():
    model = boot("gpt2")
    _, cache = model.run_with_cache(tokens())
    ran, recalled = attribute(model, 2), attribute_cached(model, cache, 2)
    torch.testing.assert_close(recalled.pairs, ran.pairs, rtol=0, atol=1e-6)
    assert recalled.reconstruction.passed
    assert ran.by_key.numbers.ran and not recalled.by_key.numbers.ran
    rotary = boot("llama")
    _, cache = rotary.run_with_cache(tokens())
    with pytest.raises(IncompleteCacheError, match="give the input in place of the cache"):
        attribute_cached(rotary, cache, 2)


def attribute_cached(model, cache, layer):
    return attribute_attention(model, None, f"L{layer}H1", query=9, key=6, versus=4, cache=cache)


def test_folded_weights_and_half_precision_add_up():
    model = boot("gpt2")
    raw = attribute(model, 2)
    model.enable_compatibility_mode(disable_warnings=True)
    folded = attribute(model, 2)
    torch.testing.assert_close(folded.score, raw.score, rtol=0, atol=1e-4)
    assert "2_ln1.b" in raw.by_query.labels and "2_ln1.b" not in folded.by_query.labels
    half = attribute(boot("qwen3", torch.bfloat16), 2)
    whole = attribute(boot("qwen3"), 2)
    assert half.reconstruction.passed
    assert 1e-3 < half.reconstruction.tolerance.max() < 1
    torch.testing.assert_close(half.score, whole.score, rtol=0, atol=0.1)


@pytest.mark.usefixtures("unchecked")
def test_bad_input_gets_one_sentence():
    model = boot("gpt2")
    for error, message, options in (
        (ArgumentError, 'unit must be "component" or "head" here; \'layer\'', dict(unit="layer")),
        (ArgumentError, "A head is written L9H9", dict(head="head 3")),
        (ArgumentError, "layer 1 has 4 heads", dict(head="L1H9")),
        (ArgumentError, "key and versus are both position 6 of prompt 0", dict(versus=6)),
        (TokenError, "key is position 10 of prompt 0, which position 9", dict(key=10)),
        (TokenError, "Key 11 is outside prompt 0, which has 11 tokens", dict(key=11)),
        (TokenError, "3 positions were given as versus for 2 prompts", dict(versus=[1, 2, 3])),
        (TokenError, "Key must be a position, one per prompt, or a .* got 2.0", dict(key=2.0)),
        (TokenError, r"got \['w3', 'w4'\]", dict(key=["w3", "w4"])),
        (TokenError, "'w0' is 0 times a token of prompt 0", dict(key="w0")),
    ):
        asked = dict(head="L1H1", query=9, key=6, versus=4) | options
        with pytest.raises(error, match=message):
            attribute_attention(model, tokens(), asked.pop("head"), **asked)


def test_what_pays_no_attention_or_shows_no_score_is_refused():
    window = boot("olmo3")  # of 8 tokens
    with pytest.raises(TokenError, match="outside of the head's window") as error:
        attribute(window, 0, places=[10, 9, 1])
    assert "leave versus out" in str(error.value)
    with pytest.raises(UnsupportedModelError, match="shows no scores before their softmax"):
        attribute(boot("gptj"), 1, places=PLACES[:2])


# ---- the certificate can fail ------------------------------------------------------------------


def without(f):
    """A reading of the layer with `f` of its query's or key's steps."""

    def change(monkeypatch, side):
        from tl_dla.model import queries_keys

        read = queries_keys.QueriesAndKeysReader._side

        def changed(self, at, attn, which, d_head):
            steps = read(self, at, attn, which, d_head)
            return tuple(map(f, steps)) if which == side else steps

        monkeypatch.setattr(queries_keys.QueriesAndKeysReader, "_side", changed)

    return change


def no_bias(step):
    return Linear(step.W) if isinstance(step, Linear) else step


def other_heads(step):
    return Linear(step.W.roll(1, 0), step.b) if isinstance(step, Linear) else step


def no_gamma(step):
    if not isinstance(step, HeadNorm):
        return step
    norm = step.norm
    bare = Norm(norm.name, norm.site, None, norm.beta, norm.centred, norm.norm_eps)
    return HeadNorm(bare, step.joint)


@pytest.mark.parametrize(
    "name, side, mistake",
    [
        ("gpt2", "q", no_bias),
        ("qwen2", "k", no_bias),
        ("llama", "k", other_heads),
        ("qwen3", "q", no_gamma),
        ("olmo2", "k", no_gamma),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mistaken_reading_fails_the_certificate(monkeypatch, name, side, mistake, dtype):
    model = boot(name, dtype)
    assert attribute(model, 2).reconstruction.passed
    without(mistake)(monkeypatch, side)
    with pytest.raises(ReconstructionError, match="own attention is"):
        attribute(model, 2)


def test_a_mistaken_scale_cap_or_rotation_fails_the_certificate(monkeypatch):
    from dataclasses import replace

    model = boot("gemma2")
    read = ModelReader.queries_and_keys

    def changed(**fields):
        own = lambda self, layer: replace(read(self, layer), **fields)  # noqa: E731
        monkeypatch.setattr(ModelReader, "queries_and_keys", own)

    for fields in dict(scale=0.4), dict(cap=1.0), dict(rotary=None), dict(factor=1.1):
        changed(**fields)
        with pytest.raises(
            ReconstructionError,
            match="^Pairs, query rows and key rows add up to [-0-9.]+, but the log of",
        ) as error:
            attribute(model, 2)
        assert "a hook of yours" in str(error.value)
    with pytest.warns(UserWarning, match="FAILED"):
        attribute(model, 2, check="warn")
    assert not attribute(model, 2, check="off").reconstruction.passed


# ---- every class -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CLASSES if name in READ and name not in CASES])
def test_every_class_that_is_read_against_its_plain_module(name):
    """61 classes more, row by row and pair by pair: with those above, 74 of 86."""
    check(name, "head", slice(None))
    strong.cache_clear()


@pytest.mark.parametrize("name", [name for name in CLASSES if name not in READ])
def test_every_other_class_is_refused_by_name(name):
    """Without attention, with queries of many experts, or with no unit that works at all."""
    try:
        model = boot(name)
    except RuntimeError as error:
        assert any(words in str(error) for words in BOOT_FAILS.values())
        return
    with pytest.raises((UnsupportedModelError, ArgumentError)) as refused:
        attribute(model, 0)
    assert "\n" not in str(refused.value)
