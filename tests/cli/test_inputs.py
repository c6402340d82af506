"""`tl-dla inputs`: the library's numbers in every form, the coloured prompt, and the page."""

import io
import json

import pandas as pd
import pytest
import torch

from tests.cli.test_refusals import assert_one_line
from tests.zoo.build import build
from tl_dla import attribute_inputs
from tl_dla.cli.inputs import by_place, coloured
from tl_dla.figures.theme import POSITIVE
from tl_dla.loading import load_model

PROMPT = "w5 w60 w7 w42 w8"
IDS = torch.tensor([[1, 5, 60, 7, 42, 8]])  # w1 is the tokenizer's BOS, which models prepend
ASKED = ["inputs", PROMPT, "--answer", "w8", "--incorrect", "w9"]


@pytest.fixture(scope="module")
def result(folder):
    return attribute_inputs(load_model(folder), PROMPT, "w8", "w9")


def test_json_carries_the_librarys_numbers_and_the_models_own_logit(run, result):
    record = json.loads(run(*ASKED, "--json"))
    with torch.no_grad():
        logits = build("gpt2")[0](IDS).logits[0, -1]
    own = float(logits[8] - logits[9])
    assert record["labels"] == result.labels and record["kinds"] == result.kinds
    assert record["attribution"] == result.attribution[:, 0].tolist()
    assert sum(record["attribution"]) == pytest.approx(own, abs=1e-5)
    assert record["logit"] == pytest.approx(own, abs=1e-5)
    assert record["flow"] == result.flow[:, 0].tolist()
    assert record["points"] == ["0_pre", "1_pre", "2_pre", "final_post"]
    assert [token.strip() for token in record["tokens"]] == [f"w{i}" for i in IDS[0].tolist()]
    assert (record["position"], record["token"], record["mlp"]) == (5, "w8", "half")
    assert (record["answer"]["id"], record["incorrect"][0]["id"]) == (8, 9)
    certificate = record["reconstruction"]
    assert certificate["passed"] and set(certificate["parts"]) == set(record["points"])


def test_csv_is_the_librarys_table(run, result):
    table = pd.read_csv(io.StringIO(run(*ASKED, "--csv")))
    expected = result.to_dataframe()
    assert list(table.columns) == list(expected.columns)
    assert table["label"].tolist() == expected["label"].tolist()
    assert table["attribution"].to_numpy() == pytest.approx(expected["attribution"].to_numpy())


def test_the_table_shows_the_prompt_the_rows_and_that_they_add_up(run, result):
    text = run(*ASKED, "--top", "3", "--mlp", "gate")
    assert text.startswith("logit difference 'w8' − 'w9'\nat position 5, 'w8', through everything")
    largest, value = result.top(1, by="magnitude")[0]
    [line] = [line for line in text.splitlines() if line.strip().startswith(f"{largest} ")]
    assert f"{value:+.4f}" in line
    assert f"{len(result) - 3} others" in text and "✓ rows add up to" in text
    assert "frozen" in text


def test_tokens_are_coloured_by_all_that_their_place_starts_with(result):
    totals = by_place(result)
    for i, total in enumerate(totals):
        own = result[f"embed←{i}"] + result[f"pos_embed←{i}"]
        assert total == pytest.approx(float(own[0]), abs=1e-6)
    text = coloured(["a", "b", "c", "d"], [2.0, -1.0, 0.0, 2.0])
    assert text.plain == "abcd"
    colours = [span.style.bgcolor.name if span.style else None for span in text.spans]
    assert colours[0] == colours[-1] == POSITIVE
    red = [int(colours[1][i : i + 2], 16) for i in (1, 3, 5)]
    blue = [int(colours[0][i : i + 2], 16) for i in (1, 3, 5)]
    assert red[0] > red[2] and blue[2] > blue[0] and len(text.spans) == 3
    assert coloured(["a"], [0.0]).plain == "a"


def test_the_page_is_written_where_out_names_one(run, tmp_path):
    path = tmp_path / "page.html"
    assert run(*ASKED, "--out", str(path)) == ""
    page = path.read_text(encoding="utf-8")
    assert "Where the answer is held" in page and "Tokens and biases" in page
    assert "tl-dla inputs" in page


def test_without_an_answer_it_is_the_models_own_prediction(run):
    record = json.loads(run("inputs", PROMPT, "--json"))
    with torch.no_grad():
        own = int(build("gpt2")[0](IDS).logits[0, -1].argmax())
    assert record["answer"]["id"] == own and record["answer"]["rank"] == 0


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--mlp", "tangent"], "invalid choice"),
        (["--answer", "w8", "--out", "no/such/page.html"], "there is no folder"),
        (["--answer", "w8", "--out", "rows.xls"], "is of no form"),
        (["--answer", "w1000"], "w1000"),
    ],
)
def test_what_cannot_be_done_is_one_line(folder, capsys, given, words):
    assert_one_line(["inputs", PROMPT, *given, "--model", folder], words, capsys)
