"""Prompts, answers and positions: what a user may write, made into tensors, or one clear sentence.

Positions count the real tokens of each prompt: 0 is its first, -1 its last, whatever the padding.
Prompts of different lengths are padded on the right when the model runs, where a causal model
cannot see the padding, so each prompt gives what it gives alone.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from tl_dla.errors import ArgumentError, TokenError

Answers = str | int | Sequence[Any] | Tensor


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


def _require_tokenizer(model: Any, what: str) -> Any:
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
    tokenizer = _require_tokenizer(model, "prompts")
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


# ---- answers -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Targets:
    """The logits attributed: their tokens, and how they are added up.

    `ids` is `[batch, pos, token]` with 1 where it is shared. `weights` is `[candidate, token]`:
    the answer minus the mean of the incorrect answers is (1, -1/k, …, -1/k). `mean_of_vocab` adds
    one more token at the end that stands for the mean logit of the vocabulary.
    """

    ids: Int[Tensor, "#batch #pos token"]
    weights: Float[Tensor, "candidate weight"]
    candidates: tuple[str, ...] | None = None
    mean_of_vocab: bool = False

    def part(self, rows: slice) -> "Targets":
        """The targets of some of the prompts."""
        return self if self.ids.shape[0] == 1 else replace(self, ids=self.ids[rows])


def read_targets(
    model: Any,
    answer: Answers | None,
    incorrect: Answers | None,
    candidates: Sequence[str | int] | Tensor | None,
    batch: int,
    positions: Positions,
    texts: Sequence[str] | None = None,
) -> Targets:
    """Answers, incorrect answers and candidates as `Targets`.

    Raises:
        TokenError: for a string that is not one token, an id outside the vocabulary, a shape that
            does not fit.
        ArgumentError: for an answer and candidates together, or neither.
    """
    if (answer is None) == (candidates is None):
        raise ArgumentError(
            "answer_tokens is required (or candidate_tokens in its place, not both)."
        )
    n_pos = positions.index.shape[1]
    if candidates is not None:
        listed = [candidates] if isinstance(candidates, str | int) else list(candidates)
        ids = token_ids(model, listed, texts).reshape(1, 1, -1)
        names = tuple(token_strings(model, ids.flatten()))
        weights = torch.eye(ids.shape[-1], dtype=torch.float64)
    else:
        assert answer is not None
        ids = _grid(model, answer, "answer_tokens", batch, n_pos, texts)
        if ids.shape[-1] != 1:
            raise TokenError(
                f"answer_tokens holds {ids.shape[-1]} answers per prompt, but one is attributed:"
                " pass the others as incorrect_tokens (for columns (correct, incorrect):"
                " answers[:, 0] and answers[:, 1]), or attribute to each with candidate_tokens."
            )
        names, weights = None, torch.ones(1, 1, dtype=torch.float64)
    if incorrect is None:
        return Targets(ids, weights, names)
    if isinstance(incorrect, str) and incorrect == "mean":
        baseline = -torch.ones(len(weights), 1, dtype=torch.float64)
        return Targets(ids, torch.cat([weights, baseline], 1), names, mean_of_vocab=True)
    wrong = _grid(model, incorrect, "incorrect_tokens", batch, n_pos, texts)
    k = wrong.shape[-1]
    lead = [max(a, b) for a, b in zip(ids.shape[:2], wrong.shape[:2], strict=True)]
    ids = torch.cat([ids.expand(*lead, -1), wrong.expand(*lead, -1)], -1)
    baseline = torch.full((len(weights), k), -1.0 / k, dtype=torch.float64)
    return Targets(ids, torch.cat([weights, baseline], 1), names)


def _grid(
    model: Any, answers: Any, name: str, batch: int, n_pos: int, texts: Sequence[str] | None
) -> Int[Tensor, "#batch #pos token"]:
    """Answers as `[batch, pos, several]`, with 1 where they are shared."""
    ids = token_ids(model, answers, texts)
    if ids.ndim == 0:
        return ids.reshape(1, 1, 1)
    if ids.ndim == 1 and ids.shape[0] == batch:
        return ids.reshape(batch, 1, 1)
    if ids.ndim == 1 and batch == 1:
        return ids.reshape(1, 1, -1)
    if ids.ndim == 2 and ids.shape[0] in (1, batch):
        per_position = n_pos > 1 and ids.shape[1] == n_pos
        return ids[:, :, None] if per_position else ids[:, None, :]
    if ids.ndim == 3 and ids.shape[0] in (1, batch) and ids.shape[1] in (1, n_pos):
        return ids
    raise TokenError(
        f"{name} has shape {tuple(ids.shape)}, which does not fit {batch} prompt(s) at {n_pos}"
        f" position(s): give one answer, one per prompt [{batch}], one per prompt and position"
        f" [{batch}, {n_pos}], or several per prompt [{batch}, k]."
    )


def token_ids(model: Any, tokens: Any, texts: Sequence[str] | None = None) -> Int[Tensor, "..."]:
    """Strings and ids, nested as given, as a tensor of ids inside the vocabulary.

    Raises:
        TokenError: naming the pieces of a string that is not one token, or the id out of range.
    """
    if isinstance(tokens, str):
        ids = torch.tensor(single_token(model, tokens, texts))
    elif isinstance(tokens, Tensor):
        ids = tokens.detach()
    elif isinstance(tokens, Sequence):
        parts = [token_ids(model, token, texts) for token in tokens]
        if not parts or len({part.shape for part in parts}) != 1:
            raise TokenError(
                f"Answers must form a rectangle with at least one token; {tokens!r} does not."
            )
        ids = torch.stack([part.cpu() for part in parts])
    else:
        try:
            ids = torch.as_tensor(tokens)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TokenError(
                f"Answers must be strings or integer token ids; {tokens!r} was given."
            ) from error
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise TokenError(f"Answers must be strings or integer token ids; {tokens!r} was given.")
    d_vocab = getattr(model.cfg, "d_vocab_out", None) or model.cfg.d_vocab
    if d_vocab < 1:
        d_vocab = model.cfg.d_vocab
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= d_vocab):
        bad = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        raise TokenError(f"Token id {bad} is outside the vocabulary of {d_vocab} tokens.")
    return ids.long().to(next(iter(model.parameters())).device)


def single_token(model: Any, text: str, texts: Sequence[str] | None = None) -> int:
    """The id of a string that must be one token; see `token_ids`."""
    _require_tokenizer(model, "answers")
    pieces = _pieces(model, text)
    spaced = [] if text.startswith(" ") else _pieces(model, f" {text}")
    if len(pieces) == 1:
        after_space = texts is not None and all(
            t[-1:].isspace() or t[-1:] in "\"'([" for t in texts
        )
        if len(spaced) == 1 and spaced != pieces and texts is not None and not after_space:
            warnings.warn(
                f"The answer {text!r} has no leading space; inside a sentence the token is usually"
                f" {' ' + text!r}. Pass that, or the id {pieces[0]} to mean this one.",
                stacklevel=2,
            )
        return pieces[0]
    if not pieces:
        raise TokenError(f"The answer {text!r} is no token: give a string that is one token.")
    parts = ", ".join(repr(part) for part in token_strings(model, torch.tensor(pieces)))
    if len(spaced) == 1:
        hint = f"with a leading space, {' ' + text!r}, it is one"
    else:
        hint = "attribute its first token, or all of them with answer_tokens as ids per position"
    raise TokenError(f"The answer {text!r} is {len(pieces)} tokens ({parts}): {hint}.")


def _pieces(model: Any, text: str) -> list[int]:
    return model.to_tokens(text, prepend_bos=False, truncate=False)[0].tolist()


def token_strings(model: Any, ids: Int[Tensor, " token"]) -> list[str]:
    """Each token as text; its id where the model has no tokenizer."""
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        return [str(int(i)) for i in ids]
    return [tokenizer.decode([int(i)]) for i in ids]
