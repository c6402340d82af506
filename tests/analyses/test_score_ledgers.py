"""`AttentionAttribution`: what it says of itself, in words, tables and pictures."""

import copy
import pickle

import numpy as np
import pytest
import torch

from tests.support.models import of_4
from tests.zoo.build import boot
from tl_dla import attribute_attention, load_model
from tl_dla.errors import ArgumentError

PROMPTS = [
    "When John and Mary went to the shops, John gave the bag to",
    "When Mary and John went to the shops, Mary gave the bag to",
]


@pytest.fixture(scope="module")
def demo():
    return load_model("demo", device="cpu")


@pytest.fixture(scope="module")
def one(demo):
    return attribute_attention(demo, PROMPTS[0], "L3H0", key=" Mary", versus=2, unit="head")


@pytest.fixture(scope="module")
def two(demo):
    return attribute_attention(demo, PROMPTS, "L3H0", key=4, versus=2, unit="head")


def test_the_name_mover_of_the_demo(one):
    """The numbers of the README: log-odds of attention, from the model's own pattern."""
    assert one.head == "L3H0" and one.tokens == [(" to", " Mary", " John")]
    _, cache = one.by_query.model.run_with_cache(PROMPTS[0])
    pattern = cache["pattern", 3][0, 0, -1]
    assert one.score.item() == pytest.approx((pattern[4] / pattern[2]).log().item(), abs=1e-5)
    assert one.score.item() == pytest.approx(10.122, abs=2e-3)
    assert [label for label, _ in one.by_query.top(2)] == ["L2H0", "L1H3"]
    assert one.by_key.top(1)[0] == ("0_mlp_out", pytest.approx(10.19, abs=0.01))
    assert one.sentence() == (
        "looks at ' Mary' rather than ' John' because of L2H0 in the query and 0_mlp_out in the key"
    )


def test_the_sentence_explains_the_token_that_is_preferred(demo, one):
    turned = attribute_attention(demo, PROMPTS[0], "L3H0", key=2, versus=" Mary", unit="head")
    assert turned.sentence() == one.sentence()
    torch.testing.assert_close(turned.score, -one.score)


def test_top_pairs_and_their_table(two):
    table = two.pairs_to_dataframe(prompt=1)
    assert list(table.index) == two.by_query.labels and list(table.columns) == two.by_key.labels
    np.testing.assert_array_equal(table.to_numpy(), two.pairs[..., 1].numpy())
    (query, key), value = two.top(1, prompt=1)[0]
    assert table.loc[query, key] == pytest.approx(value) == table.to_numpy().max()
    (query, key), value = two.top(1, largest=False)[0]
    assert two.pairs_to_dataframe().loc[query, key] == pytest.approx(value)
    assert value == pytest.approx(two.pairs.mean(-1).min().item())
    with pytest.raises(ArgumentError, match="prompt must be one of the result's 2"):
        two.top(prompt=2)


def test_the_tidy_table(two):
    table = two.to_dataframe()
    n = len(two.by_query.labels) + len(two.by_key.labels)
    assert len(table) == 2 * n and list(table.side.unique()) == ["query", "key"]
    sums = table.groupby(["side", "prompt"])["attribution"].sum()
    for side in "query", "key":
        assert sums[side].to_numpy() == pytest.approx(two.score.numpy(), abs=1e-4)
    assert table[table.side == "key"].position.unique().tolist() == [4]
    assert table[table.side == "query"].token.unique().tolist() == [" to"]
    assert (table.attribution / table.score).to_numpy() == pytest.approx(table.share.to_numpy())


def test_words_are_of_scores_and_not_of_logits(one, two):
    for shown in repr(one), one._repr_html_(), repr(one.by_query), one.by_key._repr_html_():
        assert "nats" in shown and "logit" not in shown
        assert "L3H0: &#x27; Mary" in shown or "L3H0: ' Mary'" in shown
        assert "✓" in shown and "model's own" in shown.replace("&#x27;", "'")
    assert "largest pairs: L2H0 × 0_mlp_out +2.8" in repr(one)
    assert two.by_query.target == "L3H0: each prompt's own tokens"
    for figure in one.plot(), two.plot(), one.by_query.plot(), two.by_key.plot(k=3):
        assert "logit" not in figure.to_json() and "nats" in figure.to_json()


def test_the_figure_shows_rows_and_pairs(one):
    figure = one.plot(k=50)
    query, key, pairs = figure.data
    for bars, side in (query, one.by_query), (key, one.by_key):
        np.testing.assert_allclose(bars.x[:-1], side.attribution[:, 0], rtol=1e-6)
        assert bars.x[-1] == pytest.approx(one.score.item())
    np.testing.assert_allclose(pairs.z, one.pairs[..., 0], rtol=1e-6)
    assert list(pairs.y) == one.by_query.labels and list(pairs.x) == one.by_key.labels
    assert figure.layout.coloraxis.cmax == -figure.layout.coloraxis.cmin
    assert "✓" in figure.layout.title.text and "rather than" in figure.layout.title.text


@pytest.mark.parametrize("width", [560, 800, 1200])
def test_the_number_left_of_a_falling_row_stays_clear_of_the_names(one, width):
    figure = one.plot(width=width)
    panel = 0.42 * (width - 140)  # pixels, beside names and margins
    fallen = 0
    for bars, axis in zip(
        figure.data[:2], (figure.layout.xaxis, figure.layout.xaxis2), strict=True
    ):
        left, right = axis.range
        for end in bars.x[np.asarray(bars.x) < 0]:
            assert (end - left) / (right - left) * panel > 40  # seven small characters
            fallen += 1
    assert fallen


def test_smaller_rows_are_added_up_in_the_ledgers_and_in_the_pairs(two):
    figure = two.plot(k=3, width=400)
    [bars] = [trace for trace in figure.data if trace.type == "bar" and trace.xaxis == "x"]
    [pairs] = [trace for trace in figure.data if trace.type == "heatmap"]
    assert len(pairs.y) == len(pairs.x) == 4 and pairs.y[-1] == "19 smaller rows"
    np.testing.assert_allclose(np.sum(pairs.z, 1), bars.x[:-1], atol=1e-4)
    assert np.sum(pairs.z) == pytest.approx(two.score.mean().item(), abs=1e-4)
    domains = [figure.layout[axis].domain for axis in ("yaxis", "yaxis2", "yaxis3")]
    assert domains[0][0] > domains[1][1] > domains[1][0] > domains[2][1]  # one below the other
    with pytest.raises(ArgumentError, match="k must be at least 1; 0 was given"):
        two.plot(k=0)


def test_it_copies_and_pickles(one):
    for again in copy.copy(one), pickle.loads(pickle.dumps(one.pairs)):
        assert again is not None
    assert torch.equal(copy.copy(one).pairs, one.pairs)


@of_4
def test_without_tokens_positions_stand_for_them():
    model = boot("gpt2")
    _, cache = model.run_with_cache(torch.tensor([[5, 6, 7, 8]]))
    cache.cache_dict.pop("hook_tokens", None)
    ours = attribute_attention(model, None, "L1H1", key=2, versus=0, cache=cache)
    assert ours.tokens in ([("3", "2", "0")], [("w8", "w7", "w5")])
