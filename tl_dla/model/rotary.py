"""Rotary positions as matrices: what a head's queries and keys are multiplied with.

Architectures pair a head's axes in different ways, turn them in either sense and leave some alone.
None of that is written down here: the model's own function is applied to the basis vectors, and
what it returns are the columns of the matrix.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from inspect import unwrap as unwrap_decorators
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_dla.model.hooks import Site, unwrap


@dataclass(frozen=True, eq=False)
class Rotary:
    """How a layer rotates queries and keys by their position.

    Attributes:
        site: shows what the attention is given about positions: cos and sin, or position ids.
        width: how many axes of a head are rotated at most; they begin at `start`.
        d_head: how many a head has.
    """

    site: Site
    start: int
    width: int
    d_head: int
    apply: Callable[[Float[Tensor, "batch basis pos width"], Any], Tensor]

    def matrix(self, given: Any) -> Float[Tensor, "batch pos d_head d_head"] | None:
        """The rotation at each position, from what `site` shows: q becomes R q; None for none."""
        if given is None:
            return None
        first = given[0] if isinstance(given, tuple | list) else given
        batch, pos = first.shape[:2]
        dtype = first.dtype if first.dtype == torch.float64 else torch.float32
        if first.is_complex():
            turned = _of_complex(first)
        else:
            turned = self._turned(given, batch, pos, dtype, first)
        width = turned.shape[-1]
        matrix = torch.eye(self.d_head, dtype=turned.dtype, device=turned.device)
        matrix = matrix.repeat(batch, pos, 1, 1)
        rotated = slice(self.start, self.start + width)
        matrix[..., rotated, rotated] = turned
        return matrix

    def _turned(self, given: Any, batch: int, pos: int, dtype: Any, like: Tensor) -> Tensor:
        width = self.width
        if like.is_floating_point() and not self._takes(given, like, width):
            width = like.shape[-1]  # the axes that cos covers; the caller leaves the others alone
        basis = torch.eye(width, dtype=dtype, device=like.device)
        basis = basis[None, :, None].expand(batch, -1, pos, -1)
        # basis vector e_j is at index j of the second axis: its image is column j
        return self.apply(basis, given).permute(0, 2, 3, 1)

    def _takes(self, given: Any, like: Tensor, width: int) -> bool:
        """Whether the model's function takes whole heads, or only the axes that cos covers."""
        if like.shape[-1] == width:
            return True
        probe = torch.zeros(like.shape[0], 1, like.shape[1], width, dtype=like.dtype)
        try:
            return self.apply(probe.to(like.device), given).shape[-1] == width
        except RuntimeError:  # sizes do not match
            return False


def read_rotary(attn: Any, at: str, start: int, width: int, d_head: int) -> Rotary | None | str:
    """How an attention module rotates; None where it does not, a reason where it is not found."""
    inner = unwrap(attn)
    nope = getattr(attn, "_is_nope_layer", None)
    if nope is not None and nope() or _declines(inner, "use_rope", "is_local_attention"):
        return None
    home = sys.modules.get(type(inner).__module__)
    config = getattr(inner, "config", None)
    interleave = getattr(config, "rope_interleave", False)
    names = ["apply_rotary_pos_emb", "apply_rotary_pos_emb_interleave"]
    found = (getattr(home, name, None) for name in (names[::-1] if interleave else names))
    function = next((each for each in found if each is not None), None)
    site = Site(at, attn, True, "position_embeddings")
    if function is not None and list(signature(function).parameters)[1:] == ["sin", "cos"]:
        table = getattr(inner, "embed_positions", None)
        if table is not None:  # GPT-J before transformers 5.24
            site = Site(at, attn, True, "position_ids")
        rotated = getattr(inner, "rotary_dim", None) or width
        return Rotary(site, start, rotated, d_head, _sin_first(function, table))
    if function is None and hasattr(home, "apply_rotary_emb"):  # DeepSeek-V2, Llama 4
        return Rotary(site, start, width, d_head, _complex_only)
    if function is None:
        if hasattr(attn, "hook_rot_q"):
            return f"rotates by a function that is not found in {type(inner).__module__}"
        return None
    return Rotary(site, start, width, d_head, _by_function(function))


def _declines(inner: Any, *names: str) -> bool:
    """Whether one of these is false, and the forward pass asks for it."""
    asked = unwrap_decorators(type(inner).forward).__code__.co_names
    return any(name in asked and not getattr(inner, name, True) for name in names)


def _by_function(function: Callable[..., Any]) -> Callable[[Tensor, Any], Tensor]:
    """`apply_rotary_pos_emb(q, k, cos, sin)`, or the same of one tensor."""
    both = list(signature(function).parameters)[:2] == ["q", "k"]

    def apply(basis: Tensor, given: Any) -> Tensor:
        cos, sin = (x.to(basis.dtype) for x in given)
        return function(basis, basis, cos, sin)[0] if both else function(basis, cos, sin)

    return apply


def _sin_first(
    function: Callable[..., Any], table: Float[Tensor, "pos two_width"] | None
) -> Callable[[Tensor, Any], Tensor]:
    """`apply_rotary_pos_emb(x, sin, cos)` with x `[batch, pos, head, width]`, as in GPT-J.

    The attention is given sin and cos, or positions to look up in its own table.
    """

    def apply(basis: Tensor, given: Any) -> Tensor:
        sin, cos = given if table is None else table.to(basis)[given].chunk(2, -1)
        return function(basis.transpose(1, 2), sin.to(basis), cos.to(basis)).transpose(1, 2)

    return apply


def _complex_only(basis: Tensor, given: Any) -> Tensor:
    raise TypeError("The rotations of this model are complex numbers.")


def _of_complex(turn: Tensor) -> Float[Tensor, "batch pos width width"]:
    """Neighbouring axes turned by a complex number, as Llama 4 and DeepSeek-V2 write it."""
    blocks = torch.stack([turn.real, -turn.imag, turn.imag, turn.real], -1).unflatten(-1, (2, 2))
    n = blocks.shape[2]
    matrix = torch.zeros(*blocks.shape[:2], n, 2, n, 2, dtype=blocks.dtype, device=blocks.device)
    each = torch.arange(n, device=blocks.device)
    matrix[:, :, each, :, each] = blocks.movedim(2, 0)
    return matrix.flatten(4).flatten(2, 3)
