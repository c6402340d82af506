"""A dataset's rows are those of single calls, its statistics pandas' own, and nothing is lost."""

from __future__ import annotations

import csv
import inspect
import json
import random
import shutil

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import tl_dla.data.dataset
from tests.models import either, load
from tests.zoo.build import boot, build, hf_reference
from tests.zoo.hooked import HOOKED, hooked
from tests.zoo.reference import reference
from tl_dla.data.dataset import attribute_dataset, summarize
from tl_dla.data.examples import WINDOW, read_examples
from tl_dla.data.shards import model_digest, read_shard
from tl_dla.errors import ArgumentError, OutputFolderError, ReconstructionError, TokenError

BATCH = 4


@pytest.fixture(scope="module")
def model():
    return boot("gpt2")


def make(n=75, seed=0, several=True):
    """Prompts of 3 to 20 token ids, with 0 to 3 incorrect answers, in two groups."""
    r = random.Random(seed)

    def ids(k):
        return [r.randint(3, 96) for _ in range(k)]

    return [
        {
            "prompt": ids(r.randint(3, 20)),
            "answer": r.randint(3, 96),
            "incorrect": ids(r.randint(0, 3)) if several else r.randint(3, 96),
            "group": "ab"[i % 3 == 0],
        }
        for i in range(n)
    ]


# Without the type checks that tests add, which would refuse bad arguments in words of their own.
attribute = inspect.unwrap(attribute_dataset)


def run(model, examples, out=None, **options):
    options = {"unit": "head", "batch_size": BATCH, "progress": False, **options}
    return attribute(model, examples, out=out, **options)


def table(out):
    """The stored rows as pandas reads them, in order of index."""
    return pd.read_parquet(out / "rows").sort_values("index", ignore_index=True)


def stack(stored):
    return torch.tensor(stored["rows"].tolist(), dtype=torch.float64)


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def counted(monkeypatch):
    """The batch sizes of the passes made from here on."""
    passes = []
    attribute = tl_dla.data.dataset.direct_logit_attribution

    def counting(model, tokens, *args, **options):
        passes.append(len(tokens))
        return attribute(model, tokens, *args, **options)

    monkeypatch.setattr(tl_dla.data.dataset, "direct_logit_attribution", counting)
    return passes


# ---- rows and statistics -----------------------------------------------------------------------


@pytest.mark.parametrize("name", either("gpt2", "gemma2", "ln", "sandwich"))
def test_each_prompts_rows_are_those_of_the_autograd_reference(name, tmp_path):
    examples = make(23, several=False)
    result = run(load(name), examples, tmp_path / "run")
    stored = table(tmp_path / "run")
    assert stored["index"].tolist() == list(range(23))
    plain = hooked(name, torch.float64) if name in HOOKED else hf_reference(name, torch.float64)
    for i, example in enumerate(examples):
        tokens = torch.tensor([example["prompt"]])
        answer, wrong = torch.tensor([example["answer"]]), torch.tensor([example["incorrect"]])
        expected = reference(plain, tokens, answer, wrong)
        heads = {label: row.detach() for label, row in expected.heads.items()}
        rows = dict(zip(result.labels, stored["rows"][i], strict=True))
        rows["start"] = rows.pop("embed") + rows.pop("pos_embed", 0.0)
        expected_rows = {label: float(row[0, -1]) for label, row in heads.items()}
        assert rows == pytest.approx(expected_rows, abs=1e-5)
        assert stored["logit"][i] == pytest.approx(expected.logit[0, -1].item(), abs=1e-5)


