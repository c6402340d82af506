"""How the cost grows: every size beside its double, as the exponent of a power law.

    python -m tests.benchmarks.growth

What is timed is attribution to heads at all positions from a given cache, so that the forward pass,
which has exponents of its own, is not in it.
"""

import math
import statistics
from typing import Any

import torch

from tests.benchmarks.models import random_gpt2
from tests.benchmarks.timing import inputs, medians
from tl_dla import direct_logit_attribution

SIZES: dict[str, list[int]] = {
    "layers": [4, 8, 16, 32],
    "heads": [4, 8, 16, 32],
    "positions": [128, 256, 512, 1024],
    "candidates": [1, 4, 16, 64],
}
USUAL = {"layers": 8, "heads": 8, "positions": 256, "candidates": 1}


def exponents(runs: int) -> dict[str, dict[str, Any]]:
    """Seconds at each size, and the exponent, for each thing that can grow."""
    return {what: _growth(what, sizes, runs) for what, sizes in SIZES.items()}


def _growth(what: str, sizes: list[int], runs: int) -> dict[str, Any]:
    times = [_seconds(USUAL | {what: size}, runs) for size in sizes]
    return {"sizes": sizes, "seconds": times, "exponent": slope(sizes, times)}


def _seconds(size: dict[str, int], runs: int) -> float:
    model = random_gpt2(n_layer=size["layers"], n_head=size["heads"], n_embd=512, vocab_size=4000)
    tokens = inputs(model, 4, size["positions"])["tokens"]
    candidates = torch.arange(100, 100 + size["candidates"])
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
    run = lambda: direct_logit_attribution(  # noqa: E731
        model, None, candidate_tokens=candidates, unit="head", pos=None, cache=cache
    )
    return medians(runs, run=run)["run"]


def slope(xs: list[int], ys: list[float]) -> float:
    """The exponent of growth: the least-squares slope of log y against log x."""
    lx, ly = [math.log(x) for x in xs], [math.log(y) for y in ys]
    mx, my = statistics.mean(lx), statistics.mean(ly)
    top = sum((x - mx) * (y - my) for x, y in zip(lx, ly, strict=True))
    return top / sum((x - mx) ** 2 for x in lx)


if __name__ == "__main__":
    for what, found in exponents(runs=2).items():
        print(f"{what} {found['sizes']}: cost grows as n^{found['exponent']:.2f}")
