"""A dataset's rows are those of single calls, its statistics pandas' own, and nothing is lost."""

from __future__ import annotations

import json

import pandas as pd
import pytest
import torch

import tl_dla.datasets.dataset
from tests.support.models import either, load
from tests.support.runs import BAD, make, run, spoiled, table
from tests.zoo.build import boot, hf_reference
from tests.zoo.configs import CONFIGS
from tests.zoo.hooked import HOOKED, hooked
from tests.zoo.reference import reference
from tl_dla.datasets.examples import read_examples
from tl_dla.errors import ArgumentError, ReconstructionError, TokenError


@pytest.fixture(scope="module")
def model():
    return boot("gpt2")


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
    with_baseline = make(40)
    assert {len(example["incorrect"]) for example in with_baseline} == {1, 2, 3}
    without = [{**example, "incorrect": []} for example in with_baseline]
    model, plain = boot("llama"), hf_reference("llama", torch.float64)
    stored = []
    for examples, quantity in ((with_baseline, "logit difference"), (without, "logit")):
        result = run(model, examples, tmp_path / quantity, unit="component")
        stored.append(table(tmp_path / quantity))
        assert f"the model's own {quantity}: " in repr(result) and result.quantity == quantity
        last = result.to_dataframe().query("group == 'all'").iloc[-1]
        assert (last["label"], last["kind"]) == (quantity, "logit")
        assert f">{quantity}, mean over prompts" in result.plot().layout.title.text
    stored = pd.concat(stored, ignore_index=True)
    for i, example in enumerate(with_baseline + without):
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
        n = len(rows)  # pandas' own is without bias
        skewness = rows.skew() * (n - 2) / (n * (n - 1)) ** 0.5
        assert part.rows.skewness.tolist() == close(skewness.tolist(), rel=1e-9)
    assert sorted(result.groups) == ["a", "b"] and result.groups["a"].n + result.groups["b"].n == 75


def test_prompts_run_at_their_own_length_where_positions_scale_with_it(tmp_path, monkeypatch):
    """LongRoPE has other frequencies once the longest prompt of a batch passes 8 tokens."""
    name, config = CONFIGS["phi3"]
    start = {"original_max_position_embeddings": 8}
    long = {"rope_type": "longrope", "rope_theta": 1e4, **start}
    long |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    monkeypatch.setitem(CONFIGS, "phi3_long", (name, {**config, **start, "rope_parameters": long}))
    model, examples = boot("phi3_long"), make(30, several=False)
    run(model, examples, tmp_path / "run", batch_size=30)
    stored = table(tmp_path / "run")
    for i, example in enumerate(examples):
        with torch.no_grad():
            logits = model(torch.tensor([example["prompt"]]))[0, -1]
        expected = float(logits[example["answer"]] - logits[example["incorrect"]])
        assert stored["logit"][i] == pytest.approx(expected, abs=1e-5)
        assert sum(stored["rows"][i]) == pytest.approx(expected, abs=1e-5)


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


# ---- bad examples ------------------------------------------------------------------------------


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
    original = tl_dla.datasets.dataset._attribute_batch

    def attribute(model, batch, *args, **options):
        result = original(model, batch, *args, **options)
        last = torch.tensor([example.tokens[-1] for example in batch.examples])
        result.reconstruction.reconstructed[last == 50] += 0.5
        return result

    monkeypatch.setattr(tl_dla.datasets.dataset, "_attribute_batch", attribute)
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
    for name, points in zip("ab", result.plot(5, by_group=True).data, strict=True):
        own, rows = result.groups[name], result.top(5, by="magnitude")
        assert points.name == f"{name} ({own.n})"
        assert points.x.tolist() == [own[row.label].mean for row in rows]
        high = (points.x + points.error_x.array).tolist()
        assert high == pytest.approx([own[row.label].high for row in rows])
    with pytest.raises(ArgumentError, match="have no groups"):
        result.groups["a"].plot(by_group=True)
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
