"""What a run leaves in its folder: resumed to the same bytes, refused where it is not its own."""

from __future__ import annotations

import json
import shutil

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import tl_dla.datasets.dataset
from tests.support.runs import contents, counted, make, run, spoiled, table
from tests.zoo.build import boot, build
from tl_dla.datasets.dataset import summarize
from tl_dla.datasets.shards import model_digest, read_shard
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
    (out / "rows" / f".{shards[1].name}.0.tmp").write_bytes(b"half a shard")
    run(model, spoiled(), out)
    assert len(passes) == 2 and contents(out) == before


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
    pd.testing.assert_frame_equal(read.to_dataframe(), result.to_dataframe(), check_exact=True)
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
    with pytest.raises(OutputFolderError, match="its batch_size is 4, not 5"):
        run(model, make(20), out, batch_size=5)
    with pytest.raises(OutputFolderError, match="its model is"):
        run(other, make(20), out)
    with pytest.raises(OutputFolderError, match="rows of other examples"):
        run(model, make(20, seed=1), out)
    with pytest.raises(OutputFolderError, match="rows of other examples"):
        run(model, [{**example, "group": "c"} for example in make(20)], out)
    with pytest.raises(FileExistsError):
        run(model, make(20)[::-1], out)
    assert contents(out) == before


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


def test_the_digest_is_of_the_weights_not_of_where_they_are(tmp_path):
    _, folder = build("gpt2")
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    from tl_dla.loading import load_model

    here, there = load_model(folder, device="cpu"), load_model(moved, device="cpu")
    assert model_digest(here) == model_digest(there)
    weights = there.original_model.transformer.wte.weight.detach().view(-1)
    a, b = weights[:2].tolist()
    weights[0], weights[1] = b, a
    assert a != b
    assert model_digest(here) != model_digest(there)
