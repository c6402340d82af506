"""Every token of the vocabulary a candidate: no matrix, read in parts, every logit certified."""

import pytest
import torch

from tests.support.models import all_in_float64, either, load, strong
from tests.zoo.build import tokens
from tl_dla import attribute_path, direct_logit_attribution
from tl_dla.core import run as runs
from tl_dla.errors import ArgumentError

UNITS = ["component", "layer", "head", "neuron", "source"]


@pytest.fixture
def in_parts(monkeypatch):
    """Parts of 40 tokens, of the zoo's vocabulary of 97."""
    monkeypatch.setattr(runs, "_TOKENS_AT_ONCE", 40)


def all_logits(model, pos=-1):
    with torch.no_grad():
        return model(tokens())[:, pos].double()


@pytest.mark.parametrize("name", either("gpt2", "llama", "gemma2", "granite", "ln"))
@pytest.mark.parametrize("unit", UNITS)
def test_rows_read_in_parts_are_those_read_at_once_and_the_models_logits(name, unit, monkeypatch):
    model, _ = strong(name)
    with all_in_float64():
        whole = direct_logit_attribution(model, tokens(), candidate_tokens="all", unit=unit)
        monkeypatch.setattr(runs, "_TOKENS_AT_ONCE", 40)
        parts = direct_logit_attribution(model, tokens(), candidate_tokens="all", unit=unit)
        logits = all_logits(model)
    assert parts.targets.weights is None and len(parts.targets.candidates) == logits.shape[-1]
    assert parts.labels == whole.labels
    torch.testing.assert_close(parts.attribution, whole.attribution, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(parts.logit.double(), logits, atol=1e-9, rtol=1e-9)
    rows = parts.attribution[-3:] if unit == "layer" else parts.attribution
    added = (
        rows[[label in ("final_post", "ln_final.b", "b_U") for label in parts.labels[-3:]]]
        if unit == "layer"
        else rows
    )
    torch.testing.assert_close(added.sum(0), logits, atol=1e-8, rtol=1e-8)
    assert parts.reconstruction.expected.shape == logits.shape and parts.reconstruction.passed
    assert parts.reconstruction.parts.keys() == whole.reconstruction.parts.keys()


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
    heads = torch.stack(
        [
            sum(finer[label] for label in finer.labels if label.startswith("L1H2←")),
            result["L1H2"],
        ]
    )
    torch.testing.assert_close(heads[0], heads[1], atol=1e-5, rtol=1e-4)
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


def test_what_has_no_room_is_said(monkeypatch):
    monkeypatch.setattr(runs, "_TOKENS_AT_ONCE", 40)
    with pytest.raises(ArgumentError, match="top_neurons ranks neurons for few candidates"):
        direct_logit_attribution(
            load("gpt2"), tokens(), candidate_tokens="all", unit="neuron", top_neurons=3
        )
    monkeypatch.setattr("tl_dla.inputs.targets._MOST_WITH_BASELINE", 50)
    with pytest.raises(ArgumentError, match="at most 50 candidates, and there are 97"):
        direct_logit_attribution(load("gpt2"), tokens(), None, 5, candidate_tokens="all")
