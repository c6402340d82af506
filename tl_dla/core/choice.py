"""One prompt, position or candidate of a result, or the mean over prompts and positions.

What is chosen is what the question gives alone: `result.select(prompt=1)` has the rows, the logit,
the certificate and the question of that prompt by itself.
"""

from dataclasses import dataclass, replace
from numbers import Integral

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from tl_dla.core.numbers import Numbers, compact
from tl_dla.errors import ArgumentError
from tl_dla.inputs.positions import Positions
from tl_dla.inputs.query import Query
from tl_dla.inputs.targets import Targets
from tl_dla.inputs.tokens import Prompts
from tl_dla.model.hooks import where_float64


@dataclass(frozen=True, eq=False)
class Choice:
    """Indices into the axes of a result, checked; None for all of an axis.

    `width` is how many positions are left: those that the chosen prompt has.
    """

    of: Query
    prompt: int | None
    position: int | None
    candidate: int | None
    width: int

    def cut(self, x: Shaped[Tensor, "... batch pos inner"]) -> Shaped[Tensor, "... b p inner"]:
        """The chosen prompts and positions of a tensor."""
        return x[..., _one(self.prompt), self._columns, :]

    def values(self, x: Float[Tensor, "... batch pos candidate"]) -> Float[Tensor, "... b p c"]:
        """The chosen candidates as well."""
        return compact(self.cut(x)[..., _one(self.candidate)])

    def samples(
        self, x: Float[Tensor, "row batch pos candidate"]
    ) -> Float[np.ndarray, "row sample c"]:
        """What is chosen, at the positions that exist, as numbers to show."""
        values = self.values(x.detach())
        valid = self._positions.valid.to(values.device)
        return values[:, valid].cpu().double().numpy()

    def shown(self, x: Float[Tensor, "row ..."]) -> Float[Tensor, "row ..."]:
        """What is chosen of a tensor with the axes that a result shows."""
        return self.query.shaped(self.values(self.of.with_axes(x)))

    def numbers(self, numbers: Numbers) -> Numbers:
        """The same token by token; of a candidate, with its own tokens alone."""
        return numbers.map(
            lambda x: self.cut(x)[..., self._tokens],
            lambda x: compact(self.cut(x[..., None])[..., 0]),
        )

    @property
    def query(self) -> Query:
        """The question of what is chosen."""
        return replace(
            self.of, prompts=self._prompts, positions=self._positions, targets=self._targets
        )

    @property
    def _prompts(self) -> Prompts:
        prompts, row = self.of.prompts, self.prompt
        if row is None:
            return prompts
        start, length = int(prompts.start[row]), prompts.length[[row]]
        tokens = prompts.tokens[[row], start : start + int(length)]
        return Prompts(tokens, torch.zeros_like(length), length, None, prompts.known)

    @property
    def _positions(self) -> Positions:
        old = self.of.positions
        index, valid = (compact(self.cut(x[..., None])[..., 0]) for x in (old.index, old.valid))
        single, every = old.single or self.position is not None, old.every and self.position is None
        alike = index.shape[1] == 1 and bool((index == index[0]).all())
        return Positions(index, valid, single, every, int(index[0, 0]) if alike else None)

    @property
    def _targets(self) -> Targets:
        targets, tokens = self.of.targets, self._tokens
        ids = targets.ids
        ids = ids if ids.shape[0] == 1 else ids[_one(self.prompt)]
        ids = ids if ids.shape[1] == 1 else ids[:, self._columns]
        return Targets(
            ids[..., tokens[tokens < ids.shape[-1]]],  # copies: an index is a tensor
            self._weights,
            targets.candidates if self.candidate is None else None,
            targets.mean_of_vocab,
        )

    @property
    def _columns(self) -> slice:
        return slice(0, self.width) if self.position is None else _one(self.position)

    @property
    def _tokens(self) -> Int[Tensor, " token"]:
        """The target tokens that the chosen candidates are made of."""
        ids, weights = self.of.targets.ids, self.of.targets.weights
        if weights is None:
            return torch.arange(ids.shape[-1], device=ids.device)[_one(self.candidate)]
        return weights[_one(self.candidate)].any(0).nonzero()[:, 0]

    @property
    def _weights(self) -> Float[Tensor, "candidate token"] | None:
        weights = self.of.targets.weights
        if weights is None:
            return (
                None
                if self.candidate is None
                else torch.ones(1, 1, dtype=torch.float64, device="cpu")
            )
        return weights[_one(self.candidate)][:, self._tokens]


