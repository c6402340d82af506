"""The subcommands: arguments in, an `Output` out."""

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

import torch
import transformers
from jaxtyping import Float
from torch import Tensor

from tl_dla.analyses.logit_lens import logit_lens
from tl_dla.attribution import DirectLogitAttribution, direct_logit_attribution
from tl_dla.cli.answers import (
    Prediction,
    attribution_output,
    check_output,
    completion_output,
    dataset_output,
    lens_output,
    rest_warning,
)
from tl_dla.cli.arguments import GENERATED
from tl_dla.cli.messages import tell
from tl_dla.cli.output import Output, require_page, require_writable, wrote
from tl_dla.core.result import Attribution
from tl_dla.errors import ArgumentError, TlDlaError
from tl_dla.inputs.positions import Positions, read_positions
from tl_dla.inputs.selection import require_unit
from tl_dla.inputs.tokens import Prompts, read_prompts, token_strings
from tl_dla.loading import load_model

if TYPE_CHECKING:
    from tl_dla.analyses.answer import AnswerAttribution


def attribute(args: argparse.Namespace) -> Output:
    """`tl-dla attribute`."""
    require_writable(args, page=args.completion is not None)
    if args.max_new_tokens is not None and args.completion is not GENERATED:
        raise ArgumentError("--max-new-tokens is for --completion without TEXT.")
    if args.completion is not None:
        answer = completed(args)
        other = answer.baseline_steps
        tokens = [said(answer), *([] if other is None else predictions(other))]
        return completion_output(answer, tokens, args)
    result = attributed(args)
    audit = None
    if args.audit:
        audit = result.audit(args.top or 10, progress=sys.stderr.isatty())
    return attribution_output(result, predictions(result)[0], audit, args)


def compare(args: argparse.Namespace) -> Output:
    """`tl-dla compare`."""
    from tl_dla.cli.compare import comparison_output, other_side

    require_writable(args, page=True)
    read_stdin(args)
    other = other_side(args)
    a = attributed(args)
    if args.answer is None:  # the first one's prediction is the answer of both
        other.answer = int(a.targets.ids.flatten()[0])
    b = attributed(other)
    return comparison_output(a, b, args, other)


def lens(args: argparse.Namespace) -> Output:
    """`tl-dla lens`."""
    require_writable(args)
    read_stdin(args)
    model = load(args)
    readings = logit_lens(
        model, args.prompt, args.answer, incorrect(args), pos=args.pos, top_k=args.top
    )
    return lens_output(readings, args)


def scores(args: argparse.Namespace) -> Output:
    """`tl-dla scores`."""
    from tl_dla.analyses.attention_scores import attribute_attention
    from tl_dla.cli.scores import scores_output

    require_writable(args)
    require_unit(args.unit)
    read_stdin(args)
    places = dict(query=args.query, key=args.key, versus=args.versus)
    result = attribute_attention(load(args), args.prompt, args.head, **places, unit=args.unit)
    return scores_output(result, args)


def inputs(args: argparse.Namespace) -> Output:
    """`tl-dla inputs`."""
    from tl_dla.cli.inputs import inputs_output
    from tl_dla.input_attribution import attribute_inputs

    require_writable(args, page=True)
    read_stdin(args)
    model = load(args)
    answer = asked(model, args)
    result = attribute_inputs(
        model, args.prompt, answer, incorrect(args), mlp=args.mlp, pos=args.pos
    )
    return inputs_output(result, predictions(result)[0], args)


def report(args: argparse.Namespace) -> None:
    """`tl-dla report`."""
    from tl_dla.report.page import write_report

    require_page(args)
    result = attributed(args)
    tell(f"report: {result.reconstruction}")
    if warning := rest_warning(result.labels, result.kinds, result.attribution.flatten(1)):
        tell(f"warning: {warning}")
    audit = result.audit(progress=sys.stderr.isatty()) if args.audit else None
    path = write_report(result, args.out, k=args.top, audit=audit, command=args.command)
    wrote(path, args)


def check(args: argparse.Namespace) -> Output:
    """`tl-dla check`."""
    from tl_dla.analyses.check_model import check_model

    require_writable(args)
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

    require_writable(args)
    return dataset_output(summarize(args.folder), args)


# ---- what they share ---------------------------------------------------------------------------


def attributed(args: argparse.Namespace) -> DirectLogitAttribution:
    """The attribution that the arguments ask for; of the model's own prediction by default."""
    require_unit(args.unit)
    read_stdin(args)
    model = load(args)
    answer = asked(model, args) if args.candidates is None else args.answer
    return direct_logit_attribution(
        model,
        args.prompt,
        answer,
        incorrect(args),
        candidate_tokens=args.candidates,
        unit=args.unit,
        pos=args.pos,
        layers=args.layers,
        heads=args.heads,
    )


