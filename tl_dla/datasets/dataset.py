"""From one prompt to a dataset: attribute thousands of prompts, and what they have in common.

One pass per batch, one shard of Parquet per batch, one sum over them at the end (see `examples.py`,
`shards.py` and `statistics.py`). What is true of one prompt is often not true of the task: signs
flip, and means hide it; so every mean comes with its spread, the share of prompts that agree with
its sign, and how much cancels.

Under `torchrun --nproc_per_node N` or `accelerate launch`, the processes share the windows of
batches and each writes its own shards; sums meet once, at the end. They see one output folder (each
host its own, where there is no common disk).
"""

import os
import warnings
from collections.abc import Iterable, Mapping, Sized
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm.auto import tqdm

from tl_dla.core.certificate import Check, Reconstruction, require_check
from tl_dla.core.result import Attribution
from tl_dla.core.run import run
from tl_dla.datasets.examples import Batch, Example, Rejected, batches, share, windows
from tl_dla.datasets.manifest import make_manifest, read_manifest
from tl_dla.datasets.shards import Folder, Line, RowNames, Shard, completed, stored
from tl_dla.datasets.summary import DatasetAttribution, Tally
from tl_dla.errors import ArgumentError, ReconstructionError
from tl_dla.inputs.models import (
    device_of,
    on_device,
    require_eval,
    require_model,
    scales_with_length,
)
from tl_dla.inputs.positions import read_positions
from tl_dla.inputs.query import Query
from tl_dla.inputs.selection import Unit, require_unit
from tl_dla.inputs.targets import read_targets
from tl_dla.inputs.tokens import padded
from tl_dla.model.sharded import are_sharded


