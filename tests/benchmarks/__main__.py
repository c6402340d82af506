"""What attribution costs, beside TransformerLens's own tool and a plain forward pass.

    python -m tests.benchmarks                 the table of the README, a few minutes
    python -m tests.benchmarks --grid          batch × tokens × unit × positions, and how cost grows
    python -m tests.benchmarks --json out.json

Two models, folded, because TransformerLens's tool needs that: one of GPT-2 small's size with random
weights (12 layers, d_model 768, 50,257 tokens), and SmolLM2-135M. The tools alternate, each time is
a median of several runs, a given cache is fresh for every run (TransformerLens's tool keeps head
results in the cache it is given). Before anything is timed, the two tools must agree. Peak memory
is that of a process of its own, above a process that runs a plain forward pass.
"""

import argparse
import json
import os
from importlib.metadata import version
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tests.benchmarks.growth import exponents
from tests.benchmarks.memory import above_forward
from tests.benchmarks.models import MODELS, boot
from tests.benchmarks.timing import UNITS, agree, case, inputs

BATCH, TOKENS = 4, 256
CASES = ("head", -1), ("head", None), ("neuron", -1), ("component", None)


def measured(name: str, runs: int) -> dict[str, Any]:
    """The cases of the design's table, for one model."""
    model = boot(name)
    with torch.no_grad():
        differences = {unit: agree(model, unit) for unit in UNITS}
    cases = [case(model, inputs(model, BATCH, TOKENS), *wanted, runs) for wanted in CASES]
    memory = {
        f"{unit} {pos}": {
            tool: above_forward(name, tool, unit, pos, BATCH, TOKENS) for tool in ("theirs", "ours")
        }
        for unit, pos in (("head", "all"), ("neuron", "last"))
    }
    return {"model": name, "differences": differences, "cases": cases, "memory_mb": memory}


def table(report: dict[str, Any]) -> Table:
    """The ratios of the design's section 7, which sets goals for GPT-2 small's size."""
    found = {(c["unit"], c["pos"]): c for c in report["cases"]}
    goals = ["goal"] if report["model"] == "gpt2-size" else []
    shown = Table(f"{report['model']}, {BATCH} × {TOKENS}", "TransformerLens", "tl_dla", *goals)

    def row(name: str, theirs: str, ours: str, goal: str, met: bool) -> None:
        wanted = [f"{goal}{'' if met else '  missed'}"] if goals else []
        shown.add_row(name, theirs, ours, *wanted)

    for pos, goal in (("last", 0.75), ("all", 1.10)):
        c = found["head", pos]
        theirs, ours = c["theirs"] / c["forward"], c["ours"] / c["forward"]
        name = f"heads, {pos}: prompt to result, over a forward pass"
        row(name, f"{theirs:.2f}", f"{ours:.2f}", f"≤ {goal:.2f}", ours <= goal)
    for unit, pos, goal in (("head", "all", 60), ("head", "last", 40), ("neuron", "last", 7)):
        c = found[unit, pos]
        times = c["theirs_cache"] / c["ours_cache"]
        name = f"{unit}s, {pos}: from a given cache"
        row(name, "1", f"1/{times:.0f}", f"≤ 1/{goal}", times >= goal)
    for name, peak in report["memory_mb"].items():
        if None not in peak.values():
            theirs, ours = (f"{peak[tool] / 1000:.2f} GB" for tool in ("theirs", "ours"))
            name = f"{name.replace(' ', 's, ')}: peak memory above a forward pass"
            row(name, theirs, ours, "≤ 0.10 GB", peak["ours"] <= 100)
    return shown


def grid(runs: int, console: Console) -> dict[str, Any]:
    """Batches, lengths, units and positions on SmolLM2; and the exponents with which cost grows."""
    columns = "unit", "pos", "batch", "tokens", "forward s", "ours s", "over forward", "cache s"
    shown, cells, model = Table(*columns), [], boot("smollm2")
    for batch, tokens in ((1, 64), (4, 64), (32, 64), (1, 256), (4, 256), (1, 1024)):
        for unit in UNITS:
            for pos in (-1, None):
                if unit == "neuron" and pos is None and batch * tokens > 64:
                    continue  # rows × positions numbers: tens of millions of them
                c = case(model, inputs(model, batch, tokens), unit, pos, runs, with_theirs=False)
                cells.append(c)
                numbers = c["forward"], c["ours"], c["ours"] / c["forward"], c["ours_cache"]
                where = unit, c["pos"], str(batch), str(tokens)
                shown.add_row(*where, *(f"{x:.3f}" for x in numbers))
    growth = exponents(runs)
    console.print(shown)
    for what, found in growth.items():
        console.print(f"{what} {found['sizes']}: cost grows as n^{found['exponent']:.2f}")
    return {"grid": cells, "growth": growth}


def main() -> None:
    """Measures, prints the tables, and writes everything as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, help="both by default")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--grid", action="store_true")
    parser.add_argument("--json")
    args = parser.parse_args()
    console = Console(width=110)
    report: dict[str, Any] = {
        "versions": {name: version(name) for name in ("torch", "transformer-lens")},
        "cores": os.cpu_count(),
        "models": [],
    }
    for name in [args.model] if args.model else MODELS:
        report["models"].append(measured(name, args.runs))
        console.print(table(report["models"][-1]))
    if args.grid:
        report |= grid(min(args.runs, 2), console)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
