"""Prompts and positions: what a user may write, made into tensors, or one clear sentence.

Positions count the real tokens of each prompt: 0 is its first, -1 its last, whatever the padding.
Prompts of different lengths are padded on the right when the model runs, where a causal model
cannot see the padding, so each prompt gives what it gives alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from tl_dla.errors import ArgumentError, TokenError

# ---- prompts -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Prompts:
    """Tokens `[batch, pos]` as laid out, and for each prompt where its real tokens are.

    `width` is how wide the model sees them, where that is more than the longest.
    """

    tokens: Int[Tensor, "batch pos"]
    start: Int[Tensor, " batch"]
    length: Int[Tensor, " batch"]
    width: int | None = None

    @property
    def packed(self) -> Int[Tensor, "batch pos"]:
        """The real tokens first, padding after them: what the model is run on."""
        longest = self.width or int(self.length.max())
        if not bool(self.start.any()):
            return self.tokens[:, :longest]
        index = torch.arange(longest, device=self.tokens.device)
        index = (self.start[:, None] + index).clamp(max=self.tokens.shape[1] - 1)
        return self.tokens.gather(1, index)

    def part(self, rows: slice) -> "Prompts":
        """Some of the prompts, as wide as all of them."""
        tokens = self.packed
        start = torch.zeros_like(self.start)
        return Prompts(tokens[rows], start[rows], self.length[rows], tokens.shape[1])


def read_prompts(
    model: Any,
    input: str | Sequence[str] | Int[Tensor, "*batch pos"],
    *,
    prepend_bos: bool | None = None,
    attention_mask: Int[Tensor, "batch pos"] | Bool[Tensor, "batch pos"] | None = None,
) -> Prompts:
    """Strings or tokens as `Prompts`.

    A batch of token ids that is padded is recognised by the runs of the tokenizer's padding token
    at the ends of its rows (as `transformer_lens.utilities.get_attention_mask` does), or told by
    `attention_mask`.

    Raises:
        TokenError: for an empty prompt, a doubled BOS, ids outside the vocabulary, a prompt longer
            than the model's context.
    """
    if isinstance(input, Tensor):
        if attention_mask is None:
            prompts = _from_tokens(model, input)
        else:
            prompts = _from_mask(model, input, attention_mask)
    else:
        if not isinstance(input, str | Sequence) or isinstance(input, bytes):
            raise TokenError(
                "A prompt must be a string, a list of strings or a tensor of token ids; a"
                f" {type(input).__name__} was given."
            )
        texts = [input] if isinstance(input, str) else list(input)
        rows = [_tokenize(model, text, prepend_bos) for text in texts]
        if not rows:
            raise TokenError("The prompt is empty: an empty list was given; give a prompt or more.")
        length = torch.tensor([len(row) for row in rows], device=rows[0].device)
        tokens = torch.nn.utils.rnn.pad_sequence(
            rows, batch_first=True, padding_value=_pad_id(model)
        )
        prompts = Prompts(tokens, torch.zeros_like(length), length)
    _check_prompts(model, prompts)
    return prompts


def _pad_id(model: Any) -> int:
    tokenizer = getattr(model, "tokenizer", None)
    return getattr(tokenizer, "pad_token_id", None) or 0


def require_tokenizer(model: Any, what: str) -> Any:
    """The model's tokenizer; an error that says what must be ids where it has none."""
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise TokenError(f"The model has no tokenizer, so {what} must be given as token ids.")
    return tokenizer


def _tokenize(model: Any, text: Any, prepend_bos: bool | None) -> Int[Tensor, " pos"]:
    if not isinstance(text, str):
        raise TokenError(
            f"A prompt must be a string or a tensor of token ids; a list held a"
            f" {type(text).__name__}."
        )
    tokenizer = require_tokenizer(model, "prompts")
    if not text:
        raise TokenError('The prompt is empty: "" was given; give at least one token.')
    bos = tokenizer.bos_token
    options = {} if prepend_bos is None else {"prepend_bos": prepend_bos}
    tokens = model.to_tokens(text, truncate=False, **options)[0]
    if bos and text.startswith(bos) and len(tokens) > 1:
        if int(tokens[0]) == int(tokens[1]) == tokenizer.bos_token_id:
            raise TokenError(
                f"The prompt starts with {bos!r} and the model prepends another: remove it from the"
                " text, or pass prepend_bos=False."
            )
    return tokens


def _from_mask(model: Any, tokens: Tensor, mask: Tensor) -> Prompts:
    tokens = _token_rows(model, tokens)
    mask = (mask[None] if mask.ndim == 1 else mask).to(tokens.device)
    if mask.shape != tokens.shape:
        raise TokenError(
            f"attention_mask must have the shape of the tokens, {tuple(tokens.shape)}; it has"
            f" {tuple(mask.shape)}."
        )
    mask = mask.bool()
    length, start = mask.sum(-1), mask.int().argmax(-1)
    index = torch.arange(tokens.shape[1], device=tokens.device)
    run = (index >= start[:, None]) & (index < (start + length)[:, None])
    if not torch.equal(run, mask):
        raise TokenError(
            "attention_mask has a gap inside a prompt; only padding before or after it is possible."
        )
    return Prompts(tokens, start, length)


