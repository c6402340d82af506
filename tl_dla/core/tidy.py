"""A result as a tidy table, and what is attributed, in words."""

from typing import TYPE_CHECKING

from tl_dla.core.view import Shown
from tl_dla.inputs.query import Query
from tl_dla.inputs.tokens import token_strings

if TYPE_CHECKING:
    import pandas as pd


def dataframe(result: Shown) -> "pd.DataFrame":
    """A line per row × prompt × position (× candidate); see `Attribution.to_dataframe`."""
    import numpy as np
    import pandas as pd

    query = result.query
    values_of = result.values.detach().cpu().numpy()
    logit = query.with_axes(result.logit[None])[0].detach().cpu().double().numpy()
    names = query.targets.candidates or ("",)
    packed, alone = query.prompts.packed, not result.mean_over
    lines = []
    for b, p in query.positions.valid.nonzero().tolist():
        position = int(query.positions.index[b, p])
        known = query.has_tokens
        token = token_strings(query.model, packed[b, position][None])[0] if known else ""
        one = {
            "label": result.labels,
            "kind": result.kinds,
            "layer": pd.array(result.layers, dtype="Int64"),
            "prompt": b if alone else pd.NA,
            "position": position if alone else pd.NA,
            "token": token,
        }
        if any(source is not None for source in result.sources):
            one["source"] = pd.array(result.sources, dtype="Int64")
            texts = token_strings(query.model, packed[b]) if known else [""] * packed.shape[1]
            one["source_token"] = [
                None if s is None else texts[s] if alone else "" for s in result.sources
            ]
        # All rows of the first candidate, then of the next: a whole vocabulary is one frame.
        rows = pd.DataFrame(one)
        frame = rows.iloc[np.tile(np.arange(len(rows)), len(names))].reset_index(drop=True)
        values = {
            "attribution": values_of[:, b, p].T.ravel(),
            "logit": logit[b, p].repeat(len(rows)),
        }
        if query.targets.candidates:
            values = {"candidate": np.repeat(np.array(names, dtype=object), len(rows)), **values}
        for place, (name, value) in enumerate(values.items(), 6):
            frame.insert(place, name, value)
        lines.append(frame)
    table = pd.concat(lines, ignore_index=True)
    table["share"] = table["attribution"] / table["logit"]
    return table


def target_words(query: Query) -> str:
    """What is attributed: `' Paris' − ' London'`."""
    targets = query.targets
    if targets.candidates is not None:
        return f"{len(targets.candidates)} candidate tokens"
    if targets.ids.shape[:2] != (1, 1):
        return "each prompt's own answer"
    names = [repr(name) for name in token_strings(query.model, targets.ids.flatten())]
    if targets.mean_of_vocab:
        names.append("mean of the vocabulary")
    return difference_words(names)


def difference_words(names: list[str]) -> str:
    """The first, less the mean of the others."""
    if len(names) == 1:
        return names[0]
    others = names[1] if len(names) == 2 else f"mean({', '.join(names[1:])})"
    return f"{names[0]} − {others}"
