"""What a reader of the table sees: bars, words, candidates, completions, audits."""

import io
import json
import os

import pytest
import torch
from rich.console import Console

from tests.zoo.build import build
from tl_dla import direct_logit_attribution
from tl_dla.analyses.completion import attribute_answer, attribute_completion
from tl_dla.cli import main
from tl_dla.cli.tables import Ledger, signed
from tl_dla.loading import load_model

PROMPT = "w5 w60 w7 w42 w8"


def drawn(values: list[float], width: int) -> list[str]:
    """Each row's line in a terminal of that width."""
    file = io.StringIO()
    names = [f"L0H{i}" for i in range(len(values))]
    ledger = Ledger(names, torch.tensor(values)[:, None], [0.0], [0.0], ["logits"], False)
    Console(file=file, width=width, force_terminal=True, color_system=None).print(ledger.table(99))
    lines = file.getvalue().splitlines()
    return [next(line for line in lines if line.split()[:1] == [name]) for name in names]


@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_bars_fill_the_terminal_and_are_as_long_as_their_values(width):
    values = [4.0, 1.0, -2.0, 0.5]
    lines = drawn(values, width)
    room = width - len("model's own logit  +4.0000  ")
    lengths = [line.count("█") for line in lines]
    assert all(len(line) <= width for line in lines)
    assert lengths[0] == pytest.approx(room * 4 / 6, abs=1)
    for value, length in zip(values, lengths, strict=True):
        assert length == pytest.approx(lengths[0] * abs(value) / 4, abs=1.5)
    zero = lines[0].index("█")
    assert all(lines[i].index("█") == zero for i in (1, 3))
    assert lines[2].rindex("█") == zero - 1


def test_a_tiny_value_has_a_tiny_bar():
    whole, tiny, negative, nothing = drawn([3.0, 0.02, -0.02, 0.0], 80)
    assert whole.count("█") > 40
    for line in (tiny, negative, nothing):
        assert "█" not in line
        assert len(line.split()) <= 3
    assert tiny.split()[2] in "▏▎▍"
    assert negative.split()[2] in "▐▕"
    assert nothing.rstrip().endswith("+0.0000")


def test_an_infinite_value_or_none_leaves_the_other_bars(capsys):
    lines = drawn([float("nan"), 2.0, float("inf")], 80)
    assert lines[0].split()[1] == "–"
    assert lines[1].count("█") > 40


def test_probabilities_and_ranks_are_the_models_own(run):
    with torch.no_grad():
        own = build("gpt2")[0](torch.tensor([[1, 5, 60, 7, 42, 8]])).logits[0, 2].softmax(-1)
    given = ["attribute", PROMPT, "--pos", "2", "--answer", "w8", "--incorrect", "w9"]
    record = json.loads(run(*given, "--json"))
    order = own.argsort(descending=True).tolist()
    for said, token in ((record["answer"], 8), (record["incorrect"][0], 9)):
        assert said["probability"] == pytest.approx(float(own[token]), rel=1e-4)
        assert said["rank"] == order.index(token)
    text = run(*given)
    assert f"\nprobability 'w8' {100 * float(own[8]):.3g}% #{order.index(8)}, 'w9' " in text
    assert run("attribute", PROMPT, "--answer", "w8").startswith("logit 'w8'\n")


def test_candidates_have_a_column_each(run, folder):
    given = ["attribute", PROMPT, "--candidates", "w8", "w9", "w4", "--unit", "head"]
    result = direct_logit_attribution(
        load_model(folder), PROMPT, candidate_tokens=["w8", "w9", "w4"], unit="head"
    )
    record = json.loads(run(*given, "--json"))
    assert record["attribution"] == result.attribution[:, 0].tolist()
    assert record["logit"] == result.logit[0].tolist()
    assert [one["token"] for one in record["candidates"]] == ["w8", "w9", "w4"]
    text = run(*given, "--top", "3")
    assert text.startswith("logit 'w8', 'w9', 'w4'\n")
    lines = [line.split() for line in text.splitlines()]
    size = result.attribution.abs().flatten(1).mean(1)
    for i in size.argsort(descending=True)[:3].tolist():
        assert [result.labels[i], *map(signed, result.attribution[i, 0].tolist())] in lines
    own = ["model's", "own", "logit", *map(signed, result.logit[0].tolist())]
    assert own in lines
    less = json.loads(run(*given, "--incorrect", "mean", "--json"))
    assert less["incorrect"] == "mean"
    assert less["logit"] != record["logit"]
    heading = run(*given, "--incorrect", "w5", "--incorrect", "w6").splitlines()[0]
    assert heading == "logit difference 'w8', 'w9', 'w4', each − mean('w5', 'w6')"


