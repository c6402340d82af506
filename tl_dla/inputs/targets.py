"""Answers, baselines and candidates as target tokens, and how their logits are added up."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_dla.errors import ArgumentError, TokenError
from tl_dla.inputs.models import device_of
from tl_dla.inputs.positions import Positions
from tl_dla.inputs.tokens import require_tokenizer, require_unicode, token_strings

_MOST_WITH_BASELINE = 4096  # candidates, whose matrix of weights is dense

Answers = str | int | Sequence[Any] | Tensor


@dataclass(frozen=True, eq=False)
class Targets:
    """The logits attributed: their tokens, and how they are added up.

    `ids` is `[batch, pos, token]` with 1 where it is shared. `weights` is `[candidate, token]`:
    the answer minus the mean of the incorrect answers is (1, -1/k, …, -1/k). None is the identity:
    every token a candidate, so that a whole vocabulary needs no matrix. `mean_of_vocab` adds one
    more token at the end that stands for the mean logit of the vocabulary.
    """

    ids: Int[Tensor, "#batch #pos token"]
    weights: Float[Tensor, "candidate weight"] | None
    candidates: tuple[str, ...] | None = None
    mean_of_vocab: bool = False

    def added(self, tokens: Float[Tensor, "*lead token"]) -> Float[Tensor, "*lead candidate"]:
        """Values of the tokens, added up for each candidate."""
        return tokens if self.weights is None else tokens @ self.weights.to(tokens).mT

    def chunks(self, size: int) -> "Iterator[Targets]":
        """The candidates in parts; in one where tokens are added up."""
        if self.weights is not None or self.ids.shape[-1] <= size:
            yield self
            return
        names = self.candidates or ()
        for i in range(0, self.ids.shape[-1], size):
            yield replace(self, ids=self.ids[..., i : i + size], candidates=names[i : i + size])

    def part(self, rows: slice | Int[Tensor, " row"]) -> "Targets":
        """The targets of some of the prompts."""
        return self if self.ids.shape[0] == 1 else replace(self, ids=self.ids[rows])


# Of a run that is asked for no logit.
NO_TARGETS = Targets(torch.zeros(1, 1, 0, dtype=torch.long), torch.zeros(0, 0))
# Of one number that is no logit.
ONE_NUMBER = Targets(torch.zeros(1, 1, 1, dtype=torch.long), torch.ones(1, 1))


def require_answer(answer: Any, candidates: Any) -> None:
    """Raise unless exactly one of the two was given; before the model is looked at."""
    if (answer is None) == (candidates is None):
        raise ArgumentError(
            "answer_tokens is required (or candidate_tokens in its place, not both)."
        )


def read_targets(
    model: Any,
    answer: Answers | None,
    incorrect: Answers | None,
    candidates: str | int | Sequence[str | int] | Tensor | None,
    batch: int,
    positions: Positions,
    texts: Sequence[str] | None = None,
) -> Targets:
    """Answers, incorrect answers and candidates as `Targets`.

    Answers `[batch, 2]` are (answer, incorrect answer), as the columns of TransformerLens's
    demonstrations are. `texts` are the prompts, where they were given as text. The candidates
    `"all"` are the whole vocabulary.

    Raises:
        TokenError: for a string that is not one token, an id outside the vocabulary, a shape that
            does not fit or fits in two ways.
        ArgumentError: for an answer and candidates together, or neither.
    """
    require_answer(answer, candidates)
    strings = _Strings(model, texts)
    n_pos = positions.index.shape[1]
    mean = isinstance(incorrect, str) and incorrect == "mean"
    names, wrong = None, None
    if candidates is not None:
        if isinstance(candidates, str) and candidates == "all":
            candidates = torch.arange(strings.d_vocab, device="cpu")
        ids = strings.ids(candidates, "candidate_tokens").reshape(1, 1, -1)
        names = tuple(token_strings(model, ids.flatten()))
    else:
        lone = strings.ids(answer)
        if incorrect is None and lone.shape == (batch, 2) and n_pos == 2:
            raise _ambiguous("answer_tokens", lone, "an answer and an incorrect one")
        if incorrect is None and lone.shape in ((batch, 2), (batch, 1, 2)):
            lone, wrong = lone[..., 0].reshape(batch), lone[..., 1].reshape(batch)
        ids = _grid(lone, "answer_tokens", batch, n_pos, per_position=True)
        if ids.shape[-1] != 1:
            raise TokenError(
                f"answer_tokens holds {ids.shape[-1]} answers per prompt, but one is attributed:"
                " pass the others as incorrect_tokens, or attribute to each with candidate_tokens."
            )
    if incorrect is not None and not mean:
        wrong = strings.ids(incorrect)
    strings.question()
    device = device_of(model)
    if wrong is None and not mean:
        alone = None if names else torch.ones(1, 1, dtype=torch.float64, device="cpu")
        return Targets(ids.to(device), alone, names)
    if ids.shape[-1] > _MOST_WITH_BASELINE:
        raise ArgumentError(
            f"incorrect_tokens is for at most {_MOST_WITH_BASELINE} candidates, and there are"
            f" {ids.shape[-1]}: attribute to them without it, and subtract the baseline's column."
        )
    weights = torch.eye(ids.shape[-1], dtype=torch.float64, device="cpu")
    if wrong is None:  # the baseline is the mean
        baseline = -torch.ones(len(weights), 1, dtype=torch.float64, device="cpu")
        weights = torch.cat([weights, baseline], 1)
        return Targets(ids.to(device), weights, names, mean_of_vocab=True)
    wrong = _grid(wrong, "incorrect_tokens", batch, n_pos, per_position=ids.shape[1] > 1)
    if names is None:
        _question_same(model, ids, wrong)
    k, lead = wrong.shape[-1], torch.broadcast_shapes(ids.shape[:2], wrong.shape[:2])
    ids = torch.cat([ids.expand(*lead, -1), wrong.expand(*lead, -1)], -1)
    baseline = torch.full((len(weights), k), -1 / k, dtype=torch.float64, device="cpu")
    return Targets(ids.to(device), torch.cat([weights, baseline], 1), names)


def _grid(
    ids: Int[Tensor, "..."], name: str, batch: int, n_pos: int, *, per_position: bool
) -> Int[Tensor, "#batch #pos token"]:
    """Answers as `[batch, pos, several]`, with 1 where they are shared.

    `per_position` says that a number of them that is the number of positions is one for each.
    """
    if ids.ndim == 0:
        return ids.reshape(1, 1, 1)
    if ids.ndim == 1 and ids.shape[0] == batch:
        return ids.reshape(batch, 1, 1)
    if ids.ndim == 1 and (batch == 1 or ids.shape[0] == n_pos > 1):
        ids = ids[None]
    if ids.ndim == 2 and ids.shape[0] in (1, batch):
        if n_pos == 1 or ids.shape[1] != n_pos:
            return ids[:, None, :]
        if not per_position:
            raise _ambiguous(name, ids, f"{n_pos} incorrect answers")
        return ids[:, :, None]
    if ids.ndim == 3 and ids.shape[0] in (1, batch) and ids.shape[1] in (1, n_pos):
        return ids
    raise TokenError(
        f"{name} has shape {tuple(ids.shape)}, which does not fit {batch} prompt(s) at {n_pos}"
        f" position(s): give one answer, one per prompt [{batch}], one per prompt and position"
        f" [{batch}, {n_pos}], or several per prompt [{batch}, k]."
    )


def _ambiguous(name: str, ids: Tensor, other: str) -> TokenError:
    batch, k = ids.shape
    return TokenError(
        f"{name} of shape {(batch, k)} may be one per position, or {other} per prompt: give shape"
        f" {(batch, k, 1)} to mean one per position, or {(batch, 1, k)} to mean the other."
    )


def _question_same(model: Any, answer: Int[Tensor, "..."], wrong: Int[Tensor, "..."]) -> None:
    """Warn where the one incorrect answer is the answer."""
    if wrong.shape[-1] > 1:
        return
    answer, wrong = torch.broadcast_tensors(answer, wrong)
    places = (answer == wrong).nonzero()
    if len(places):
        row, *_ = place = tuple(places[0].tolist())
        token = answer[place]
        warnings.warn(
            f"The answer{f' of prompt {row}' if len(answer) > 1 else ''} and its incorrect answer"
            f" are one token, {token_strings(model, token[None])[0]!r} (id {int(token)}): their"
            " difference is 0.",
            stacklevel=3,
        )


def token_ids(model: Any, tokens: Any) -> Int[Tensor, "..."]:
    """Strings and ids, nested as given, as a tensor of ids inside the vocabulary.

    Raises:
        TokenError: naming the pieces of a string that is not one token, or the id out of range.
    """
    return ids_of(model, tokens).to(device_of(model))


def ids_of(model: Any, tokens: Any, texts: Sequence[str] | None = None) -> Int[Tensor, "..."]:
    """The same on the CPU; `texts` are the prompts, which may ask for a space before a word."""
    strings = _Strings(model, texts)
    ids = strings.ids(tokens)
    strings.question()
    return ids


class _Strings:
    """Answers as ids, and the words among them that may lack the space before them."""

    def __init__(self, model: Any, texts: Sequence[str] | None) -> None:
        self.model = model
        self.inside = texts is not None and not all(
            t[-1:].isspace() or t[-1:] in "\"'([" for t in texts
        )
        self.without_space: dict[str, int] = {}

    @property
    def d_vocab(self) -> int:
        """How many tokens there are logits of."""
        d_vocab_out = getattr(self.model.cfg, "d_vocab_out", None) or -1
        return d_vocab_out if d_vocab_out > 0 else self.model.cfg.d_vocab

    def ids(self, tokens: Any, name: str = "Answers") -> Int[Tensor, "..."]:
        """The ids, on the CPU."""
        ids = self._nested(tokens, name)
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise TokenError(f"Answers must be strings or integer token ids; {tokens!r} was given.")
        if not ids.numel():
            raise TokenError(f"{name} must hold at least one token; {tokens!r} was given.")
        d_vocab, low, high = self.d_vocab, int(ids.min()), int(ids.max())
        if low < 0 or high >= d_vocab:
            bad = low if low < 0 else high
            raise TokenError(f"Token id {bad} is outside the vocabulary of {d_vocab} tokens.")
        return ids.long()

    def _nested(self, tokens: Any, name: str) -> Tensor:
        if isinstance(tokens, str):
            return torch.tensor(self._single(tokens), device="cpu")
        if isinstance(tokens, Tensor):
            return tokens.detach().cpu()
        if isinstance(tokens, np.ndarray) and tokens.dtype.kind == "U":
            tokens = tokens.tolist()
        if isinstance(tokens, Sequence) and not isinstance(tokens, bytes):
            parts = [self._nested(token, name) for token in tokens]
            if not parts:
                raise TokenError(f"{name} must hold at least one token; an empty list was given.")
            if len({part.shape for part in parts}) != 1:
                raise TokenError(f"{name} must form a rectangle; {tokens!r} does not.")
            return torch.stack(parts)
        try:
            return torch.as_tensor(tokens).cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise TokenError(
                f"Answers must be strings or integer token ids; {tokens!r} was given."
            ) from error

    def _single(self, text: str) -> int:
        require_tokenizer(self.model, "answers")
        pieces = _pieces(self.model, text)
        spaced = [] if text.startswith(" ") else _pieces(self.model, f" {text}")
        if len(pieces) == 1:
            if self.inside and len(spaced) == 1 and spaced != pieces:
                self.without_space[text] = pieces[0]
            return pieces[0]
        if not pieces:
            raise TokenError(f"The answer {text!r} is no token: give a string that is one token.")
        parts = ", ".join(
            repr(part) for part in token_strings(self.model, torch.tensor(pieces, device="cpu"))
        )
        if len(spaced) == 1:
            hint = f"with a leading space, {' ' + text!r}, it is one"
        else:
            hint = (
                "attribute its first token, or all of them with attribute_completion (in the shell:"
                " tl-dla attribute --completion)"
            )
        raise TokenError(f"The answer {text!r} is {len(pieces)} tokens ({parts}): {hint}.")

    def question(self) -> None:
        """Warn once of all words without a space that are usually written with one."""
        if not self.without_space:
            return
        (text, token), *others = self.without_space.items()
        more = f" (also without: {', '.join(repr(x) for x, _ in others[:3])})" if others else ""
        warnings.warn(
            f"The answer {text!r} has no leading space{more}; inside a sentence the token is"
            f" usually {' ' + text!r}. Pass that, or the id {token} to mean this one.",
            stacklevel=3,
        )


def _pieces(model: Any, text: str) -> list[int]:
    require_unicode(text)
    options = dict(prepend_bos=False, truncate=False, move_to_device=False)
    return model.to_tokens(text, **options)[0].tolist()
