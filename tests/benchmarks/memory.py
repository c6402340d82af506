"""Peak memory of a process that does one thing, in MB above what the loaded model takes.

python -m tests.benchmarks.memory --tool ours --unit head --pos all
python -m tests.benchmarks.memory --model smollm2 --batch 1 --tokens 3512 --completion 512
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.models import LLAMA, MODELS, boot
from tests.benchmarks.timing import inputs, ours, theirs
from tl_dla import attribute_completion

TOOLS = ("forward", "ours", "theirs")


def above_forward(tool: str, **options: Any) -> float | None:
    """Peak memory of a tool above that of a plain forward pass, each in a process of its own."""
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    peaks = [peak("tests.benchmarks.memory", "--tool", name, *words) for name in (tool, "forward")]
    return None if None in peaks else peaks[0] - peaks[1]


def peak(module: str, *words: str) -> float | None:
    """What a module prints that calls `print_peak`, run in a process of its own."""
    # What is freed goes back to the system at once, so that no slack of the allocator is measured.
    freed = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    env = os.environ | freed | {"MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-m", module, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    printed = done.stdout.split()
    return float(printed[-1]) if printed else None


def print_peak(first: Callable[[], Any], call: Callable[[], Any]) -> None:
    """The peak of a call, after a first one that loads what is loaded once.

    Prints nothing where the system does not tell (it is Linux that does).
    """
    reset = Path("/proc/self/clear_refs")  # forgets the peak of loading the model
    if not reset.exists():
        return
    first()
    reset.write_text("5")
    before = _high_water_mark()
    call()
    print(_high_water_mark() - before)


def _high_water_mark() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1000


def main() -> None:
    """Prints the peak."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="gpt2-size", choices=(*MODELS, LLAMA))
    parser.add_argument("--tool", default="ours", choices=TOOLS)
    parser.add_argument("--unit", default="head")
    parser.add_argument("--pos", default="all", choices=["all", "last"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--baseline", default="foil", help="of ours: foil, mean, or 64 candidates")
    parser.add_argument("--completion", type=int, help="how many of the tokens are one, for ours")
    args = parser.parse_args()
    model = boot(args.model)
    data, pos = inputs(model, args.batch, args.tokens), None if args.pos == "all" else -1

    def call() -> None:
        if args.tool == "forward":
            model(data["tokens"])
        elif args.completion:
            prompt, said = data["tokens"][0].tensor_split([-args.completion])
            attribute_completion(model, prompt, said, unit=args.unit)
        elif args.tool == "theirs":
            theirs(model, data, args.unit, pos)
        else:
            ours(model, data, args.unit, pos, baseline=args.baseline)

    with torch.no_grad():
        print_peak(lambda: model(data["tokens"][:1, :8]), call)


if __name__ == "__main__":
    main()