def test_several_incorrect_answers_are_averaged_and_none_is_a_plain_logit(tmp_path):
    examples = make(40)
    assert {len(example["incorrect"]) for example in examples} == {0, 1, 2, 3}
    run(boot("llama"), examples, tmp_path / "run", unit="component")
    stored, plain = table(tmp_path / "run"), hf_reference("llama", torch.float64)
    for i, example in enumerate(examples):
        with torch.no_grad():
            logits = plain(torch.tensor([example["prompt"]])).logits[0, -1]
        wrong = logits[example["incorrect"]].mean() if example["incorrect"] else 0.0
        expected = float(logits[example["answer"]] - wrong)
        assert stored["logit"][i] == pytest.approx(expected, abs=1e-5)
        assert sum(stored["rows"][i]) == pytest.approx(expected, abs=1e-5)
        assert stored["answer"][i] == example["answer"]
        assert list(stored["incorrect"][i]) == example["incorrect"]
        assert stored["n_tokens"][i] == len(example["prompt"])


def test_statistics_are_those_that_pandas_computes_of_the_stored_rows(model, tmp_path):
    result = run(model, make(), tmp_path / "run", confidence=0.9)
    stored = table(tmp_path / "run")
    assert result.n == len(stored) == 75
    for part, lines in [
        (result, stored),
        *((result.groups[g], f) for g, f in stored.groupby("group")),
    ]:
        rows = pd.DataFrame(lines["rows"].tolist(), columns=result.labels).astype("float64")
        assert part.n == len(lines)
        close = pytest.approx
        assert part.rows.mean.tolist() == close(rows.mean().tolist(), rel=1e-12)
        assert part.rows.std.tolist() == close(rows.std().tolist(), rel=1e-12)
        assert part.rows.sem.tolist() == close(rows.sem().tolist(), rel=1e-12)
        agree = ((rows > 0) == (rows.mean() > 0)).mean()
        assert part.rows.sign_agreement.tolist() == close(agree.tolist())
        cancelled = rows.abs().sum() / rows.sum().abs()
        assert part.rows.cancellation.tolist() == close(cancelled.tolist(), rel=1e-12)
        gross, net = rows.abs().sum(axis=1).mean(), rows.sum(axis=1).abs().mean()
        assert part.gross_to_net == close(gross / net, rel=1e-6)
        assert float(part.logit.mean) == close(lines["logit"].astype("float64").mean(), rel=1e-12)
        half = (part.rows.high - part.rows.low) / 2 / part.rows.sem
        assert bool(((half > 1.64) & (half < 1.75)).all())  # t at 90 %, 24 to 74 degrees
    assert sorted(result.groups) == ["a", "b"] and result.groups["a"].n + result.groups["b"].n == 75


def test_a_group_is_what_its_examples_alone_give(model):
    examples = make(30)
    whole = run(model, examples)
    alone = run(model, [e for e in examples if e["group"] == "b"])
    torch.testing.assert_close(whole.groups["b"].rows.mean, alone.rows.mean, atol=1e-6, rtol=0)
    torch.testing.assert_close(whole.groups["b"].rows.std, alone.rows.std, atol=1e-6, rtol=0)


def test_the_layer_unit_cancels_nothing_and_keeps_the_model_logit(model):
    result = run(model, make(30), unit="layer")
    assert 1 <= result.gross_to_net < run(model, make(30), unit="component").gross_to_net
    total = result["final_post"].mean + result["ln_final.b"].mean
    if "b_U" in result.labels:
        total += result["b_U"].mean
    assert float(result.logit.mean) == pytest.approx(total, abs=1e-6)


