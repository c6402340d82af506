"""What is written in place of an ablated row: nothing, a mean, or another prompt's activation."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_dla.core.result import Attribution
from tl_dla.core.taps import Tap, forward
from tl_dla.errors import ArgumentError
from tl_dla.inputs.positions import Positions
from tl_dla.inputs.query import Query
from tl_dla.inputs.tokens import Prompts, read_prompts
from tl_dla.model.hooks import Site

Ablation = Literal["zero", "mean", "resample"]
At = Literal["position", "all"]


@dataclass(frozen=True, eq=False)
class Place:
    """Where a row is written from: one of `parts` equal parts of a site's activation."""

    site: Site
    part: int = 0
    parts: int = 1

    def columns(self, width: int) -> slice:
        """The part's columns in an activation of that width."""
        size = width // self.parts
        return slice(self.part * size, (self.part + 1) * size)


def ablated_tokens(prompts: Prompts, positions: Positions, at: At) -> Bool[Tensor, "batch pos"]:
    """Which tokens are ablated, of the prompts as packed."""
    if at not in ("position", "all"):
        raise ArgumentError(f'at must be "position" or "all"; {at!r} was given.')
    return prompts.real if at == "all" else positions.mask(prompts.packed.shape[1])


def substitutes(
    result: Attribution,
    places: dict[str, list[Place]],
    ablation: Ablation,
    at: At,
    reference: Any,
) -> dict[str, list[Tensor | float]]:
    """For each place what is written there, `[batch, pos, width]` over the prompts as packed."""
    if ablation == "zero":
        if reference is not None:
            raise ArgumentError('ablation="zero" reads no reference; leave `reference` out.')
        return {name: [0.0] * len(group) for name, group in places.items()}
    if ablation not in ("mean", "resample"):
        raise ArgumentError(f'ablation must be "zero", "mean" or "resample"; {ablation!r}.')
    prompts = result.prompts if reference is None else read_prompts(result.model, reference)
    if ablation == "resample":
        _require_pairs(result.prompts, prompts, at, reference is None)
    mask = _reference_mask(result, prompts, at)
    if ablation == "mean" and int(mask.sum()) == 1:
        raise ArgumentError(
            'ablation="mean" over one token is that token\'s own activation: give more prompts, or'
            " others as `reference`."
        )
    sites = {place.site.name: place.site for group in places.values() for place in group}
    taps = {name: Tap(site, lambda x: x.flatten(2), whole=True) for name, site in sites.items()}
    # The logits are not wanted: one position is unembedded, the least that a run can do.
    first = Positions(torch.zeros_like(prompts.length)[:, None], mask[:, :1], True, False)
    query = Query(result.model, prompts, first, result.targets)
    kept = forward(query, list(taps.values()), logits=False)

    def substitute(place: Place) -> Tensor:
        x = kept[taps[place.site.name]]
        x = x[..., place.columns(x.shape[-1])].expand(*mask.shape, -1)
        if ablation == "mean":
            return x[mask].mean(0).expand(1, 1, -1)
        return _resampled(x, mask, result, at, reference is None)

    return {name: [substitute(place) for place in group] for name, group in places.items()}


def _reference_mask(result: Attribution, prompts: Prompts, at: At) -> Bool[Tensor, "batch pos"]:
    """The reference's tokens that correspond to the ablated ones, matched from the end."""
    if at == "all" or prompts is result.prompts:
        return ablated_tokens(prompts, result.positions, at)
    positions = result.positions
    index = torch.arange(prompts.packed.shape[1], device=prompts.length.device)
    back = (result.prompts.length[:, None] - positions.index)[positions.valid].unique()
    if len(back) > positions.index.shape[1]:
        raise ArgumentError(
            "The attributed positions are not the same for every prompt counted from its end, so a"
            ' reference cannot be matched: attribute one position, or ablate at="all".'
        )
    mask = (prompts.length[:, None, None] - index[:, None] == back).any(-1)
    if not bool((mask.sum(-1) == len(back)).all()):
        raise ArgumentError("A reference prompt is too short to have the attributed positions.")
    return mask


def _require_pairs(prompts: Prompts, reference: Prompts, at: At, own: bool) -> None:
    batch, given = len(prompts.length), len(reference.length)
    if own and batch == 1:
        raise ArgumentError(
            'ablation="resample" needs another prompt: give more than one, or pass `reference`.'
        )
    if given not in (1, batch):
        raise ArgumentError(
            f"A reference to resample from holds one prompt, or one for each of the {batch}"
            f" attributed; it holds {given}."
        )
    source = reference.length.roll(1) if own else reference.length.expand(batch)
    if at == "all" and not torch.equal(source.to(prompts.length), prompts.length):
        raise ArgumentError(
            'ablation="resample" at="all" needs prompts of the same length as those they replace.'
        )


def _resampled(
    x: Float[Tensor, "reference from width"],
    mask: Bool[Tensor, "reference from"],
    result: Attribution,
    at: At,
    own: bool,
) -> Float[Tensor, "batch pos width"]:
    """Each ablated token's activation on the prompt that stands in."""
    target = ablated_tokens(result.prompts, result.positions, at)
    source = x.roll(1, 0) if own else x.expand(len(target), -1, -1)
    taken = mask.roll(1, 0) if own else mask.expand(len(target), -1)
    if not torch.equal(target.sum(-1), taken.sum(-1)):
        raise ArgumentError(
            "The prompts have different numbers of ablated tokens, so one cannot stand in for"
            " another: attribute one position, or give a reference."
        )
    out = x.new_zeros(*target.shape, x.shape[-1])
    out[target] = source[taken]  # in order: the n-th ablated takes the n-th of the other
    return out
