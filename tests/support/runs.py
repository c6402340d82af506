"""Datasets of random prompts, runs over them, and what a run left in its folder."""

from __future__ import annotations

import inspect
import random

import pandas as pd
import torch

import tl_dla.datasets.dataset
from tl_dla.datasets.dataset import attribute_dataset

BATCH = 4


def make(n=75, seed=0, several=True):
    """Prompts of 3 to 20 token ids, with 1 to 3 incorrect answers, in two groups."""
    r = random.Random(seed)

    def ids(k, low=3, high=96):
        return [r.randint(low, high) for _ in range(k)]

    examples = [
        {
            "prompt": ids(r.randint(3, 20)),
            "answer": r.randint(50, 96),
            "incorrect": ids(r.randint(1, 3), 3, 49) if several else r.randint(3, 49),
            "group": "ab"[i % 3 == 0],
        }
        for i in range(n)
    ]
    for example in examples:  # an answer against itself would be warned about
        if example["incorrect"] in (example["answer"], [example["answer"]]):
            example["answer"] = 3 + (example["answer"] - 2) % 94
    return examples


# What cannot be read, by its index, and what the reason says.
BAD = {
    3: ({"prompt": [4] * 90, "answer": 5, "incorrect": 6}, "more than the model's context"),
    10: ({"prompt": [4, 5], "answer": "w3 w4", "incorrect": 6}, "is 2 tokens"),
    11: ({"prompt": [4, 5], "incorrect": 6}, "needs the field 'answer'"),
    20: ({"prompt": [4, 5], "answer": [5, 6], "incorrect": 6}, "has one answer"),
    21: ({"prompt": [4, 5], "answer": 500, "incorrect": 6}, "outside the vocabulary"),
    22: ("a string", "must be a mapping"),
    30: ({"prompt": ["w4", "w5"], "answer": 5, "incorrect": 6}, "strings or token ids"),
    31: ({"prompt": [4, 5], "answer": 5, "incorrect": [None]}, "strings or token ids"),
    39: ({"prompt": "", "answer": 5, "incorrect": 6}, "prompt is empty"),
}


def spoiled(n=40):
    """The same with some that cannot be read."""
    examples = make(n)
    for i, (example, _) in BAD.items():
        examples[i] = example
    return examples


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
    """The files of a folder, without those that a killed run was just writing."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.suffix != ".tmp")
    return {p.relative_to(folder): p.read_bytes() for p in files}


def counted(monkeypatch):
    """The batch sizes of the passes made from here on."""
    passes = []
    attribute = tl_dla.datasets.dataset._attribute_batch

    def counting(model, batch, *args, **options):
        passes.append(len(batch.examples))
        return attribute(model, batch, *args, **options)

    monkeypatch.setattr(tl_dla.datasets.dataset, "_attribute_batch", counting)
    return passes
