"""The result's views (ranking, table, text) say what the tensor says, and average nothing unasked.

The numbers themselves are held to references elsewhere; here the oracle is sorting, indexing and
pandas over the tensor and the model's own logits.
"""

import dataclasses
import math

import pandas as pd
import pytest
import torch

from tests.support.models import either, load, of_4, with_tokenizer, words
from tests.zoo.build import ANSWERS, INCORRECT, tokens
from tl_dla import direct_logit_attribution
from tl_dla.errors import ArgumentError

TEXTS = ["w5 w7 w9 w31 w30", "w8 w6", "w40 w41 w42 w8"]


@pytest.fixture(scope="module")
def one():
    """One prompt, one position."""
    return direct_logit_attribution(load("gpt2"), tokens()[:1], 5, 7, unit="head")


@pytest.fixture(scope="module")
def ragged():
    """Three prompts of 6, 3 and 5 tokens, every position."""
    return direct_logit_attribution(load("gpt2"), TEXTS, [5, 9, 11], 7, unit="head", pos=None)


# ---- ranking -----------------------------------------------------------------------------------


def by_hand(result, index=(0,), kinds=None):
    rows = zip(result.labels, result.kinds, result.attribution, strict=True)
    return [(label, float(row[index])) for label, kind, row in rows if kind in (kinds or kind)]


def check_top(got, expected):
    assert [label for label, _ in got] == [label for label, _ in expected]
    assert [value for _, value in got] == pytest.approx([value for _, value in expected])


def test_top_is_the_highest_rows_best_first(one):
    ranked = sorted(by_hand(one), key=lambda row: -row[1])
    check_top(one.top(), ranked[:5])
    check_top(one.top(3), ranked[:3])
    check_top(one.top(1000), ranked)
    check_top(one.top(4, largest=False), ranked[::-1][:4])
    assert ranked[-1][1] < 0 < ranked[0][1]


def test_top_can_rank_by_magnitude_and_keeps_the_sign(one):
    ranked = sorted(by_hand(one), key=lambda row: -abs(row[1]))
    check_top(one.top(6, by="magnitude"), ranked[:6])
    check_top(one.top(6, by="magnitude", largest=False), ranked[::-1][:6])
    assert min(value for _, value in ranked[:6]) < 0


@pytest.mark.parametrize("kind", ["head", "mlp", "bias", "embed"])
def test_top_of_a_kind(one, kind):
    ranked = sorted(by_hand(one, kinds=[kind]), key=lambda row: -row[1])
    check_top(one.top(100, kind=kind), ranked)
    expected = {"head": 12, "mlp": 3, "bias": 4, "embed": 2}  # b_O three times, ln_final.b
    assert len(ranked) == expected[kind]


def test_top_agrees_with_transformer_lens_on_what_it_can_rank():
    from transformer_lens.tools.analysis import direct_logit_attribution as transformer_lens_own

    model = load("gpt2", folded=True)
    theirs = transformer_lens_own(model, tokens()[:1], 5, 7).top(5)
    ours = direct_logit_attribution(model, tokens()[:1], 5, 7, include_bias=False).top(5)
    assert [label for label, _ in ours] == [label for label, _ in theirs]
    assert [v for _, v in ours] == pytest.approx([v for _, v in theirs], abs=1e-5)


def test_what_is_not_chosen_is_averaged():
    result = direct_logit_attribution(load("gpt2"), TEXTS, 5, 7)
    for prompt in range(3):
        ranked = sorted(by_hand(result, (prompt,)), key=lambda row: -row[1])
        check_top(result.top(prompt=prompt), ranked[:5])
    check_top(result.top(prompt=-1), ranked[:5])


