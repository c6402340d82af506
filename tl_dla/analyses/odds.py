"""What a model itself says of each token of an answer: log-probability, rank, and the runner-up."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_dla.core.rounding import logits_tolerance
from tl_dla.core.run import Run
from tl_dla.core.taps import Tap
from tl_dla.model.hooks import Site, in_float64, upcast
from tl_dla.model.reader import ModelReader
from tl_dla.model.unembedding import output_transform

_POSITIONS_AT_ONCE = 64  # whose logits are held in float32 at once


@dataclass(frozen=True, eq=False)
class Odds:
    """What the model itself says of each token of the answers.

    Attributes:
        log_probs: in nats; NaN where an answer has fewer tokens than others.
        ranks: how many tokens are likelier: 0 for the prediction itself; -1 for no token.
        runner_up: the likeliest token beside the answer's; -1 for no token.
    """

    log_probs: Float[Tensor, "prompt step"]
    ranks: Int[Tensor, "prompt step"]
    runner_up: Int[Tensor, "prompt step"]


class OddsReader:
    """The model's own words on each token, read off the logits as they pass by."""

    def __init__(self, model: Any, ids: Int[Tensor, "prompt step 1"]) -> None:
        self.model, self.ids = model, ids[..., 0]
        self.site = Site("unembed.output", model.unembed)
        self.whole = self._tap(slice(0, len(ids)))

    def taps(self, prompts: slice) -> list[Tap]:
        """What to keep, of some of the prompts."""
        return [self.whole if prompts == slice(0, len(self.ids)) else self._tap(prompts)]

    def _tap(self, prompts: slice) -> Tap:
        # Whole: the unembedding is given no other positions than those attributed.
        return Tap(self.site, partial(_odds, self.model, self.ids[prompts]), whole=True)

    def odds(self, once: Run) -> Odds:
        """What was read; nothing where an answer has no such token."""
        log_probs, ranks, runner_up, own = once.kept[self.whole].unbind(-1)
        assert once.kept.logits is not None
        returned = once.kept.logits[..., 0].to(own)
        # The model may do something to its logits that is not understood.
        eps = max(ModelReader(self.model).machine_eps, once.kept.machine_eps)
        allowed = logits_tolerance(eps) * returned.abs().amax()
        understood = (own - returned).abs() <= allowed
        valid = once.query.positions.valid.to(ranks.device)
        log_probs = torch.where(understood, log_probs, torch.nan)
        ranks, runner_up = (torch.where(valid, x, -1).long() for x in (ranks, runner_up))
        log_probs = torch.where(valid, log_probs, torch.nan).float()
        return Odds(*(x.to(once.kept.logits.device) for x in (log_probs, ranks, runner_up)))


def _odds(
    model: Any, ids: Int[Tensor, "prompt step"], raw: Float[Tensor, "prompt step d_vocab"]
) -> Float[Tensor, "prompt step 4"]:
    """Log-probability, rank, the likeliest other token, and the logit, after the transform."""
    found = []
    for start in range(0, ids.shape[1], _POSITIONS_AT_ONCE):
        at = slice(start, start + _POSITIONS_AT_ONCE)
        logits = output_transform(model, upcast(raw[:, at]))
        own = logits.gather(-1, chosen := ids[:, at, None].to(logits.device))
        log_prob = own[..., 0] - logits.logsumexp(-1)
        rank = (logits > own).sum(-1)
        others = logits.scatter(-1, chosen, -torch.inf).argmax(-1)
        seen = (log_prob, rank, others, own[..., 0])
        found.append(torch.stack([in_float64(x) for x in seen], -1))
    return torch.cat(found, 1)
