"""The mean logit of the vocabulary as a baseline, where a soft cap bends every logit.

Capped logits are r_v × raw logits, with a ratio r_v of each token's own that is frozen. Their mean
is read along Σ_v r_v W_U[:, v] / V, so the direction is known only once the logits are: the model
(or the cache) is read once for its final residual stream, and the vocabulary chunk by chunk.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_dla.analyses.vocabulary import Unembedding
from tl_dla.core.rows import upcast
from tl_dla.core.taps import Probe, Recording
from tl_dla.model.reader import ModelReader, output_transform

_CHUNK = 16384  # tokens whose columns of W_U are held in float32 at once


def is_linear(model: Any) -> bool:
    """Whether the model's output transform multiplies all logits by one number."""
    x = torch.tensor([0.5, -1.0, 4.0, 32.0])
    ratio = output_transform(model, x) / x
    return bool(torch.allclose(ratio, ratio[:1].expand_as(ratio)))


def capped_mean(
    reader: ModelReader, read: Callable[[Sequence[Probe]], Recording]
) -> tuple[Float[Tensor, "batch pos 1 d"], Float[Tensor, "batch pos 1"]]:
    """The mean capped logit's direction at the unembedding, and its bias; `read` reads probes."""
    stream = reader.stream()
    final, norm = stream.points[-1], stream.norm
    probes = [Probe("final", final.site, upcast)]
    if norm is not None:
        probes.append(Probe("scale", norm.site, lambda x: norm.scale(upcast(x))))
    values = read(probes).values
    y = values["final"]
    if norm is not None:
        y = y - y.mean(-1, keepdim=True) if norm.centred else y
        y = y / values["scale"][..., None]
        y = y if norm.gamma is None else y * norm.gamma.to(y)
        y = y if norm.beta is None else y + norm.beta.to(y)
    if stream.project_out is not None:
        y = y @ stream.project_out.to(y).mT
    unembed = Unembedding(reader.model, stream, _CHUNK)
    direction, bias = torch.zeros_like(y), torch.zeros_like(y[..., 0])
    for chunk in unembed.chunks():
        ratio = chunk.ratio(y)
        direction += ratio @ chunk.columns.mT
        bias += ratio @ chunk.bias
    n = unembed.d_vocab
    return (direction / n)[:, :, None], (bias / n)[:, :, None]
