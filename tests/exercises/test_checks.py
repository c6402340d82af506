"""The exercises: every check accepts the solution and tells each classic mistake by its name."""

import re
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "tutorials" / "exercises"
sys.path.insert(0, str(FOLDER))

import solutions  # noqa: E402

from tests.support import mistakes, wrong_readings  # noqa: E402
from tl_dla.exercises import EXERCISES, catalogue, check, load_lesson  # noqa: E402
from tl_dla.exercises.comparing import Mistake  # noqa: E402

NAMES = list(EXERCISES)
MISTAKES = mistakes.MISTAKES | wrong_readings.MISTAKES


@pytest.fixture(scope="module")
def lesson():
    return load_lesson()


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


CASES = [(name, case) for name in MISTAKES for case in MISTAKES[name]]


@pytest.mark.parametrize("name", NAMES)
def test_a_check_accepts_the_solution(name, lesson):
    EXERCISES[name].check(getattr(solutions, name), lesson)


@pytest.mark.parametrize(("name", "case"), CASES)
def test_a_check_tells_each_classic_mistake_by_its_name(name, case, lesson):
    wrong, sentences = MISTAKES[name][case]
    sentences = (sentences,) if isinstance(sentences, str) else sentences  # two for two at once
    with pytest.raises(Mistake) as caught:
        EXERCISES[name].check(wrong, lesson)
    said = str(caught.value)
    assert all(re.search(sentence, said) for sentence in sentences), said
    known = {says for _, says in MISTAKES[name].values() if isinstance(says, str)}
    assert not [other for other in known.difference(sentences) if re.search(other, said)], said


def test_a_centred_direction_is_right_too(lesson):
    def centred(*args):
        direction = solutions.logit_diff_directions(*args)
        return direction - direction.mean(-1, keepdim=True)

    EXERCISES["logit_diff_directions"].check(centred, lesson)


@pytest.mark.parametrize("name", NAMES)
def test_every_exercise_has_mistakes_and_an_undone_state(name, monkeypatch, lesson, capsys):
    assert MISTAKES[name]

    def undone(*args):
        raise NotImplementedError

    undone.__name__ = name
    monkeypatch.setattr(catalogue, "_lesson", lambda: lesson)
    assert check(undone) is False
    assert check(getattr(solutions, name)) is True
    assert capsys.readouterr().out == f"{name}: not done yet.\n{name}: correct.\n"


def test_what_the_checks_call_right_adds_up_to_what_the_model_returned(lesson):
    from tl_dla.exercises.norm import all_rows, layer_norm_split
    from tl_dla.exercises.reference import heads

    logits, prompt = lesson.logits[:, -1].double(), torch.arange(3)
    expected = logits[prompt, lesson.correct] - logits[prompt, lesson.incorrect]
    torch.testing.assert_close(all_rows(lesson, over="none").sum(0), expected, atol=2e-5, rtol=0)
    cache = lesson.cache
    for pos in (-1, 3):
        rows = layer_norm_split(lesson, pos)
        normed = cache["unembed.hook_in"][:, pos].double()
        torch.testing.assert_close(rows.sum(0), normed, atol=1e-5, rtol=0)
    attn = torch.stack(
        [cache["attn_out", i][:, -1] - b.attn.b_O for i, b in enumerate(lesson.model.blocks)]
    )
    torch.testing.assert_close(heads(lesson).sum(1), attn.double(), atol=1e-5, rtol=0)


def test_what_the_notebook_says_of_the_lesson_holds(lesson):
    tokens, answers = lesson.tokens, (lesson.correct, lesson.incorrect)
    directions = solutions.logit_diff_directions(lesson.model, *answers)
    rows = solutions.per_head_logit_diff(lesson.model, lesson.cache, directions)
    assert (rows.abs() >= 1).nonzero().tolist() == [[1, 0], [2, 0], [3, 0]]
    assert float(rows[1, 3]) == pytest.approx(0.9, abs=0.05)  # and more is lost without it
    assert solutions.logit_diff_lost(lesson.model, tokens, *answers, 1, 3) > 2 * rows[1, 3]
    head = solutions.suppressing_head(lesson.model, lesson.cache, lesson.incorrect)
    assert rows[head] > 0.5  # it helps, by holding a name down


def test_the_lesson_leaves_nothing_at_zero_that_could_be_forgotten(lesson):
    stream = lesson.cache["resid_post", -1][:, -1]
    assert stream.mean(-1).abs().min() > 1
    b_U = lesson.model.b_U
    assert abs(float((b_U[lesson.correct] - b_U[lesson.incorrect]).mean())) > 0.1
    assert lesson.logit_diff > 3


def test_the_result_of_the_package_is_the_ledger(lesson):
    from tl_dla import direct_logit_attribution

    result = direct_logit_attribution(
        lesson.model, lesson.tokens, lesson.correct, lesson.incorrect, unit="component"
    )
    rows = solutions.all_rows(lesson.model, lesson.cache, lesson.correct, lesson.incorrect)
    torch.testing.assert_close(result.attribution.mean(-1), rows, atol=1e-4, rtol=0)
