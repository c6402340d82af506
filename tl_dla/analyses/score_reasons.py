"""Why heads look where they look, in a line each: who wrote the query and the key.

Of each head and prompt, the token that the head reads most from the last attributed position is
compared with another. Where the token is the answer or what it is compared with, that is the other
of them, if the prompt has it; else the token of another sort that is read most after it. One
forward pass for all heads.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_dla.analyses.attention_scores import Score
from tl_dla.core.taps import Kept, Tap, exact, forward, recall
from tl_dla.errors import IncompleteCacheError, UnsupportedModelError
from tl_dla.inputs.caches import read_cache
from tl_dla.inputs.positions import Positions
from tl_dla.inputs.query import Query
from tl_dla.inputs.targets import ONE_NUMBER
from tl_dla.model.reader import ModelReader

Place = tuple[int, int]  # layer and head


def reasons(
    query: Query, paid: Mapping[Place, Float[Tensor, "batch key"]], cache: Any = None
) -> dict[Place, list[str]]:
    """A sentence for each head and prompt.

    `""` where a head sees one sort of token only, where the model's scores are not read, and where
    a cache does not hold what they are made of (rotary positions are at no hook).

    Args:
        query: the prompts, positions and targets.
        paid: the attention of each head from the last attributed position of each prompt, 0
            outside of the prompt's own tokens.
        cache: of the prompts; None to run the model once more.
    """
    reader, batch = ModelReader(query.model), len(query.prompts.length)
    none = {place: [""] * batch for place in paid}
    if not query.has_tokens:
        return none
    places = {place: _places(query, own) for place, own in paid.items()}
    try:
        with exact():
            scores = {
                place: Score(reader, place, _asked(query, index), "head")
                for place, index in places.items()
            }
            kept = _kept(reader, query, list(scores.values()), cache)
            found = {place: score.result(kept[place]) for place, score in scores.items()}
    except (UnsupportedModelError, IncompleteCacheError):
        return none
    return {
        place: [
            one.sentence(prompt) if index[1] != index[2] and one.reconstruction.passed else ""
            for prompt, index in enumerate(places[place].tolist())
        ]
        for place, one in found.items()
    }


def _places(query: Query, paid: Float[Tensor, "batch key"]) -> Int[Tensor, "batch place"]:
    """Query, key and versus of each prompt; versus is the key where there is no other token."""
    rows = []
    ids, last = query.prompts.packed.tolist(), query.positions.last.tolist()
    targets = query.targets.ids.expand(len(ids), *query.targets.ids.shape[1:]).flatten(1).tolist()
    for b, (tokens, at) in enumerate(zip(ids, last, strict=True)):
        own = paid[b].tolist()
        order = sorted((i for i, x in enumerate(own) if x > 0), key=lambda i: -own[i])
        key = order[0]
        others = [i for i in order if tokens[i] != tokens[key]]
        named = [i for i in others if tokens[i] in targets[b]] if tokens[key] in targets[b] else []
        rows.append([at, key, next(iter(named or others), key)])
    return torch.tensor(rows, device=query.positions.index.device)


def _asked(query: Query, index: Int[Tensor, "batch place"]) -> Query:
    positions = Positions(index, torch.ones_like(index).bool(), False, False)
    return Query(query.model, query.prompts, positions, ONE_NUMBER)


def _kept(reader: ModelReader, query: Query, scores: list[Score], cache: Any) -> dict[Place, Kept]:
    """What the taps of each score keep at its own positions, in one pass."""
    own = [{tap: _at(tap, score.query.positions) for tap in score.taps} for score in scores]
    taps = [tap for one in own for tap in one.values()]
    if cache is None:
        kept = forward(query, taps, logits=False)
    else:
        kept = recall(reader, read_cache(query.model, cache), query, taps)
    return {
        (score.layer, score.head): Kept({tap: kept[there] for tap, there in one.items()})
        for score, one in zip(scores, own, strict=True)
    }


def _at(tap: Tap, positions: Positions) -> Tap:
    """The same at positions of its own."""
    if tap.whole or tap.site.argument is not None:
        return tap

    def read(*shown: Tensor) -> Tensor:
        kept = tap.read(*(tap.of(x, positions) for x in shown))
        assert isinstance(kept, Tensor)
        return kept

    return Tap(tap.site, read, whole=True)