def test_a_completion_is_attributed_token_by_token_and_summed(run, folder):
    given = ["attribute", PROMPT, "--completion", "w8 w9 w4", "--incorrect", "w60 w7"]
    with pytest.warns(UserWarning, match="has 3 tokens and its baseline 2"):
        answer = attribute_answer(load_model(folder), PROMPT, "w8 w9 w4", "w60 w7")
    record = json.loads(run(*given, "--json"))
    assert record["attribution"] == answer.attribution[:, 0].tolist()
    assert record["logit"] == float(answer.logit)
    assert [step["tokens"] for step in record["steps"]] == [["w8", "w9", "w4"], ["w60", "w7"]]
    sums = [torch.tensor(step["attribution"]).sum(1) for step in record["steps"]]
    assert torch.allclose(sums[0] - sums[1], answer.attribution[:, 0].cpu(), atol=1e-5)
    # The probabilities are those of the model on the prompt with the answer, from transformers.
    with torch.no_grad():
        own = build("gpt2")[0](torch.tensor([[1, 5, 60, 7, 42, 8, 8, 9]])).logits[0].softmax(-1)
    expected = [float(own[i, token]) for i, token in ((5, 8), (6, 9), (7, 4))]
    assert [one["probability"] for one in record["answer"]] == pytest.approx(expected, rel=1e-4)
    text = run(*given)
    assert text.startswith("difference of summed logits ")
    assert f"all rows  {float(answer.attribution.sum()):+.3f}"[:-1] in text
    assert run(*given, "--csv").count("\n") == len(answer.to_dataframe()) + 1


def test_a_completion_may_be_shorter_than_its_baseline(run, folder):
    given = ["attribute", PROMPT, "--completion", "w8", "--incorrect", "w60 w7 w9"]
    with pytest.warns(UserWarning, match="has 1 tokens and its baseline 3"):
        answer = attribute_answer(load_model(folder), PROMPT, "w8", "w60 w7 w9")
    record = json.loads(run(*given, "--json"))
    assert record["logit"] == float(answer.logit)
    assert [one["token"] for one in record["answer"]] == ["w8"]
    assert [step["tokens"] for step in record["steps"]] == [["w8"], ["w60", "w7", "w9"]]
    assert "probability 'w8' " in run(*given)


@pytest.mark.parametrize("baseline", ["mean", "runner-up"])
def test_what_the_model_says_is_attributed_where_no_text_is_given(run, folder, tmp_path, baseline):
    given = ["attribute", PROMPT, "--max-new-tokens", "5", "--incorrect", baseline, "--completion"]
    answer = attribute_completion(load_model(folder), PROMPT, max_new_tokens=5, baseline=baseline)
    page = tmp_path / "page.html"
    record = json.loads(run(*given, "--json", "--out", str(page)))
    assert record["attribution"] == answer.attribution[:, 0].tolist()
    assert record["incorrect"] == baseline
    assert [one["token"] for one in record["answer"]] == record["steps"][0]["tokens"]
    assert [one["rank"] for one in record["answer"]] == [0] * 5  # it says what is likeliest
    # The probabilities are those of transformers' own module.
    ids = torch.tensor([[1, 5, 60, 7, 42, 8, *(one["id"] for one in record["answer"])]])
    with torch.no_grad():
        own = build("gpt2")[0](ids).logits[0, 5:-1].softmax(-1).gather(-1, ids[0, 6:, None])
    probabilities = [one["probability"] for one in record["answer"]]
    assert probabilities == pytest.approx(own[:, 0].tolist(), rel=1e-4)
    assert run(*given).splitlines()[0] == f"difference of summed logits {answer.target(0)}"
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>") and text == answer_page(answer, tmp_path)


def answer_page(answer, folder):
    return answer.report(folder / "again.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("extra", "fragment"),
    [
        (["--incorrect-id", "5"], "--completion is compared with one text"),
        (["--incorrect", "w5", "--incorrect", "w6"], "--completion is compared with one text"),
        (["--max-new-tokens", "3"], "--max-new-tokens is for --completion without TEXT"),
        (["--audit"], "--audit does not go with --completion"),
        (["--pos", "0"], "--pos does not go with --completion"),
    ],
)
def test_flags_without_meaning_beside_a_completion_are_refused(folder, capsys, extra, fragment):
    argv = ["attribute", PROMPT, "--completion", "w8 w9", "--model", folder, *extra]
    assert main(argv) == 2
    assert fragment in capsys.readouterr().err


def test_what_the_model_says_is_compared_with_no_other_text(folder, capsys):
    argv = ["attribute", PROMPT, "--incorrect", "w8", "--model", folder, "--completion"]
    assert main(argv) == 2
    assert "give --completion TEXT to compare it with another" in capsys.readouterr().err


def test_the_audit_is_the_librarys(run, folder):
    given = ["attribute", PROMPT, "--answer", "w8", "--top", "3", "--audit"]
    audit = direct_logit_attribution(load_model(folder), PROMPT, "w8").audit(3, progress=False)
    frame = audit.to_dataframe()
    text = run(*given)
    below = text.split("what removing the part would do: the audit measures that.")[1]
    lines = [line.split() for line in below.splitlines()]
    columns = ["direct", "direct_recomputed", "total", "indirect"]
    for name, *values in frame[["row", *columns]].itertuples(index=False):
        assert [name, *map(signed, values)] in lines
    assert all(f"\n- {sentence}\n" in below for sentence in audit.sentences)
    record = json.loads(run(*given, "--json"))
    assert [row["total"] for row in record["audit"]] == pytest.approx(frame["total"].tolist())
    assert record["flags"] == audit.sentences


def test_a_direct_effect_is_said_to_be_an_observation(run):
    text = run("attribute", PROMPT, "--answer", "w8")
    sentence = "A direct effect is an observation, not what removing the part would do:"
    assert f"{sentence} --audit measures that.{os.linesep}" in text
    assert text.count("rounding allows: ") == 1


def test_the_readings_of_the_stream_are_not_said_to_be_a_sum(run):
    text = run("attribute", PROMPT, "--answer", "w8", "--unit", "layer")
    assert "\nlast reading + biases  " in text
    assert "the last reading and the biases are the logit" in text
