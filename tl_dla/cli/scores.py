"""The answer of `tl-dla scores`: who wrote the query, and who wrote the keys."""

import argparse
from dataclasses import replace
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from tl_dla.analyses.score_ledgers import AttentionAttribution
from tl_dla.cli.answers import certificates, rest_warning, rows_of
from tl_dla.cli.output import Output
from tl_dla.cli.tables import Ledger, certified
from tl_dla.core.result import Attribution


def scores_output(result: AttentionAttribution, args: argparse.Namespace) -> Output:
    """A head's preference on one prompt."""
    sides = result.by_query, result.by_key
    warnings = (rest_warning(side.labels, side.kinds, side.attribution) for side in sides)
    warning = next(filter(None, warnings), "")
    return Output(
        lambda: _table(result, args, warning),
        lambda: {
            "model": args.model,
            "prompt": args.prompt,
            "head": result.head,
            **_places(result),
            "score": float(result.score[0]),
            "by_query": _record(result.by_query),
            "by_key": _record(result.by_key),
            "pairs": result.pairs[..., 0].tolist(),
            "reconstruction": certificates(result.reconstruction),
        },
        result.to_dataframe,
        warning=warning,
    )


def _table(result: AttentionAttribution, args: argparse.Namespace, warning: str) -> RenderableType:
    """Both ledgers, the largest pairs and the certificate."""
    position, token = _places(result)["query"].values()
    lines: list[RenderableType] = [
        Text(f"score {result.by_query.target}", style="bold"),
        Text(f'from position {position}, {token!r}, of {args.prompt!r}, unit="{args.unit}"'),
        Text(result.sentence()),
    ]
    for name, side in (("query", result.by_query), ("keys", result.by_key)):
        ledger = replace(Ledger.of(side, columns=["nats"]), own="model's own score")
        lines += [Text(), Text(f"who wrote the {name}"), ledger.table(args.top)]
    pairs = (f"{query} × {key} {value:+.4f}" for (query, key), value in result.top(5))
    largest = Text(f"\nlargest pairs: {', '.join(pairs)}\n")
    return Group(*lines, largest, certified(result.reconstruction, warning))


def _places(result: AttentionAttribution) -> dict[str, dict[str, Any]]:
    """The query, key and versus, each with its position and its text."""
    names = ("query", "key", "versus")
    found = zip(names, result.places[0].tolist(), result.tokens[0], strict=False)
    return {name: {"position": place, "token": token} for name, place, token in found}


def _record(side: Attribution) -> dict[str, Any]:
    return {**rows_of(side), "attribution": side.attribution[:, 0].tolist()}
