"""From the final norm's output to logits: W_U, b_U, and the model's output transform.

Logits over 250 thousand tokens do not fit in memory for many positions: `Unembedding` gives them a
chunk of the vocabulary at a time. Everything is in at least float32.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_dla.errors import ArgumentError, UnsupportedModelError
from tl_dla.model.hooks import (
    class_name,
    compute_dtype,
    is_packed,
    own_map,
    parameter,
    product,
    unwrap,
)
from tl_dla.model.sharded import is_sharded, rows_of, team, whole
from tl_dla.model.stream import Stream


def output_transform(model: Any, logits: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The model's own output transform: a multiplier, a soft cap."""
    adapter = getattr(model, "adapter", None)
    if adapter is not None and hasattr(adapter, "apply_output_logits_transform"):
        return adapter.apply_output_logits_transform(logits)
    cap = getattr(model.cfg, "output_logits_soft_cap", None)
    return cap * torch.tanh(logits / cap) if cap and cap > 0 else logits


def unembed_matrix(model: Any, *, in_parts: bool = False) -> Float[Tensor, "d d_vocab"]:
    """W_U, dequantised where it is kept quantised, brought back where it is offloaded.

    With `in_parts` it is left as processes hold it that share it out and run each prompt together.
    """
    inner = unwrap(model.unembed)
    stored = getattr(inner, "weight", None)
    if is_packed(inner):
        own = own_map(inner, model)
        if own is None:
            raise UnsupportedModelError(
                f"The unembedding, {class_name(inner)}, holds its weight in a form that is no"
                " matrix: keep it as it is where the model is quantised; no unit works."
            )
        return own[0]
    if isinstance(stored, Tensor) and (stored.is_meta or is_sharded(stored)):
        weight = parameter(inner, "weight", in_parts=in_parts and team(model) is not None)
        assert weight is not None
        return weight.mT
    return model.W_U.detach()


def unembed_bias(model: Any) -> Float[Tensor, " d_vocab"] | None:
    """b_U, brought back where it is offloaded; None where the model has none, or only zeros."""
    bias = getattr(model, "b_U", None)
    if bias is not None and bias.is_meta:
        bias = parameter(unwrap(model.unembed), "bias")
    return None if bias is None or not bool(whole(bias.any())) else whole(bias.detach())


def is_linear(model: Any) -> bool:
    """Whether the model's output transform multiplies all logits by one number."""
    x = torch.tensor([0.5, -1.0, 4.0, 32.0])
    ratio = output_transform(model, x) / x
    return bool(torch.allclose(ratio, ratio[:1].expand_as(ratio)))


def unembedding(
    model: Any, ids: Int[Tensor, "#batch #pos token"], mean_of_vocab: bool = False
) -> tuple[Float[Tensor, "#batch #pos column d"], Float[Tensor, "#batch #pos column"] | None]:
    """The tokens' columns of W_U and entries of b_U; with `mean_of_vocab`, then their means.

    The bias is None where the model has none, or only zeros.
    """
    W_U, b_U = unembed_matrix(model, in_parts=True), unembed_bias(model)
    dtype = compute_dtype(W_U.dtype)
    ids = ids.to(W_U.device)
    columns = rows_of(W_U.mT, ids).to(dtype)
    if mean_of_vocab:
        every = columns.new_full((1, W_U.shape[1]), 1 / W_U.shape[1])
        mean = product(W_U, every).expand(*ids.shape[:2], 1, -1)
        columns = torch.cat([columns, mean], 2)
    if b_U is None:
        return columns, None
    bias = b_U[ids].to(dtype)
    if mean_of_vocab:
        bias = torch.cat([bias, b_U.mean(dtype=dtype).expand(*ids.shape[:2], 1)], 2)
    return columns, bias


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some tokens of the vocabulary: their columns of W_U, as stored, and entries of b_U."""

    part: slice
    columns: Float[Tensor, "d chunk"]
    bias: Float[Tensor, " chunk"]
    model: Any
    linear: bool

    def moved(self, y: Float[Tensor, "*lead d"]) -> Float[Tensor, "*lead chunk"]:
        """What a vector adds to the logits, before the output transform."""
        return product(self.columns.mT, y.to(self.bias))

    def logits(self, y: Float[Tensor, "*lead d"]) -> Float[Tensor, "*lead chunk"]:
        """The logits of a normalised stream, after the model's output transform."""
        return output_transform(self.model, self._raw(y))

    def ratio(self, y: Float[Tensor, "*lead d"]) -> Float[Tensor, "*#lead chunk"]:
        """The output transform, frozen: transformed / raw."""
        raw = torch.ones_like(self.bias) if self.linear else self._raw(y)
        return torch.where(raw == 0, 1.0, output_transform(self.model, raw) / raw)

    def _raw(self, y: Float[Tensor, "*lead d"]) -> Float[Tensor, "*lead chunk"]:
        return self.moved(y) + self.bias


class Unembedding:
    """The model's own final norm, projection, unembedding and output transform, in chunks."""

    def __init__(self, model: Any, stream: Stream, chunk_size: int) -> None:
        if chunk_size < 1:
            raise ArgumentError(f"chunk_size must be at least 1; {chunk_size} was given.")
        self.model, self.stream, self.chunk_size = model, stream, chunk_size
        self.W_U = unembed_matrix(model)
        self.b_U = unembed_bias(model)
        self.d_vocab, self.linear = self.W_U.shape[1], is_linear(model)

    def normalise(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d"]:
        """What is multiplied with W_U: the norm's statistics are those of x."""
        if self.stream.norm is not None:
            norm = self.model.ln_final
            x = norm(x.to(next((w.device for w in norm.parameters() if not w.is_meta), x.device)))
        if self.stream.project_out is not None:
            x = x @ self.stream.project_out.to(x).mT
        return x.to(self.W_U.device)

    def chunks(self) -> Iterator[Chunk]:
        """The whole vocabulary, `chunk_size` tokens at a time."""
        dtype = compute_dtype(self.W_U.dtype)
        for start in range(0, self.d_vocab, self.chunk_size):
            part = slice(start, min(start + self.chunk_size, self.d_vocab))
            columns = self.W_U[:, part]
            bias = columns.new_zeros(columns.shape[1]) if self.b_U is None else self.b_U[part]
            yield Chunk(part, columns, bias.to(dtype), self.model, self.linear)