def test_the_average_is_over_real_positions(ragged):
    def average(row, prompts=(0, 1, 2)):
        values = [float(x) for p in prompts for x in row[p, : [6, 3, 5][p]]]
        return sum(values) / len(values)

    rows = list(zip(ragged.labels, ragged.attribution, strict=True))
    ranked = sorted(((label, average(row)) for label, row in rows), key=lambda row: -row[1])
    check_top(ragged.top(7), ranked[:7])
    ranked = sorted(((label, average(row, [1])) for label, row in rows), key=lambda row: -row[1])
    check_top(ragged.top(7, prompt=1), ranked[:7])
    # By magnitude: ranked by the size of what is shown.
    ranked = sorted(((label, average(row)) for label, row in rows), key=lambda row: -abs(row[1]))
    check_top(ragged.top(7, by="magnitude"), ranked[:7])
    one = sorted(((label, float(row[2, 3])) for label, row in rows), key=lambda row: row[1])
    check_top(ragged.top(4, prompt=2, position=3, largest=False), one[:4])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ({"kind": "neuron"}, "kind 'neuron'; the kinds here are bias, embed, head, mlp"),
        ({"by": "size"}, "by must be .*'size'"),
        ({"k": 0}, "k must be at least 1; 0"),
        ({"prompt": 3}, "prompt must be one of the result's 1; 3"),
    ],
)
def test_what_top_cannot_rank_is_one_sentence(one, options, fragment):
    with pytest.raises(ArgumentError, match=fragment):
        one.top(**options)


# ---- rows --------------------------------------------------------------------------------------


def test_a_row_by_its_label(ragged):
    for i, label in enumerate(ragged.labels):
        close(ragged[label], ragged.attribution[i])
    assert len(ragged) == len(ragged.labels) == len(ragged.attribution)
    with pytest.raises(KeyError, match="No row .L9H9.; the rows are L0H0"):
        ragged["L9H9"]


@pytest.mark.parametrize("name", either("gpt2", "llama", "ln", "attn_only"))
def test_heads_by_layer_and_head(name):
    result = direct_logit_attribution(
        load(name), tokens(), ANSWERS, INCORRECT, unit="head", pos=[3, 5]
    )
    assert result.heads.shape == (3, 4, 2, 2)
    for layer in range(3):
        for head in range(4):
            close(result.heads[layer, head], result[f"L{layer}H{head}"])
    components = direct_logit_attribution(load(name), tokens(), ANSWERS, INCORRECT)
    with pytest.raises(ArgumentError, match='unit="component" result has no head rows'):
        _ = components.heads


@of_4
def test_layers_without_heads_are_zero():
    """Attention in one layer of three, linear attention in the others."""
    result = direct_logit_attribution(load("qwen3_next"), tokens(), ANSWERS, INCORRECT, unit="head")
    layers = {
        layer for layer, kind in zip(result.layers, result.kinds, strict=True) if kind == "head"
    }
    assert layers and layers < {0, 1, 2}
    for layer in range(3):
        assert result.heads[layer].any() == (layer in layers)


def test_kinds_and_layers_say_what_a_row_is(one):
    expected = {"L1H2": ("head", 1), "2_mlp_out": ("mlp", 2), "embed": ("embed", None)}
    expected |= {
        "pos_embed": ("embed", None),
        "0_attn_bias": ("bias", 0),
        "ln_final.b": ("bias", None),
    }
    for label, (kind, layer) in expected.items():
        i = one.labels.index(label)
        assert (one.kinds[i], one.layers[i]) == (kind, layer)
    layers = direct_logit_attribution(load("gpt2"), tokens(), 5, unit="layer")
    assert layers.kinds == ["residual"] * 7 + ["bias"]
    components = direct_logit_attribution(load("gpt2"), tokens(), 5)
    assert components.kinds == ["embed"] * 2 + ["attn", "mlp"] * 3 + ["bias"]


def test_rows_and_labels_stay_aligned(one):
    with pytest.raises(ArgumentError, match="Every row needs a key"):
        dataclasses.replace(one, keys=one.keys[:-1])


# ---- the table ---------------------------------------------------------------------------------

COLUMNS = ["label", "kind", "layer", "prompt", "position", "token", "attribution", "logit", "share"]


