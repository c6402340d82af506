"""The exercises: every check accepts the solution and tells each classic mistake by its name."""

import inspect
import re
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "tutorials" / "exercises"
sys.path.insert(0, str(FOLDER))

import checkers  # noqa: E402
import comparing  # noqa: E402
import lesson as lessons  # noqa: E402
import solutions  # noqa: E402

from tests.support.mistakes import MISTAKES  # noqa: E402

NAMES = list(checkers.CHECKS)


@pytest.fixture(scope="module")
def lesson():
    return lessons.load_lesson()


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


CASES = [(name, case) for name in MISTAKES for case in MISTAKES[name]]


@pytest.mark.parametrize("name", NAMES)
def test_a_check_accepts_the_solution(name, lesson):
    checkers.CHECKS[name](getattr(solutions, name), lesson)


@pytest.mark.parametrize(("name", "case"), CASES)
def test_a_check_tells_each_classic_mistake_by_its_name(name, case, lesson):
    wrong, sentence = MISTAKES[name][case]
    with pytest.raises(comparing.Mistake, match=sentence) as caught:
        checkers.CHECKS[name](wrong, lesson)
    others = {s for _, s in MISTAKES[name].values()} - {sentence}
    assert not [other for other in others if re.search(other, str(caught.value))]


def test_a_centred_direction_is_right_too(lesson):
    def centred(*args):
        direction = solutions.logit_diff_directions(*args)
        return direction - direction.mean(-1, keepdim=True)

    checkers.CHECKS["logit_diff_directions"](centred, lesson)


@pytest.mark.parametrize("name", NAMES)
def test_every_exercise_has_mistakes_and_an_undone_state(name, monkeypatch, lesson, capsys):
    assert MISTAKES[name]

    def undone(*args):
        raise NotImplementedError

    undone.__name__ = name
    monkeypatch.setattr(checkers, "_lesson", lambda: lesson)
    assert checkers.check(undone) is False
    assert checkers.check(getattr(solutions, name)) is True
    assert capsys.readouterr().out == f"{name}: not done yet.\n{name}: correct.\n"


def test_what_the_checks_call_right_adds_up_to_what_the_model_returned(lesson):
    from reference import accumulated, heads, ledger, scale_at, split

    logits, prompt = lesson.logits[:, -1].double(), torch.arange(3)
    expected = logits[prompt, lesson.correct] - logits[prompt, lesson.incorrect]
    torch.testing.assert_close(ledger(lesson).sum(0), expected, atol=2e-5, rtol=0)
    cache = lesson.cache
    for pos in (-1, 3):
        rows = split(lesson, accumulated(lesson, pos)[-1:], scale_at(lesson, pos))
        normed = cache["unembed.hook_in"][:, pos].double()
        torch.testing.assert_close(rows.sum(0), normed, atol=1e-5, rtol=0)
    attn = torch.stack(
        [cache["attn_out", i][:, -1] - b.attn.b_O for i, b in enumerate(lesson.model.blocks)]
    )
    torch.testing.assert_close(heads(lesson).sum(1), attn.double(), atol=1e-5, rtol=0)


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


# ---- the notebook ------------------------------------------------------------------------------


def run(cells):
    nbclient = pytest.importorskip("nbclient")
    import nbformat

    notebook = nbformat.read(FOLDER / "exercises.ipynb", as_version=4)
    for cell in notebook.cells:
        name = stub_name(cell)
        if name in cells:
            cell.source = cells[name]
    nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(FOLDER)}}
    ).execute()
    return notebook, "".join(
        output.get("text", "")
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream"
    )


def stub_name(cell):
    found = re.search(r"^def (\w+)\(", cell.source, re.M) if cell.cell_type == "code" else None
    return found and found[1]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("solved", [False, True], ids=["as shipped", "solved"])
def test_the_notebook_runs(solved):
    cells = {name: inspect.getsource(getattr(solutions, name)) for name in NAMES} if solved else {}
    _, said = run(cells)
    for name in NAMES:
        assert f"{name}: {'correct' if solved else 'not done yet'}.\n" in said


def test_the_stubs_of_the_notebook_have_the_signatures_of_the_solutions():
    import nbformat

    notebook = nbformat.read(FOLDER / "exercises.ipynb", as_version=4)
    stubs = {stub_name(cell): cell.source for cell in notebook.cells if stub_name(cell)}
    assert list(stubs) == NAMES
    for name, source in stubs.items():
        solution = inspect.getsource(getattr(solutions, name))
        signature = re.match(r"def .*?\) -> .*?:\n", solution, re.S)[0]
        assert source.startswith(signature)
        assert '"""' in source and source.endswith("raise NotImplementedError")
