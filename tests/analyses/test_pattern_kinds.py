"""Kinds of attention pattern, on patterns made by hand and against TransformerLens's detector."""

from __future__ import annotations

import math

import pytest
import torch

from tl_dla.analyses import pattern_kinds as patterns
from tl_dla.analyses.pattern_kinds import column, expected_keys, is_punctuation, kind, pool, scores

#         0    1    2    3    4    5    6    7
TOKENS = ["b", "x", "y", ".", "z", "x", "y", "w"]
IDS = torch.tensor([9, 1, 2, 3, 4, 1, 2, 5])
N = len(TOKENS)


def one_hot(keys):
    """Each query attends to one key, given in order."""
    pattern = torch.zeros(N, N)
    pattern[torch.arange(N), torch.tensor(keys)] = 1.0
    return pattern


EVEN = torch.ones(N, N).tril() / torch.arange(1, N + 1)[:, None]
PREVIOUS = one_hot([0, 0, 1, 2, 3, 4, 5, 6])
DUPLICATE = one_hot([0, 0, 0, 0, 0, 1, 2, 0])
INDUCTION = one_hot([0, 0, 0, 0, 0, 2, 3, 0])
FIRST = one_hot([0] * N)
MARKS = one_hot([0, 0, 0, 0, 3, 3, 3, 3])
SELF = torch.eye(N)
COLUMN = one_hot([0, 1, 2, 2, 2, 2, 2, 2])  # five of the six queries from 2 on, and itself


def of(pattern, ids=IDS, tokens=TOKENS):
    pooled = pool(pattern, ids, tokens)
    return scores(pooled), kind(pooled)


@pytest.mark.parametrize(
    "pattern, name",
    [
        (PREVIOUS, "previous token"),
        (DUPLICATE, "duplicate token"),
        (INDUCTION, "induction"),
        (FIRST, "first token"),
        (MARKS, "punctuation"),
        (COLUMN, "column"),
        (EVEN, "uniform"),
    ],
)
def test_a_pattern_made_for_a_kind_scores_1_and_is_named(pattern, name):
    score, named = of(pattern)
    assert score[name] == pytest.approx(1.0)
    assert named == name


def test_heads_that_rest_on_the_first_token_are_named_for_what_else_they_do():
    """Duplicates alone: five of seven queries rest on the first token, two do the work."""
    assert of(DUPLICATE)[0]["first token"] == pytest.approx(5 / 7)
    assert of(DUPLICATE)[1] == "duplicate token"
    assert of(INDUCTION)[1] == "induction"


def test_scores_counted_by_hand():
    score, named = of(0.5 * PREVIOUS + 0.25 * FIRST + 0.25 * SELF)
    # Query 1 has its previous token at 0, where the quarter for the first token goes as well.
    assert score["previous token"] == pytest.approx((0.75 + 6 * 0.5) / 7)
    assert score["first token"] == pytest.approx((0.75 + 6 * 0.25) / 7)
    assert score["duplicate token"] == pytest.approx(0.0)
    # The mark at 3 is the previous token of query 4 alone, of 4 queries after it.
    assert score["punctuation"] == pytest.approx(0.5 / 4)
    # Of query 5 (x) the key is 2, of query 6 (y) it is 3; neither is attended to.
    assert score["induction"] == pytest.approx(0.0)
    chance = sum(1 / (q + 1) for q in range(1, N)) / 7
    assert (score["previous token"] - chance) / (1 - chance) < 0.5
    assert named == "other"


def test_a_column_is_of_the_token_that_most_later_tokens_read():
    assert column(COLUMN) == 2 and column(0.6 * COLUMN + 0.4 * FIRST) == 2
    # Half of it goes elsewhere: the stripe is there, but is not what the head is.
    score, named = of(0.45 * COLUMN + 0.55 * SELF)
    assert math.isnan(score["column"]) and named == "other"
    assert of(0.75 * COLUMN + 0.25 * SELF)[0]["column"] == pytest.approx(0.75)
    # Of the keys that four queries see after them, 3 is the last.
    late = one_hot([0, 0, 0, 0, 0, 4, 4, 4])
    assert column(late) != 4 and of(late)[1] != "column"
    assert column(torch.eye(5)) is None and math.isnan(of(torch.eye(2), IDS[:2], "ab")[0]["column"])


def test_queries_are_judged_alone_where_they_are_named():
    """Over the prompt these heads rest on the first token; two queries do what they are for."""
    mask = torch.zeros(N, dtype=torch.bool)
    mask[5] = True
    for pattern, name in [(DUPLICATE, "duplicate token"), (INDUCTION, "induction")]:
        resting = 0.1 * pattern + 0.9 * FIRST
        resting[5] = pattern[5]
        assert of(resting)[1] == "first token"
        pooled = pool(resting, IDS, TOKENS, mask)
        assert kind(pooled) == name and scores(pooled)[name] == 1.0
        assert all(sums.queries <= 1 for sums in pooled.values())
    column_at = pool(COLUMN, IDS, TOKENS, mask.roll(2))
    assert kind(column_at) == "column"  # which token that is, all queries tell
    every = pool(DUPLICATE, IDS, TOKENS)
    assert pool(DUPLICATE, IDS, TOKENS, torch.ones(N, dtype=torch.bool)) == every


