"""Runs that are killed and runs in several processes give what one run in peace gives."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.support.dataset_worker import attribute
from tests.support.runs import contents, make, table
from tests.zoo.build import build
from tl_dla.datasets.dataset import summarize

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """The folder of a model, a file of examples with bad ones, and what one process gives."""
    folder = tmp_path_factory.mktemp("inputs")
    examples = make(300)
    examples[7], examples[201] = (
        {"prompt": [4] * 90, "answer": 5, "incorrect": 6},
        {"prompt": [4, 5], "incorrect": 6},
    )
    path = folder / "examples.jsonl"
    path.write_text("".join(json.dumps(example) + "\n" for example in examples))
    model = str(build("gpt2")[1])
    return model, str(path), attribute(model, str(path), str(folder / "run")), folder / "run"


def test_killed_ten_times_at_random_nothing_is_lost_or_doubled(inputs, tmp_path):
    model, examples, expected, whole = inputs
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.dataset_worker"])
    out, kept, kills = tmp_path / "run", 0, 0
    r = random.Random(time.time_ns())
    total = len(list((whole / "rows").iterdir()))
    while kills < 10:
        process = context.Process(target=attribute, args=(model, examples, str(out)))
        process.start()
        # Until the run is under way (it has loaded the model and stored a batch or more), and then
        # a random moment longer.
        wanted = min(kept + r.randint(1, total // 12), total - 2)
        while len(list((out / "rows").glob("*.parquet"))) < wanted and process.is_alive():
            time.sleep(0.001)
        time.sleep(r.random() * 0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the run ended before it was killed"
        kills += 1
        now = len(list((out / "rows").glob("*.parquet")))
        assert now >= max(kept, wanted)
        kept = now
    result = attribute(model, examples, str(out))
    assert contents(out) == contents(whole)
    assert table(out)["index"].tolist() == list(range(300))
    assert torch.equal(result.rows.mean, expected.rows.mean)
    assert result.skipped == expected.skipped and [i for i, _ in result.skipped] == [7, 201]


@pytest.mark.parametrize("processes", [2, 3])
def test_torchrun_gives_the_statistics_of_one_process(inputs, tmp_path, processes):
    model, examples, expected, whole = inputs
    out = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(processes), "-m", "tests.support.dataset_worker"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, model, examples, str(out)],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert contents(out) == contents(whole)
    for process in range(processes):  # every process returns the same result
        got = torch.load(f"{out}-{process}.pt")
        assert got["n"] == expected.n and got["skipped"] == expected.skipped
        for name in ("mean", "std", "sem", "low", "high", "sign_agreement", "cancellation"):
            assert torch.equal(got[name], getattr(expected.rows, name)), name


def test_three_identical_runs_at_once_do_not_harm_each_other(inputs, tmp_path):
    model, examples, _, whole = inputs
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.dataset_worker"])
    out = tmp_path / "run"
    call = {"target": attribute, "args": (model, examples, str(out))}
    processes = [context.Process(**call) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert contents(out) == contents(whole)
    assert summarize(out).complete and summarize(out).n == 298