def test_the_table_is_tidy(ragged):
    table = ragged.to_dataframe()
    assert list(table.columns) == COLUMNS
    assert len(table) == len(ragged.labels) * (6 + 3 + 5)
    assert not table.drop(columns="layer").isna().any(axis=None)
    assert not table.duplicated(["label", "prompt", "position"]).any()
    # Every number is where its prompt, position and label say.
    for line in table.sample(60, random_state=0).itertuples():
        i = ragged.labels.index(line.label)
        value = float(ragged.attribution[i, line.prompt, line.position])
        assert line.attribution == pytest.approx(value)
        assert line.kind == ragged.kinds[i]
        assert (None if pd.isna(line.layer) else line.layer) == ragged.layers[i]
        assert line.share == pytest.approx(line.attribution / line.logit)
        words_of = ["w1", *TEXTS[line.prompt].split()]
        assert line.token == words_of[line.position]
    assert table["layer"].dtype == "Int64"


def test_the_tables_logit_is_the_models_own(ragged):
    model, table = load("gpt2"), ragged.to_dataframe()
    sums = table.groupby(["prompt", "position"])[["attribution", "share"]].sum()
    for row, (text, answer) in enumerate(zip(TEXTS, [5, 9, 11], strict=True)):
        logits = model(text)[0].detach()
        own = logits[:, answer] - logits[:, 7]
        for position in range(len(own)):
            here = table[(table["prompt"] == row) & (table["position"] == position)]
            assert set(here["logit"]) == {here["logit"].iloc[0]}
            assert here["logit"].iloc[0] == pytest.approx(float(own[position]), abs=1e-5)
            assert sums.loc[(row, position), "attribution"] == pytest.approx(
                float(own[position]), abs=1e-5
            )
            assert sums.loc[(row, position), "share"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("pos", [-1, [0, -1]])
def test_positions_in_the_table_count_real_tokens(pos):
    model = with_tokenizer("gpt2", words("w1"))
    rows = [[1, 5, 7, 9], [1, 1, 8, 6]]  # the second is padded on its left with BOS
    table = direct_logit_attribution(model, torch.tensor(rows), 5, 7, pos=pos).to_dataframe()
    places = table[["prompt", "position", "token"]].drop_duplicates().to_numpy().tolist()
    last = [[0, 3, "w9"], [1, 2, "w6"]]
    first = [[0, 0, "w1"], [1, 0, "w1"]]
    assert places == (last if pos == -1 else [first[0], last[0], first[1], last[1]])


def test_candidates_are_a_column():
    result = direct_logit_attribution(
        load("gpt2"), tokens(), candidate_tokens=["w5", "w7", "w60"], pos=[2, 4]
    )
    table = result.to_dataframe()
    assert list(table.columns) == [*COLUMNS[:6], "candidate", *COLUMNS[6:]]
    assert len(table) == len(result.labels) * 2 * 2 * 3
    own = load("gpt2")(tokens()).detach()
    for line in table.sample(40, random_state=0).itertuples():
        c = ["w5", "w7", "w60"].index(line.candidate)
        p = [2, 4].index(line.position)
        i = result.labels.index(line.label)
        assert line.attribution == pytest.approx(float(result.attribution[i, line.prompt, p, c]))
        expected = float(own[line.prompt, line.position, [5, 7, 60][c]])
        assert line.logit == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", either("gpt2", "ln"))
def test_a_cache_without_its_input_shows_no_tokens_that_it_does_not_know(name):
    model = load(name)
    _, cache = model.run_with_cache(tokens())
    result = direct_logit_attribution(model, None, ANSWERS, cache=cache)
    given = direct_logit_attribution(model, tokens(), ANSWERS, cache=cache).to_dataframe()
    shown = result.to_dataframe()
    # A bridge's cache holds its tokens.
    expected = given["token"].tolist() if name == "gpt2" else [""] * len(given)
    assert shown["token"].tolist() == expected
    pd.testing.assert_frame_equal(shown.drop(columns="token"), given.drop(columns="token"))


# ---- text --------------------------------------------------------------------------------------


def test_the_text_shows_the_rows_that_matter_the_total_and_the_certificate(one):
    text = repr(one)
    lines = text.splitlines()
    assert lines[0] == "DirectLogitAttribution: 'w5' − 'w7', unit=\"head\", rows [21, 1]"
    assert "the 12 largest of 21 rows (logits)" in lines[1]
    ranked = sorted(by_hand(one), key=lambda row: -abs(row[1]))[:12]
    for line, (label, value) in zip(lines[2:14], ranked, strict=True):
        assert line.split() == [label, f"{value:+.4f}"]
    logits = load("gpt2")(tokens()[:1])[0, -1].detach()
    own = float(logits[5] - logits[7])
    assert lines[14].split()[:3] == ["9", "smaller", "rows"]
    rest = sum(value for _, value in by_hand(one)) - sum(value for _, value in ranked)
    assert float(lines[14].split()[3]) == pytest.approx(rest, abs=1e-4)
    assert lines[15].split() == ["all", "rows", f"{own:+.4f}"]
    assert lines[16].split() == ["model's", "own", "logit", f"{own:+.4f}"]
    assert str(one.reconstruction) in lines[17]
    assert len(lines) == 18


def test_the_tables_rows_are_those_of_top_by_magnitude_in_its_order(ragged):
    """Also of a batch: ordered by what is shown, the mean."""
    shown = [line.split() for line in repr(ragged).splitlines()[2:14]]
    ranked = ragged.top(12, by="magnitude")
    assert [(label, value) for label, value in shown] == [(x, f"{v:+.4f}") for x, v in ranked]
    cells = ragged._repr_html_().split('<th scope="row"')[1:13]
    assert [cell.split("</th>")[0].rpartition(">")[2] for cell in cells] == [x for x, _ in ranked]


def test_the_text_of_a_batch_says_that_it_averages(ragged):
    text = repr(ragged)
    assert "mean over prompts and positions" in text
    assert "each prompt's own answer" in text
    own = []
    for text_, answer in zip(TEXTS, [5, 9, 11], strict=True):
        logits = load("gpt2")(text_)[0].detach()
        own += (logits[:, answer] - logits[:, 7]).tolist()
    assert f"model's own logit    {sum(own) / len(own):+.4f}" in text
    candidates = direct_logit_attribution(load("gpt2"), tokens(), candidate_tokens=[5, 7])
    assert "2 candidate tokens" in repr(candidates)
    own = load("gpt2")(tokens())[:, -1, [5, 7]].mean(0).tolist()
    assert repr(candidates).splitlines()[-2].split()[3:] == [f"{x:+.4f}" for x in own]


@pytest.mark.parametrize(
    ("answer", "options", "expected"),
    [
        ("w5", {}, "'w5'"),
        ("w5", {"incorrect_tokens": "w7"}, "'w5' − 'w7'"),
        (5, {"incorrect_tokens": [["w7", "w9"]]}, "'w5' − mean('w7', 'w9')"),
        (5, {"incorrect_tokens": "mean"}, "'w5' − mean of the vocabulary"),
        ([5, 9], {}, "each prompt's own answer"),
        (None, {"candidate_tokens": [5, 7, 9]}, "3 candidate tokens"),
    ],
    ids=str,
)
def test_what_is_attributed_is_said_in_words(answer, options, expected):
    result = direct_logit_attribution(load("gpt2"), tokens(), answer, **options)
    assert result.target == expected
    assert expected in repr(result)


def test_without_biases_the_logit_is_the_logit_without_them():
    model = load("gptj")
    result = direct_logit_attribution(model, tokens(), 5, include_bias=False)
    whole = direct_logit_attribution(model, tokens(), 5)
    biases = whole["ln_final.b"] + whole["b_U"]
    assert biases.abs().min() > 1e-2
    close(result.logit, whole.logit - biases, 1e-5)
    close(result.attribution.sum(0), result.logit, 1e-5)
    assert math.isclose(float(result.to_dataframe()["logit"].iloc[0]), float(result.logit[0]))


def close(actual, expected, atol=0.0):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0, equal_nan=True)
