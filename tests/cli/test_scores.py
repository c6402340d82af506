"""`tl-dla scores`: the library's numbers in every form, and one line where it cannot."""

import io
import json

import pandas as pd
import pytest
import torch

from tests.cli.test_refusals import assert_one_line
from tests.zoo.build import build
from tl_dla import attribute_attention
from tl_dla.loading import load_model

PROMPT = "w5 w60 w7 w42 w8"
IDS = torch.tensor([[1, 5, 60, 7, 42, 8]])  # w1 is the tokenizer's BOS, which models prepend
ASKED = ["scores", PROMPT, "--head", "L1H2", "--key", "w7", "--versus", "1"]


@pytest.fixture(scope="module")
def result(folder):
    return attribute_attention(load_model(folder), PROMPT, "L1H2", key=3, versus=1)


def test_json_carries_the_librarys_numbers_and_the_models_own_pattern(run, folder, result):
    record = json.loads(run(*ASKED, "--json"))
    with torch.no_grad():
        pattern = build("gpt2")[0](IDS, output_attentions=True).attentions[1][0, 2, -1]
    own = float((pattern[3] / pattern[1]).log())
    assert record["score"] == pytest.approx(own, abs=1e-5)
    for name, side in (("by_query", result.by_query), ("by_key", result.by_key)):
        assert record[name]["labels"] == side.labels and record[name]["kinds"] == side.kinds
        assert record[name]["attribution"] == side.attribution[:, 0].tolist()
        assert sum(record[name]["attribution"]) == pytest.approx(own, abs=1e-5)
    assert record["pairs"] == result.pairs[..., 0].tolist()
    assert (record["head"], record["key"]) == ("L1H2", {"position": 3, "token": "w7"})
    assert record["query"] == {"position": 5, "token": "w8"}
    assert record["versus"] == {"position": 1, "token": "w5"}
    certificate = record["reconstruction"]
    assert certificate["passed"] and set(certificate["parts"]) == {
        *("the query rows", "the key rows")
    }


def test_csv_is_the_librarys_table(run, result):
    table = pd.read_csv(io.StringIO(run(*ASKED, "--csv")))
    expected = result.to_dataframe()
    assert list(table.columns) == list(expected.columns)
    assert table["label"].tolist() == expected["label"].tolist()
    assert table["attribution"].to_numpy() == pytest.approx(expected["attribution"].to_numpy())


def test_the_table_shows_both_sides_and_adds_up(run, result):
    text = run(*ASKED, "--top", "3")
    assert text.startswith("score L1H2: 'w7' rather than 'w5'\nfrom position 5, 'w8', of")
    assert result.sentence() in text and "✓ pairs, query rows and key rows add up to" in text
    query, keys = text.split("who wrote the ")[1:]
    for side, part in (result.by_query, query), (result.by_key, keys):
        lines = [line.split("  ") for line in part.splitlines()]
        cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
        numbers = {line[0]: float(line[1]) for line in cells if len(line) > 1 and "." in line[1]}
        *rows, others, total, own = numbers
        assert rows == [label for label, _ in side.top(3, by="magnitude")]
        assert (total, own) == ("all rows", "model's own score")
        everything = sum(numbers[row] for row in [*rows, others])
        assert everything == pytest.approx(numbers[own], abs=5e-4)
    assert "nats" in text and "logit" not in text


def test_components_and_the_score_alone(run):
    alone = ["scores", PROMPT, "--head", "L1H2", "--key", "3", "--query", "-2", "--json"]
    record = json.loads(run(*alone, "--unit", "component"))
    assert record["by_query"]["unit"] == "component" and "versus" not in record
    assert record["query"] == {"position": 4, "token": "w42"}


@pytest.mark.parametrize(
    ("argv", "fragment"),
    [
        (["scores", PROMPT, "--head", "L1H2"], "required: --key"),
        (["scores", PROMPT, "--key", "2"], "required: --head"),
        ([*ASKED, "--unit", "layer"], 'unit must be "component" or "head" here'),
        ([*ASKED, "--query", "0"], "which position 0 (the query) cannot see"),
        ([*ASKED[:-1], "w9"], "'w9' is 0 times a token of prompt 0"),
        ([*ASKED[:-1], "w7"], "key and versus are both position 3"),
    ],
)
def test_what_cannot_be_done_is_one_line(folder, capsys, argv, fragment):
    assert_one_line([*argv, "--model", folder], fragment, capsys)