def test_even_attention_is_chance_for_every_other_kind():
    pooled = pool(EVEN, IDS, TOKENS)
    for name, sums in pooled.items():
        if name not in ("uniform", "column"):  # and no token is a column
            assert sums.excess == pytest.approx(0.0, abs=1e-6)
    assert not pooled["column"].queries
    assert kind(pooled) == "uniform"


def test_a_quarter_of_uneven_attention_is_the_most_that_is_uniform():
    assert of(0.8 * EVEN + 0.2 * SELF)[1] == "uniform"
    assert of(0.55 * EVEN + 0.45 * SELF)[1] == "other"
    overlap = of(SELF)[0]["uniform"]
    assert overlap == pytest.approx(sum(1 / (q + 1) for q in range(1, N)) / 7)


def test_the_threshold_is_halfway_from_chance():
    def mixed(share):
        return of(share * PREVIOUS + (1 - share) * EVEN)

    # share is then the excess itself
    assert mixed(0.51)[1] == "previous token"
    assert mixed(0.49)[1] == "other"


def test_what_cannot_be_seen_is_nan_and_never_named():
    ids, tokens = torch.arange(N), list("abcdefgh")
    score, named = of(PREVIOUS, ids, tokens)
    for name in ("induction", "duplicate token", "punctuation"):
        assert math.isnan(score[name])
    assert named == "previous token"
    score, named = of(torch.ones(1, 1), torch.tensor([3]), ["a"])
    assert all(math.isnan(x) for x in score.values()) and named == "other"


def test_prompts_add_up_by_their_queries():
    short = pool(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([1, 2]), ["a", "b"])
    long = pool(PREVIOUS, IDS, TOKENS)
    both = {name: short[name] + long[name] for name in long}
    assert scores(both)["previous token"] == pytest.approx(7 / 8)


def test_a_model_that_looks_ahead_sees_every_key():
    pattern = torch.full((N, N), 1 / N)
    score, named = of(pattern)
    assert score["uniform"] == pytest.approx(1.0) and named == "uniform"


def test_attention_that_rests_on_a_sink_counts_against_every_kind():
    assert of(0.3 * PREVIOUS)[0]["previous token"] == pytest.approx(0.3)
    assert of(0.3 * PREVIOUS)[1] == "other"


def test_every_score_is_between_0_and_1():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        n = int(torch.randint(2, 12, (1,), generator=generator))
        logits = 4 * torch.randn(n, n, generator=generator)
        pattern = logits.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf).softmax(-1)
        ids = torch.randint(0, 4, (n,), generator=generator)
        for score in scores(pool(pattern, ids, (["a", ".", "\n", "b"] * 3)[:n])).values():
            assert math.isnan(score) or -1e-9 <= score <= 1 + 1e-9


def test_agrees_with_the_head_detector_of_transformer_lens():
    """Its score divides by all the attention; ours by that of the queries that have such a key."""
    from transformer_lens import head_detector

    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 5, (13,), generator=generator)
    logits = 2 * torch.randn(13, 13, generator=generator)
    pattern = logits.masked_fill(torch.ones(13, 13).triu(1).bool(), -torch.inf).softmax(-1)
    keys = expected_keys(ids, ["a"] * 13)
    score = scores(pool(pattern, ids, ["a"] * 13))
    for name, theirs in [
        ("previous token", head_detector.get_previous_token_head_detection_pattern),
        ("duplicate token", head_detector.get_duplicate_token_head_detection_pattern),
        ("induction", head_detector.get_induction_head_detection_pattern),
    ]:
        detection = theirs(ids[None])
        assert torch.equal(keys[name], detection.bool())
        expected = head_detector.compute_head_attention_similarity_score(
            pattern, detection, exclude_bos=False, exclude_current_token=False, error_measure="mul"
        )
        share = keys[name].any(-1).float().mean().item()
        assert score[name] * share == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize(
    "token, expected",
    [(".", True), (" ,", True), ("?!", True), ("\n", True), (" ", False), ("a.", False),
     ("", False), ("=", False), ("。", True), ("<|endoftext|>", False)],
)  # fmt: skip
def test_punctuation(token, expected):
    assert is_punctuation(token) is expected


def test_thresholds_are_what_the_docstrings_say():
    assert patterns.HALFWAY == 0.5 and patterns.UNIFORM == 0.75
