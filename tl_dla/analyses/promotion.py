"""What a row promotes: the tokens whose logits it raises and lowers most.

A row's value is linear in the unembedding: with y what the row wrote, read through the frozen
norms, it moves the logit of token v by y · W_U[:, v]. y comes from one more run of the prompt with
the unit vectors in place of a token's column of W_U; the vocabulary is then read chunk by chunk. A
soft cap is frozen at each token's own ratio capped/raw.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_dla.analyses.vocabulary import Unembedding
from tl_dla.core.decomposition import Plan
from tl_dla.core.result import DirectLogitAttribution, require_input
from tl_dla.core.taps import run
from tl_dla.errors import ArgumentError
from tl_dla.inputs.selection import Choice, Unit
from tl_dla.inputs.tokens import Positions, token_strings
from tl_dla.model.reader import compute_dtype

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
    result: DirectLogitAttribution,
    label: str,
    k: int = 10,
    *,
    prompt: int | None = None,
    position: int | None = None,
    chunk_size: int = 16384,
) -> PromotedTokens:
    """The tokens whose logits a row raises and lowers most; see `result.promoted_tokens`."""
    result[label]  # an unknown label has its own message
    require_input(result)
    if k < 1 or chunk_size < 1:
        raise ArgumentError(
            f"k and chunk_size must be at least 1; {k} and {chunk_size} were given."
        )
    if result.path or label.endswith("_other_neurons"):
        raise ArgumentError(
            f"Row {label!r} is not written to the final stream by one part of the model: ask for a"
            " row of direct_logit_attribution, such as a head or a neuron."
        )
    row = _one(prompt, len(result.prompts.tokens), "prompt", "prompts")
    places = result.positions.index[row][result.positions.valid[row]]
    place = places[_one(position, len(places), "position", "attributed positions")]
    wrote, total = _vectors(result, label, row, place.reshape(1, 1))
    effect = _effect(result, None if label == "b_U" else wrote, total, chunk_size)
    return PromotedTokens(label, effect, _top(result, effect, k, 1), _top(result, effect, k, -1))


def _top(
    result: DirectLogitAttribution, effect: Float[Tensor, " d_vocab"], k: int, sign: int
) -> list[tuple[str, float]]:
    top = (sign * effect).topk(min(k, len(effect)))
    names = token_strings(result.model, top.indices)
    return list(zip(names, (sign * top.values).tolist(), strict=True))


def _one(given: int | None, n: int, name: str, names: str) -> int:
    if given is None and n > 1:
        raise ArgumentError(f"The result has {n} {names}: say which one, with {name}=.")
    index = 0 if given is None else given
    if not -n <= index < n:
        raise ArgumentError(f"{name}={index} is outside the result's {n} {names}.")
    return index % n


def _vectors(
    result: DirectLogitAttribution, label: str, row: int, place: Int[Tensor, "1 1"]
) -> tuple[Float[Tensor, " d"], Float[Tensor, " d"]]:
    """What the row, and all of them, give to the unembedding at one position of one prompt."""
    reader = result.plan.reader
    weight = result.model.W_U
    basis = torch.eye(len(weight), dtype=compute_dtype(weight.dtype), device=weight.device)
    plan = Plan(reader, basis[None, None], None, *_unit(result, label))
    positions = Positions(place, torch.ones_like(place).bool(), True, False)
    prompts = result.prompts.part(slice(row, row + 1))
    rows = plan.rows(run(result.model, prompts, positions, plan.probes, None), positions)
    found = {own.label: own.value for own in rows.rows}
    return found.get(label, torch.zeros_like(rows.total))[0, 0], rows.total[0, 0]


def _unit(result: DirectLogitAttribution, label: str) -> tuple[Unit, bool, Choice]:
    """The unit that has the row and little else."""
    at = result.labels.index(label)
    kind, layer = result.kinds[at], result.layers[at]
    layers = None if layer is None else (layer,)
    if kind == "source":
        return "source", True, Choice(heads=(label.partition("←")[0],))
    if kind in ("neuron", "expert"):
        neurons = (label,) if kind == "neuron" else ()
        return "neuron", True, Choice(layers, neurons=neurons, alone=True)
    if kind == "head" or label.endswith("_attn_bias"):
        return "head", True, Choice(layers)
    if label.endswith("_bias"):
        return "neuron", True, Choice(layers, neurons=(), alone=True)
    return ("layer" if result.unit == "layer" else "component"), True, Choice()


def _effect(
    result: DirectLogitAttribution,
    wrote: Float[Tensor, " d"] | None,
    total: Float[Tensor, " d"],
    chunk_size: int,
) -> Float[Tensor, " d_vocab"]:
    """What a vector (or None for b_U itself) adds to each token's logit."""
    effects = []
    for chunk in Unembedding(result.model, result.plan.stream, chunk_size).chunks():
        moved = chunk.bias if wrote is None else wrote @ chunk.columns
        effects.append(moved * chunk.ratio(total))
    return torch.cat(effects)
