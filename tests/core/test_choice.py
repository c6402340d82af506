"""`select` gives what the question gives alone; `mean` the rows of the mean logit."""

import dataclasses

import pytest
import torch
from torch.testing import assert_close

from tests.support.models import either, load
from tests.zoo.build import ANSWERS, INCORRECT, tokens
from tl_dla import attribute_inputs, attribute_path, direct_logit_attribution
from tl_dla.effects.interventions import ablate
from tl_dla.errors import ArgumentError

TEXTS = ["w5 w7 w9 w31 w30", "w8 w6", "w40 w41 w42 w8"]
LENGTHS = [6, 3, 5]  # with a BOS


def equal(part, alone):
    """The same rows, question and certificate, but for rounding."""
    assert part.labels == alone.labels and part.unit == alone.unit
    assert part.target == alone.target
    assert_close(part.attribution, alone.attribution, atol=2e-6, rtol=0, equal_nan=True)
    assert_close(part.logit, alone.logit, atol=2e-6, rtol=0, equal_nan=True)
    assert part.reconstruction.passed
    assert part.reconstruction.parts.keys() == alone.reconstruction.parts.keys()
    for name, own in alone.reconstruction.parts.items():
        assert_close(part.reconstruction.parts[name].expected, own.expected, atol=2e-6, rtol=0)
    numbers = (part.numbers, alone.numbers)
    for name in ("rows", "ratio", "scale", "logits", "raw"):
        assert_close(*(getattr(x, name) for x in numbers), atol=5e-6, rtol=1e-6)
    own, other = part.to_dataframe(), alone.to_dataframe()
    assert own.columns.tolist() == other.columns.tolist()
    assert own[["label", "position", "token"]].equals(other[["label", "position", "token"]])


@pytest.mark.parametrize("unit", ["component", "head", "source", "neuron", "layer"])
@pytest.mark.parametrize("pos", [None, -1, [0, -1]], ids=str)
def test_a_prompt_of_a_ragged_batch_is_what_it_is_alone(unit, pos):
    model = load("gpt2")
    whole = direct_logit_attribution(model, TEXTS, [5, 9, 11], [7, 3, 4], unit=unit, pos=pos)
    for prompt, answer, incorrect in ((1, 9, 3), (-1, 11, 4)):
        own = direct_logit_attribution(model, TEXTS[prompt], answer, incorrect, unit=unit, pos=pos)
        equal(whole.select(prompt=prompt), own)


@pytest.mark.parametrize("name", either("gemma2", "ln"))
@pytest.mark.parametrize("incorrect", [None, INCORRECT, "mean"], ids=str)
def test_a_position_and_a_candidate_are_what_they_are_alone(name, incorrect):
    """Soft caps and several incorrect tokens: the token axis keeps those of the candidate."""
    model = load(name)
    options = dict(unit="head", incorrect_tokens=incorrect)
    whole = direct_logit_attribution(
        model, tokens(), candidate_tokens=[5, 9, 11], pos=[1, 4], **options
    )
    own = direct_logit_attribution(model, tokens(), 9, pos=4, **options)
    part = whole.select(position=1, candidate=1)
    equal(part, own)
    named = whole.targets.candidates[1]  # its text, or its id where there is no tokenizer
    equal(whole.select(candidate=named).select(position=-1), own)
    assert part.reconstruction.tolerance.shape == own.reconstruction.tolerance.shape


def test_a_position_with_an_answer_of_its_own():
    model, answers = load("gpt2"), torch.tensor([[5, 7], [9, 11]])[..., None]
    whole = direct_logit_attribution(model, tokens(), answers, pos=[1, 4])
    equal(whole.select(position=0), direct_logit_attribution(model, tokens(), [5, 9], pos=1))
    alone = direct_logit_attribution(model, tokens()[1:], [[[9], [11]]], pos=[1, 4])
    equal(whole.select(prompt=1), alone)
    one = direct_logit_attribution(model, tokens()[1:], 11, pos=4)
    equal(whole.select(prompt=1, position=1), one)


def test_what_is_chosen_is_run_again_as_itself():
    """The model runs on the chosen prompt alone: an ablation is that of the prompt alone."""
    model = load("gpt2")
    whole = direct_logit_attribution(model, TEXTS, [5, 9, 11], 7, unit="head")
    part = whole.select(prompt=1)
    own = direct_logit_attribution(model, TEXTS[1], 9, 7, unit="head")
    runs = [ablate(x, ["L1H2"])["L1H2"].attribution for x in (part, own)]
    assert_close(*runs, atol=2e-6, rtol=0)
    sources = direct_logit_attribution(model, TEXTS, [5, 9, 11], 7, unit="source")
    path = attribute_path(sources, "L1H2", [2, 1, 3])
    alone = attribute_path(part, "L1H2", 1)
    assert path.select(prompt=1).path == alone.path == ("L1H2←1",)
    assert_close(path.select(prompt=1).attribution, alone.attribution, atol=2e-6, rtol=0)