def completed(args: argparse.Namespace) -> "AnswerAttribution":
    """The attribution of `--completion`, and of the text in `--incorrect` as its baseline.

    Raises:
        ArgumentError: for flags that have no meaning beside a completion.
    """
    from tl_dla.analyses.completion import attribute_answer, attribute_completion

    require_unit(args.unit)
    baseline: Any = incorrect(args)
    if isinstance(baseline, int | list):
        raise ArgumentError(
            "--completion is compared with one text: give one --incorrect TEXT, mean or runner-up."
        )
    if args.completion is GENERATED and baseline not in (None, "mean", "runner-up"):
        raise ArgumentError(
            "What the model says is compared with --incorrect mean or runner-up; give --completion"
            " TEXT to compare it with another text."
        )
    if args.pos != -1 or args.audit:
        flag = "--audit" if args.audit else "--pos"
        raise ArgumentError(f"{flag} does not go with --completion, which follows the prompt.")
    read_stdin(args)
    model, options = load(args), dict(unit=args.unit, layers=args.layers, heads=args.heads)
    if args.completion is not GENERATED:
        return attribute_answer(model, args.prompt, args.completion, baseline, **options)
    if args.max_new_tokens is not None:
        options["max_new_tokens"] = args.max_new_tokens
    return attribute_completion(model, args.prompt, baseline=baseline, **options)


def asked(model: Any, args: argparse.Namespace) -> str | int:
    """The answer that is given; without one, the model's own prediction, which is said."""
    if args.answer is not None:
        return args.answer
    prompts = read_prompts(model, args.prompt)
    after = next_token(model, prompts, read_positions(args.pos, prompts))[0, 0]
    answer = int(after.argmax())
    [token] = token_strings(model, torch.tensor([answer]))
    tell(f"{args.subcommand}: no --answer, so this is the model's own prediction, {token!r}")
    return answer


def read_stdin(args: argparse.Namespace) -> None:
    """The prompt `-` is what comes on stdin, without its last line break."""
    if args.prompt == "-":
        if sys.stdin is None:
            raise ArgumentError("The prompt - is read from stdin, which is closed.")
        args.prompt = sys.stdin.read().removesuffix("\n")


def incorrect(args: argparse.Namespace) -> str | int | list[str | int] | None:
    """One incorrect answer by itself (`mean` is the vocabulary's mean), several as a list.

    Raises:
        ArgumentError: for words that name a baseline, where they cannot.
    """
    given = args.incorrect or []
    if getattr(args, "completion", None) is None:
        if "mean" in given and len(given) > 1:
            raise ArgumentError(
                "--incorrect mean is the mean of the whole vocabulary and stands alone; give the"
                " token of that name by --incorrect-id."
            )
        if "runner-up" in given:
            raise ArgumentError(
                "--incorrect runner-up, the likeliest other token of each, is for --completion."
            )
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
            reason = str(error).splitlines()[0].partition(". ")[0]  # PyTorch goes on for pages
            raise ArgumentError(f"--device {args.device!r} cannot be used: {reason}") from error
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


@torch.no_grad()
def next_token(
    model: Any, prompts: Prompts, positions: Positions
) -> Float[Tensor, "batch pos vocab"]:
    """The model's own probabilities of what comes after each position."""
    return positions.take(model(prompts.packed, return_type="logits")).float().softmax(-1)


def said(answer: "AnswerAttribution") -> list[Prediction]:
    """How likely the model found each token of an answer, as it was attributed."""
    n = len(answer.answers[0])  # a text as baseline may have more tokens
    numbers = answer.steps.targets.ids[0, :n, 0], answer.log_probs[0, :n].exp(), answer.ranks[0, :n]
    ids, probabilities, ranks = (x.tolist() for x in numbers)
    rows = zip(ids, answer.answers[0], probabilities, ranks, strict=True)
    return [Prediction(*one) for one in rows]


def predictions(result: Attribution) -> list[list[Prediction]]:
    """How likely the model finds each of the tokens attributed, prompt by prompt."""
    positions, ids = result.positions, result.targets.ids
    after = next_token(result.model, result.prompts, positions)
    ids = ids.to(after.device).expand(*after.shape[:2], -1)
    probabilities = after.gather(-1, ids)
    ranks = (after[:, :, None] > probabilities[..., None]).sum(-1)
    found = []
    for valid, *columns in zip(positions.valid, ids, probabilities, ranks, strict=True):
        flat = [column[valid.to(column.device)].flatten() for column in columns]
        texts = token_strings(result.model, flat[0])
        rows = zip(*(column.tolist() for column in flat), texts, strict=True)
        found.append([Prediction(id, text, p, rank) for id, p, rank, text in rows])
    return found