def _token_rows(model: Any, tokens: Tensor) -> Int[Tensor, "batch pos"]:
    tokens = tokens[None] if tokens.ndim == 1 else tokens
    if tokens.ndim != 2 or tokens.is_floating_point() or not tokens.numel():
        raise TokenError(
            "Prompts as tokens must be integers [pos] or [batch, pos] with at least one token;"
            f" a {tokens.dtype} tensor of shape {tuple(tokens.shape)} was given."
        )
    return tokens.to(next(iter(model.parameters())).device)


def _from_tokens(model: Any, tokens: Tensor) -> Prompts:
    tokens = _token_rows(model, tokens)
    batch, pos = tokens.shape
    tokenizer = getattr(model, "tokenizer", None)
    pad = getattr(tokenizer, "pad_token_id", None)
    if tokenizer is None or pad is None:
        return Prompts(tokens, tokens.new_zeros(batch), tokens.new_full((batch,), pos))
    real = tokens != pad
    start, after = real.int().argmax(-1), real.flip(-1).int().argmax(-1)
    if pad in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id):
        # Not only padding: but the longest prompt has none, so what every row starts or ends with
        # is its own.
        start, after = start - start.min(), after - after.min()
        after = torch.where(start > 0, 0, after)
    elif not bool(real.any(-1).all()):
        raise TokenError("A prompt is empty: one holds nothing but padding.")
    return Prompts(tokens, start, pos - start - after)


def _check_prompts(model: Any, prompts: Prompts) -> None:
    cfg, tokens = model.cfg, prompts.tokens
    if bool((prompts.length < 1).any()):
        raise TokenError("A prompt is empty: every prompt needs at least one token.")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= cfg.d_vocab:
        raise TokenError(
            f"Token id {low if low < 0 else high} is outside the model's vocabulary of"
            f" {cfg.d_vocab} tokens (ids 0 to {cfg.d_vocab - 1})."
        )
    longest = int(prompts.length.max())
    if longest > cfg.n_ctx:
        raise TokenError(
            f"A prompt has {longest} tokens, more than the model's context of {cfg.n_ctx}:"
            " shorten it."
        )
    tokenizer = getattr(model, "tokenizer", None)
    bos = getattr(tokenizer, "bos_token_id", None)
    if tokenizer is not None and bos is not None and longest > 1:
        first = tokens.gather(1, prompts.start[:, None])
        second = tokens.gather(1, (prompts.start[:, None] + 1).clamp(max=tokens.shape[1] - 1))
        doubled = ((first == bos) & (second == bos))[:, 0] & (prompts.length > 1)
        if bool(doubled.any()):
            row = int(doubled.int().argmax())
            raise TokenError(
                f"Prompt {row} starts with two BOS tokens ({tokenizer.bos_token!r}): remove one."
            )


# ---- positions ---------------------------------------------------------------------------------


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

    def part(self, rows: slice) -> "Positions":
        """The positions of some of the prompts."""
        return replace(self, index=self.index[rows], valid=self.valid[rows])


def read_positions(pos: Any, prompts: Prompts) -> Positions:
    """`pos` as TransformerLens's `Slice` reads it.

    An int, a list, tensor or array of ints, a tuple or `slice`, a `Slice`, or None for every
    position.

    Raises:
        TokenError: for a position that a prompt does not have.
    """
    from transformer_lens.utilities import Slice

    if isinstance(pos, Slice):
        pos = pos.slice
    if isinstance(pos, tuple):
        pos = slice(*pos)
    lengths = prompts.length.tolist()
    if pos is None:
        pos = slice(None)
    if isinstance(pos, slice):
        rows = [list(range(n))[pos] for n in lengths]
        if not all(rows):
            raise TokenError(f"pos={pos!r} selects no position of prompt {rows.index([])}.")
        single = False
    else:
        try:
            wanted = torch.as_tensor(pos)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ArgumentError(
                f"pos must be an integer, a list of integers, a slice or None; {pos!r} was given."
            ) from error
        if wanted.is_floating_point() or wanted.dtype == torch.bool or wanted.ndim > 1:
            raise ArgumentError(
                f"pos must be an integer, a list of integers, a slice or None; {pos!r} was given."
            )
        single = wanted.ndim == 0
        flat = wanted.reshape(-1).tolist()
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
    valid = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    every = isinstance(pos, slice) and pos == slice(None)
    shared = rows[0][0] if width == 1 and len({row[0] for row in rows}) == 1 else None
    return Positions(index, valid.to(device), single, every, shared)


# ---- tokens as text ----------------------------------------------------------------------------


def token_strings(model: Any, ids: Int[Tensor, " token"]) -> list[str]:
    """Each token as text; its id where the model has no tokenizer."""
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        return [str(int(i)) for i in ids]
    return [tokenizer.decode([int(i)]) for i in ids]
