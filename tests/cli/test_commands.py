"""The command gives the library's numbers, in every form, and one line where it cannot."""

import argparse
import io
import json
import subprocess
import sys
from importlib.metadata import version
from typing import get_args

import pandas as pd
import pytest
import torch

from tests.zoo.build import build
from tl_dla import direct_logit_attribution, logit_lens
from tl_dla.analyses.check_model import Identity, ModelCheck
from tl_dla.cli import main
from tl_dla.cli.answers import check_output
from tl_dla.figures.text import number
from tl_dla.inputs.selection import Unit
from tl_dla.loading import load_model

PROMPT = "w5 w60 w7 w42 w8"
IDS = torch.tensor([[1, 5, 60, 7, 42, 8]])  # w1 is the tokenizer's BOS, which models prepend


@pytest.fixture(scope="module")
def own_logits():
    """The model's logits at each position, from plain transformers."""
    with torch.no_grad():
        return build("gpt2")[0](IDS).logits[0]


# ---- attribute ---------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", [unit for unit in get_args(Unit) if unit != "latent"])
def test_json_carries_the_librarys_numbers_and_the_models_own_logit(run, folder, own_logits, unit):
    given = ["attribute", PROMPT, "--answer", "w8", "--incorrect", "w9", "--unit", unit, "--json"]
    record = json.loads(run(*given))
    result = direct_logit_attribution(load_model(folder), PROMPT, "w8", "w9", unit=unit)

    assert record["labels"] == result.labels
    assert record["kinds"] == result.kinds
    assert record["layers"] == result.layers
    assert record["attribution"] == result.attribution[:, 0].tolist()
    assert record["logit"] == pytest.approx(float(own_logits[-1, 8] - own_logits[-1, 9]), abs=1e-5)
    certificate = record["reconstruction"]
    assert certificate["expected"] == record["logit"]
    assert certificate["reconstructed"] == float(result.reconstruction.reconstructed)
    assert certificate["error"] == abs(certificate["reconstructed"] - record["logit"])
    assert certificate["error"] <= certificate["tolerance"]
    assert certificate["passed"] is True
    refined = unit in ("head", "neuron", "source")
    assert len(certificate["parts"]) >= 3 if refined else not certificate["parts"]
    assert all(part["passed"] for part in certificate["parts"].values())


def test_json_says_what_was_asked_and_with_what(run, folder):
    record = json.loads(run("attribute", PROMPT, "--answer", "w8", "--json"))
    assert record["command"] == f"tl-dla attribute '{PROMPT}' --answer w8 --json --model {folder}"
    assert (record["model"], record["prompt"], record["unit"]) == (folder, PROMPT, "component")
    assert (record["position"], record["token"]) == (5, "w8")
    assert (record["answer"]["id"], record["answer"]["token"]) == (8, "w8")
    assert record["incorrect"] == []
    assert record["prediction"] is None
    assert record["versions"]["torch"] == version("torch")
    assert set(record["versions"]) == {
        *("tl-dla", "transformer-lens", "transformers", "torch", "python")
    }


@pytest.mark.parametrize(
    ("given", "wrong", "weights"),
    [
        (["--incorrect", "w9", "--incorrect", "w4"], [9, 4], [-0.5, -0.5]),
        (["--incorrect", "mean"], list(range(97)), [-1 / 97] * 97),
        (["--incorrect", "w9", "--incorrect-id", "4"], [9, 4], [-0.5, -0.5]),
        (["--incorrect", "w9", "--pos", "2"], [9], [-1.0]),
        (["--incorrect", "w9", "--pos", "-3", "--dtype", "float64"], [9], [-1.0]),
    ],
)
def test_baselines_and_positions_are_those_of_the_library(run, own_logits, given, wrong, weights):
    record = json.loads(run("attribute", PROMPT, "--answer-id", "8", "--json", *given))
    pos = int(given[3]) if "--pos" in given else -1
    logits = own_logits[pos]
    expected = float(logits[8] + (logits[wrong] * torch.tensor(weights)).sum())
    assert record["logit"] == pytest.approx(expected, abs=1e-5)
    assert sum(record["attribution"]) == pytest.approx(expected, abs=1e-5)
    assert record["position"] == pos % 6


