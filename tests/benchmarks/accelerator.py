"""What a call takes on a GPU, in milliseconds and over a plain forward pass there.

    python -m tests.benchmarks.accelerator
    python -m tests.benchmarks.accelerator --model llama-8b

Two models with random weights: GPT-2 small's size in float32, folded, beside TransformerLens's own
tool, and a Llama of 8 billion parameters in bfloat16. Each time is a median of runs that alternate,
until the device is done; memory is the peak above what is held before the call. Of the first also
how many short prompts a second a dataset takes.
"""

import argparse
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tests.benchmarks.dataset import plain, rate
from tests.benchmarks.models import LARGEST, boot, largest
from tests.benchmarks.timing import inputs, medians, ours, theirs
from tl_dla import attribute_dataset, attribute_inputs

SIZES = {"gpt2-size": ((1, 15), (4, 256), (32, 512)), LARGEST: ((1, 128), (8, 512))}
UNITS = "component", "layer", "head", "source", "neuron"


def calls(model: Any, data: dict[str, Any], folded: bool) -> dict[str, Callable[[], Any]]:
    """Each call of the same prompts."""
    found = {unit: partial(ours, model, data, unit, -1) for unit in UNITS}
    found["head, against the mean"] = partial(ours, model, data, "head", -1, baseline="mean")
    found["head, all positions"] = partial(ours, model, data, "head", None)
    if folded:
        found["TransformerLens: head"] = partial(theirs, model, data, "head", -1)
        found["TransformerLens: head, all positions"] = partial(theirs, model, data, "head", None)
    answers = data["answer"], data["incorrect"]
    found["attribute_inputs"] = partial(attribute_inputs, model, data["tokens"], *answers)
    return found


def from_cache(model: Any, data: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """By head, from activations that are at hand."""
    _, cache = model.run_with_cache(data["tokens"])
    return {
        f"head, {name}, from a cache": partial(ours, model, data, "head", pos, cache)
        for name, pos in (("last", -1), ("all positions", None))
    }


def waited(call: Callable[[], Any]) -> Callable[[], None]:
    """The call, and the end of what it asked of the device."""

    def run() -> None:
        call()
        torch.cuda.synchronize()

    return run


def peak(call: Callable[[], Any]) -> float:
    """The peak of a call above what is held before it, in MB."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    waited(call)()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


@torch.no_grad()
def measured(model: Any, name: str, size: tuple[int, int], runs: int) -> Table:
    """The table of one model and size."""
    data = {key: x.to("cuda") for key, x in inputs(model, *size).items()}
    timed = {"forward": partial(model, data["tokens"]), **calls(model, data, name != LARGEST)}
    times = medians(runs, **{what: waited(call) for what, call in timed.items()})
    memory = {what: peak(call) for what, call in timed.items()}  # of calls that are warm
    cached = from_cache(model, data)
    times |= medians(runs, **{what: waited(call) for what, call in cached.items()})
    memory |= {what: peak(call) for what, call in cached.items()}
    table = Table(f"{name}, {size[0]} × {size[1]}", "ms", "over a forward pass", "peak MB")
    for what, took in times.items():
        ratio = took / times["forward"]
        table.add_row(what, f"{1000 * took:.1f}", f"{ratio:.2f}", f"{memory[what]:.0f}")
    return table


def dataset(model: Any, n: int = 2048) -> Table:
    """Prompts of 14 to 21 tokens by head, beside plain passes of the same batches."""
    draw = random.Random(0)
    examples = [
        {
            "prompt": [draw.randrange(100, 50_000) for _ in range(draw.randrange(14, 22))],
            "answer": draw.randrange(100, 50_000),
            "incorrect": draw.randrange(100, 50_000),
        }
        for _ in range(n)
    ]
    prompts = [e["prompt"] for e in examples]
    table = Table(
        f"{n} prompts of 14 to 21 tokens", "plain, a second", "attribute_dataset, a second"
    )
    for size in (32, 128, 512):
        runs = (
            partial(plain, model, prompts, size),
            partial(
                attribute_dataset, model, examples, unit="head", batch_size=size, progress=False
            ),
        )
        rates = [max(rate(waited(run), n) for _ in range(3)) for run in runs]
        table.add_row(f"batches of {size}", *(f"{x:.0f}" for x in rates))
    return table


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SIZES, help="both by default")
    parser.add_argument("--runs", type=int, default=7)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("There is no GPU here: python -m tests.benchmarks measures on the CPU.")
    console = Console(width=100)
    console.print(torch.cuda.get_device_name(), "PyTorch", torch.__version__)
    for name in [args.model] if args.model else SIZES:
        model = largest("cuda") if name == LARGEST else boot(name).to("cuda")
        for size in SIZES[name]:
            console.print(measured(model, name, size, args.runs))
        if name != LARGEST:
            console.print(dataset(model))
        del model


if __name__ == "__main__":
    main()
