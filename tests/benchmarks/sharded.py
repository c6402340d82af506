"""A llama of 2 billion parameters that two processes share out: what a call adds to a forward pass.

    python -m tests.benchmarks.sharded

Prints a table, in about a minute; the model (4 GB) is made once in a temporary folder. Beside
`plan.py`'s formulas stand what was counted, and the time over a plain forward pass, shared alike.
"""

import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.benchmarks.models import LARGER, larger
from tests.benchmarks.size import UNITS, Size, handed_over, kept, readable
from tests.benchmarks.timing import inputs, medians
from tl_dla import direct_logit_attribution, load_model
from tl_dla.core.saved import nbytes

PROCESSES, LENGTH = 2, 128


class Counted(TorchDispatchMode):
    """Counts the bytes that this process hands to the others."""

    n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As `func` does."""
        out = func(*args, **(kwargs or {}))
        if any(name in func.__name__ for name in ("all_gather", "all_reduce", "allreduce")):
            self.n += sum(x.nbytes for x in tree_leaves(args) if isinstance(x, torch.Tensor))
        return out


@contextmanager
def _together() -> Iterator[int]:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    yield torch.distributed.get_rank()
    torch.distributed.destroy_process_group()


def measure() -> None:
    """One of the processes: measures, and the first prints a line for each unit."""
    from transformers.distributed import DistributedConfig

    with _together() as rank, torch.no_grad():
        model = load_model(
            transformers.AutoModelForCausalLM.from_pretrained(
                larger(),
                dtype=torch.bfloat16,
                distributed_config=DistributedConfig(tp_plan="auto"),
            )
        )
        data, size = inputs(model, 1, LENGTH), Size.of(model, 2)

        def call(unit: str) -> Any:
            question = data["tokens"], data["answer"], data["incorrect"]
            return direct_logit_attribution(model, *question, unit=unit)

        calls = {unit: lambda unit=unit: call(unit) for unit in UNITS}
        times = medians(3, forward=lambda: model(data["tokens"]), **calls)
        # A call unembeds one position; how a plain pass that does so is counted beside it.
        last = model.unembed.register_forward_pre_hook(lambda _module, given: (given[0][:, -1:],))
        with Counted() as plain:
            model(data["tokens"])
        last.remove()
        for unit in UNITS:
            with Counted() as counted:
                result = call(unit)
            sizes = (
                kept(size, unit, LENGTH, 1),
                nbytes(result),
                handed_over(size, unit, LENGTH, 2, PROCESSES),
                counted.n - plain.n,
            )
            rows = f"{size.rows(unit, LENGTH):,} | {len(result.labels):,}"
            over = f"{times[unit] / times['forward']:.2f}"
            if rank == 0:
                print("|", unit, "|", rows, "|", " | ".join(map(readable, sizes)), "|", over, "|")
        if rank == 0:
            print(f"forward: {readable(plain.n)}, {times['forward']:.2f} s")


def table() -> list[str]:
    """Its lines, and at last what a plain forward pass hands over and takes."""
    larger()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(PROCESSES), "-m", "tests.benchmarks.sharded", "one"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [line for line in done.stdout.splitlines() if line.startswith(("|", "forward"))]


if __name__ == "__main__":
    if sys.argv[1:] == ["one"]:
        measure()
    else:
        print(f"{LARGER}:", *table(), sep="\n")
