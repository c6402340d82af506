"""Grading a folder of notebooks: what is solved counts, whatever the rest of a notebook does."""

import csv
import inspect
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

SOLUTIONS = Path(__file__).parents[2] / "tutorials" / "exercises" / "solutions.py"
sys.path.insert(0, str(SOLUTIONS.parent))

import solutions  # noqa: E402

from tl_dla.exercises import EXERCISES  # noqa: E402
from tl_dla.exercises.__main__ import main  # noqa: E402
from tl_dla.exercises.catalogue import POINTS, judge_all, score  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")
IMPORTS = SOLUTIONS.read_text().partition("\n\n\n")[0]


def write(path, *cells):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbformat.write(notebook, path)


def read(path):
    with path.open() as file:
        return {line["notebook"]: line for line in csv.DictReader(file)}


@pytest.fixture(scope="module")
def grades(tmp_path_factory):
    folder = tmp_path_factory.mktemp("notebooks")
    one = inspect.getsource(solutions.top_heads)
    write(folder / "some.ipynb", IMPORTS, "1 / 0", one, "def adds_up(rows, expected): return True")
    write(folder / "stops.ipynb", IMPORTS, "import os", "os._exit(1)", one)
    (folder / "text.ipynb").write_text("no notebook")
    assert main([str(folder), "--out", str(folder / "scores.csv")]) == 0
    return read(folder / "scores.csv")


@pytest.mark.slow
def test_a_cell_that_fails_does_not_keep_the_rest_from_counting(grades):
    line = grades["some.ipynb"]
    assert line["top_heads"] == line["points"] == "1" and line["of"] == str(POINTS)
    assert line["adds_up"] == "0" and "adds_up: it accepts" in line["notes"]
    assert "logit_lens: not there." in line["notes"]


@pytest.mark.slow
def test_a_notebook_that_cannot_be_graded_is_a_line_that_says_so(grades):
    assert grades["stops.ipynb"]["points"] == grades["text.ipynb"]["points"] == "0"
    assert "kernel died" in grades["stops.ipynb"]["notes"]
    assert grades["text.ipynb"]["notes"] == "this is no notebook"


@pytest.mark.slow
def test_a_cell_that_never_ends_is_stopped(tmp_path):
    one = inspect.getsource(solutions.top_heads)
    write(
        tmp_path / "loops.ipynb", "while True: pass", IMPORTS, one, "from tl_dla import exercises"
    )
    out = tmp_path / "scores.csv"
    command = [sys.executable, "-m", "tl_dla.exercises", str(tmp_path), "--timeout", "20"]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "loops.ipynb: 1 of" in done.stderr and read(out)["loops.ipynb"]["top_heads"] == "1"


def test_a_folder_without_notebooks_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "no .ipynb file" in capsys.readouterr().err


def test_the_score_counts_what_is_solved_and_says_what_is_not():
    def top_heads(per_head, k):
        return per_head / 0, {}["heads"]

    mine = {"top_heads": top_heads, "adds_up": solutions.adds_up}
    table = score(mine)
    assert table.loc["all", "points"] == table.loc["adds_up", "points"] == 2
    assert table.loc["top_heads", "check"].startswith("it stops with KeyError: 'heads'")
    assert (table.loc[list(EXERCISES), "of"] == [e.points for e in EXERCISES.values()]).all()
    assert table.loc["all", "of"] == POINTS
    whole = judge_all(vars(solutions))
    assert sum(verdict.points for verdict in whole) == POINTS
