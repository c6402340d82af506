"""The readout of the final residual stream, with the output transform and the scale frozen.

Of a result, or of a cache alone.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_dla.core.decomposition import of_query
from tl_dla.core.mean_logit import capped_mean
from tl_dla.core.readout import Readout
from tl_dla.core.result import Attribution, require_prompts
from tl_dla.core.run import Run, again, require_rerun
from tl_dla.core.taps import Kept, Tap, exact, recall
from tl_dla.errors import ArgumentError
from tl_dla.inputs.query import Query
from tl_dla.inputs.selection import Selection
from tl_dla.model.reader import ModelReader
from tl_dla.model.unembedding import is_linear


def readout_of(result: Attribution) -> Readout:
    """The readout of the final residual stream; see `DirectLogitAttribution.readout`."""
    require_prompts(result)
    if result.path:
        raise ArgumentError("A path's rows are read out through its head, not from the stream.")
    if result.targets.candidates is not None:
        raise ArgumentError("A result over candidates has no single readout.")
    numbers = result.numbers
    return _added_up(result.query, token_readout(result), numbers.ratio, numbers.scale)


def token_readout(result: Attribution) -> Readout:
    """The readout of the end of the stream, a direction for each target token."""
    query = result.query
    if query.targets.mean_of_vocab and not is_linear(query.model):
        return again(result, "component").parts.readout
    readout, own = of_query(query, "component", Selection()).readout, result.numbers.readouts
    if own is not None:
        differs = readout.checksum().cpu() != own.cpu()
        if bool(differs[query.positions.valid.cpu()].any()):  # other weights, or another device
            require_rerun(result)
    return readout


def frozen_readout(query: Query, cache: Any) -> Readout:
    """The same from a cache alone, which need hold no more than the end of the stream."""
    reader = ModelReader(query.model)

    def read(taps: Sequence[Tap]) -> Kept:
        return recall(reader, cache, query, taps)

    with exact():
        linear = not query.targets.mean_of_vocab or is_linear(query.model)
        mean = None if linear else capped_mean(reader, read)
        parts = of_query(query, "component", Selection(), mean, end_only=True)
        kept = read(parts.taps)
        known = parts.scaled(kept, query.positions)
        total = known.scaled(kept[parts.stream.value[parts.end]], parts.readout)
        total = total + sum(bias.to(total) for _, bias in parts.constants)
        ratio = Run(query, parts, kept, mean).ratio_of(total)
        scale = torch.ones_like(total[..., 0])
        for norm in parts.readout.norms:
            scale = scale * known.scales[norm.name].to(scale)
        return _added_up(query, parts.readout, ratio, scale)


def _added_up(
    query: Query,
    tokens: Readout,
    ratio: Float[Tensor, "batch pos token"],
    scale: Float[Tensor, "batch pos"],
) -> Readout:
    """One readout of the logits of several tokens, with the axes that were asked for."""
    assert query.targets.weights is not None
    weights = (ratio * query.targets.weights[0].to(ratio))[..., None]
    direction = (tokens.direction.to(weights) * weights).sum(-2)

    def squeezed(x: Float[Tensor, "batch pos ..."]) -> Float[Tensor, "..."]:
        x = query.positions.squeeze(x)
        return x if query.has_batch else x.squeeze(0)

    return Readout(squeezed(direction), tokens.norms, squeezed(scale) if tokens.norms else None)
