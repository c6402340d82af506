"""`tl-dla compare` gives the library's numbers, and refuses where there is nothing to compare."""

import io
import json

import pytest

from tests.zoo.build import build
from tl_dla import compare, direct_logit_attribution
from tl_dla.cli import main
from tl_dla.loading import load_model

PROMPT, OTHER = "w5 w60 w7 w42 w8", "w5 w60 w9"
ASKED = ["compare", PROMPT, "--answer", "w8", "--incorrect", "w9", "--unit", "head"]


def test_two_prompts_are_compared_as_the_library_does(run, folder, tmp_path):
    model = load_model(folder)
    a, b = (direct_logit_attribution(model, p, "w8", "w9", unit="head") for p in (PROMPT, OTHER))
    found = compare(a, b)
    record = json.loads(run(*ASKED, "--corrupted", OTHER, "--json"))
    for name in ("a", "b", "change", "wrote", "read"):
        assert record[name] == getattr(found, name)[:, 0].tolist()
    assert record["labels"] == found.labels and record["reconstruction"]["passed"]
    assert record["logit"]["change"] == pytest.approx(float(b.logit - a.logit), abs=1e-6)
    shown = run(*ASKED, "--corrupted", OTHER, "--top", "3")
    label, value = found.top(1, by="magnitude")[0]
    assert (
        f"{label} " in shown and f"{value:+.4f}" in shown and f"{len(found) - 3} smaller" in shown
    )
    run(*ASKED, "--corrupted", OTHER, "--out", str(tmp_path / "rows.csv"))
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 1 + len(found)
    page = tmp_path / "page.html"
    assert run(*ASKED, "--corrupted", OTHER, "--out", str(page)) == ""
    assert page.read_bytes() == found.report(tmp_path / "again.html").read_bytes()
    assert json.loads(run(*ASKED, "--corrupted", OTHER, "--out", str(page), "--json")) | {
        "command": 0
    } == record | {"command": 0}


def test_the_prediction_of_the_first_is_the_answer_of_both(run):
    record = json.loads(run("compare", PROMPT, "--corrupted", OTHER, "--json"))
    assert "against" not in record["target"]


def test_a_prompt_from_stdin_is_that_of_both_models(run, monkeypatch):
    against = ["--against", str(build("gpt2")[1])]
    shown = run(*ASKED, *against)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{PROMPT}\n"))
    assert run("compare", "-", *ASKED[2:], *against) == shown


def test_two_models_are_compared(run, capsys):
    """The same weights under another name: nothing changed."""
    record = json.loads(run(*ASKED, "--against", str(build("gpt2")[1]), "--json"))
    assert not any(record["change"])
    assert main([*ASKED, "--against", str(build("llama")[1]), "--model", record["model"]]) == 2
    assert "Models of one architecture are compared" in capsys.readouterr().err


def test_nothing_to_compare_with_is_refused(run, capsys):
    run(*ASKED, code=2)
    assert main(ASKED) == 2
    assert "give --corrupted PROMPT, --against MODEL, or both" in capsys.readouterr().err
