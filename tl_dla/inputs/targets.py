"""Answers, baselines and candidates as target tokens, and how their logits are added up."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_dla.errors import ArgumentError, TokenError
from tl_dla.inputs.tokens import Positions, require_tokenizer, token_strings

Answers = str | int | Sequence[Any] | Tensor


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
    require_tokenizer(model, "answers")
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
