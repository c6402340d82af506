"""The subcommands: arguments in, an `Output` out."""

import argparse
import os
import sys
from typing import Any

import torch
import transformers

from tl_dla.analyses.logit_lens import logit_lens
from tl_dla.attribution import direct_logit_attribution
from tl_dla.cli import tell
from tl_dla.cli.output import (
    Output,
    Prediction,
    attribution_output,
    check_output,
    dataset_output,
    lens_output,
    require_writable,
)
from tl_dla.core.result import DirectLogitAttribution
from tl_dla.errors import ArgumentError, TlDlaError
from tl_dla.inputs.selection import require_unit
from tl_dla.inputs.tokens import read_positions, read_prompts, token_strings
from tl_dla.loading import load_model


def attribute(args: argparse.Namespace) -> Output:
    """`tl-dla attribute`."""
    require_writable(args.out)
    result, prediction = attributed(args)
    return attribution_output(result, prediction, args)


def lens(args: argparse.Namespace) -> Output:
    """`tl-dla lens`."""
    require_writable(args.out)
    read_stdin(args)
    model = load(args)
    readings = logit_lens(
        model, args.prompt, args.answer, incorrect(args), pos=args.pos, top_k=args.top
    )
    return lens_output(readings, args)


def report(args: argparse.Namespace) -> None:
    """`tl-dla report`."""
    from tl_dla.report.page import write_report

    require_writable(args.out)
    result, _ = attributed(args)
    tell(f"report: {result.reconstruction}")
    path = write_report(result, args.out, k=args.top, command=args.command)
    tell(f"report: wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")


def check(args: argparse.Namespace) -> Output:
    """`tl-dla check`."""
    from tl_dla.analyses.check_model import check_model

    require_writable(args.out)
    read_stdin(args)
    return check_output(check_model(load(args), args.prompt), args)


def dataset(args: argparse.Namespace) -> Output | None:
    """`tl-dla dataset`; of several processes (`torchrun -m tl_dla dataset …`) the first answers."""
    from tl_dla.datasets.dataset import attribute_dataset, process_device
    from tl_dla.datasets.examples import read_examples

    require_unit(args.unit)
    examples = read_examples(args.source, split=args.split)
    args.device = args.device or process_device()
    summary = attribute_dataset(
        load(args),
        examples,
        unit=args.unit,
        batch_size=args.batch_size,
        out=args.folder,
        on_error=args.on_error,
    )
    return dataset_output(summary, args) if int(os.environ.get("RANK", 0)) == 0 else None


def summarize(args: argparse.Namespace) -> Output:
    """`tl-dla summarize`."""
    from tl_dla.datasets.dataset import summarize

    require_writable(args.out)
    return dataset_output(summarize(args.folder), args)


# ---- what they share ---------------------------------------------------------------------------


def attributed(args: argparse.Namespace) -> tuple[DirectLogitAttribution, Prediction | None]:
    """The attribution that the arguments ask for, and the model's own prediction if that is it."""
    require_unit(args.unit)
    read_stdin(args)
    model = load(args)
    prediction = predict(model, args.prompt, args.pos) if args.answer is None else None
    if prediction is not None:
        own = f"the model's own prediction, {prediction.token!r}"
        tell(f"{args.subcommand}: no --answer, so this is {own}")
    answer = args.answer if prediction is None else prediction.id
    result = direct_logit_attribution(
        model,
        args.prompt,
        answer,
        incorrect(args),
        unit=args.unit,
        pos=args.pos,
        layers=args.layers,
        heads=args.heads,
    )
    return result, prediction


def read_stdin(args: argparse.Namespace) -> None:
    """The prompt `-` is what comes on stdin, without its last line break."""
    if args.prompt == "-":
        args.prompt = sys.stdin.read().removesuffix("\n")


def incorrect(args: argparse.Namespace) -> str | int | list[str | int] | None:
    """One incorrect answer by itself (`mean` is the vocabulary's mean), several as a list."""
    return args.incorrect[0] if args.incorrect and len(args.incorrect) == 1 else args.incorrect


def load(args: argparse.Namespace) -> Any:
    """The model asked for; whatever goes wrong is one error that names it.

    Raises:
        ArgumentError: where the model or the device cannot be used.
    """
    if args.device is not None:
        try:
            torch.empty(0, device=args.device)
        except (RuntimeError, AssertionError) as error:  # the latter: "not compiled with CUDA"
            raise ArgumentError(f"--device {args.device!r} cannot be used: {error}") from error
    if sys.stderr.isatty():
        tell(f"{args.subcommand}: loading {args.model} …")
    else:
        transformers.logging.disable_progress_bar()
    try:
        return load_model(args.model, device=args.device, dtype=getattr(torch, args.dtype))
    except (TlDlaError, ImportError):
        raise
    except Exception as error:  # each library below has errors of its own
        what = f"{type(error).__name__}: {error}"
        raise ArgumentError(f"--model {args.model!r} could not be loaded: {what}") from error


def predict(model: Any, prompt: str, pos: int) -> Prediction:
    """The model's own most likely next token after a position."""
    prompts = read_prompts(model, prompt)
    positions = read_positions(pos, prompts)
    with torch.no_grad():
        logits = model(prompts.packed, return_type="logits")
    probabilities = positions.take(logits)[0, 0].float().softmax(-1)
    best = probabilities.argmax()
    return Prediction(int(best), token_strings(model, best[None])[0], float(probabilities[best]))