def test_without_an_answer_the_models_own_prediction_is_attributed(run, folder, own_logits, capsys):
    assert main(["attribute", PROMPT, "--json", "--pos", "1", "--model", folder]) == 0
    out, err = capsys.readouterr()
    record, best = json.loads(out), int(own_logits[1].argmax())
    assert record["answer"] == record["prediction"]
    assert (record["answer"]["id"], record["answer"]["rank"]) == (best, 0)
    probability = float(own_logits[1].softmax(-1)[best])
    assert record["prediction"]["probability"] == pytest.approx(probability, abs=1e-6)
    assert record["logit"] == pytest.approx(float(own_logits[1, best]), abs=1e-5)
    assert f"the model's own prediction, 'w{best}'" in err
    table = run("attribute", PROMPT, "--pos", "1")
    said = f"probability 'w{best}' {100 * probability:.3g}% #0 (the model's own prediction)"
    assert said in table


@pytest.mark.parametrize(
    ("given", "choice"),
    [
        (["--unit", "source", "--head", "L0H1", "--head", "L2H3"], {"heads": ["L0H1", "L2H3"]}),
        (["--unit", "neuron", "--layer", "1"], {"layers": [1]}),
    ],
)
def test_a_choice_of_layers_and_heads_is_the_librarys(run, folder, given, choice):
    record = json.loads(run("attribute", PROMPT, "--answer", "w8", "--json", *given))
    model = load_model(folder)
    result = direct_logit_attribution(model, PROMPT, "w8", unit=given[1], **choice)
    whole = direct_logit_attribution(model, PROMPT, "w8", unit=given[1])
    assert len(result) < len(whole)
    assert record["labels"] == result.labels
    assert record["attribution"] == result.attribution[:, 0].tolist()


def test_source_rows_show_the_token_that_was_read(run):
    given = ["--answer", "w8", "--unit", "source", "--head", "L0H1", "--top", "40"]
    text = run("attribute", PROMPT, *given)
    words = ["w1", *PROMPT.split()]
    assert all(f" L0H1←{i} {word!r} " in text for i, word in enumerate(words))


def test_csv_is_the_librarys_table(run, folder):
    table = pd.read_csv(io.StringIO(run("attribute", PROMPT, "--answer", "w8", "--csv")))
    expected = direct_logit_attribution(load_model(folder), PROMPT, "w8").to_dataframe()
    assert list(table.columns) == list(expected.columns)
    assert table["label"].tolist() == expected["label"].tolist()
    assert torch.equal(
        torch.tensor(table["attribution"].to_numpy(), dtype=torch.float32),
        torch.tensor(expected["attribution"].to_numpy()),
    )


