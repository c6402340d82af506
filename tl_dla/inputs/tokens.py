"""Prompts: what a user may write, made into tensors, or one clear sentence.

Prompts of different lengths are padded on the right when the model runs, where a causal model
cannot see the padding, so each prompt gives what it gives alone.
"""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tl_dla.errors import ArgumentError, TokenError
from tl_dla.inputs.models import device_of, on_device

# A prompt, several, or token ids, `[pos]` or `[batch, pos]`.
Input = str | Sequence[Any] | Shaped[Tensor, "*batch pos"] | np.ndarray

# ---- prompts -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Prompts:
    """Tokens `[batch, pos]` as laid out, and for each prompt where its real tokens are.

    `width` is how wide the model sees them, where that is more than the longest. `known` is False
    where a cache came without its input: the tokens are then zeros of the cache's shape.
    """

    tokens: Int[Tensor, "batch pos"]
    start: Int[Tensor, " batch"]
    length: Int[Tensor, " batch"]
    width: int | None = None
    known: bool = True

    @property
    def packed(self) -> Int[Tensor, "batch pos"]:
        """The real tokens first, padding after them: what the model is run on."""
        return self.pack(self.tokens)

    def pack(self, x: Shaped[Tensor, "batch pos_in ..."]) -> Shaped[Tensor, "batch pos_out ..."]:
        """What is laid out as the tokens are, with that of the real tokens first."""
        longest = self.width or int(self.length.max())
        if not bool(self.start.any()):
            return x[:, :longest]
        index = torch.arange(longest, device=x.device)
        index = (self.start.to(x.device)[:, None] + index).clamp(max=x.shape[1] - 1)
        return x[torch.arange(len(x), device=x.device)[:, None], index]

    @property
    def real(self) -> Bool[Tensor, "batch pos"]:
        """Which of the packed tokens are real."""
        longest = self.width or int(self.length.max())
        return torch.arange(longest, device=self.length.device) < self.length[:, None]

    @property
    def rows(self) -> list[Int[Tensor, " _"]]:
        """Each prompt's own tokens."""
        return [row[:n] for row, n in zip(self.packed, self.length.tolist(), strict=True)]

    def part(self, rows: slice | Int[Tensor, " row"]) -> "Prompts":
        """Some of the prompts, as wide as all of them."""
        tokens = self.packed
        start = torch.zeros_like(self.start)
        return Prompts(tokens[rows], start[rows], self.length[rows], tokens.shape[1], self.known)


def read_prompts(
    model: Any,
    input: Input | None,
    *,
    prepend_bos: bool | None = None,
    attention_mask: Shaped[Tensor, "... pos"] | None = None,
) -> Prompts:
    """Strings or tokens as `Prompts`.

    A batch of token ids that is padded is recognised by the runs of the tokenizer's padding token
    at the ends of its rows (as `transformer_lens.utilities.get_attention_mask` does), or told by
    `attention_mask`. Lists of ids hold no padding, and may be of different lengths.

    Raises:
        ArgumentError: where there is no input, or a mask for what needs none.
        TokenError: for an empty prompt, a doubled BOS, ids outside the vocabulary, a prompt longer
            than the model's context, tokens that may be padding or the prompt's own.
    """
    prompts = prompts_of(model, input, prepend_bos=prepend_bos, attention_mask=attention_mask)
    return on_device(prompts, device_of(model))


def prompts_of(
    model: Any,
    input: Input | None,
    *,
    prepend_bos: bool | None = None,
    attention_mask: Shaped[Tensor, "... pos"] | None = None,
) -> Prompts:
    """The same on the CPU: each number that is checked would be waited for on the device."""
    if input is None:
        raise ArgumentError("Give either `input` to run the model on, or a `cache` of such a run.")
    given = _as_tokens(input)
    if isinstance(given, list):
        if attention_mask is not None:
            raise ArgumentError(
                "attention_mask says which tokens of a padded tensor are real; prompts as strings"
                " or lists are padded by this call: leave the mask out, or give token ids"
                " [batch, pos]."
            )
        prompts = _from_rows(model, given, prepend_bos)
    elif attention_mask is None:
        prompts = _from_tokens(model, given)
    else:
        prompts = _from_mask(model, given, torch.as_tensor(attention_mask))
    _check_prompts(model, prompts)
    return prompts


