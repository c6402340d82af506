"""The notebook of the exercises: it runs as shipped and solved, and its stubs are the exercises."""

import inspect
import os
import re
import sys
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).parents[2] / "tutorials" / "exercises"
sys.path.insert(0, str(FOLDER))

import solutions  # noqa: E402

from tl_dla.exercises import EXERCISES  # noqa: E402

NAMES = list(EXERCISES)


def run(cells):
    nbclient = pytest.importorskip("nbclient")
    notebook = nbformat.read(FOLDER / "exercises.ipynb", as_version=4)
    for cell in notebook.cells:
        name = stub_name(cell)
        if name in cells:
            cell.source = cells[name]
    nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(FOLDER)}}
    ).execute(env=os.environ | {"PYTHONPATH": str(FOLDER.parents[1])})
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
    notebook = nbformat.read(FOLDER / "exercises.ipynb", as_version=4)
    stubs = {stub_name(cell): cell.source for cell in notebook.cells if stub_name(cell)}
    assert list(stubs) == NAMES
    for name, source in stubs.items():
        solution = inspect.getsource(getattr(solutions, name))
        signature = re.match(r"def .*?\) -> .*?:\n", solution, re.S)[0]
        assert source.startswith(signature)
        assert '"""' in source and source.endswith("raise NotImplementedError")


def test_every_exercise_has_its_stars_and_three_hints_that_unfold():
    text = [c.source for c in notebook_cells("markdown")]
    sections = [one for one in text if re.match(r"## \d", one)]
    stars = [section.splitlines()[0].count("★") for section in sections]
    assert stars == [exercise.points for exercise in EXERCISES.values()]
    for section in sections:
        assert re.findall(r"<summary>(.*?)</summary>", section) == ["Hint 1", "Hint 2", "Hint 3"]


def test_a_third_of_the_exercises_is_not_about_the_norm():
    beyond = [
        name
        for name, exercise in EXERCISES.items()
        if exercise.check.__module__.endswith(("reading", "choices"))
    ]
    assert len(beyond) >= len(EXERCISES) / 3


def notebook_cells(kind):
    notebook = nbformat.read(FOLDER / "exercises.ipynb", as_version=4)
    return [cell for cell in notebook.cells if cell.cell_type == kind]