def test_the_table_shows_the_rows_that_matter_and_adds_up(run, folder):
    given = ["attribute", PROMPT, "--answer", "w8", "--incorrect", "w9", "--unit", "head"]
    text = run(*given, "--top", "4")
    lines = [line.split("  ") for line in text.splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    numbers = {line[0]: float(line[1]) for line in cells if len(line) > 1 and line[1][0] in "+-"}
    result = direct_logit_attribution(load_model(folder), PROMPT, "w8", "w9", unit="head")
    *rows, others, total, own = numbers

    assert rows == [label for label, _ in result.top(4, by="magnitude")]
    assert all(numbers[row] == pytest.approx(float(result[row]), abs=5e-5) for row in rows)
    assert others == f"{len(result) - 4} others"
    everything = sum(numbers[row] for row in [*rows, others])
    assert everything == pytest.approx(numbers[total], abs=5e-4)
    assert numbers[own] == pytest.approx(float(result.logit), abs=5e-5)
    assert (total, own) == ("all rows", "model's own logit")
    assert text.startswith(
        "logit difference 'w8' − 'w9'\n"
        f"at position 5, 'w8', of {PROMPT!r}, unit=\"head\"\nprobability 'w8' "
    )
    assert "✓ rows add up to the model's own logit" in text


def test_bars_are_as_long_as_their_values(run, folder):
    text = run("attribute", PROMPT, "--answer", "w8", "--unit", "head", "--top", "6")
    result = direct_logit_attribution(load_model(folder), PROMPT, "w8", unit="head")
    rows = result.top(6, by="magnitude")
    span = max(0.0, *(value for _, value in rows)) - min(0.0, *(value for _, value in rows))
    for label, value in rows:
        [line] = [line for line in text.splitlines() if line.split()[:1] == [label]]
        assert line.count("█") == pytest.approx(32 * abs(value) / span, abs=2)


def test_the_points_of_the_stream_keep_their_order(run):
    text = run("attribute", PROMPT, "--answer", "w8", "--unit", "layer")
    labels = [line.split()[0] for line in text.splitlines() if " +" in line or " -" in line]
    assert labels[:8] == "0_pre 0_mid 1_pre 1_mid 2_pre 2_mid final_post ln_final.b".split()
    assert "others" not in text


def test_the_prompt_can_come_from_stdin(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{PROMPT}\n"))
    piped = json.loads(run("attribute", "-", "--answer", "w8", "--json"))
    given = json.loads(run("attribute", PROMPT, "--answer", "w8", "--json"))
    assert piped["prompt"] == PROMPT
    assert piped["attribution"] == given["attribution"]


def test_out_takes_its_form_from_the_name(run, tmp_path):
    given = ["attribute", PROMPT, "--answer", "w8"]
    for name, form in (("a.json", "--json"), ("a.csv", "--csv"), ("a.txt", None)):
        assert run(*given, "--out", str(tmp_path / name)) == ""
        written = (tmp_path / name).read_text(encoding="utf-8")
        if form == "--json":
            assert (
                json.loads(written)["attribution"] == json.loads(run(*given, form))["attribution"]
            )
        elif form == "--csv":
            assert written == run(*given, form)
        else:
            assert "✓ rows add up" in written
    run(*given, "--csv", "--out", str(tmp_path / "b.json"))
    assert (tmp_path / "b.json").read_text().startswith("label,kind")


# ---- lens, check -------------------------------------------------------------------------------


def test_the_lens_gives_the_librarys_numbers_and_ends_at_the_models_own(run, folder, own_logits):
    given = ["lens", PROMPT, "--answer", "w8", "--incorrect", "w9", "--top", "2"]
    readings = json.loads(run(*given, "--json"))["readings"]
    lens = logit_lens(load_model(folder), PROMPT, "w8", "w9", pos=-1, top_k=2)
    assert [r["label"] for r in readings] == [label for label in lens.labels for _ in range(4)]
    assert [r["logit"] for r in readings if r["read"] == "asked"] == lens.values.flatten().tolist()
    probabilities, best = own_logits[-1].softmax(-1), own_logits[-1].argsort(descending=True)
    top, _, answer, wrong = readings[-4:]
    assert (top["label"], top["read_id"]) == ("final_post", int(best[0]))
    assert top["probability"] == pytest.approx(float(probabilities[best[0]]), abs=1e-5)
    assert (answer["rank"], wrong["rank"]) == (
        (best == 8).int().argmax(),
        (best == 9).int().argmax(),
    )

    text = run(*given)
    last = text.splitlines()[-1].split()
    own = [f"{float(probabilities[i]):.1%}" for i in (8, 9, best[0])]
    assert last[0] == "final_post"
    assert [last[2], last[4], last[7]] == own
    assert last[3] == f"#{answer['rank']}"
    crowded = run("lens", PROMPT, "--top", "20").splitlines()
    assert [line.split()[0] for line in crowded[5:]] == lens.labels
    assert len(pd.read_csv(io.StringIO(run(*given, "--csv")))) == len(readings)


def test_check_shows_every_identity(run):
    record = json.loads(run("check", PROMPT, "--json"))
    assert record["passed"] is True
    assert len(record["identities"]) == 8
    assert all(i["relative_error"] <= i["tolerance"] for i in record["identities"])
    verdict = "✓ GPT2LMHeadModel: all 8 identities hold\n"
    assert run("check", PROMPT) == verdict
    every = run("check", PROMPT, "-v")
    assert every.endswith(verdict)
    assert all(f"✓  {one['identity']}\n" in every for one in record["identities"])


def test_a_model_that_fails_its_check_gives_exit_code_1(run, monkeypatch):
    identities = [Identity(0, "good", 0.0, 0.0, 1e-6), Identity(1, "bad", 0.5, 0.1, 1e-6)]
    failing = ModelCheck("Odd", identities, "its heads")
    assert check_output(failing, argparse.Namespace(model="", prompt="", verbose=False)).code == 1
    monkeypatch.setattr("tl_dla.analyses.check_model.check_model", lambda *_: failing)
    text = run("check", PROMPT, code=1)
    assert "not checked: its heads" in text
    assert "✗ Odd: first failure: bad" in text
    assert "✗  bad\n" in text
    assert "good" not in text
    assert "✓  good\n" in run("check", PROMPT, "-v", code=1)


def test_the_report_is_a_page_with_the_command_that_made_it(run, tmp_path, capsys, folder):
    page = tmp_path / "page.html"
    argv = ["report", PROMPT, "--answer", "w8", "--out", str(page), "--model", folder]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "rows add up to the model's own logit" in err
    assert f"wrote {page}" in err
    text = page.read_text()
    assert text.startswith("<!doctype html>")
    assert f"tl-dla report &#39;{PROMPT}&#39; --answer w8" in text
    assert "not what removing the part would do" in text
    assert 'id="audit"' not in text
    assert main([*argv, "--audit"]) == 0
    capsys.readouterr()
    text = page.read_text()
    audited = text[text.index('id="audit"') :]
    found = direct_logit_attribution(load_model(folder), PROMPT, "w8").audit(progress=False)
    cells = [number(x) for x in found.to_dataframe()["total"]]
    assert len(cells) > 5 and all(f'<td class="n">{cell}</td>' in audited for cell in cells)


# ---- dataset, summarize ------------------------------------------------------------------------


def test_a_dataset_has_the_means_of_its_prompts(run, folder, tmp_path, capsys):
    prompts = ["w5 w60 w7", "w50 w6 w70 w8", "w3 w4"]
    lines = [{"prompt": p, "answer": "w8", "incorrect": "w9", "group": p[:3]} for p in prompts]
    lines.append({"prompt": "w5 w6", "answer": "w8 w9", "incorrect": "w9"})
    source, out = tmp_path / "prompts.jsonl", str(tmp_path / "run")
    source.write_text("\n".join(map(json.dumps, lines)))
    given = ["dataset", str(source), "--unit", "head", "--batch-size", "2", "--out", out]

    record = json.loads(run(*given, "--json"))
    model = load_model(folder)
    single = [direct_logit_attribution(model, p, "w8", "w9", unit="head") for p in prompts]
    mean = torch.stack([one.attribution[:, 0] for one in single]).mean(0)
    logits = torch.cat([one.logit for one in single])
    statistics = [line for line in record["statistics"] if line["group"] == "all"]
    assert [line["label"] for line in statistics] == [*single[0].labels, "logit difference"]
    assert [s["mean"] for s in statistics[:-1]] == pytest.approx(mean.tolist(), abs=1e-5)
    assert statistics[-1]["mean"] == pytest.approx(float(logits.mean()), abs=1e-5)
    assert statistics[-1]["std"] == pytest.approx(float(logits.std()), abs=1e-5)
    assert (record["n"], len(record["skipped"])) == (3, 1)
    of_one = [line for line in record["statistics"] if line["group"] == "w3 "]
    assert of_one[0]["std"] is None  # JSON has no NaN

    text = run(*given, "--top", "3")
    main(["summarize", out, "--top", "3"])
    assert capsys.readouterr().out == text
    assert "3 prompts" in text
    table = text[text.index("model's own logit difference") :].splitlines()
    means = {"all": logits.mean(), "w3": logits[2], "w5": logits[0], "w50": logits[1]}
    expected = [[group, f"{float(value):+.4f}"] for group, value in means.items()]
    assert [line.split()[:2] for line in table[1:5]] == expected
    assert "1 examples left out; example 3: The answer 'w8 w9' is 2 tokens" in text
    main(["summarize", out, "--json"])
    again = json.loads(capsys.readouterr().out)
    assert again["statistics"] == record["statistics"]


# ---- as a process ------------------------------------------------------------------------------


def test_the_module_is_the_command_and_stdout_can_be_piped(folder):
    argv = ["attribute", "-", "--answer", "w8", "--model", folder, "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "tl_dla", *argv],
        input=PROMPT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["reconstruction"]["passed"] is True
    assert done.stderr == ""


def test_a_reader_that_leaves_early_is_no_error(folder):
    argv = ["attribute", PROMPT, "--answer", "w8", "--model", folder, "--csv"]
    with subprocess.Popen(
        [sys.executable, "-m", "tl_dla", *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0
