"""What a row promotes: the tokens whose logits it raises and lowers most.

A row's value is linear in the unembedding: with y what the row wrote, through the frozen final
norm, it moves the logit of token v by y · W_U[:, v]. What it wrote comes from one more run of the
prompt; the vocabulary is then read chunk by chunk. A soft cap is frozen at each token's own ratio
capped/raw.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_dla.core.decomposition import B_U, LN_FINAL_B, Decomposition
from tl_dla.core.result import Attribution, require_input
from tl_dla.core.rows import RowKey
from tl_dla.core.run import again
from tl_dla.core.taps import Kept, Tap, exact, forward
from tl_dla.core.vectors import vectors_of
from tl_dla.errors import ArgumentError
from tl_dla.inputs.positions import Positions
from tl_dla.inputs.query import Query
from tl_dla.inputs.selection import Selection, Unit
from tl_dla.inputs.tokens import token_strings
from tl_dla.model.reader import ModelReader
from tl_dla.model.unembedding import Unembedding

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class PromotedTokens:
    """What one row does to the logits of the whole vocabulary.

    Attributes:
        label: the row.
        effect: what it adds to each token's logit.
        raised: the tokens that it raises most, as `(token, logits)`, most first.
        lowered: the tokens that it lowers most, most first.
    """

    label: str
    effect: Float[Tensor, " d_vocab"]
    raised: list[tuple[str, float]]
    lowered: list[tuple[str, float]]

    def to_dataframe(self) -> "pd.DataFrame":
        """A line per token: `label`, `direction` (raised or lowered), `rank`, `token`, `effect`."""
        import pandas as pd

        return pd.DataFrame(
            [
                (self.label, direction, rank, token, effect)
                for direction, tokens in (("raised", self.raised), ("lowered", self.lowered))
                for rank, (token, effect) in enumerate(tokens, 1)
            ],
            columns=["label", "direction", "rank", "token", "effect"],
        )

    def __repr__(self) -> str:
        """The tokens raised and lowered, a line each."""
        mean = f"{self.label} moves the vocabulary by {float(self.effect.mean()):+.4f} on average"
        raised = ", ".join(f"{token!r} {value:+.3f}" for token, value in self.raised)
        lowered = ", ".join(f"{token!r} {value:+.3f}" for token, value in self.lowered)
        return f"{mean}\n  raises {raised}\n  lowers {lowered}"


def promoted_tokens(
    result: Attribution,
    label: str,
    k: int = 10,
    *,
    prompt: int | None = None,
    position: int | None = None,
    chunk_size: int = 16384,
) -> PromotedTokens:
    """The tokens whose logits a row raises and lowers most; see `result.promoted_tokens`."""
    key = result.keys[result.index(label)]
    require_input(result)
    if k < 1 or chunk_size < 1:
        raise ArgumentError(
            f"k and chunk_size must be at least 1; {k} and {chunk_size} were given."
        )
    if result.path or key.kind in ("neurons", "latents"):
        raise ArgumentError(
            f"Row {label!r} is not written to the final stream by one part of the model: ask for a"
            " row of direct_logit_attribution, such as a head or a neuron."
        )
    row = _one(prompt, len(result.prompts.tokens), "prompt", "prompts")
    n = int(result.positions.valid[row].sum())
    column = _one(position, n, "position", "attributed positions")
    with exact():
        wrote, total = _vectors(result.select(prompt=row, position=column), key)
        effect = _effect(result, None if key == B_U else wrote, total, chunk_size)
    raised, lowered = (top_tokens(result.model, effect, k, sign) for sign in (1, -1))
    return PromotedTokens(label, effect, raised, lowered)


Moved = list[tuple[str, float]]


def most_moved(
    query: Query, k: int, *, chunk_size: int = 16384
) -> list[dict[str, tuple[Moved, Moved]]]:
    """The same of every component and head at once, raised and lowered, for each position.

    `query` is about one prompt; its targets do not matter.
    """
    reader = ModelReader(query.model)
    units: list[Unit] = ["component", "head"]
    if not any(reader.attention(layer) for layer in range(reader.n_layers)):
        units.remove("head")
    found: list[dict[str, tuple[Moved, Moved]]] = [{} for _ in query.positions.index[0]]
    with exact():
        for unit in units:
            read = partial(forward, query, logits=False)
            keys, wrote, total = _read_out(vectors_of(reader, unit), query.positions, read)
            for p, moved in enumerate(found):
                tokens, effects = _extremes(query, wrote[:, 0, p], total[0, p], (k, chunk_size))
                names = iter(token_strings(query.model, tokens.flatten()))
                for key, values in zip(keys, effects.tolist(), strict=True):
                    own = [(next(names), value) for value in values]
                    moved[key.label] = own[: len(own) // 2], own[len(own) // 2 :]
    return found


def _extremes(
    query: Query,
    wrote: Float[Tensor, "row d"],
    total: Float[Tensor, " d"],
    size: tuple[int, int],
) -> tuple[Int[Tensor, "row k"], Float[Tensor, "row k"]]:
    """The tokens that each vector raises most, then those that it lowers most; their effects."""
    k, chunk_size = size
    sides: dict[int, list[tuple[Tensor, Tensor]]] = {1: [], -1: []}
    for chunk in Unembedding(query.model, ModelReader(query.model).stream(), chunk_size).chunks():
        effect = chunk.moved(wrote) * chunk.ratio(total)
        for sign, found in sides.items():
            top = (sign * effect).topk(min(k, effect.shape[1]))
            found.append((top.indices + chunk.part.start, top.values))
    tokens, effects = [], []
    for sign, found in sides.items():
        ids, values = (torch.cat(x, 1) for x in zip(*found, strict=True))
        top = values.topk(min(k, values.shape[1]))
        tokens.append(ids.gather(1, top.indices))
        effects.append(sign * top.values)
    return torch.cat(tokens, 1), torch.cat(effects, 1)


def _read_out(
    parts: Decomposition, positions: Positions, read: Callable[[Sequence[Tap]], Kept]
) -> tuple[Sequence[RowKey], Float[Tensor, "row batch pos d"], Float[Tensor, "batch pos d"]]:
    """What each row, and all of them, give to the unembedding."""
    stream, taps = parts.reader.stream(), parts.taps
    norm = stream.norm
    if norm is not None:
        taps = [*taps, Tap(norm.site, norm.scale)]
    kept = read(taps)
    rows = parts.rows(kept, positions)
    wrote, total = rows.values, rows.total
    if norm is not None:
        scale = kept[taps[-1]]
        wrote, total = norm.through(wrote, scale), norm.forward(total, scale)
    if stream.project_out is not None:
        wrote, total = (x @ stream.project_out.to(x).mT for x in (wrote, total))
    return rows.keys, wrote, total


def top_tokens(
    model: Any, logits: Float[Tensor, " d_vocab"], k: int, sign: int = 1
) -> list[tuple[str, float]]:
    """The k tokens of the highest logits, or with sign −1 of the lowest, as `(token, logit)`."""
    top = (sign * logits).topk(min(k, len(logits)))
    names = token_strings(model, top.indices)
    return list(zip(names, (sign * top.values).tolist(), strict=True))


def _one(given: int | None, n: int, name: str, names: str) -> int:
    if given is None and n > 1:
        raise ArgumentError(f"The result has {n} {names}: say which one, with {name}=.")
    index = 0 if given is None else given
    if not -n <= index < n:
        raise ArgumentError(f"{name}={index} is outside the result's {n} {names}.")
    return index % n


def _vectors(result: Attribution, key: RowKey) -> tuple[Float[Tensor, " d"], Float[Tensor, " d"]]:
    """What the row, and all of them, give to the unembedding, of one position of one prompt."""
    parts = vectors_of(ModelReader(result.model), *_unit(result, key))

    def read(taps: Sequence[Tap]) -> Kept:
        return again(result, "component", taps=taps).kept

    keys, vectors, total = _read_out(parts, result.positions, read)
    found = dict(zip(keys, vectors, strict=True))
    wrote, norm = found.get(key, torch.zeros_like(total)), parts.reader.stream().norm
    if norm is not None and key == LN_FINAL_B and norm.beta is not None:
        wrote = norm.beta.to(total).expand_as(total)
    return wrote[0, 0], total[0, 0]


def _unit(result: Attribution, key: RowKey) -> tuple[Unit, Selection]:
    """The unit that has the row and little else."""
    layers = None if key.layer is None else (key.layer,)
    if key.kind == "source":
        return "source", Selection(heads=((key.layer or 0, key.index or 0),))
    if key.kind in ("neuron", "expert") or (key.kind == "bias" and key.name == "mlp_bias"):
        neurons = ((key.layer or 0, key.index or 0),) if key.kind == "neuron" else ()
        return "neuron", Selection(layers, neurons=neurons, alone=True)
    if result.unit == "latent":
        return "latent", replace(result.selection, top_latents=None)
    if key.kind == "head" or key.name == "attn_bias":
        return "head", Selection(layers)
    return ("layer" if result.unit == "layer" else "component"), Selection()


def _effect(
    result: Attribution,
    wrote: Float[Tensor, " d"] | None,
    total: Float[Tensor, " d"],
    chunk_size: int,
) -> Float[Tensor, " d_vocab"]:
    """What a vector (or None for b_U itself) adds to each token's logit."""
    effects = []
    stream = ModelReader(result.model).stream()
    for chunk in Unembedding(result.model, stream, chunk_size).chunks():
        moved = chunk.bias if wrote is None else chunk.moved(wrote)
        effects.append(moved * chunk.ratio(total))
    return torch.cat(effects)