def attribute_dataset(
    model: Any,
    examples: Iterable[Any],
    *,
    unit: Unit = "component",
    batch_size: int = 16,
    out: str | os.PathLike[str] | None = None,
    on_error: Literal["skip", "raise"] = "skip",
    pos: int = -1,
    include_bias: bool = True,
    check: Check = "raise",
    prepend_bos: bool | None = None,
    confidence: float = 0.95,
    progress: bool = True,
) -> DatasetAttribution:
    """Attribute every example's logit (difference), and give the statistics of each row.

    Memory does not grow with the number of examples. With `out`, each batch's rows are stored as
    soon as they are computed; the same call after a stop continues after the last whole batch and
    gives the same result. So does a call with more examples after the same ones, or with another
    batch size: what is stored is not computed again.

    Args:
        model: a `HookedTransformer` or a `TransformerBridge`, in evaluation mode. Under several
            processes each has its own; see `process_device`.
        examples: mappings with the fields `prompt`, `answer` and, where there are any, `incorrect`
            (one or several: the mean of their logits is the baseline) and `group`; a DataFrame or
            `datasets.Dataset` of them, or anything that gives them one by one. See
            `tl_dla.datasets.examples.read_examples` for files, `tl_dla.datasets.ioi` for prompts.
        unit: as in `direct_logit_attribution`.
        batch_size: how many prompts are run together.
        out: a folder for the rows of every example; its format is that of `tl_dla.datasets.shards`.
        on_error: what an example does that cannot be attributed (an answer that is no token, a
            prompt too long for the model, rows that miss the logit): `"skip"` leaves it out and
            reports its index and reason in `result.skipped` and `out/errors.jsonl`; `"raise"`
            raises.
        pos: the position attributed, counted over each prompt's real tokens.
        include_bias: as in `direct_logit_attribution`.
        check: what a failed certificate makes of an example: `"raise"` an error (see `on_error`),
            `"warn"` a warning, `"off"` nothing.
        prepend_bos: as in `model.to_tokens`.
        confidence: of the intervals of the means.
        progress: whether to show a progress bar with the rate and the time left.

    Returns:
        A `DatasetAttribution`; the same one in every process.

    Raises:
        OutputFolderError: where `out` holds something else, another run, or damaged shards.
        ArgumentError: for arguments that do not fit; for a model that processes share out; for a
            field nearly named as one that is read, or incorrect answers in some examples only;
            where no example could be attributed.
        ReconstructionError: where no example of the first batch passes its certificate.
        TlDlaError: with `on_error="raise"`, the error of the first bad example.

    Example:
        >>> from tl_dla import attribute_dataset, load_model
        >>> from tl_dla.datasets.ioi import ioi_prompts
        >>> model = load_model("demo")
        >>> result = attribute_dataset(model, ioi_prompts(model, 40), unit="head", progress=False)
        >>> result.n, sorted(result.groups)
        (40, ['ABBA', 'BABA'])
    """
    require_unit(unit)
    if on_error not in ("skip", "raise"):
        raise ArgumentError(f'on_error must be "skip" or "raise"; {on_error!r} was given.')
    require_check(check)
    if not isinstance(pos, int) or isinstance(pos, bool):
        raise ArgumentError(f"pos must be one integer for a dataset; {pos!r} was given.")
    if batch_size < 1:
        raise ArgumentError(f"batch_size must be at least 1; {batch_size} was given.")
    if not 0 < confidence < 1:
        raise ArgumentError(f"confidence must be between 0 and 1; {confidence} was given.")
    if isinstance(examples, str | os.PathLike | Mapping):
        raise ArgumentError(
            "examples must be a sequence of mappings or a dataset; for a file or a hub id pass"
            " read_examples(source), for a dataset of several splits one of them."
        )
    options: dict[str, Any] = {"unit": unit, "include_bias": include_bias}
    read: dict[str, Any] = {"pos": pos, "prepend_bos": prepend_bos}
    model = require_model(model)
    if are_sharded(model):
        raise ArgumentError(
            "attribute_dataset deals its batches out to the processes, and those that share this"
            " model out must all run each batch: call direct_logit_attribution batch by batch."
        )
    manifest = make_manifest(model, **options, **read, check=check)
    require_eval(model)
    process, processes = _join(model)
    folder = None if out is None else Folder(out, manifest)
    n = len(examples) if isinstance(examples, Sized) else None
    equal_lengths = scales_with_length(model)

    tally = Tally()
    bar = tqdm(
        total=None if n is None else share(n, batch_size, process, processes),
        desc="attribute" if processes == 1 else f"attribute (process {process} of {processes})",
        unit=" prompts",
        disable=not progress or process > 0,
    )
    with bar:
        for window in windows(
            model, examples, batch_size, process=process, processes=processes, **read
        ):
            left = {one.index: one for one in window}
            wanted = {index: one.digest for index, one in left.items()}
            for shard in [] if folder is None else folder.read(wanted):
                tally = _add(tally, shard, on_error, bar)
                for line in shard.lines:
                    del left[line.index]
            for batch in batches(list(left.values()), batch_size, equal_lengths=equal_lengths):
                if on_error == "raise" and batch.rejected:
                    first = batch.rejected[0]
                    raise type(first.error)(f"Example {first.index}: {first.error}")
                shard = _compute(
                    model, batch, check, on_error, fresh=not tally.n, pos=pos, **options
                )
                if folder is not None:
                    folder.write(shard)
                tally = _add(tally, shard, on_error, bar)
    if processes > 1:
        from accelerate.utils import gather_object

        tally = Tally.merge(gather_object([tally]))
    result = tally.result(manifest, confidence)
    if folder is not None and process == 0:
        folder.finish(result.to_dataframe(), result.skipped, result.n + len(result.skipped))
    return result


def summarize(out: str | os.PathLike[str], *, confidence: float = 0.95) -> DatasetAttribution:
    """The statistics of a folder that `attribute_dataset` wrote, without the model.

    It has the examples of the run that was finished last. A run that stopped is summarised as far
    as it went, and so is a folder that lost a shard (`result.complete` is False).

    Raises:
        OutputFolderError: for a folder of something else, or damaged.
        ArgumentError: where it holds no attributed example.
    """
    path = Path(out)
    manifest = read_manifest(path)
    n = completed(path)
    tally = Tally()
    for shard in stored(path, manifest, n):
        tally = Tally.merge([tally, Tally.of(shard)])
    return tally.result(manifest, confidence, complete=n == tally.n + len(tally.skipped))


def process_device() -> torch.device | None:
    """The device that this process should load its model on; None for TransformerLens's choice.

    Under `torchrun` or `accelerate launch` every process has a device of its own.
    """
    if not _launched():
        return None
    local = int(os.environ.get("LOCAL_RANK", 0))
    return torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")


def _launched() -> bool:
    started = torch.distributed.is_available() and torch.distributed.is_initialized()
    return started or int(os.environ.get("WORLD_SIZE", 1)) > 1


def _join(model: Any) -> tuple[int, int]:
    """Which process this is, and of how many.

    A single process is left alone: `accelerate` would fix the device for all the session does next.
    """
    if not _launched():
        return 0, 1
    from accelerate import PartialState

    on_cpu = device_of(model).type == "cpu"
    # The first process to finish waits for the last; the default is to give up after minutes.
    state = PartialState(cpu=on_cpu, timeout=timedelta(days=30))
    return state.process_index, state.num_processes


