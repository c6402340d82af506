"""How the cost grows: every size beside its double, as the exponent of a power law.

    python -m tests.benchmarks.growth

What is timed is attribution to heads at all positions from a given cache, so that the forward pass,
which has exponents of its own, is not in it.
"""

import math
import statistics
from collections.abc import Callable
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


def heads_from_cache(size: dict[str, int]) -> Callable[[], Any]:
    """The call that is timed."""
    model = sized(size)
    tokens = inputs(model, 4, size["positions"])["tokens"]
    candidates = torch.arange(100, 100 + size["candidates"])
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
    return lambda: direct_logit_attribution(
        model, None, candidate_tokens=candidates, unit="head", pos=None, cache=cache
    )


def sized(size: dict[str, int]) -> Any:
    """A GPT-2 of so many layers and heads."""
    shape = dict(n_layer=size["layers"], n_head=size["heads"], n_embd=512, vocab_size=4000)
    return random_gpt2(**shape)


def print_growth(
    call: Callable[[dict[str, int]], Callable[[], Any]],
    usual: dict[str, int],
    sizes: dict[str, list[int]],
    runs: int,
) -> None:
    """Seconds of a call at each size, the others as usual, and the exponent of their growth."""
    for what, values in sizes.items():
        times = [medians(runs, run=call(usual | {what: n}))["run"] for n in values]
        shown = ", ".join(f"{time:.2f} s" for time in times)
        print(f"{what} {values}: {shown}; grows as n^{slope(values, times):.2f}")


def slope(xs: list[int], ys: list[float]) -> float:
    """The exponent of growth: the least-squares slope of log y against log x."""
    return statistics.linear_regression(list(map(math.log, xs)), list(map(math.log, ys))).slope


if __name__ == "__main__":
    print_growth(heads_from_cache, USUAL, SIZES, runs=2)
