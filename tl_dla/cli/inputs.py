"""The answer of `tl-dla inputs`: the prompt coloured by its tokens' rows, and the rows."""

import argparse
from functools import partial
from typing import Any

from rich.console import Group, RenderableType
from rich.style import Style
from rich.text import Text

from tl_dla.cli.answers import Prediction, certificates, place, rest_warning, rows_of
from tl_dla.cli.output import Output
from tl_dla.cli.tables import Ledger, certified
from tl_dla.core.view import prompt_tokens, view_of
from tl_dla.figures.theme import NEGATIVE, POSITIVE
from tl_dla.input_attribution import InputAttribution

_FROZEN = (
    "Attention patterns are frozen: what a token did by steering attention is in no row"
    " (tl-dla scores shows that). A row is not what removing the token would do."
)


def inputs_output(
    result: InputAttribution, tokens: list[Prediction], args: argparse.Namespace
) -> Output:
    """A result for one prompt at one position."""
    answer, *others = [vars(token) for token in tokens]
    position, token = place(result)
    warning = rest_warning(result.labels, result.kinds, result.attribution)
    return Output(
        lambda: _table(result, tokens, args, warning),
        lambda: {
            "model": args.model,
            "prompt": args.prompt,
            "position": position,
            "token": token,
            "answer": answer,
            "incorrect": "mean" if result.targets.mean_of_vocab else others,
            "mlp": result.mlp,
            **rows_of(result),
            "attribution": result.attribution[:, 0].tolist(),
            "logit": float(result.logit[0]),
            "tokens": prompt_tokens(result, 0),
            "points": result.points,
            "flow": result.flow[:, 0].tolist(),
            "reconstruction": certificates(result.reconstruction),
        },
        result.to_dataframe,
        warning=warning,
        page=partial(result.report, command=args.command),
    )


def by_place(result: InputAttribution) -> list[float]:
    """What each token's place starts with: all its embeddings' rows together."""
    totals = [0.0] * int(result.prompts.length[0])
    for source, value in zip(result.sources, result.attribution[:, 0].tolist(), strict=True):
        if source is not None:
            totals[source] += value
    return totals


def coloured(tokens: list[str], values: list[float]) -> Text:
    """The prompt, each token on the colour of its value: blue pushes the logit up, red down."""
    largest = max(map(abs, values)) or 1.0
    text = Text()
    for token, value in zip(tokens, values, strict=True):
        share = abs(value) / largest
        colour = _blended(POSITIVE if value > 0 else NEGATIVE, share)
        ink = "white" if share > 0.6 else "black"
        text.append(token, Style(color=ink, bgcolor=colour) if share >= 0.05 else None)
    return text


def _blended(colour: str, share: float) -> str:
    """A colour on white paper."""
    parts = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    mixed = (round(255 + (part - 255) * share) for part in parts)
    return "#" + "".join(f"{part:02x}" for part in mixed)


def _table(
    result: InputAttribution, tokens: list[Prediction], args: argparse.Namespace, warning: str
) -> RenderableType:
    position, token = place(result)
    words: list[Any] = [
        Text(f"{'logit difference' if args.incorrect else 'logit'} {result.target}", style="bold"),
        Text(f"at position {position}, {token!r}, through everything, mlp={result.mlp!r}"),
        Text("   ".join(map(str, tokens[:8]))),
        Text(),
        coloured(prompt_tokens(result, 0), by_place(result)),
        Text(),
    ]
    ledger = Ledger.of(result, view_of(result).labels)
    notes = certified(result.reconstruction, warning, _FROZEN)
    return Group(*words, ledger.table(args.top), Text(), notes)