def _add(tally: Tally, shard: Shard, on_error: str, bar: Any) -> Tally:
    """What has been seen, with one more shard."""
    failed = [line for line in shard.lines if line.error is not None]
    if failed and on_error == "raise":
        raise ArgumentError(f"Example {failed[0].index}: {failed[0].error}")
    tally = Tally.merge([tally, Tally.of(shard)])
    bar.update(len(shard.lines))
    if tally.skipped:
        bar.set_postfix(skipped=len(tally.skipped))
    return tally


def _attribute_batch(
    model: Any, batch: Batch, unit: Unit, pos: int, include_bias: bool
) -> Attribution:
    """The attribution of the examples of one batch, not yet certified."""
    examples = batch.examples
    rows = [torch.tensor(example.tokens, device="cpu") for example in examples]
    prompts = on_device(padded(model, rows), device_of(model))
    positions = read_positions(pos, prompts)
    answers = torch.tensor([example.answer for example in examples])
    incorrect = torch.tensor([[example.incorrect] for example in examples])  # [batch, pos, several]
    wrong = incorrect if incorrect.numel() else None
    targets = read_targets(model, answers, wrong, None, len(examples), positions)
    query = Query(model, prompts, positions, targets, include_bias)
    return run(query, unit).result(Attribution)


def _compute(
    model: Any, batch: Batch, check: str, on_error: str, fresh: bool, **options: Any
) -> Shard:
    """Run a batch, and write down each example's rows or why it has none."""
    lines = [Line(**_about(one), error=str(one.error)) for one in batch.rejected]
    if not batch.examples:
        return Shard(sorted(lines, key=lambda line: line.index), None)
    result = _attribute_batch(model, batch, **options)
    base = [i for i, kind in enumerate(result.kinds) if kind != "rest"]
    extra = [i for i, kind in enumerate(result.kinds) if kind == "rest"]
    values = result.attribution.detach().float().cpu()
    logit = result.logit.float().tolist()
    miss = result.reconstruction.error.float().tolist()
    reasons = [None] * len(batch.examples) if check == "off" else failures(result.reconstruction)
    failed = [i for i, reason in enumerate(reasons) if reason is not None]
    hopeless = fresh and len(failed) == len(miss)
    if failed and check == "raise" and (on_error == "raise" or hopeless):
        example = batch.examples[failed[0]]
        raise ReconstructionError(f"Example {example.index}: {reasons[failed[0]]}")
    if failed and check == "warn":
        indices = ", ".join(str(batch.examples[i].index) for i in failed)
        warnings.warn(f"Examples {indices}: {reasons[failed[0]]}", stacklevel=3)
        reasons = [None] * len(batch.examples)
    for i, example in enumerate(batch.examples):
        if reasons[i] is not None:
            lines.append(Line(**_about(example), error=reasons[i]))
            continue
        line = Line(
            **_about(example),
            answer=example.answer,
            incorrect=example.incorrect,
            n_tokens=len(example.tokens),
            logit=logit[i],
            miss=miss[i],
            values=values[base, i],
            rest={result.labels[row]: float(values[row, i]) for row in extra},
        )
        lines.append(line)
    names = RowNames(
        tuple(result.labels[i] for i in base),
        tuple(result.kinds[i] for i in base),
        tuple(result.layers[i] for i in base),
    )
    return Shard(sorted(lines, key=lambda line: line.index), names)


def _about(one: Example | Rejected) -> dict[str, Any]:
    return dict(index=one.index, example=one.digest, group=one.group, prompt=one.prompt)


def failures(reconstruction: Reconstruction) -> list[str | None]:
    """Why each prompt of a batch fails its certificate; None for those that pass."""
    reasons: list[str | None] = [None] * len(reconstruction.expected)
    for name, part in [("The rows", reconstruction), *reconstruction.parts.items()]:
        numbers = part.reconstructed, part.expected, part.tolerance
        listed = zip(*(x.tolist() for x in numbers), strict=True)
        for i, (got, want, tolerance) in enumerate(listed):
            if reasons[i] is None and not abs(got - want) <= tolerance:  # NaN fails too
                reasons[i] = (
                    f"{name} add up to {got:.6g}, but {part.against} is {want:.6g}, where rounding"
                    f" explains {tolerance:.1g}; check_model(model, tokens) shows where."
                )
    return reasons