def texts_of(input: Any) -> list[str] | None:
    """The prompts as text, where they were given so."""
    texts = [input] if isinstance(input, str) else input
    ok = isinstance(texts, Sequence) and all(isinstance(text, str) for text in texts)
    return list(texts) if ok else None


def _as_tokens(input: Any) -> Tensor | list[Any]:
    """A tensor of ids, or a list of prompts that are each a string or a list of ids."""
    if isinstance(input, Tensor):
        return input
    if isinstance(input, np.ndarray | np.integer):
        if input.dtype.kind in "US":
            return np.atleast_1d(input).tolist()
        return torch.as_tensor(input) if input.dtype.kind in "iuf" else [input]
    if isinstance(input, str):
        return [input]
    if not isinstance(input, Sequence) or isinstance(input, bytes):
        raise TokenError(
            "A prompt must be a string, a list of strings or a tensor of token ids; a"
            f" {type(input).__name__} was given."
        )
    if not input:
        raise TokenError("The prompt is empty: an empty list was given; give a prompt or more.")
    return [list(input)] if all(_is_id(token) for token in input) else list(input)


def _is_id(token: Any) -> bool:
    scalar = isinstance(token, Tensor | np.ndarray) and token.ndim == 0
    return scalar or isinstance(token, Integral) and not isinstance(token, bool)


def _from_rows(model: Any, given: list[Any], prepend_bos: bool | None) -> Prompts:
    rows = [_read_row(model, prompt, prepend_bos) for prompt in given]
    _question_spaces(model, given, rows)
    return padded(model, rows)


def padded(model: Any, rows: list[Int[Tensor, " _"]]) -> Prompts:
    """Prompts that were read, as one batch."""
    length = torch.tensor([len(row) for row in rows], device=rows[0].device)
    pad = getattr(model.tokenizer, "pad_token_id", None) or 0
    tokens = pad_sequence(rows, batch_first=True, padding_value=pad)
    return Prompts(tokens, torch.zeros_like(length), length)


def _read_row(model: Any, prompt: Any, prepend_bos: bool | None) -> Int[Tensor, " pos"]:
    if isinstance(prompt, str):
        return _tokenize(model, prompt, prepend_bos)
    if isinstance(prompt, Tensor | np.ndarray):
        ids = torch.as_tensor(prompt)
    elif isinstance(prompt, Sequence) and all(_is_id(token) for token in prompt):
        ids = torch.tensor([int(token) for token in prompt], dtype=torch.long)
    else:
        raise TokenError(
            "A prompt must be a string, token ids or a tensor of them; a list held a"
            f" {type(prompt).__name__}{', ' + repr(prompt) if isinstance(prompt, list) else ''}."
        )
    if not ids.numel():
        raise TokenError("The prompt is empty: a list held no tokens; give at least one token.")
    if ids.ndim != 1:
        raise TokenError(
            f"Each prompt in a list is one row of token ids; one has shape {tuple(ids.shape)}."
        )
    return _token_rows(ids)[0]


def _question_spaces(model: Any, texts: Sequence[Any], rows: Sequence[Tensor]) -> None:
    """Warn where a prompt ends with a space that is a token of its own."""
    for text, row in zip(texts, rows, strict=True):
        if isinstance(text, str) and text.endswith(" ") and text.strip():
            if not token_strings(model, row[-1:])[0].strip():
                warnings.warn(
                    f"The prompt {text[-24:]!r} ends with a space, which is a token of its own;"
                    " words usually hold the space before them: leave it out, and give the answer"
                    " with its space.",
                    stacklevel=3,
                )
                return


def require_tokenizer(model: Any, what: str) -> Any:
    """The model's tokenizer; an error that says what must be ids where it has none."""
    if model.tokenizer is None:
        raise TokenError(f"The model has no tokenizer, so {what} must be given as token ids.")
    return model.tokenizer


