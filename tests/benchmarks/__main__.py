"""What attribution costs, beside TransformerLens's own tool and a plain forward pass.

    python -m tests.benchmarks                 the table of the README, a few minutes
    python -m tests.benchmarks --grid          batch × tokens × unit × positions, and how cost grows
    python -m tests.benchmarks --json out.json

One model of GPT-2 small's size with random weights (12 layers, d_model 768, 50,257 tokens), folded,
because TransformerLens's tool needs that; `--model smollm2` for SmolLM2. The tools alternate, each
time is a median of several runs, a given cache is fresh for every run (TransformerLens's tool
keeps head results in the cache it is given). Before anything is timed, the two tools must agree.
Peak memory is of a process of its own, above a process that runs a plain forward pass.
"""

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tests.benchmarks.models import boot
from tl_dla import direct_logit_attribution

UNITS = ("component", "head", "neuron")


def inputs(model: Any, batch: int, pos: int) -> dict[str, Any]:
    """Random tokens and answers, without a padding token among them."""
    generator = torch.Generator().manual_seed(0)
    low, high = 100, model.cfg.d_vocab
    tokens = torch.randint(low, high, (batch, pos), generator=generator)
    answer, incorrect = torch.randint(low, high, (2, batch), generator=generator)
    return {"tokens": tokens, "answer": answer, "incorrect": incorrect}


def ours(model: Any, data: dict[str, Any], unit: str, pos: Any, cache: Any = None) -> Any:
    prompt = data["tokens"] if cache is None else None
    return direct_logit_attribution(
        model, prompt, data["answer"], data["incorrect"], unit=unit, pos=pos, cache=cache
    )


def theirs(model: Any, data: dict[str, Any], unit: str, pos: Any, cache: Any = None) -> Any:
    """TransformerLens's tool; for neurons, which it does not have, its cache's own method."""
    from transformer_lens.tools.analysis import direct_logit_attribution as theirs

    if unit != "neuron":
        prompt = data["tokens"] if cache is None else None
        return theirs(
            model, prompt, data["answer"], data["incorrect"], unit=unit, pos=pos, cache=cache
        )
    if cache is None:
        _, cache = model.run_with_cache(data["tokens"])
    stack = cache.stack_neuron_results(layer=-1, pos_slice=pos)
    return cache.logit_attrs(
        stack, tokens=data["answer"], incorrect_tokens=data["incorrect"], pos_slice=pos
    )


def agree(model: Any, data: dict[str, Any], unit: str) -> float:
    """The largest difference between the two tools, over the rows that both have."""
    mine = ours(model, data, unit, -1).attribution
    other = theirs(model, data, unit, -1)
    other = getattr(other, "attribution", other)
    if unit == "neuron":
        rows = [i for i, kind in enumerate(ours(model, data, unit, -1).kinds) if kind == "neuron"]
        mine = mine[rows]
    n = min(len(mine), len(other)) - (unit == "head")
    difference = float((mine[:n] - other[:n]).abs().max())
    if difference > 1e-4 * float(other.abs().max()):
        raise SystemExit(f"The tools disagree on {unit} by {difference:.3g}: nothing was timed.")
    return difference


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def fresh(cache: Any) -> Any:
    """The same activations in a cache of its own, so that nothing is remembered between runs."""
    from transformer_lens import ActivationCache

    return ActivationCache(dict(cache.cache_dict), cache.model, has_batch_dim=cache.has_batch_dim)


def case(
    model: Any, data: dict[str, Any], unit: str, pos: Any, runs: int, with_theirs: bool = True
) -> dict[str, Any]:
    """Medians over alternating runs."""
    with torch.no_grad():
        _, cache = model.run_with_cache(data["tokens"])
        timed: dict[str, Callable[[], Any]] = {
            "forward": lambda: model(data["tokens"]),
            "ours": lambda: ours(model, data, unit, pos),
            "ours_cache": lambda: ours(model, data, unit, pos, fresh(cache)),
        }
        if with_theirs:
            timed["theirs"] = lambda: theirs(model, data, unit, pos)
            timed["theirs_cache"] = lambda: theirs(model, data, unit, pos, fresh(cache))
        times: dict[str, list[float]] = {name: [] for name in timed}
        for name in ("forward", "ours", "ours_cache"):
            timed[name]()
        for _ in range(runs):
            for name, run in timed.items():
                times[name].append(seconds(run))
    medians = {name: statistics.median(values) for name, values in times.items()}
    batch, n = data["tokens"].shape
    return {"unit": unit, "pos": pos, "batch": batch, "tokens": n, **medians}


