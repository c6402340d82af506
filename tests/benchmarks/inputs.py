"""What `attribute_inputs` costs, beside a forward and a backward pass of the same model.

    python -m tests.benchmarks.inputs                    batch 4 × 256, last position
    python -m tests.benchmarks.inputs --growth           how it grows with positions and layers

A backward pass by autograd, to every parameter as in training, and to the embeddings alone; times
are medians of runs that alternate. Peak memory is that of a process of its own above the loaded
model.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.growth import USUAL, print_growth, sized
from tests.benchmarks.memory import peak, print_peak
from tests.benchmarks.models import MODELS, boot
from tests.benchmarks.timing import inputs, medians
from tl_dla import attribute_inputs

BATCH, TOKENS = 4, 256
WAYS = ("ours", "backward", "to_embeddings")


def calls(model: Any, data: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """Each way to what the tokens did to the logit difference at the last position."""
    tokens, rows = data["tokens"], torch.arange(len(data["tokens"]))

    def autograd(to_parameters: bool) -> None:
        model.requires_grad_(to_parameters)

        def start(x: Tensor, hook: Any) -> Tensor:
            return x if x.requires_grad else x.requires_grad_(True)

        with torch.enable_grad(), model.hooks(fwd_hooks=[("hook_embed", start)]):
            last = model(tokens)[:, -1]
            difference = last[rows, data["answer"]] - last[rows, data["incorrect"]]
            difference.sum().backward()
        model.zero_grad(set_to_none=True)

    return {
        "ours": lambda: attribute_inputs(model, tokens, data["answer"], data["incorrect"]),
        "backward": lambda: autograd(True),
        "to_embeddings": lambda: autograd(False),
    }


def _print_peak(name: str, way: str) -> None:
    model = boot(name)
    print_peak(
        calls(model, inputs(model, 1, 8))[way], calls(model, inputs(model, BATCH, TOKENS))[way]
    )


def _of_size(size: dict[str, int]) -> Callable[[], Any]:
    model = sized(size)
    return calls(model, inputs(model, 2, size["positions"]))["ours"]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, help="both by default")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--peak", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        return _print_peak(args.model, args.peak)
    if args.growth:
        sizes = {"positions": [64, 128, 256, 512], "layers": [4, 8, 16]}
        return print_growth(_of_size, USUAL | {"positions": 128}, sizes, args.runs)
    for name in [args.model] if args.model else MODELS:
        model = boot(name)
        times = medians(args.runs, **calls(model, inputs(model, BATCH, TOKENS)))
        module = "tests.benchmarks.inputs"
        peaks = {way: peak(module, "--model", name, "--peak", way) for way in WAYS}
        for way in WAYS:
            memory = "" if peaks[way] is None else f", peak {peaks[way]:.0f} MB"
            over = times["ours"] / times[way]
            print(f"{name}, {way}: {times[way]:.2f} s (ours over it: {over:.2f}){memory}")


if __name__ == "__main__":
    main()
