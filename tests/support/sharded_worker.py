"""One process of several that share a model out, to be launched in two.

torchrun --nproc_per_node 2 -m tests.support.sharded_worker FOLDER...

FOLDER ends in the name of the model's way of being shared out: each process saves what it finds
there as FOLDER/0.pt or FOLDER/1.pt, and the sentences by which it was refused.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import transformers
from jaxtyping import install_import_hook

with install_import_hook("tl_dla", "beartype.beartype"):
    import tl_dla

TOKENS = torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(3))
ANSWERS, INCORRECT = torch.tensor([5, 9]), torch.tensor([7, 20])
UNITS = ("component", "layer", "head", "source", "neuron")
QUESTION = (TOKENS, ANSWERS, INCORRECT)


def questions(model: Any) -> dict[str, torch.Tensor]:
    """What is asked of a model, shared out or not."""
    dla = tl_dla.direct_logit_attribution
    found = {unit: dla(model, *QUESTION, unit=unit).attribution for unit in UNITS}
    _, cache = model.run_with_cache(TOKENS)
    for unit in ("component", "head", "source"):
        result = dla(model, TOKENS, ANSWERS, INCORRECT, unit=unit, cache=cache)
        found[f"{unit} from a cache"] = result.attribution
    padded = (TOKENS * (torch.arange(11) >= torch.tensor([[0], [4]])), ANSWERS, "mean")
    mask = (torch.arange(11) >= torch.tensor([[0], [4]])).long()
    result = dla(model, *padded, unit="source", pos=None, attention_mask=mask)
    found["everywhere, padded, against the mean"] = result.attribution
    found["audit"] = dla(model, *QUESTION).audit(progress=False).total
    inputs = tl_dla.attribute_inputs(model, *QUESTION)
    found["inputs"] = inputs.attribution
    for unit, lines in (("component", "tangent"), ("head", "frozen")):
        found[f"effects of {unit}s"] = inputs.effects(unit, lines=lines).attribution
    why = tl_dla.attribute_attention(model, TOKENS[:1], "L1H3", query=9, key=3, versus=2)
    found["attention"] = why.score
    found["lens"] = tl_dla.logit_lens(model, *QUESTION[:2]).values
    found["vectors"] = tl_dla.decompose(cache, "head").vectors
    return found


def refusals(model: Any) -> dict[str, str]:
    """The sentences that say what cannot be asked."""
    by_head = tl_dla.direct_logit_attribution(model, *QUESTION, unit="head")
    rank = torch.distributed.get_rank()
    cases: dict[str, Callable[[], Any]] = {
        "ablate": lambda: tl_dla.ablate(by_head, ["L0H3"]),
        "gradient": lambda: tl_dla.attribute_inputs(model, *QUESTION).effects(
            "head", lines="tangent"
        ),
        "dataset": lambda: tl_dla.attribute_dataset(model, [{"prompt": [4, 5], "answer": 5}]),
        "other prompts": lambda: tl_dla.direct_logit_attribution(model, TOKENS.roll(rank), ANSWERS),
    }
    return {name: _refused(case) for name, case in cases.items()}


def _refused(case: Callable[[], Any]) -> str:
    try:
        case()
    except tl_dla.TlDlaError as error:
        return str(error)
    return "no error"


def shared_out(folder: Path) -> Any:
    """A model of transformers, shared out as the folder's name says."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    if folder.name.endswith("-tp"):
        from transformers.distributed import DistributedConfig

        return load(folder, distributed_config=DistributedConfig(tp_plan="auto")).eval()
    from torch.distributed.fsdp import fully_shard

    model = load(folder).eval()
    for block in model.transformer.h if hasattr(model, "transformer") else model.model.layers:
        fully_shard(block)
    return fully_shard(model)


def main() -> None:
    """Asks every model, and saves the answers."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    for folder in map(Path, sys.argv[1:]):
        inner = shared_out(folder)
        try:
            model = tl_dla.load_model(inner)
        except tl_dla.UnsupportedModelError as error:
            torch.save({"load": str(error)}, folder / f"{rank}.pt")
            continue
        found: dict[str, Any] = questions(model)
        if folder.name.endswith("-tp"):
            found["refused"] = refusals(model)
        else:  # each process may run prompts of its own
            own = (TOKENS.roll(rank, 1), ANSWERS + rank, INCORRECT)
            result = tl_dla.direct_logit_attribution(model, *own, unit="neuron")
            found["own prompts"] = result.attribution
        torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