def test_rows_that_only_some_batches_have_are_kept_and_are_zero_in_the_others(tmp_path):
    """A vector that no component writes joins the stream after block 1, for long prompts only."""
    model, vector = boot("gpt2"), torch.randn(32, generator=torch.Generator().manual_seed(0))
    length = 9

    def push(_module, _args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = hidden + vector * (hidden.shape[1] > length)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    examples = [{**example, "answer": 5, "incorrect": 9} for example in make(80)]
    block = model.original_model.transformer.h[1]
    getattr(block, "original_component", block).register_forward_hook(push)
    result = run(model, examples, tmp_path / "run", unit="component")
    stored = table(tmp_path / "run")
    names = stored["rest_labels"].map(list)
    assert {tuple(name) for name in names} == {(), ("1_rest",)}
    rest = stored["rest"].map(lambda values: sum(map(float, values)))
    assert (stored["n_tokens"][rest == 0] <= length).all()
    assert result.labels[-1] == "1_rest" and result.kinds[-1] == "rest" and result.layers[-1] == 1
    assert result["1_rest"].mean == pytest.approx(rest.mean(), rel=1e-9)
    assert result["1_rest"].std == pytest.approx(rest.std(), rel=1e-9)
    total = stored["rows"].map(sum) + rest
    assert total.tolist() == pytest.approx(stored["logit"].tolist(), abs=1e-5)


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
    for source in sources:
        got = run(model, source)
        assert got.n == 20 and torch.equal(got.rows.mean, expected.rows.mean)
    assert len(read_examples(lines)) == 20


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


# ---- bad examples ------------------------------------------------------------------------------

BAD = {
    3: ({"prompt": [4] * 90, "answer": 5}, "more than the model's context"),
    10: ({"prompt": [4, 5], "answer": "w3 w4"}, "is 2 tokens"),
    11: ({"prompt": [4, 5]}, "needs the field 'answer'"),
    20: ({"prompt": [4, 5], "answer": [5, 6]}, "has one answer"),
    21: ({"prompt": [4, 5], "answer": 500}, "outside the vocabulary"),
    22: ("a string", "must be a mapping"),
    30: ({"prompt": ["w4", "w5"], "answer": 5}, "strings or token ids"),
    31: ({"prompt": [4, 5], "answer": 5, "incorrect": [None]}, "strings or token ids"),
    39: ({"prompt": "", "answer": 5}, "prompt is empty"),
}


def spoiled(n=40):
    examples = make(n)
    for i, (example, _) in BAD.items():
        examples[i] = example
    return examples


def test_bad_examples_are_left_out_and_reported_with_their_reason(model, tmp_path):
    result = run(model, spoiled(), tmp_path / "run")
    assert [index for index, _ in result.skipped] == list(BAD)
    for (_, reason), (_, fragment) in zip(result.skipped, BAD.values(), strict=True):
        assert fragment in reason
    lines = (tmp_path / "run" / "errors.jsonl").read_text().splitlines()
    assert [(e["index"], e["error"]) for e in map(json.loads, lines)] == result.skipped
    stored = table(tmp_path / "run")
    assert stored["index"].tolist() == list(range(40))
    assert stored["index"][stored["error"].notna()].tolist() == list(BAD)
    good = run(model, [e for i, e in enumerate(make(40)) if i not in BAD])
    assert result.n == good.n == 31
    torch.testing.assert_close(result.rows.mean, good.rows.mean, atol=1e-6, rtol=0)
    assert "9 examples left out; example 3" in repr(result)


def test_on_error_raise_stops_at_the_first_bad_example(model, tmp_path):
    with pytest.raises(TokenError, match=r"Example 3: A prompt has 90 tokens"):
        run(model, spoiled(), on_error="raise")
    run(model, spoiled(), tmp_path / "run")
    with pytest.raises(ArgumentError, match=r"Example 3: A prompt has 90 tokens"):
        run(model, spoiled(), tmp_path / "run", on_error="raise")


def test_no_good_example_is_an_error(model):
    with pytest.raises(
        ArgumentError, match=r"No example could be attributed, of 9 given; example 0"
    ):
        run(model, [example for example, _ in BAD.values()])
    with pytest.raises(ArgumentError, match=r"No example could be attributed, of 0 given"):
        run(model, [])


def test_an_example_whose_rows_miss_the_logit_is_left_out(model, monkeypatch, tmp_path):
    """The certificate of every prompt that ends in token 50 is made to fail."""
    original = tl_dla.data.dataset.direct_logit_attribution

    def attribute(model, tokens, *args, attention_mask, **options):
        result = original(model, tokens, *args, attention_mask=attention_mask, **options)
        last = tokens.gather(1, attention_mask.sum(1, keepdim=True) - 1)[:, 0]
        result.reconstruction.reconstructed[last == 50] += 0.5
        return result

    monkeypatch.setattr(tl_dla.data.dataset, "direct_logit_attribution", attribute)
    examples = make(30)
    for i, example in enumerate(examples):
        example["prompt"][-1] = 50 if i in (5, 17) else 51
    result = run(model, examples, tmp_path / "run")
    assert [index for index, _ in result.skipped] == [5, 17] and result.n == 28
    assert "rows add up to" in result.skipped[0][1]
    with pytest.raises(ReconstructionError, match=r"Example (5|17): The rows add up to"):
        run(model, examples, on_error="raise")
    with pytest.warns(UserWarning, match=r"Examples (5|17)"):
        assert run(model, examples, check="warn").n == 30
    assert run(model, examples, check="off").n == 30
    for example in examples:
        example["prompt"][-1] = 50
    with pytest.raises(ReconstructionError, match="The rows add up to"):
        run(model, examples)


# ---- the output folder -------------------------------------------------------------------------


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
        monkeypatch.setattr(tl_dla.data.dataset, "_join", lambda _, process=process: (process, 3))
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


# ---- the result --------------------------------------------------------------------------------


def test_the_result_ranks_and_tabulates(model):
    result = run(model, make())
    means = dict(zip(result.labels, result.rows.mean.tolist(), strict=True))
    heads = {label: mean for label, mean in means.items() if label.startswith("L")}
    top = result.top(3, kind="head")
    assert [row.label for row in top] == sorted(heads, key=heads.get, reverse=True)[:3]
    assert all(row.low < row.mean == means[row.label] < row.high for row in top)
    lowest = result.top(2, largest=False)
    assert [row.label for row in lowest] == sorted(means, key=means.get)[:2]
    by = result.top(1, by="magnitude")[0]
    assert abs(by.mean) == max(map(abs, means.values()))
    assert result["L1H2"].mean == means["L1H2"]
    table = result.to_dataframe()
    assert len(table) == 3 * (len(result) + 1) and set(table["group"]) == {"all", "a", "b"}
    line = table[(table["group"] == "b") & (table["label"] == "L1H2")].iloc[0]
    assert line["mean"] == result.groups["b"]["L1H2"].mean and line["n"] == 25
    bars = result.plot(5, kind="head").data[0]
    assert bars.x.tolist() == [row.mean for row in result.top(5, kind="head", by="magnitude")]
    with pytest.raises(KeyError, match="No row .*L9H9"):
        result["L9H9"]
    with pytest.raises(ArgumentError, match="No row is of kind"):
        result.top(kind="neuron")


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ({"unit": "heads"}, "unit must be"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"on_error": "stop"}, "on_error must be"),
        ({"check": "maybe"}, "check must be"),
        ({"pos": None}, "pos must be one integer"),
        ({"confidence": 1.0}, "confidence must be"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(model, options, fragment):
    with pytest.raises(ArgumentError, match=fragment):
        run(model, make(4), **options)


def test_a_path_or_a_dataset_of_splits_is_not_taken_for_examples(model, tmp_path):
    for examples in ("prompts.jsonl", {"train": make(4)}):
        with pytest.raises(ArgumentError, match="examples must be a sequence"):
            run(model, examples)
    with pytest.raises(ArgumentError, match="There is no file"):
        read_examples(tmp_path / "absent.jsonl")
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(ArgumentError, match=r"\.jsonl, \.csv and \.parquet"):
        read_examples(tmp_path / "x.txt")
    (tmp_path / "x.jsonl").write_text('{"prompt": 1}\n{')
    with pytest.raises(ArgumentError, match="line 2"):
        list(read_examples(tmp_path / "x.jsonl"))
