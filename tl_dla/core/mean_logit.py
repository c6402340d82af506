"""The mean logit of the vocabulary as a baseline, where a soft cap bends every logit.

Capped logits are r_v × raw logits, with a ratio r_v of each token's own that is frozen. Their mean
is read along Σ_v r_v W_U[:, v] / V, so the direction is known only once the logits are: the model
(or the cache) is read once for its final residual stream, and the vocabulary chunk by chunk.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_dla.core.taps import Kept, Tap, exact
from tl_dla.model.hooks import product, upcast
from tl_dla.model.reader import ModelReader
from tl_dla.model.unembedding import Unembedding

_CHUNK = 16384  # tokens of the vocabulary that are read at once


@dataclass(frozen=True, eq=False)
class Mean:
    """The mean capped logit's direction at the unembedding, and its bias."""

    direction: Float[Tensor, "batch pos 1 d"]
    bias: Float[Tensor, "batch pos 1"]

    def part(self, rows: slice) -> "Mean":
        """Of some of the prompts."""
        return Mean(self.direction[rows], self.bias[rows])


def capped_mean(reader: ModelReader, read: Callable[[Sequence[Tap]], Kept]) -> Mean:
    """The mean capped logit; `read` reads taps, from a run or a cache."""
    stream = reader.stream()
    norm = stream.norm
    taps = [Tap(stream.points[-1].site, upcast)]
    if norm is not None:
        taps.append(Tap(norm.site, norm.scale))
    kept = read(taps)
    with exact():
        y = kept[taps[0]]
        if norm is not None:
            y = norm.forward(y, kept[taps[1]])
        if stream.project_out is not None:
            y = y @ stream.project_out.to(y).mT
        unembed = Unembedding(reader.model, stream, _CHUNK)
        y = y.to(unembed.W_U.device)
        direction, bias = torch.zeros_like(y), torch.zeros_like(y[..., 0])
        for chunk in unembed.chunks():
            ratio = chunk.ratio(y)
            direction += product(chunk.columns, ratio)
            bias += ratio @ chunk.bias
        n = unembed.d_vocab
        return Mean((direction / n)[:, :, None], (bias / n)[:, :, None])
