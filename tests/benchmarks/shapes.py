"""What one call takes, by the shape of its question: short, long, wide, and on a large model.

    python -m tests.benchmarks.shapes                      all of it, ten minutes
    python -m tests.benchmarks.shapes --memory             peak memory too, half an hour
    python -m tests.benchmarks.shapes --model llama-1b
    python -m tests.benchmarks.shapes --json out.json      kept, to be shown beside a later run
    python -m tests.benchmarks.shapes --against out.json

Each time is a median over that of a plain forward pass of the same prompts, in rounds that
alternate; peak memory is that of a process of its own, above one that runs the forward pass.
"""

import argparse
from functools import partial
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from tests.benchmarks.memory import above_forward
from tests.benchmarks.models import LLAMA, boot
from tests.benchmarks.results import kept, save
from tests.benchmarks.timing import inputs, medians, ours


class Case(NamedTuple):
    """A question of a model: its size, and the options of the call."""

    model: str
    batch: int
    tokens: int
    unit: str
    pos: int | None = -1
    baseline: str = "foil"  # or "mean", or how many candidates

    @property
    def name(self) -> str:
        """In words."""
        where = "last" if self.pos == -1 else "all positions"
        what = {"foil": "", "mean": ", against the mean"}
        more = what.get(self.baseline, f", {self.baseline} candidates")
        return f"{self.model}, {self.batch} × {self.tokens}: {self.unit}, {where}{more}"


SMALL = ("component", "layer", "head")
CASES = [
    *(Case(m, 1, n, unit) for m in ("gpt2-size", "smollm2") for n in (15, 64) for unit in SMALL),
    *(Case(LLAMA, 1, 128, unit) for unit in (*SMALL, "source", "neuron")),
    Case(LLAMA, 1, 128, "head", baseline="mean"),
    Case("smollm2", 1, 4096, "head"),
    Case("smollm2", 1, 4096, "source"),
    Case("smollm2", 4, 256, "head", baseline="64"),
    Case("smollm2", 4, 256, "head", None, baseline="64"),
    Case("smollm2", 32, 512, "head"),
    Case("smollm2", 4, 64, "source", None),
    Case("smollm2", 4, 64, "neuron", None),
]


@torch.no_grad()
def over_forward(model: Any, cases: list[Case], runs: int) -> list[float]:
    """The time of each call of the same prompts, over that of a forward pass."""
    data = inputs(model, cases[0].batch, cases[0].tokens)
    calls = {
        case.name: partial(ours, model, data, case.unit, case.pos, baseline=case.baseline)
        for case in cases
    }
    times = medians(runs, forward=lambda: model(data["tokens"]), **calls)
    return [times[case.name] / times["forward"] for case in cases]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted({case.model for case in CASES}))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="of each, in two processes")
    parser.add_argument("--json", help="keep the numbers in this file")
    parser.add_argument("--against", help="such a file, of an earlier run")
    args = parser.parse_args()
    before, found = kept(args.against), dict[str, float]()
    columns = ["", "time over a forward pass", "peak MB above it", *(["before"] if before else [])]
    table = Table(*columns)
    chosen = [case for case in CASES if args.model in (None, case.model)]
    for name in dict.fromkeys(case.model for case in chosen):
        model = boot(name)
        mine = [case for case in chosen if case.model == name]
        for size in dict.fromkeys((case.batch, case.tokens) for case in mine):
            group = [case for case in mine if (case.batch, case.tokens) == size]
            runs = max(1, args.runs if size[0] * size[1] < 2048 else args.runs // 2)
            for case, ratio in zip(group, over_forward(model, group, runs), strict=True):
                found[case.name] = ratio
                options = case._asdict() | {"pos": "last" if case.pos == -1 else "all"}
                mb = above_forward("ours", **options) if args.memory else None
                shown = [f"{ratio:.2f}", "" if mb is None else f"{mb:.0f}"]
                old = before.get(case.name)
                earlier = ["" if old is None else f"{old:.2f}"] if before else []
                table.add_row(case.name, *shown, *earlier)
        del model
    Console(width=110).print(table)
    save(args.json, found)


if __name__ == "__main__":
    main()