def require_unicode(text: str) -> None:
    """Raise for bytes that are no UTF-8, which Python hands on from a shell as half characters."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenError(
            f"The text {text!r} is no Unicode at character {error.start}: write it in UTF-8."
        ) from error


def _tokenize(model: Any, text: str, prepend_bos: bool | None) -> Int[Tensor, " pos"]:
    tokenizer = require_tokenizer(model, "prompts")
    if not text:
        raise TokenError('The prompt is empty: "" was given; give at least one token.')
    require_unicode(text)
    bos = tokenizer.bos_token
    options = {} if prepend_bos is None else {"prepend_bos": prepend_bos}
    tokens = model.to_tokens(text, truncate=False, move_to_device=False, **options)[0].cpu()
    if bos and text.startswith(bos) and len(tokens) > 1:
        if int(tokens[0]) == int(tokens[1]) == tokenizer.bos_token_id:
            raise TokenError(
                f"The prompt starts with {bos!r} and the model prepends another: remove it from the"
                " text, or pass prepend_bos=False."
            )
    return tokens


def _from_mask(model: Any, tokens: Tensor, mask: Tensor) -> Prompts:
    tokens = _token_rows(tokens)
    mask = (mask[None] if mask.ndim == 1 else mask).cpu()
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


def _token_rows(tokens: Tensor) -> Int[Tensor, "batch pos"]:
    tokens = tokens[None] if tokens.ndim == 1 else tokens
    if tokens.ndim != 2 or tokens.is_floating_point() or not tokens.numel():
        raise TokenError(
            "Prompts as tokens must be integers [pos] or [batch, pos] with at least one token;"
            f" a {tokens.dtype} tensor of shape {tuple(tokens.shape)} was given."
        )
    return tokens.to("cpu", torch.long, copy=True)  # what the user does to theirs is theirs


def _from_tokens(model: Any, tokens: Tensor) -> Prompts:
    tokens = _token_rows(tokens)
    batch, pos = tokens.shape
    tokenizer = model.tokenizer
    pad = getattr(tokenizer, "pad_token_id", None)
    if pad is None:
        return Prompts(tokens, tokens.new_zeros(batch), tokens.new_full((batch,), pos))
    real = tokens != pad
    start, after = real.int().argmax(-1), real.flip(-1).int().argmax(-1)
    if pad in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id):
        # Not only padding: but the longest prompt has none, so what every row starts or ends with
        # is its own.
        _require_told(start, after, tokenizer.decode([pad]))
        start, after = start - start.min(), after - after.min()
        after = torch.where(start > 0, 0, after)
    elif not bool(real.any(-1).all()):
        raise TokenError("A prompt is empty: one holds nothing but padding.")
    return Prompts(tokens, start, pos - start - after)


def _require_told(start: Int[Tensor, " batch"], after: Int[Tensor, " batch"], pad: str) -> None:
    """Raise where one token at an end of some rows, and none of others, may be padding or not.

    Longer runs are padding, and what every row begins or ends with is its own.
    """
    for where, count in (("starts", start), ("ends", after)):
        other = after if count is start else start
        if int(count.min()) == 0 and int(count.max()) == 1 and not bool(other.any()):
            raise TokenError(
                f"Prompt {int(count.argmax())} {where} with {pad!r}, which may be its own or"
                " padding, as not all do: say which tokens are real with attention_mask=, or give"
                " the prompts as lists of ids."
            )


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
    bos = getattr(model.tokenizer, "bos_token_id", None)
    if bos is not None and longest > 1:
        doubled = (prompts.packed[:, :2] == bos).all(1) & (prompts.length > 1)
        if bool(doubled.any()):
            row = int(doubled.int().argmax())
            bos = model.tokenizer.bos_token
            raise TokenError(f"Prompt {row} starts with two BOS tokens ({bos!r}): remove one.")


# ---- tokens as text ----------------------------------------------------------------------------


LOST = "\ufffd"  # what a tokenizer makes of bytes that are no letter
# GPT-2's names of the 256 bytes: a printable byte is itself, the others follow from 256 on.
_PRINTED = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTE_OF = {chr(byte): byte for byte in _PRINTED}
_BYTE_OF |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in _PRINTED)}


def token_strings(model: Any, ids: Int[Tensor, " token"]) -> list[str]:
    """Each token as text, or as its bytes where it is no letter; its id without a tokenizer."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        return [str(i) for i in ids.tolist()]
    decoded = [(i, tokenizer.decode([i])) for i in ids.tolist()]
    return [spelled_bytes(tokenizer, i) if LOST in text else text for i, text in decoded]


def spelled_bytes(tokenizer: Any, token: int) -> str:
    """A token as the bytes that it holds, `⟨F0 9F⟩`, from its name in the vocabulary."""
    name = tokenizer.convert_ids_to_tokens(token)
    if named := re.fullmatch(r"<0x([0-9A-F]{2})>", name):
        return f"⟨{named[1]}⟩"
    if all(letter in _BYTE_OF for letter in name):
        return f"⟨{bytes(_BYTE_OF[letter] for letter in name).hex(' ').upper()}⟩"
    return name