def peak_memory(model_name: str, tool: str, unit: str, pos: str, batch: int, tokens: int) -> float:
    """Peak resident memory in MB of a process that does one thing."""
    command = [sys.executable, "-m", "tests.benchmarks", "--peak", tool, "--unit", unit]
    command += ["--pos", pos, "--model", model_name, "--batch", str(batch), "--tokens", str(tokens)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def peak(args: argparse.Namespace) -> None:
    model = boot(args.model)
    data, pos = inputs(model, args.batch, args.tokens), None if args.pos == "all" else -1
    with torch.no_grad():
        if args.peak == "forward":
            model(data["tokens"])
        else:
            {"ours": ours, "theirs": theirs}[args.peak](model, data, args.unit, pos)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def slope(xs: list[float], ys: list[float]) -> float:
    """The exponent of growth: the least-squares slope of log y against log x."""
    lx, ly = [math.log(x) for x in xs], [math.log(y) for y in ys]
    mx, my = statistics.mean(lx), statistics.mean(ly)
    top = sum((x - mx) * (y - my) for x, y in zip(lx, ly, strict=True))
    return top / sum((x - mx) ** 2 for x in lx)


def goals(cases: list[dict[str, Any]], memory: dict[str, float]) -> Table:
    """The ratios of the design's section 7."""
    found = {(c["unit"], c["pos"]): c for c in cases}
    head_last, head_all, neuron = found["head", -1], found["head", None], found["neuron", -1]
    table = Table("", "TransformerLens", "tl_dla", "goal")

    def row(name: str, theirs: str, ours: float, goal: float, inverse: bool = False) -> None:
        shown = f"1/{1 / ours:.0f}" if inverse else f"{ours:.2f}"
        wanted = f"1/{1 / goal:.0f}" if inverse else f"{goal:.2f}"
        table.add_row(name, theirs, shown, f"≤ {wanted}{'' if ours <= goal else '  missed'}")

    for name, c, goal in (("last", head_last, 0.75), ("all", head_all, 1.10)):
        row(
            f"heads, {name} position(s), prompt to result, over a forward pass",
            f"{c['theirs'] / c['forward']:.2f}",
            c["ours"] / c["forward"],
            goal,
        )
    for name, c, goal in (
        ("heads, all positions, from a given cache", head_all, 1 / 60),
        ("heads, last position, from a given cache", head_last, 1 / 40),
        ("neurons, last position, from a given cache", neuron, 1 / 7),
    ):
        row(name, "1", c["ours_cache"] / c["theirs_cache"], goal, inverse=True)
    if memory:
        above = {tool: memory[tool] - memory["forward"] for tool in ("ours", "theirs")}
        shown = f"{above['theirs'] / 1000:.1f} GB", f"{above['ours'] / 1000:.2f} GB"
        missed = "" if above["ours"] <= 100 else "  missed"
        table.add_row("peak memory above a forward pass, heads, all", *shown, f"≤ 0.10 GB{missed}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="gpt2-size", choices=["gpt2-size", "smollm2"])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--grid", action="store_true")
    parser.add_argument("--json")
    parser.add_argument("--peak", choices=["forward", "ours", "theirs"], help=argparse.SUPPRESS)
    parser.add_argument("--unit", default="head")
    parser.add_argument("--pos", default="all", choices=["all", "last"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    args = parser.parse_args()
    if args.peak:
        return peak(args)

    console, model = Console(), boot(args.model)
    data = inputs(model, args.batch, args.tokens)
    with torch.no_grad():
        differences = {unit: agree(model, inputs(model, 2, 16), unit) for unit in UNITS}
    console.print({unit: f"agree to {d:.0e}" for unit, d in differences.items()})
    cases = [
        case(model, data, unit, pos, args.runs)
        for unit, pos in (("head", -1), ("head", None), ("neuron", -1), ("component", None))
    ]
    tools = ("forward", "ours", "theirs")
    memory = {
        tool: peak_memory(args.model, tool, "head", "all", args.batch, args.tokens)
        for tool in tools
    }
    console.print(goals(cases, memory))
    report: dict[str, Any] = {"model": args.model, "cases": cases, "memory_mb": memory}
    if args.grid:
        report |= grid(model, args.runs, console)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(report, file, indent=1)


def grid(model: Any, runs: int, console: Console) -> dict[str, Any]:
    """Batches, lengths, units and positions; and the exponents with which cost grows."""
    columns = "unit", "pos", "batch", "tokens", "forward s", "ours s", "over forward", "cache s"
    table = Table(*columns)
    cells = []
    for batch, tokens in ((1, 64), (4, 64), (32, 64), (1, 256), (4, 256), (1, 1024), (4, 1024)):
        for unit in UNITS:
            for pos in (-1, None):
                if unit == "neuron" and pos is None and batch * tokens > 64:
                    continue  # rows × positions numbers: a million an hour of them
                c = case(model, inputs(model, batch, tokens), unit, pos, min(runs, 3), False)
                cells.append(c)
                numbers = c["forward"], c["ours"], c["ours"] / c["forward"], c["ours_cache"]
                where = unit, "all" if pos is None else "last", str(batch), str(tokens)
                table.add_row(*where, *(f"{x:.3f}" for x in numbers))
    console.print(table)
    counts = [1, 4, 16, 64]
    data, times = inputs(model, 1, 64), []
    with torch.no_grad():
        _, cache = model.run_with_cache(data["tokens"])
        for k in counts:
            candidates = torch.arange(100, 100 + k)
            run = lambda c=candidates: direct_logit_attribution(  # noqa: E731
                model, None, candidate_tokens=c, unit="head", pos=None, cache=cache
            )
            times.append(statistics.median(seconds(run) for _ in range(5)))
    lengths = [c for c in cells if c["unit"] == "head" and c["pos"] is None and c["batch"] == 1]
    slopes = {
        "candidates": slope(counts, times),
        "positions": slope([c["tokens"] for c in lengths], [c["ours_cache"] for c in lengths]),
    }
    console.print({name: f"cost grows as n^{x:.2f}" for name, x in slopes.items()})
    return {"grid": cells, "slopes": slopes}


if __name__ == "__main__":
    main()
