"""Residual vectors read over the whole vocabulary, a chunk of it at a time.

The logits of many vectors over 250 thousand tokens do not fit in memory; what one wants of them is
a few numbers. They are accumulated chunk by chunk (a streaming log-sum-exp), in at least float32.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_dla.core.taps import exact
from tl_dla.inputs.targets import Targets
from tl_dla.model.unembedding import Unembedding


@dataclass(frozen=True, eq=False)
class Reading:
    """What `read_vocabulary` reads; see `LogitLens` for the meaning of each."""

    entropy: Float[Tensor, "layer batch pos"]
    top_ids: Int[Tensor, "layer batch pos k"]
    top_values: Float[Tensor, "layer batch pos k"]
    top_probabilities: Float[Tensor, "layer batch pos k"]
    values: Float[Tensor, "layer batch pos token"] | None
    probabilities: Float[Tensor, "layer batch pos token"] | None
    ranks: Int[Tensor, "layer batch pos token"] | None


@exact()
def read_vocabulary(
    unembed: Unembedding,
    states: list[Float[Tensor, "batch pos d"]],
    targets: Targets | None,
    top_k: int,
) -> Reading:
    """Read normalised streams, one a layer, over the whole vocabulary."""
    ids = None if targets is None else targets.ids.to(states[0].device)
    asked = _values_of(unembed, states, ids)
    read = [_Statistics(None if asked is None else asked[i]) for i in range(len(states))]
    for chunk in unembed.chunks():
        for state, statistics in zip(states, read, strict=True):
            statistics.add(chunk.logits(state), chunk.part.start, top_k)

    log_z = torch.stack([s.maximum + s.total.log() for s in read]).unsqueeze(-1)
    # H = log Z - E[x], both taken from the maximum, where they are small.
    entropy = torch.stack([s.total.log() - s.weighted / s.total for s in read])
    top_values = torch.stack([s.top_values for s in read])
    top = torch.stack([s.top_ids for s in read]), top_values, (top_values - log_z).exp()
    if asked is None:
        return Reading(entropy, *top, None, None, None)
    ranks = torch.stack([s.above for s in read if s.above is not None])
    return Reading(entropy, *top, asked, (asked - log_z).exp(), ranks)


def _values_of(
    unembed: Unembedding, states: list[Tensor], ids: Int[Tensor, "#batch #pos token"] | None
) -> Float[Tensor, "layer batch pos token"] | None:
    """The asked tokens' logits, from the very products that rank them.

    Computed in another way, rounding could put a token above itself.
    """
    if ids is None:
        return None
    lead = states[0].shape[:2]
    values: list[Tensor] = [torch.empty(0)] * len(states)
    for chunk in unembed.chunks():
        part = chunk.part
        inside = (ids >= part.start) & (ids < part.stop)
        if bool(inside.any()) or part.start == 0:
            local = (ids - part.start).clamp(0, part.stop - part.start - 1)
            for i, state in enumerate(states):
                chosen = chunk.logits(state).gather(-1, local.expand(*lead, -1))
                values[i] = torch.where(inside, chosen, values[i] if part.start else chosen)
    return torch.stack(values)


class _Statistics:
    """What is known of one point's softmax so far.

    With m the largest logit x seen: Σ exp(x - m) and Σ exp(x - m)(x - m); the top tokens; and how
    many tokens are above each asked one.
    """

    def __init__(self, asked: Float[Tensor, "batch pos token"] | None) -> None:
        self.asked = asked
        self.above = None if asked is None else torch.zeros_like(asked, dtype=torch.long)
        self.maximum = self.total = self.weighted = self.top_values = torch.empty(0)
        self.top_ids = torch.empty(0, dtype=torch.long)

    def add(self, logits: Float[Tensor, "batch pos chunk"], start: int, top_k: int) -> None:
        """Take in the logits of the tokens from `start` on."""
        top = logits.topk(min(top_k, logits.shape[-1]), -1)
        maximum, values, ids = top.values[..., 0], top.values, top.indices + start
        if start:
            maximum = torch.maximum(maximum, self.maximum)
            values = torch.cat([self.top_values, values], -1)
            ids = torch.cat([self.top_ids, ids], -1)
            values, order = values.topk(min(top_k, values.shape[-1]), -1)
            ids = ids.gather(-1, order)
        below = logits - maximum.unsqueeze(-1)
        mass = below.exp()
        total, weighted = mass.sum(-1), -torch.special.entr(mass).sum(-1)
        if start:
            step = self.maximum - maximum
            total = total + self.total * step.exp()
            weighted = weighted + (self.weighted + step * self.total) * step.exp()
        self.maximum, self.total, self.weighted = maximum, total, weighted
        self.top_values, self.top_ids = values, ids
        if self.asked is not None and self.above is not None:
            for t in range(self.asked.shape[-1]):
                self.above[..., t] += (logits > self.asked[..., t : t + 1]).sum(-1)
