"""What a run leaves in its folder: resumed to the same bytes, refused where it is not its own."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import tl_dla.datasets.dataset
from tests.support.runs import contents, counted, make, run, spoiled, table
from tests.zoo.build import boot
from tl_dla.datasets.dataset import summarize
from tl_dla.datasets.shards import read_shard
from tl_dla.errors import OutputFolderError


@pytest.fixture(scope="module")
def model():
    return boot("gpt2")


def test_the_same_call_computes_what_is_missing_and_gives_the_same_bytes(
    model, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    first = run(model, spoiled(), out)
    before = contents(out)
    passes = counted(monkeypatch)
    again = run(model, spoiled(), out)
    assert passes == [] and contents(out) == before
    assert torch.equal(again.rows.mean, first.rows.mean)

    shards = sorted((out / "rows").glob("*.parquet"))
    for path in (shards[1], shards[-1], out / "statistics.csv"):
        path.unlink()
    left = out / "rows" / f".{shards[1].name}.0.tmp"
    left.write_bytes(b"half a shard of a run that was killed an hour ago")
    os.utime(left, (time.time() - 3700,) * 2)
    run(model, spoiled(), out)
    assert len(passes) == 2 and contents(out) == before and not left.exists()


def test_a_run_that_stops_keeps_what_it_computed(model, tmp_path, monkeypatch):
    out, expected = tmp_path / "run", run(model, make(70), tmp_path / "whole")

    def stopping():
        yield from make(70)[:40]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, stopping(), out)
    kept = contents(out)
    assert len(table(out)) == 32 and not (out / "statistics.csv").exists()
    partial = summarize(out)
    assert partial.n == 32 and not partial.complete and "has not finished" in repr(partial)
    result = run(model, make(70), out)
    assert contents(out) == contents(tmp_path / "whole") and kept.items() <= contents(out).items()
    assert torch.equal(result.rows.std, expected.rows.std)


def test_summarize_needs_no_model_and_gives_the_same_result(model, tmp_path):
    result = run(model, spoiled(), tmp_path / "run")
    read = summarize(tmp_path / "run")
    assert_same(read, result)
    assert (read.skipped, read.unit, read.kinds) == (result.skipped, "head", result.kinds)
    assert read.complete and repr(read) == repr(result)
    wider = summarize(tmp_path / "run", confidence=0.999)
    assert bool((wider.rows.high > read.rows.high).all())


def test_processes_share_the_batches_and_nothing_is_lost_or_doubled(model, tmp_path, monkeypatch):
    """The shards of three processes are those of one, and so are their sums together."""
    expected = run(model, spoiled(100), tmp_path / "one")
    tallies = []
    monkeypatch.setattr(
        "accelerate.utils.gather_object", lambda own: tallies.extend(own) or tallies
    )
    for process in range(3):  # the last one sees the sums of all
        monkeypatch.setattr(
            tl_dla.datasets.dataset, "_join", lambda _, process=process: (process, 3)
        )
        result = run(model, spoiled(100), tmp_path / "three")
    assert contents(tmp_path / "three" / "rows") == contents(tmp_path / "one" / "rows")
    assert result.n == expected.n and torch.equal(result.rows.std, expected.rows.std)


def test_the_folder_of_another_run_is_refused_and_left_alone(model, tmp_path):
    out = tmp_path / "run"
    run(model, make(20), out)
    before = contents(out)
    other = boot("gpt2")
    with torch.no_grad():
        next(iter(other.original_model.transformer.h[1].mlp.parameters())).view(-1)[7] += 1e-3
    with pytest.raises(OutputFolderError, match="its unit is 'head', not 'component'"):
        run(model, make(20), out, unit="component")
    with pytest.raises(OutputFolderError, match="its pos is -1, not -2"):
        run(model, make(20), out, pos=-2)
    with pytest.raises(OutputFolderError, match="its model's digest is"):
        run(other, make(20), out)
    with pytest.raises(OutputFolderError, match="rows of another example"):
        run(model, make(20, seed=1), out)
    with pytest.raises(OutputFolderError, match="rows of another example"):
        run(model, [{**example, "group": "c"} for example in make(20)], out)
    with pytest.raises(FileExistsError):
        run(model, make(20)[::-1], out)
    assert contents(out) == before


# ---- other lengths, other batch sizes ----------------------------------------------------------


def test_a_dataset_may_grow(model, tmp_path, monkeypatch):
    """From 60 examples, which end inside a window, to 100."""
    out, expected = tmp_path / "run", run(model, make(100))
    first = run(model, make(60), out)
    before, passes = contents(out / "rows"), counted(monkeypatch)
    result = run(model, make(100), out)
    assert sum(passes) == 40 and before.items() <= contents(out / "rows").items()
    assert first.n == 60 and result.n == 100 and table(out)["index"].tolist() == list(range(100))
    torch.testing.assert_close(result.mean, expected.mean, atol=1e-6, rtol=0)
    assert_same(summarize(out), result)


@pytest.mark.parametrize("sizes", [(4, 5), (5, 3), (3, 16)])
def test_a_run_is_continued_with_another_batch_size(model, tmp_path, monkeypatch, sizes):
    out, expected = tmp_path / "run", run(model, spoiled())

    def stopping():
        yield from spoiled()[:30]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, stopping(), out, batch_size=sizes[0])
    had = len(table(out)) if any((out / "rows").iterdir()) else 0
    passes = counted(monkeypatch)
    result = run(model, spoiled(), out, batch_size=sizes[1])
    assert max(passes) <= sizes[1] and sum(passes) >= expected.n - had
    assert table(out)["index"].tolist() == list(range(40))
    assert result.skipped == expected.skipped and result.n == expected.n
    torch.testing.assert_close(result.mean, expected.mean, atol=1e-6, rtol=0)
    assert_same(summarize(out), result)
    passes.clear()
    assert torch.equal(run(model, spoiled(), out, batch_size=7).mean, result.mean) and not passes


def test_a_shorter_run_is_summarised_without_what_is_stored_beyond_it(model, tmp_path, monkeypatch):
    out = tmp_path / "run"
    run(model, make(64), out)
    passes = counted(monkeypatch)
    result = run(model, make(32), out)
    written = pd.read_csv(out / "statistics.csv")
    assert passes == [] and result.n == 32 and written["n"].max() == 32
    assert_same(summarize(out), result)
    assert len(table(out)) == 64  # kept, for the next longer run
    assert_same(summarize(out), run(model, make(32)), exact=False)
    passes.clear()
    assert run(model, make(64), out).n == summarize(out).n == 64 and passes == []


def test_a_folder_is_complete_only_with_all_its_shards(model, tmp_path):
    out = tmp_path / "run"
    run(model, make(64), out)
    assert summarize(out).complete

    def dying():
        yield from make(100)[:96]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, dying(), out)
    assert not (out / "statistics.csv").exists()  # nothing is said of 64 beside rows of 96
    assert summarize(out).n == 96 and not summarize(out).complete
    run(model, make(100), out)
    assert summarize(out).complete and summarize(out).n == 100
    sorted((out / "rows").glob("*.parquet"))[3].unlink()
    partial = summarize(out)
    assert not partial.complete and "has not finished" in repr(partial)
    assert run(model, make(100), out).n == 100 and summarize(out).complete


def test_two_runs_that_store_the_same_examples_count_them_once(model, tmp_path):
    out = tmp_path / "run"
    result = run(model, make(40), out)
    run(model, make(40), tmp_path / "other", batch_size=3)
    for path in (tmp_path / "other" / "rows").iterdir():
        shutil.copy(path, out / "rows")
    assert summarize(out).n == 40 and summarize(out).complete
    torch.testing.assert_close(summarize(out).mean, result.mean, atol=1e-6, rtol=0)
    assert run(model, make(40), out).n == 40


def assert_same(got, expected, exact=True):
    tolerances = {"check_exact": True} if exact else {"atol": 1e-6, "rtol": 1e-4}
    pd.testing.assert_frame_equal(got.to_dataframe(), expected.to_dataframe(), **tolerances)


# ---- what goes wrong ---------------------------------------------------------------------------


def test_the_files_that_another_run_is_writing_are_left_to_it(model, tmp_path):
    out = tmp_path / "run"
    run(model, make(20), out)
    others = [out / ".statistics.csv.0.tmp", out / "rows" / ".000000000-000000003-0.parquet.0.tmp"]
    for path in others:
        path.write_bytes(b"half")
    run(model, make(20), out)
    assert all(path.exists() for path in others)
    assert summarize(out).complete


def test_a_damaged_record_of_completion_is_named(model, tmp_path):
    out = tmp_path / "run"
    run(model, make(8), out)
    for text in ("", "[]", "{}", '{"examples": "many"}'):
        (out / "complete.json").write_text(text)
        with pytest.raises(OutputFolderError, match=r"complete\.json' is damaged: delete it"):
            summarize(out)
    assert run(model, make(8), out).n == summarize(out).n == 8
    (out / "rows" / "mine.parquet").write_bytes(b"")
    with pytest.raises(OutputFolderError, match=r"mine\.parquet' is no shard"):
        summarize(out)


@pytest.mark.parametrize("at", ["shard", "statistics"])
def test_a_full_disk_leaves_nothing_half(model, tmp_path, monkeypatch, at):
    out, left, replace = tmp_path / "run", [3], os.replace

    def full(temporary, path):
        left[0] -= path.suffix == ".parquet"
        if path.suffix == ".csv" if at == "statistics" else left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(temporary, path)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        with pytest.raises(OSError, match="No space left"):
            run(model, make(40), out)
    assert not list(out.rglob("*.tmp")) and not (out / "statistics.csv").exists()
    stored = len(list((out / "rows").iterdir()))
    assert stored == 3 if at == "shard" else stored >= 10
    assert not summarize(out).complete
    assert torch.equal(run(model, make(40), out).mean, run(model, make(40)).mean)
    assert summarize(out).complete


@pytest.mark.parametrize("damage", ["cut", "row", "empty", "other"])
def test_a_damaged_shard_is_refused_by_name(model, tmp_path, damage):
    out = tmp_path / "run"
    run(model, make(20), out)
    path = sorted((out / "rows").glob("*.parquet"))[2]
    data = path.read_bytes()
    if damage == "row":  # a valid file in which one value was edited
        edited = pq.read_table(path)
        rows = edited.column("rows").to_pylist()
        rows[1][2] += 1e-3
        place, field = edited.schema.get_field_index("rows"), edited.schema.field("rows")
        pq.write_table(edited.set_column(place, field, pa.array(rows, field.type)), path)
    else:
        path.write_bytes({"cut": data[:-20], "empty": b"", "other": b"PAR1 not so PAR1"}[damage])
    before = contents(out)
    for call in (lambda: run(model, make(20), out), lambda: summarize(out)):
        with pytest.raises(OutputFolderError, match=path.name):
            call()
    assert contents(out) == before
    path.unlink()
    assert run(model, make(20), out).n == 20


def test_a_flipped_bit_is_noticed_or_does_no_harm(model, tmp_path):
    """A Parquet file holds some of its metadata twice, and reads only one of the copies."""
    run(model, make(20), tmp_path / "run")
    path = sorted((tmp_path / "run" / "rows").glob("*.parquet"))[2]
    expected, _ = read_shard(path)
    data, noticed = path.read_bytes(), 0
    places = range(11, len(data), 61)
    for place in places:
        flipped = bytearray(data)
        flipped[place] ^= 4
        (tmp_path / "flipped.parquet").write_bytes(flipped)
        try:
            got, _ = read_shard(tmp_path / "flipped.parquet")
        except OutputFolderError:
            noticed += 1
            continue
        assert got.names == expected.names
        for a, b in zip(got.lines, expected.lines, strict=True):
            assert {**vars(a), "values": a.values.tolist()} == {
                **vars(b),
                "values": b.values.tolist(),
            }
    assert noticed > len(places) // 3


def test_a_folder_of_something_else_is_refused_and_left_alone(model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputFolderError, match=r"holds notes\.txt and no manifest"):
        run(model, make(20), tmp_path)
    with pytest.raises(OutputFolderError, match="is a file"):
        run(model, make(20), tmp_path / "notes.txt")
    with pytest.raises(OutputFolderError, match="no output folder"):
        summarize(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text("{")
    with pytest.raises(OutputFolderError, match="is damaged"):
        run(model, make(20), tmp_path / "run")
    (tmp_path / "run" / "manifest.json").write_text('{"format": 99}')
    with pytest.raises(OutputFolderError, match="not of format"):
        summarize(tmp_path / "run")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["manifest.json", "notes.txt", "run"]


def test_the_schema_says_what_the_rows_are(model, tmp_path):
    result = run(model, make(20), tmp_path / "run")
    path = sorted((tmp_path / "run" / "rows").glob("*.parquet"))[0]
    schema = pq.read_schema(path)
    about = json.loads(schema.metadata[b"tl_dla"])
    assert about["labels"] == result.labels and about["kinds"] == result.kinds
    assert (
        about["unit"] == "head" and "torch" in about["versions"] and about["model"] == result.model
    )
    assert str(schema.field("rows").type) in ("list<element: float>", "list<item: float>")
