"""Examples come from many places; what is not what was meant is refused by name."""

from __future__ import annotations

import csv
import json

import numpy as np
import pandas as pd
import pytest
import torch

from tests.support.runs import BATCH, make, run
from tests.zoo.build import boot
from tl_dla.datasets.examples import WINDOW, batches, read_examples, windows
from tl_dla.errors import ArgumentError


@pytest.fixture(scope="module")
def model():
    return boot("gpt2")


# ---- fields ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("incorect", "incorrect"), ("Incorrect", "incorrect"), ("answers", "answer"),
     ("promt", "prompt"), ("groups", "group")],
)  # fmt: skip
def test_a_field_nearly_called_like_one_that_is_read_is_refused(model, wrong, meant):
    examples = make(12)
    examples[5][wrong] = examples[5].pop(meant)
    match = rf"Example 5 has the field '{wrong}', which is not read; did you mean '{meant}'"
    with pytest.raises(ArgumentError, match=match):
        run(model, examples)


def test_other_fields_are_left_alone(model):
    more = [{**e, "template": "x", "id": 3, "source": "mine", "corrupted": 1} for e in make(8)]
    assert torch.equal(run(model, more).mean, run(model, make(8)).mean)


@pytest.mark.parametrize("absent", [None, [], (), float("nan"), torch.zeros(0)])
def test_logits_and_logit_differences_are_not_averaged(model, absent, tmp_path):
    examples = make(40)
    examples[37]["incorrect"] = absent
    message = "Example 0 has incorrect answers and example 37 has none: .* cannot be averaged"
    with pytest.raises(ArgumentError, match=message):
        run(model, examples, tmp_path / "run")
    for example in examples[:37]:
        example["incorrect"] = absent
    with pytest.raises(ArgumentError, match="Example 38 has incorrect answers and example 0 has"):
        run(model, examples)


def test_every_process_refuses_the_same_example(model):
    examples = make(100)
    del examples[70]["incorrect"]
    for process in range(3):
        with pytest.raises(ArgumentError, match="Example 0 has .* example 70 has none"):
            list(windows(model, examples, BATCH, process=process, processes=3))


# ---- batches -----------------------------------------------------------------------------------


@pytest.mark.parametrize("equal", [False, True])
def test_batches_hold_every_example_once_and_what_can_run_together(model, equal):
    (window,) = windows(model, make(60), 8)
    cut = list(batches(window, 8, equal_lengths=equal))
    assert sorted(e.index for batch in cut for e in batch.examples) == list(range(60))
    for batch in cut:
        assert len(batch.examples) <= 8 and len({len(e.incorrect) for e in batch.examples}) == 1
    lengths = [len({len(e.tokens) for e in batch.examples}) for batch in cut]
    assert max(lengths) == 1 if equal else max(lengths) > 1


# ---- from elsewhere ----------------------------------------------------------------------------


def test_examples_come_from_anything_that_gives_mappings(model, tmp_path):
    import datasets

    examples = make(20)
    lines = tmp_path / "examples.jsonl"
    lines.write_text("".join(json.dumps(e) + "\n" for e in examples) + "\n")
    dataset = datasets.Dataset.from_list(examples)
    dataset.save_to_disk(str(tmp_path / "disk"))
    dataset.to_parquet(str(tmp_path / "examples.parquet"))
    expected = run(model, examples)
    sources = [iter(examples), dataset, dataset.to_iterable_dataset(), read_examples(lines)]
    sources += [read_examples(tmp_path / "disk"), read_examples(tmp_path / "examples.parquet")]
    sources += [pd.DataFrame(examples), pd.read_parquet(tmp_path / "examples.parquet")]
    for source in sources:
        got = run(model, source)
        assert got.n == 20 and torch.equal(got.rows.mean, expected.rows.mean)
    assert len(read_examples(lines)) == 20


def test_the_empty_cells_of_a_frame_are_absent_fields(model):
    examples = make(20, several=False)
    frame = pd.DataFrame(examples)
    frame.loc[3, "group"] = np.nan
    frame.loc[4, "answer"] = np.nan
    frame = frame.set_index(frame.index * 7)
    examples[3]["group"] = None
    expected = run(model, [e for i, e in enumerate(examples) if i != 4])
    frame["answer"] = frame["answer"].astype("Int64")
    got = run(model, frame)
    assert got.n == 19 and got.groups["a"].n == expected.groups["a"].n
    torch.testing.assert_close(got.mean, expected.mean, atol=1e-6, rtol=0)
    ((index, reason),) = got.skipped
    assert index == 4 and "needs the field 'answer'" in reason


def test_a_csv_is_text_and_several_incorrect_answers_are_a_list(tmp_path):
    path = tmp_path / "examples.csv"
    rows = [
        {"prompt": "1 + 6 =", "answer": "7", "incorrect": '["8", " 9"]', "group": ""},
        {"prompt": 'a, "quoted"\nline', "answer": " NA", "incorrect": "", "group": "g"},
    ]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    assert list(read_examples(path)) == [
        {"prompt": "1 + 6 =", "answer": "7", "incorrect": ["8", " 9"]},
        {"prompt": 'a, "quoted"\nline', "answer": " NA", "group": "g"},
    ]
    assert len(read_examples(path)) == 2


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_files_of_other_programs_are_read(tmp_path, encoding, kind):
    """Excel writes a byte order mark, PowerShell UTF-16."""
    path = tmp_path / f"examples.{kind}"
    text = "prompt,answer\nWörter → 4,é\nb,c\n"
    if kind == "jsonl":
        text = '{"prompt": "Wörter → 4", "answer": "é"}\n{"prompt": "b", "answer": "c"}\n'
    mark = "\ufeff" if encoding.endswith("e") else ""  # the others write it themselves
    path.write_bytes((mark + text).encode(encoding))
    examples = read_examples(path)
    assert list(examples) == [
        {"prompt": "Wörter → 4", "answer": "é"},
        {"prompt": "b", "answer": "c"},
    ]
    assert len(examples) == 2


def test_a_file_of_an_unknown_encoding_is_named(tmp_path):
    path = tmp_path / "examples.jsonl"
    path.write_bytes('{"prompt": "Wörter"}\n'.encode("latin-1"))
    with pytest.raises(ArgumentError, match=r"examples\.jsonl must be text in UTF-8.*save it as"):
        list(read_examples(path))
    with pytest.raises(ArgumentError, match=r"examples\.jsonl must be text in UTF-8"):
        len(read_examples(path))


def test_only_one_window_is_read_ahead(model, tmp_path):
    """What is read from a stream of examples is never further ahead than a window."""
    read, ahead = [0], []

    def stream():
        for example in make(5 * WINDOW * BATCH):
            read[0] += 1
            ahead.append(read[0] - BATCH * len(list((tmp_path / "run" / "rows").glob("*.parquet"))))
            yield example

    assert run(model, stream(), tmp_path / "run").n == 5 * WINDOW * BATCH
    assert max(ahead) <= WINDOW * BATCH
