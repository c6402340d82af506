"""One dataset run in a process of its own, to be launched in several or killed.

torchrun --nproc_per_node 2 -m tests.support.dataset_worker MODEL EXAMPLES OUT
"""

import sys

import torch

from tl_dla.datasets.dataset import attribute_dataset
from tl_dla.datasets.examples import read_examples
from tl_dla.loading import load_model


def attribute(model: str, examples: str, out: str, unit: str = "head", batch_size: int = 4):
    torch.set_num_threads(1)
    return attribute_dataset(
        load_model(model, device="cpu"),
        read_examples(examples),
        unit=unit,
        batch_size=batch_size,
        out=out,
        progress=False,
    )


if __name__ == "__main__":
    result = attribute(*sys.argv[1:4])
    process = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    names = ("mean", "std", "sem", "low", "high", "sign_agreement", "cancellation")
    seen = {name: getattr(result.rows, name) for name in names}
    torch.save({**seen, "n": result.n, "skipped": result.skipped}, f"{sys.argv[3]}-{process}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
