"""What the page can be asked, as data: every row at every place, and what stands behind it.

For each held place (an attributed position of a prompt): the rows' values; where each head looks
from there and what it moved from each token (`unit="source"` of all heads); why the largest heads
look there; and the tokens that each row raises and lowers most. A page holds only so many numbers:
of a large result the first places, the shown prompt's before others.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_dla.analyses.promotion import most_moved
from tl_dla.analyses.score_reasons import reasons
from tl_dla.core.result import Attribution
from tl_dla.core.rows import RowKey
from tl_dla.core.run import CAUSE, run
from tl_dla.core.sources import SourceSplit
from tl_dla.core.taps import exact
from tl_dla.core.view import prompt_tokens
from tl_dla.effects.audit import Audit
from tl_dla.errors import UnsupportedModelError
from tl_dla.inputs.query import Query
from tl_dla.inputs.selection import place_of_head
from tl_dla.model.reader import ModelReader

_MOST_NUMBERS = 400_000  # about heads at all places
_MOST_PLACES = 48
_MOST_REASONS = 32  # heads whose query and key are explained: the largest of the shown prompt
_MOST_READ_OUT = 12  # places whose rows are read over the vocabulary, which takes the longest
_MOST_ROWS = 3000  # of a unit with more: the largest
_N_TOKENS = 6  # raised, and lowered


@dataclass(frozen=True, order=True)
class Place:
    """An attributed position: which prompt, and which of its positions, as an index."""

    prompt: int
    column: int


def held_places(result: Attribution, shown: int) -> list[Place]:
    """The places that the page holds: of the shown prompt first, the last position first."""
    every = [Place(b, p) for b, p in result.positions.valid.nonzero().tolist()]
    every.sort(key=lambda place: (place.prompt != shown, place.prompt, -place.column))
    cfg = result.model.cfg  # without sizes for a result of numbers alone
    heads = getattr(cfg, "n_layers", 1) * max(1, getattr(cfg, "n_heads", 1))
    tokens = result.values.shape[3] * int(result.prompts.length.max())
    size = heads * (tokens + 4 * _N_TOKENS)  # what a head moves; tokens with their values, twice
    return every[: max(1, min(_MOST_PLACES, _MOST_NUMBERS // size))]


def evidence(
    result: Attribution, parts: Sequence[Attribution], shown: int, audit: Audit | None
) -> dict[str, Any]:
    """Everything that the page's panel, ledger and marks need.

    Args:
        result: what is reported.
        parts: the same by other units, whose rows can be asked as well.
        shown: the prompt whose panel is open first.
        audit: what intervention says, where it was asked.
    """
    places = held_places(result, shown)
    keys, values, mean = _rows([result, *parts], places)
    index = result.positions.index
    own = result.query.with_axes(result.logit[None])[0]
    found: dict[str, Any] = {
        "shown": shown,
        "n_prompts": len(result.prompts.tokens),
        "places": [[x.prompt, int(index[x.prompt, x.column])] for x in places],
        "candidates": list(result.targets.candidates or [""]),
        "rows": [[key.label, key.kind, key.layer] for key in keys],
        "values": values,
        "mean": mean,
        "logit": [_numbers(own[x.prompt, x.column]) for x in places],
        "heads": [],
        "audit": {} if audit is None else _audited(audit, places),
        "refused": {},
        "why": {},
    }
    if not result.has_tokens:
        return found
    found["tokens"] = {b: prompt_tokens(result, b) for b in {x.prompt for x in places}}
    if result.alone:
        return found
    for name, ask in (("heads", _sources), ("promoted", _promoted)):
        try:
            found |= ask(result.query, places, keys)
        except UnsupportedModelError as error:
            found["refused"][name] = str(error)
    if found["heads"]:
        found["why"] = {shown: _reasons(result.query, places[0], found)}
    return found


def _rows(
    results: Sequence[Attribution], places: Sequence[Place]
) -> tuple[list[RowKey], list[Any], list[Any]]:
    """Keys, values `[place][candidate][row]`, and the means over all places `[candidate][row]`."""
    keys: list[RowKey] = []
    held, means = [], []
    for result in results:
        valid = result.positions.valid.to(result.values.device)
        every = result.values[:, valid]  # [row, place, candidate]
        largest = every.abs().mean((1, 2)).argsort(descending=True)[:_MOST_ROWS].sort().values
        rows = [i for i in largest.tolist() if result.keys[i] not in keys]
        keys += [result.keys[i] for i in rows]
        at = [x.prompt for x in places], [x.column for x in places]
        held.append(result.values[rows][:, at[0], at[1]])
        means.append(every[rows].mean(1))
    values, mean = torch.cat(held), torch.cat(means)
    return (
        keys,
        [[_numbers(x) for x in one.mT] for one in values.unbind(1)],
        [_numbers(x) for x in mean.mT],
    )


def _numbers(x: Float[Tensor, "..."]) -> list[Any]:
    """Numbers with the digits that a page shows, and one more."""
    return [float(f"{value:.5g}") for value in x.flatten().tolist()]


def _audited(audit: Audit, places: Sequence[Place]) -> dict[str, Any]:
    """Direct and total effect of each audited row at each place, and its flags in words."""
    single = audit.result.positions.single
    direct, total = (x.unsqueeze(2) if single else x for x in (audit.direct, audit.total))
    found: dict[str, Any] = {}
    for i, row in enumerate(audit.rows):
        found[row] = {
            "direct": _numbers(torch.stack([direct[i, x.prompt, x.column] for x in places])),
            "total": _numbers(torch.stack([total[i, x.prompt, x.column] for x in places])),
            "mean": [float(direct[i].nanmean()), float(total[i].nanmean())],
            "flags": [flag.sentence for flag in audit.flags if flag.row == row],
        }
    return found


# ---- what needs the model ----------------------------------------------------------------------


def at_places(query: Query, prompt: int, columns: Sequence[int]) -> Query:
    """The question at some of the positions of one prompt."""
    one = query.part(slice(prompt, prompt + 1))
    index = one.positions.index[:, columns]
    shared = int(index[0, 0]) if len(columns) == 1 else None
    positions = replace(
        one.positions,
        index=index,
        valid=torch.ones_like(index).bool(),
        single=False,
        every=False,
        shared=shared,
    )
    targets = one.targets
    if targets.ids.shape[1] > 1:
        targets = replace(targets, ids=targets.ids[:, columns])
    return replace(one, positions=positions, targets=targets)


def _by_prompt(places: Sequence[Place]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for place in places:
        found.setdefault(place.prompt, []).append(place.column)
    return found


def _sources(query: Query, places: Sequence[Place], _: Sequence[RowKey]) -> dict[str, Any]:
    """Of every head and place: attention to each token, and what was moved from it."""
    attention: dict[Place, Any] = {}
    moved: dict[Place, Any] = {}
    heads: list[str] = []
    for prompt, columns in _by_prompt(places).items():
        once = run(at_places(query, prompt, columns), "source")
        result = once.result(Attribution).certified("raise", CAUSE)
        rows: dict[RowKey, list[int]] = {}
        for i, key in enumerate(result.keys):
            if key.kind == "source":
                rows.setdefault(key._replace(kind="head", source=None), []).append(i)
        heads = [key.label for key in rows]
        with exact():
            kept = once.parts.scaled(once.kept, once.query.positions)
            patterns = [
                split.pattern(kept)[0, :, split.chosen]  # [pos, head, source]
                for split in once.parts.splits.values()
                if isinstance(split, SourceSplit)
            ]
        for p, column in enumerate(columns):
            place, n = Place(prompt, column), int(query.prompts.length[prompt])
            attention[place] = [_shares(row[:n]) for part in patterns for row in part[p]]
            moved[place] = [
                [_numbers(result.values[own[:n], 0, p, c]) for own in rows.values()]
                for c in range(result.values.shape[3])
            ]
    return {
        "heads": heads,
        "attention": [attention[place] for place in places],
        "moved": [moved[place] for place in places],
    }


def _reasons(query: Query, place: Place, found: dict[str, Any]) -> dict[str, str]:
    """Why the largest heads look where they do from the last position of the shown prompt."""
    size = {
        label: sum(abs(values[i]) for values in found["values"][0])
        for i, (label, *_) in enumerate(found["rows"])
    }
    heads = sorted(found["heads"], key=lambda head: -size.get(head, 0.0))[:_MOST_REASONS]
    reader, one = ModelReader(query.model), at_places(query, place.prompt, [place.column])
    n = one.prompts.packed.shape[1]
    paid = {}
    for head in heads:
        own = found["attention"][0][found["heads"].index(head)]
        paid[place_of_head(reader, head)] = torch.tensor([own + [0.0] * (n - len(own))])
    return {
        head: why for head, [why] in zip(heads, reasons(one, paid).values(), strict=True) if why
    }


def _shares(x: Float[Tensor, " source"]) -> list[float]:
    """Attention to five digits; the tail of tokens that are not seen is left out."""
    values = [round(value, 5) for value in x.tolist()]
    while values and values[-1] == 0:
        values.pop()
    return values


def _promoted(query: Query, places: Sequence[Place], keys: Sequence[RowKey]) -> dict[str, Any]:
    """Of every head, attention and MLP row: tokens raised and lowered most, at the first places."""
    names: list[str] = []
    number: dict[str, int] = {}

    def numbered(token: str) -> int:
        if token not in number:
            number[token] = len(names)
            names.append(token)
        return number[token]

    wanted = {key.label for key in keys}
    found: dict[Place, Any] = {}
    for prompt, columns in _by_prompt(places[:_MOST_READ_OUT]).items():
        moved = most_moved(at_places(query, prompt, columns), _N_TOKENS)
        for p, column in enumerate(columns):
            found[Place(prompt, column)] = {
                label: [
                    [[numbered(token), float(f"{x:.4g}")] for token, x in side] for side in sides
                ]
                for label, sides in moved[p].items()
                if label in wanted
            }
    return {"vocabulary": names, "promoted": [found.get(place) for place in places]}
