"""What attribution costs, beside TransformerLens's own tool and a plain forward pass.

    python -m tests.benchmarks                 the table of the README, a few minutes
    python -m tests.benchmarks --json out.json         the ratios, kept
    python -m tests.benchmarks --against out.json      and shown beside those of a later run

Two models, folded, because TransformerLens's tool needs that: one of GPT-2 small's size with random
weights (12 layers, d_model 768, 50,257 tokens), and SmolLM2-135M. The tools alternate, each time is
a median of several runs, a given cache is fresh for every run (TransformerLens's tool keeps head
results in the cache it is given). Before anything is timed, the two tools must agree. Peak memory
is that of a process of its own, above a process that runs a plain forward pass.
"""

import argparse
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tests.benchmarks.memory import above_forward
from tests.benchmarks.models import MODELS, boot
from tests.benchmarks.results import kept, save
from tests.benchmarks.timing import UNITS, agree, case, inputs

BATCH, TOKENS = 4, 256
CASES = ("head", -1), ("head", None), ("neuron", -1), ("component", None)


def measured(name: str, runs: int) -> dict[str, Any]:
    """The cases of the design's table, for one model."""
    model = boot(name)
    with torch.no_grad():
        differences = {unit: agree(model, unit) for unit in UNITS}
    cases = [case(model, inputs(model, BATCH, TOKENS), *wanted, runs) for wanted in CASES]
    memory = {}
    for unit, pos in (("head", "all"), ("neuron", "last")):
        options = dict(model=name, unit=unit, pos=pos, batch=BATCH, tokens=TOKENS)
        memory[f"{unit} {pos}"] = {t: above_forward(t, **options) for t in ("theirs", "ours")}
    return {"model": name, "differences": differences, "cases": cases, "memory_mb": memory}


def ratios(report: dict[str, Any]) -> dict[str, tuple[float, float, float | None]]:
    """What is compared, by name: TransformerLens's, ours, and the goal of GPT-2 small's size."""
    found = {(c["unit"], c["pos"]): c for c in report["cases"]}
    rows: dict[str, tuple[float, float, float | None]] = {}
    for pos, goal in (("last", 0.75), ("all", 1.10)):
        c = found["head", pos]
        name = f"heads, {pos}: prompt to result, over a forward pass"
        rows[name] = c["theirs"] / c["forward"], c["ours"] / c["forward"], goal
    for unit, pos, goal in (("head", "all", 60), ("head", "last", 40), ("neuron", "last", 7)):
        c = found[unit, pos]
        name = f"{unit}s, {pos}: from a given cache, over TransformerLens"
        rows[name] = 1.0, c["ours_cache"] / c["theirs_cache"], 1 / goal
        name = f"{unit}s, {pos}: from a given cache, over reading it once"
        rows[name] = c["theirs_cache"] / c["least_cache"], c["ours_cache"] / c["least_cache"], 2.0
    for name, peak in report["memory_mb"].items():
        if None not in peak.values():
            name = f"{name.replace(' ', 's, ')}: peak memory above a forward pass, GB"
            rows[name] = *(max(0.0, peak[tool] / 1000) for tool in ("theirs", "ours")), 0.1
    return rows


def table(report: dict[str, Any], before: dict[str, float]) -> Table:
    """Ours beside TransformerLens's, beside the goals, and beside an earlier run."""
    model = report["model"]
    goals = ["goal"] if model == "gpt2-size" else []
    columns = ["TransformerLens", "tl_dla", *goals, *(["before"] if before else [])]
    shown = Table(f"{model}, {BATCH} × {TOKENS}", *columns)

    def number(name: str, x: float) -> str:
        return f"1/{1 / x:.0f}" if name.endswith("over TransformerLens") else f"{x:.2f}"

    for name, (theirs, ours, goal) in ratios(report).items():
        wanted = [f"≤ {number(name, goal)}{'' if ours <= goal else '  missed'}"] if goals else []
        old = before.get(f"{model}: {name}")
        earlier = ["" if old is None else number(name, old)] if before else []
        shown.add_row(name, number(name, theirs), number(name, ours), *wanted, *earlier)
    return shown


def main() -> None:
    """Measures, prints the tables, and writes everything as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, help="both by default")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", help="keep the ratios in this file")
    parser.add_argument("--against", help="such a file, of an earlier run")
    args = parser.parse_args()
    console = Console(width=110)
    before, found = kept(args.against), dict[str, float]()
    for name in [args.model] if args.model else MODELS:
        report = measured(name, args.runs)
        console.print(table(report, before))
        found |= {f"{name}: {what}": ours for what, (_, ours, _) in ratios(report).items()}
    save(args.json, found)


if __name__ == "__main__":
    main()
