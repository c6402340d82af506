"""How many prompts a second a dataset takes, and how much memory.

    python -m tests.benchmarks.dataset                    SmolLM2, 200 IOI prompts, heads
    python -m tests.benchmarks.dataset --model demo --prompts 1000
    python -m tests.benchmarks.dataset --memory           peak memory at 1,000 and 10,000 prompts

Beside a loop of single calls, and TransformerLens's own tool called once per prompt, which is all
it can do with prompts of different lengths. The model is folded, because that tool needs it.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console

from tests.benchmarks.memory import peak, print_peak
from tl_dla import attribute_dataset, direct_logit_attribution, load_model
from tl_dla.datasets.ioi import ioi_prompts

console = Console()


def rate(run: Callable[[], Any], prompts: int) -> float:
    start = time.perf_counter()
    run()
    return prompts / (time.perf_counter() - start)


def plain(model: Any, prompts: list[list[int]], batch_size: int) -> None:
    """The model on the same batches, and no more."""
    prompts = sorted(prompts, key=len)
    for start in range(0, len(prompts), batch_size):
        some = prompts[start : start + batch_size]
        longest = len(some[-1])
        padded = torch.tensor([one + [0] * (longest - len(one)) for one in some])
        with torch.no_grad():
            model(padded.to(model.cfg.device))


def throughput(model_name: str, prompts: int, batch_size: int) -> None:
    from transformer_lens.tools.analysis import direct_logit_attribution as theirs

    model = load_model(model_name)
    if hasattr(model, "enable_compatibility_mode"):
        model.enable_compatibility_mode(disable_warnings=True)
    examples = ioi_prompts(model, prompts)

    def dataset(out: str | None = None) -> None:
        attribute_dataset(
            model, examples, unit="head", batch_size=batch_size, out=out, progress=False
        )

    def loop(tool: Callable[..., Any]) -> None:
        for e in examples:
            tool(model, e["prompt"], e["answer"], e["incorrect"], unit="head")

    def forwards() -> None:
        plain(model, [model.to_tokens(e["prompt"])[0].tolist() for e in examples], batch_size)

    loop_of = {
        "plain forward passes, the same batches": forwards,
        "attribute_dataset": dataset,
        "attribute_dataset, stored": lambda: dataset(tempfile.mkdtemp() + "/run"),
        "direct_logit_attribution, one by one": lambda: loop(direct_logit_attribution),
        "TransformerLens's tool, one by one": lambda: loop(theirs),
    }
    dataset()  # warm
    for name, run in loop_of.items():
        console.print(f"{name:<40} {rate(run, prompts):8.1f} prompts/s", highlight=False)


def _print_peak(prompts: int) -> None:
    """Of a stream of examples, stored."""
    from tests.zoo.build import boot

    torch.set_num_threads(1)
    model = boot("gpt2")

    def stream() -> Any:
        for i in range(prompts):
            tokens = [3 + (i * j) % 90 for j in range(5 + i % 12)]
            yield {"prompt": tokens, "answer": 5, "incorrect": [7, 8], "group": str(i % 2)}

    out = tempfile.mkdtemp() + "/run"
    options = dict(unit="head", batch_size=16, progress=False)
    first = partial(attribute_dataset, model, list(stream())[:64], **options)
    print_peak(first, partial(attribute_dataset, model, stream(), out=out, **options))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        _print_peak(args.peak)
    elif args.memory:
        for prompts in (1_000, 10_000):
            mb = peak("tests.benchmarks.dataset", "--peak", str(prompts))
            print(f"{prompts:>7,} prompts: {mb} MB above the first 64")
    else:
        throughput(args.model, args.prompts, args.batch_size)


if __name__ == "__main__":
    main()