def test_what_the_stream_holds_of_each_token_is_chosen_too():
    model = load("gpt2")
    whole = attribute_inputs(model, TEXTS, [5, 9, 11], 7, pos=[0, -1], progress=False)
    part = whole.select(prompt=1, position=-1)
    own = attribute_inputs(model, TEXTS[1], 9, 7, progress=False)
    assert part.labels == own.labels and part.points == own.points
    assert_close(part.attribution, own.attribution, atol=2e-6, rtol=0)
    assert_close(part.flow[..., :3], own.flow, atol=5e-6, rtol=0)
    assert not part.flow[..., 3:].any()  # tokens of longer prompts


def test_a_rest_row_is_told_of_only_where_it_is():
    whole = direct_logit_attribution(load("gpt2"), tokens(), ANSWERS)
    key = whole.keys[0]._replace(kind="rest", name="embed_rest")
    values = whole.values.clone()
    values[0, 0] = 0.0
    known = dataclasses.replace(whole.reconstruction, unexplained={key.label: 9.0})
    rest = dataclasses.replace(
        whole, keys=[key, *whole.keys[1:]], values=values, reconstruction=known
    )
    assert rest.select(prompt=0).reconstruction.unexplained == {}
    found = rest.select(prompt=1).reconstruction.unexplained
    assert found == {key.label: pytest.approx(float(values[0, 1].abs().max()))}


# ---- the mean ----------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["component", "head", "source"])
def test_the_mean_is_over_what_exists(unit):
    model = load("gpt2")
    whole = direct_logit_attribution(model, TEXTS, [5, 9, 11], 7, unit=unit, pos=None)
    mean = whole.mean()
    assert mean.attribution.shape == (len(whole),) and mean.logit.shape == ()
    real = [whole.attribution[:, row, :n].double() for row, n in enumerate(LENGTHS)]
    assert_close(mean.attribution.double(), torch.cat(real, 1).mean(1), atol=1e-6, rtol=0)
    logits = [model(text)[0].double().detach() for text in TEXTS]
    own = torch.cat([x[:, a] - x[:, 7] for x, a in zip(logits, [5, 9, 11], strict=True)])
    assert float(mean.logit) == pytest.approx(float(own.mean()), abs=1e-5)
    assert mean.reconstruction.passed and type(mean) is type(whole)
    assert mean.top(7) == [(label, pytest.approx(value, abs=1e-6)) for label, value in whole.top(7)]
    assert mean.mean() is mean


def test_the_mean_says_what_it_is_of_and_runs_nothing(tmp_path):
    whole = direct_logit_attribution(load("gpt2"), TEXTS, [5, 9, 11], 7, pos=None)
    mean = whole.mean()
    words = "mean over 14 positions of 3 prompts"
    assert words in repr(mean) and words in mean._repr_html_()
    assert words in mean.plot().layout.title.text
    table = mean.to_dataframe()
    assert len(table) == len(mean) and table["prompt"].isna().all()
    for runs in (
        mean.audit,
        lambda: mean.promoted_tokens("embed"),
        lambda: mean.readout,
        lambda: ablate(mean, ["embed"]),
        lambda: attribute_path(mean, "L1H0", 0),
    ):
        with pytest.raises(ArgumentError, match=f"The result is a {words}, which no run"):
            runs()


def test_candidates_keep_their_axis_in_a_mean():
    model = load("gpt2")
    whole = direct_logit_attribution(model, tokens(), candidate_tokens=[5, 7, 9], pos=[2, 4])
    mean = whole.mean()
    assert_close(mean.attribution, whole.attribution.mean((1, 2)), atol=1e-6, rtol=0)
    assert_close(mean.select(candidate="w7").attribution, mean.attribution[:, 1], atol=0, rtol=0)
    assert mean.select(candidate="w7").target == "'w7'"


# ---- refusals ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ({"prompt": 3}, "prompt must be one of the result's 3; 3"),
        ({"prompt": 1, "position": 3}, "position must be one of the result's 3; 3"),
        ({"candidate": "w5"}, "candidate must be one of none here, or its index; 'w5'"),
        ({"prompt": "first"}, "prompt must be an integer; 'first'"),
        ({"position": True}, "position must be an integer; True"),
    ],
)
def test_what_is_not_there_is_refused(chosen, words):
    result = direct_logit_attribution(load("gpt2"), TEXTS, 5, pos=None)
    for choose in (result.select, result.top):
        with pytest.raises(ArgumentError, match=words):
            choose(**chosen)
