"""Heads with their attention from a cache, and the kind that they are at the attributed token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.support.models import load, of_4
from tests.zoo.build import ANSWERS, INCORRECT, tokens
from tl_dla import direct_logit_attribution, required_hooks, top_heads_with_patterns
from tl_dla.analyses.pattern_kinds import kind, pool, scores
from tl_dla.errors import ArgumentError, IncompleteCacheError, TokenError

EXACT = dict(rtol=0, atol=1e-6)


def cached(model, names=None, prompts=None):
    prompts = tokens() if prompts is None else prompts
    names = required_hooks(model, "source") if names is None else names
    return model.run_with_cache(prompts, names_filter=names)[1]


def attribute(model, input=None, **options):
    return direct_logit_attribution(model, input, ANSWERS, INCORRECT, unit="head", **options)


@of_4
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_cache_is_read_in_place_of_the_model(name):
    model = load.__wrapped__(name)
    cache = cached(model)
    run = top_heads_with_patterns(attribute(model, tokens(), pos=[2, -1]), 2)
    own = attribute(model, tokens(), pos=[2, -1], cache=cache)
    unknown = attribute(model, cache=cache)
    calls = []
    model.add_hook("blocks.0.hook_out", lambda x, hook: calls.append(1))
    for one, other in zip(run, top_heads_with_patterns(own, 2, cache=cache), strict=True):
        assert one.label == other.label and one.tokens == other.tokens
        assert (one.kind, one.query_kind) == (other.kind, other.query_kind)
        torch.testing.assert_close(one.contributions, other.contributions, **EXACT)
        torch.testing.assert_close(one.pattern, other.pattern, **EXACT)
    # Of prompts that came with no tokens, positions are the names.
    [head, *_] = top_heads_with_patterns(unknown, 1, cache=cache)
    assert head.tokens[0] == [str(i) for i in range(11)] and not calls
    del cache.cache_dict["blocks.1.attn.hook_pattern"]
    with pytest.raises(IncompleteCacheError, match=r"blocks\.1\.attn\.hook_pattern"):
        top_heads_with_patterns(own, heads="L1H0", cache=cache)


@of_4
def test_a_cache_of_other_prompts_is_refused():
    model = load("llama")
    result = attribute(model, tokens())
    for other, message in [(tokens().flip(1), "another input"), (tokens()[:, :9], "same run")]:
        with pytest.raises(TokenError, match=message):
            top_heads_with_patterns(result, 1, cache=cached(model, prompts=other))
    blind = attribute(model, cache=cached(model))  # no tokens to tell by
    with pytest.raises(ArgumentError, match="The cache does not give the result's row"):
        top_heads_with_patterns(blind, 1, cache=cached(model, prompts=tokens().flip(1)))


@of_4
def test_named_heads_and_the_kind_at_the_attributed_token():
    prompts = ["w3 w4 w5 w3 w4 w9 w8", "w8 w9 w8 w9"]
    result = attribute(load("llama"), prompts, pos=[4, -1])
    heads = top_heads_with_patterns(result, heads=["L0H1", "L2H3", "L1H0"])
    assert {head.label for head in heads} == {"L0H1", "L2H3", "L1H0"}
    values = [float(head.value.mean()) for head in heads]
    assert values == sorted(values, key=lambda x: (x < 0, -abs(x)))
    for head in heads:
        pooled = {}
        for row, ids in enumerate(result.prompts.packed):
            n = len(head.tokens[row])
            mask = torch.zeros(n, dtype=torch.bool)
            mask[[4, n - 1]] = True
            one = pool(head.pattern[row, :n, :n], ids[:n], head.tokens[row], mask)
            pooled = {name: pooled.get(name, type(sums)()) + sums for name, sums in one.items()}
        assert head.query_kind == kind(pooled) and pooled["uniform"].queries == 3
        assert head.query_scores == pytest.approx(scores(pooled), nan_ok=True)
    with pytest.raises(ArgumentError, match=r"must name head rows .* \['L9H9'\] was given"):
        top_heads_with_patterns(result, heads=["L9H9"])


@of_4
def test_a_column_is_named_where_it_is_that_of_every_prompt():
    result = attribute(load("llama"), ["w3 w4 w5 w3 w4 w9 w8", "w8 w4 w8 w9"], pos=-1)
    [head] = top_heads_with_patterns(result, heads="L0H1")
    for columns, named in (([5, 2], True), ([5, None], False), ([5, 1], False)):
        head = replace(head, columns=columns, kind="column")
        token = f" {head.tokens[0][columns[0]]!r}" if named else ""
        assert head.described()[1] == f"column{token} {head.scores['column']:.2f}"
    assert head.tokens[0][5] == head.tokens[1][2] == "w4"


@pytest.mark.real
def test_smollm2_copies_at_the_attributed_token_and_rests_elsewhere():
    """Fifteen random tokens twice: L24H1 reads what followed the last one, and moves +2.36."""
    from tl_dla.loading import load_model

    model = load_model("smollm2")
    words = torch.randint(1000, 20000, (15,), generator=torch.Generator().manual_seed(5))
    prompt = torch.cat([torch.tensor([model.tokenizer.bos_token_id]), words, words[:-1]])
    result = direct_logit_attribution(model, prompt, int(words[-1]), unit="head")
    [head] = top_heads_with_patterns(result, heads="L24H1")
    assert head.kind == "first token" and head.query_kind == "induction"
    assert head.query_scores["induction"] == pytest.approx(0.99, abs=0.01)
    assert head.reads(1)[0][1] == 15 and float(head.value) == pytest.approx(2.36, abs=0.02)
