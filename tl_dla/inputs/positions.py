"""Positions: which tokens of each prompt are attributed.

They count the real tokens of each prompt: 0 is its first, -1 its last, whatever the padding.
"""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from tl_dla.errors import ArgumentError, TokenError
from tl_dla.inputs.tokens import Prompts, require_tokenizer, token_strings


@dataclass(frozen=True, eq=False)
class Positions:
    """The positions attributed, of each prompt: `index` counts its real tokens from 0.

    `valid` is False where a prompt is too short to have the position that others have. `every`
    says that they are all positions in order, and `shared` that one position is the same in every
    prompt, so that nothing need be gathered.
    """

    index: Int[Tensor, "batch pos"]
    valid: Bool[Tensor, "batch pos"]
    single: bool
    every: bool
    shared: int | None = None

    def take(
        self, x: Shaped[Tensor, "#batch ..."], start: Int[Tensor, " batch"] | None = None
    ) -> Shaped[Tensor, "batch ..."]:
        """The activations `[batch, pos, …]` at these positions.

        `start` says where the prompts begin in their layout.
        """
        batch = self.index.shape[0]
        if x.shape[0] == 1 and batch > 1:
            x = x.expand(batch, *x.shape[1:])
        if start is None and self.every:
            return x[:, : self.index.shape[1]]
        if start is None and self.shared is not None:
            return x[:, self.shared : self.shared + 1]
        index = self.index if start is None else self.index + start[:, None]
        rows = torch.arange(batch, device=x.device)[:, None]
        return x[rows, index.to(x.device)]

    def squeeze(self, x: Float[Tensor, "..."], axis: int = 1) -> Float[Tensor, "..."]:
        """Drop the position axis where one position was asked for."""
        return x.squeeze(axis) if self.single else x

    def unsqueeze(self, x: Float[Tensor, "..."], axis: int = 1) -> Float[Tensor, "..."]:
        """With the position axis, also where one position was asked for."""
        return x.unsqueeze(axis) if self.single else x

    def mask(self, width: int) -> Bool[Tensor, "batch {width}"]:
        """Which tokens they are, of prompts packed in that width."""
        mask = torch.zeros(len(self.index), width, dtype=torch.bool, device=self.index.device)
        rows, columns = self.valid.nonzero(as_tuple=True)
        mask[rows, self.index[rows, columns]] = True
        return mask

    @property
    def last(self) -> Int[Tensor, " batch"]:
        """The last of each prompt's own, in the order asked for."""
        rows = zip(self.index, self.valid, strict=True)
        return torch.stack([index[valid][-1] for index, valid in rows])

    def part(self, rows: slice | Int[Tensor, " row"]) -> "Positions":
        """The positions of some of the prompts."""
        return replace(self, index=self.index[rows], valid=self.valid[rows])


def slice_class() -> Any:
    """TransformerLens's `Slice`, which TransformerLens 2 keeps elsewhere."""
    try:
        from transformer_lens.utilities import Slice
    except ImportError:
        from transformer_lens.utils import Slice
    return Slice


def read_positions(pos: Any, prompts: Prompts) -> Positions:
    """`pos` as TransformerLens's `Slice` reads it.

    An int, a list, tensor or array of ints, a tuple or `slice`, a `Slice`, or None for every
    position.

    Raises:
        TokenError: for a position that a prompt does not have.
        ArgumentError: for what is no position.
    """
    if isinstance(pos, slice_class()):
        pos = pos.slice
    if pos is None:
        pos = slice(None)
    lengths, single = prompts.length.tolist(), False
    if isinstance(pos, tuple | slice):
        try:
            pos = slice(*pos) if isinstance(pos, tuple) else pos
            rows = [list(range(n))[pos] for n in lengths]
        except (TypeError, ValueError) as error:  # no or four numbers, texts, a step of 0
            raise _refusal(pos) from error
        if not all(rows):
            raise TokenError(f"pos={pos!r} selects no position of prompt {rows.index([])}.")
    else:
        wanted = _integers(pos)
        single, flat = wanted.ndim == 0, wanted.reshape(-1).tolist()
        for row, n in enumerate(lengths):
            for p in flat:
                if not -n <= p < n:
                    raise TokenError(
                        f"Position {p} is outside prompt {row}, which has {n} tokens"
                        f" (0 to {n - 1}, or -{n} to -1)."
                    )
        rows = [[p % n for p in flat] for n in lengths]
    width = max(map(len, rows))
    device = prompts.tokens.device
    index = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    known = [[True] * len(row) + [False] * (width - len(row)) for row in rows]
    valid = torch.tensor(known, device=device)
    every = isinstance(pos, slice) and pos == slice(None)
    shared = rows[0][0] if width == 1 and len({row[0] for row in rows}) == 1 else None
    return Positions(index, valid, single, every, shared)


def _integers(pos: Any) -> Int[Tensor, "..."]:
    """One integer, or a row of them."""
    with suppress(TypeError, ValueError, RuntimeError):
        wanted = torch.as_tensor(pos)
        counted = wanted.dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
        if counted and wanted.ndim < 2 and wanted.numel():
            return wanted
    raise _refusal(pos)


def _refusal(pos: Any) -> ArgumentError:
    return ArgumentError(
        f"pos must be an integer, a list of integers, a slice or None; {pos!r} was given."
    )


def read_places(
    model: Any, prompts: Prompts, given: int | str | Sequence[int], name: str
) -> Int[Tensor, " batch"]:
    """One token of each prompt: its position, one per prompt, or its text where that is once.

    Raises:
        TokenError: for a token that a prompt does not have; `name` says which was meant.
    """
    lengths = prompts.length.tolist()
    if isinstance(given, str):
        places = [_find(model, prompts, row, given) for row in range(len(lengths))]
    else:
        given = given.tolist() if isinstance(given, Tensor) else given
        places = list(given) if isinstance(given, Iterable) else [given] * len(lengths)
        if not all(isinstance(place, Integral) for place in places):
            raise TokenError(
                f"{name.capitalize()} must be a position, one per prompt, or a token's text; got"
                f" {given!r}."
            )
    if len(places) != len(lengths):
        raise TokenError(
            f"{len(places)} positions were given as {name} for {len(lengths)} prompts."
        )
    for row, (place, length) in enumerate(zip(places, lengths, strict=True)):
        if not -length <= place < length:
            raise TokenError(
                f"{name.capitalize()} {place} is outside prompt {row}, which has {length} tokens."
            )
    resolved = [place % length for place, length in zip(places, lengths, strict=True)]
    return torch.tensor(resolved, device=prompts.tokens.device)


def _find(model: Any, prompts: Prompts, row: int, text: str) -> int:
    require_tokenizer(model, "positions")
    texts = token_strings(model, prompts.rows[row])
    places = [place for place, token in enumerate(texts) if token == text]
    if len(places) != 1:
        at = f" (positions {', '.join(map(str, places))})" if places else ""
        raise TokenError(
            f"{text!r} is {len(places)} times a token of prompt {row}{at}"
            f" ({', '.join(map(repr, texts))}): give its position."
        )
    return places[0]
