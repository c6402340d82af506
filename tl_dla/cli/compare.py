"""The answer of `tl-dla compare`: two prompts, or two models, side by side."""

import argparse
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

import tl_dla.cli.tables as tables
from tl_dla.analyses.comparison import compare
from tl_dla.cli.output import Output
from tl_dla.core.result import Attribution
from tl_dla.errors import ArgumentError
from tl_dla.figures.changes import COLUMNS, lines

if TYPE_CHECKING:
    from tl_dla.analyses.comparison import Comparison


def other_side(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments of the second run.

    Raises:
        ArgumentError: where it is the first one once more.
    """
    args.candidates = None
    if args.corrupted is None and args.against is None:
        raise ArgumentError(
            "There is nothing to compare with: give --corrupted PROMPT, --against MODEL, or both."
        )
    own = {
        "prompt": args.prompt if args.corrupted is None else args.corrupted,
        "model": args.model if args.against is None else args.against,
    }
    return argparse.Namespace(**{**vars(args), **own})


def comparison_output(a: Attribution, b: Attribution, args: argparse.Namespace) -> Output:
    """Both runs and their differences, for one prompt at one position."""
    comparison = compare(a, b)
    return Output(
        lambda: _table(comparison, args),
        lambda: _record(comparison, args),
        comparison.to_dataframe,
        page=comparison.report,
    )


def _record(comparison: "Comparison", args: argparse.Namespace) -> dict[str, object]:
    numbers = {name: getattr(comparison, name)[:, 0].tolist() for name in COLUMNS}
    a, b = (float(logit[0]) for logit in comparison.logits)
    certificate = comparison.reconstruction
    return {
        "model": args.model,
        "against": args.against or args.model,
        "prompt": args.prompt,
        "corrupted": args.corrupted or args.prompt,
        "target": comparison.target,
        "unit": comparison.unit,
        "labels": comparison.labels,
        "kinds": comparison.kinds,
        "layers": comparison.layers,
        **numbers,
        "logit": {"a": a, "b": b, "change": float(comparison.logit[0])},
        "reconstruction": {
            "error": certificate.max_error,
            "tolerance": float(certificate.tolerance[0]),
            "passed": certificate.passed,
        },
    }


def _table(comparison: "Comparison", args: argparse.Namespace) -> RenderableType:
    shown = comparison.changes()
    what = f'what changed in the logit of {comparison.target}, unit="{comparison.unit}"'
    heading = [Text(what, style="bold"), *map(Text, _sides(args))]
    table = Table(box=None, pad_edge=False)
    for name in ("row", *COLUMNS):
        table.add_column(Text(name), justify="right", no_wrap=True)
    for line in lines(shown, args.top):
        style = "bold" if line.total else None
        table.add_row(Text(line.label), *map(tables.signed, line.values), style=style)
    measured = "`tl-dla attribute --audit`"
    certified = tables.certified(comparison.reconstruction, "", measured)
    return Group(*heading, Text(), table, Text(), certified)


def _sides(args: argparse.Namespace) -> list[str]:
    """What the two runs are, with the models where there are two."""
    a, b = (f"{name}: {prompt!r}" for name, prompt in zip("ab", _prompts(args), strict=True))
    if args.against is None:
        return [a, b]
    return [f"{a} on {args.model}", f"{b} on {args.against}"]


def _prompts(args: argparse.Namespace) -> tuple[str, str]:
    return args.prompt, args.prompt if args.corrupted is None else args.corrupted