def read_choice(
    query: Query, prompt: int | None, position: int | None, candidate: str | int | None
) -> Choice:
    """A prompt, position and candidate as indices, checked.

    Positions are those of the chosen prompt, where one is.

    Raises:
        ArgumentError: for one that the result does not have.
    """
    n_prompts, width = query.positions.index.shape
    prompt = within("prompt", prompt, n_prompts)
    width = width if prompt is None else int(query.positions.valid[prompt].sum())
    names = query.targets.candidates
    if isinstance(candidate, str):
        if names is None or candidate not in names:
            raise ArgumentError(
                f"candidate must be one of {', '.join(map(repr, names or ())) or 'none here'}, or"
                f" its index; {candidate!r} was given."
            )
        candidate = names.index(candidate)
    n_candidates = 1 if names is None else len(names)
    position = within("position", position, width)
    return Choice(query, prompt, position, within("candidate", candidate, n_candidates), width)


def within(name: str, index: int | None, n: int) -> int | None:
    """An index counted from the front, None for none; raise where there is no such one of n."""
    if index is None:
        return None
    if isinstance(index, bool) or not isinstance(index, Integral):
        raise ArgumentError(f"{name} must be an integer; {index!r} was given.")
    if not -n <= index < n:
        raise ArgumentError(f"{name} must be one of the result's {n}; {index} was given.")
    return int(index) % n


def _one(index: int | None) -> slice:
    """One index with its axis kept, or all of them."""
    return slice(None) if index is None else slice(index, index + 1)


# ---- the mean ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Average:
    """The mean over the prompts and positions of a result, those that exist."""

    of: Query

    def values(self, x: Float[Tensor, "... batch pos inner"]) -> Float[Tensor, "... 1 1 inner"]:
        """The mean of a tensor with all its axes, added up in float64."""
        valid = self.of.positions.valid.to(x.device)
        known = where_float64(torch.where(valid[..., None], x, 0))
        total = known.sum((-3, -2), keepdim=True, dtype=torch.float64)
        return (total / valid.sum().to(total)).to(x)

    def shown(self, x: Float[Tensor, "row ..."]) -> Float[Tensor, "row ..."]:
        """The mean of a tensor with the axes that a result shows."""
        return self.query.shaped(self.values(self.of.with_axes(x)))

    def numbers(self, numbers: Numbers) -> Numbers:
        """The same token by token, after the output transform, which differs between prompts."""
        rows, logits = self.values(numbers.rows * numbers.ratio), self.values(numbers.logits)
        ones = torch.ones_like(logits)
        return Numbers(rows, ones, ones[..., 0], logits, logits, numbers.ran)

    @property
    def query(self) -> Query:
        """The question, of a prompt that nobody wrote."""
        at = torch.zeros_like(self.of.positions.index[:1, :1])
        prompt = Prompts(at, at[0], torch.ones_like(at[0]), None, known=False)
        positions = Positions(at, torch.ones_like(at).bool(), single=True, every=False, shared=0)
        return replace(self.of, prompts=prompt, positions=positions, has_batch=False)

    @property
    def words(self) -> str:
        """What the mean is over: `3 prompts`, `14 positions of 3 prompts`."""
        batch, pos = self.of.positions.valid.shape
        prompts = f"{batch} prompt{'s' * (batch > 1)}"
        n = int(self.of.positions.valid.sum())
        return prompts if pos == 1 else f"{n} positions of {prompts}"
