"""Grading notebooks: each is run from the top in a kernel of its own, then asked for its score."""

import json
import os
from pathlib import Path
from typing import Any

from tl_dla.exercises.catalogue import EXERCISES, POINTS

ASK = """
from json import dumps as _dumps
from tl_dla.exercises.catalogue import judge_all as _judge_all
print({mark!r} + _dumps([[one.name, one.points, one.says] for one in _judge_all(globals())]))
"""
MARK = "verdicts of the exercises: "


def grade(path: Path, timeout: int = 120) -> dict[str, Any]:
    """The points of a notebook: one entry an exercise, their sum, and what is wrong, in words.

    A cell that fails, or takes longer than `timeout` seconds, does not keep the rest from being
    graded. The notebook itself is left as it is.

    Raises:
        ImportError: nbclient, which runs notebooks, is not installed.
    """
    try:
        import nbformat
        from nbclient import NotebookClient
        from nbclient.exceptions import DeadKernelError
    except ImportError as error:
        raise ImportError("To run notebooks: pip install 'tl-dla[course]'") from error
    line: dict[str, Any] = {"notebook": path.name, "points": 0, "of": POINTS}
    line |= dict.fromkeys(EXERCISES, 0)
    try:
        notebook = nbformat.read(path, as_version=4)
    except (nbformat.reader.NotJSONError, nbformat.ValidationError, UnicodeDecodeError):
        return line | {"notes": "this is no notebook"}
    notebook.cells.append(nbformat.v4.new_code_cell(ASK.format(mark=MARK)))
    client = NotebookClient(
        notebook, timeout=timeout, kernel_name="python3", allow_errors=True,
        interrupt_on_timeout=True, resources={"metadata": {"path": str(path.parent)}},
    )  # fmt: skip
    try:
        client.execute(env=_environment())
    except DeadKernelError:
        return line | {"notes": "the kernel died while the notebook ran"}
    said = "".join(out.get("text", "") for out in notebook.cells[-1].outputs)
    if MARK not in said:
        return line | {"notes": f"the checks did not end within {timeout} s"}
    verdicts = json.loads(said.partition(MARK)[2].splitlines()[0])
    line |= {name: points for name, points, _ in verdicts}
    unsolved = [f"{name}: {says}" for name, points, says in verdicts if not points]
    return line | {"points": sum(points for _, points, _ in verdicts), "notes": " ".join(unsolved)}


def _environment() -> dict[str, str]:
    """A kernel's environment, in which notebooks meet the checks of this very package."""
    package = str(Path(__file__).parents[2])
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path, "PLOTLY_RENDERER": "plotly_mimetype"}
