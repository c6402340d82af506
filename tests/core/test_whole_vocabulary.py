"""Every token of the vocabulary a candidate: no matrix, read in parts, every logit certified."""

import pytest
import torch

from tests.support.models import all_in_float64, either, load, strong
from tests.zoo.build import tokens
from tl_dla import attribute_path, direct_logit_attribution
from tl_dla.core import run as runs
from tl_dla.core.rows import RowGroup, RowKey, Rows
from tl_dla.errors import ArgumentError

LAST = ["final_post", "ln_final.b", "b_U"]
UNITS = ["component", "layer", "head", "neuron", "source"]


@pytest.fixture
def in_parts(monkeypatch):
    """Parts of 40 tokens, of the zoo's vocabulary of 97."""
    monkeypatch.setattr(runs, "_TOKENS_AT_ONCE", 40)


def all_logits(model, pos=-1):
    with torch.no_grad():
        return model(tokens())[:, pos].double()


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", either("gpt2", "gptj", "gemma2", "granite", "ln"))
def test_rows_read_in_parts_are_those_read_at_once_and_the_models_logits(name, unit, monkeypatch):
    model, _ = strong(name)
    with all_in_float64():
        whole = direct_logit_attribution(model, tokens(), candidate_tokens="all", unit=unit)
        monkeypatch.setattr(runs, "_TOKENS_AT_ONCE", 40)
        parts = direct_logit_attribution(model, tokens(), candidate_tokens="all", unit=unit)
        logits = all_logits(model)
    assert parts.targets.weights is None and len(parts.targets.candidates) == logits.shape[-1]
    assert parts.labels == whole.labels and parts.kinds == whole.kinds
    torch.testing.assert_close(parts.attribution, whole.attribution, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(parts.logit, logits, atol=1e-9, rtol=1e-9)
    added = [i for i, label in enumerate(parts.labels) if unit != "layer" or label in LAST]
    torch.testing.assert_close(parts.attribution[added].sum(0), logits, atol=1e-8, rtol=1e-8)
    assert parts.reconstruction.passed
    assert parts.reconstruction.parts.keys() == whole.reconstruction.parts.keys()


@pytest.mark.usefixtures("in_parts")
def test_experts_are_run_for_every_part_also_where_prompts_are(monkeypatch):
    monkeypatch.setattr(runs, "_LOGITS_AT_ONCE", 1)  # one prompt at a time
    model = load("mixtral")
    result = direct_logit_attribution(model, tokens(), candidate_tokens="all", unit="neuron")
    assert "expert" in result.kinds
    torch.testing.assert_close(
        result.attribution.sum(0).double(), all_logits(model), atol=1e-5, rtol=1e-4
    )


def test_a_rest_that_only_some_tokens_see_is_a_row_of_all():
    one = torch.ones(1, 1, 2)

    def rows(*labels):
        groups = [RowGroup.one(RowKey("mlp", None, label), one * len(label)) for label in labels]
        return Rows(groups, [], one, one, one, one)

    joined = Rows.joined([rows("a", "bbb"), rows("a", "cc", "bbb", "dddd")])
    assert [key.label for key in joined.keys] == ["a", "cc", "bbb", "dddd"]
    assert joined.values[:, 0, 0].tolist() == [
        [1, 1, 1, 1],
        [0, 0, 2, 2],
        [3, 3, 3, 3],
        [0, 0, 4, 4],
    ]


def test_a_candidate_is_held_to_what_rounding_explains_of_it_alone():
    """As many candidates as one likes make the tolerance of none of them larger."""
    model = load("llama")
    alone = direct_logit_attribution(model, tokens(), candidate_tokens=[7]).reconstruction
    among = direct_logit_attribution(model, tokens(), candidate_tokens="all").reconstruction
    torch.testing.assert_close(among.tolerance[..., 7], alone.tolerance[..., 0], atol=0, rtol=1e-5)


@pytest.mark.usefixtures("in_parts")
def test_every_bias_is_left_out_where_biases_are():
    model = load("gptj")
    result = direct_logit_attribution(
        model, tokens(), candidate_tokens="all", include_bias=False, unit="layer"
    )
    whole = direct_logit_attribution(model, tokens(), candidate_tokens="all")
    assert whole.labels[-2:] == ["ln_final.b", "b_U"] and result.labels[-1] == "final_post"
    torch.testing.assert_close(
        result.logit, whole.logit - whole.attribution[-2:].sum(0), atol=1e-5, rtol=1e-4
    )


@pytest.mark.usefixtures("in_parts")
def test_a_cache_and_every_position_are_read_in_parts_too():
    model = load("gpt2")
    _, cache = model.run_with_cache(tokens())
    given = direct_logit_attribution(model, tokens(), cache=cache, candidate_tokens="all", pos=None)
    run = direct_logit_attribution(model, tokens(), candidate_tokens="all", pos=None)
    torch.testing.assert_close(given.attribution, run.attribution, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(run.logit, model(tokens()), atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("in_parts")
def test_a_result_over_the_vocabulary_can_be_asked_again():
    model = load("gpt2")
    result = direct_logit_attribution(model, tokens(), candidate_tokens="all", unit="head")
    finer = runs.again(result, "source").result(type(result))
    moved = sum(finer[label] for label in finer.labels if label.startswith("L1H2←"))
    torch.testing.assert_close(moved, result["L1H2"], atol=1e-5, rtol=1e-4)
    path = attribute_path(result, "L1H2", 3)
    torch.testing.assert_close(path.attribution.sum(0), finer["L1H2←3"], atol=1e-5, rtol=1e-4)
    assert "97 candidate tokens" in repr(result)


def test_one_certificate_covers_every_logit(monkeypatch):
    monkeypatch.setattr(runs, "_TOKENS_AT_ONCE", 40)
    own = runs.of_query

    def wrong(query, *args, **options):
        parts = own(query, *args, **options)
        if len(query.targets.candidates or ()) == 17:  # the last part's readout is off
            for _step, readout in parts.steps:
                readout.direction.mul_(1.5)
        return parts

    monkeypatch.setattr(runs, "of_query", wrong)
    result = direct_logit_attribution(load("gpt2"), tokens(), candidate_tokens="all", check="off")
    error = result.reconstruction.error > result.reconstruction.tolerance
    assert not result.reconstruction.passed
    assert not bool(error[:, :80].any()) and bool(error[:, 80:].any())


def test_a_table_of_all_is_that_of_each(monkeypatch):
    result = direct_logit_attribution(load("gpt2"), tokens(), candidate_tokens="all", pos=[2, -1])
    table = result.to_dataframe()
    assert len(table) == len(result) * 2 * 2 * 97
    assert list(table.columns[5:9]) == ["token", "candidate", "attribution", "logit"]
    for b, p, c, row in [(0, 0, 0, 0), (1, 1, 96, 3), (0, 1, 40, len(result) - 1)]:
        line = table.iloc[((2 * b + p) * 97 + c) * len(result) + row]
        name = result.targets.candidates[c]
        assert (line["label"], line["candidate"], line["prompt"]) == (result.labels[row], name, b)
        assert line["attribution"] == pytest.approx(float(result.attribution[row, b, p, c]))
        assert line["logit"] == pytest.approx(float(result.logit[b, p, c]))
    monkeypatch.setattr("tl_dla.figures.view.MOST_CANDIDATES", 50)
    for draw in (result.plot, result.plot_profile):
        with pytest.raises(ArgumentError, match="room for 50 candidates, and the result has 97"):
            draw()
    assert result.plot_profile(candidate=3).data


def test_what_has_no_room_is_said(monkeypatch):
    monkeypatch.setattr(runs, "_TOKENS_AT_ONCE", 40)
    with pytest.raises(ArgumentError, match="top_neurons ranks neurons for few candidates"):
        direct_logit_attribution(
            load("gpt2"), tokens(), candidate_tokens="all", unit="neuron", top_neurons=3
        )
    monkeypatch.setattr("tl_dla.inputs.targets._MOST_WITH_BASELINE", 50)
    with pytest.raises(ArgumentError, match="at most 50 candidates, and there are 97"):
        direct_logit_attribution(load("gpt2"), tokens(), None, 5, candidate_tokens="all")
