"""The answer of `tl-dla compare`: two prompts, or two models, side by side."""

import argparse

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

import tl_dla.cli.tables as tables
from tl_dla.analyses.comparison import Comparison, compare
from tl_dla.cli.answers import rows_of
from tl_dla.cli.output import Output
from tl_dla.core.result import Attribution
from tl_dla.errors import ArgumentError
from tl_dla.figures.changes import COLUMNS, lines


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


def comparison_output(
    a: Attribution, b: Attribution, args: argparse.Namespace, other: argparse.Namespace
) -> Output:
    """Both runs and their differences, for one prompt at one position; the arguments of both."""
    comparison = compare(a, b)
    return Output(
        lambda: _table(comparison, args, other),
        lambda: _record(comparison, args, other),
        comparison.to_dataframe,
        page=comparison.report,
    )


def _record(
    comparison: Comparison, args: argparse.Namespace, other: argparse.Namespace
) -> dict[str, object]:
    numbers = {name: getattr(comparison, name)[:, 0].tolist() for name in COLUMNS}
    a, b = (float(logit[0]) for logit in comparison.logits)
    certificate = comparison.reconstruction
    return {
        "model": args.model,
        "against": other.model,
        "prompt": args.prompt,
        "corrupted": other.prompt,
        "target": comparison.target,
        **rows_of(comparison),
        **numbers,
        "logit": {"a": a, "b": b, "change": float(comparison.logit[0])},
        "reconstruction": {
            "error": certificate.max_error,
            "tolerance": float(certificate.tolerance[0]),
            "passed": certificate.passed,
        },
    }


def _table(
    comparison: Comparison, args: argparse.Namespace, other: argparse.Namespace
) -> RenderableType:
    shown = comparison.changes()
    what = f'what changed in the logit of {comparison.target}, unit="{comparison.unit}"'
    sides = [f"a: {args.prompt!r}", f"b: {other.prompt!r}"]
    if args.against is not None:
        sides = [f"{sides[0]} on {args.model}", f"{sides[1]} on {other.model}"]
    heading = [Text(what, style="bold"), *map(Text, sides)]
    table = Table(box=None, pad_edge=False)
    for name in ("row", *COLUMNS):
        table.add_column(Text(name), justify="right", no_wrap=True)
    for line in lines(shown, args.top):
        style = "bold" if line.total else None
        table.add_row(Text(line.label), *map(tables.signed, line.values), style=style)
    caution = tables.observed("`tl-dla attribute --audit`")
    certified = tables.certified(comparison.reconstruction, "", caution)
    return Group(*heading, Text(), table, Text(), certified)
