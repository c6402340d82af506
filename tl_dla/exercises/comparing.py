"""A learner's answer beside the right one, and beside what known mistakes would give.

The formula of an exercise has choices, and their defaults are right. A `Slip` is a known mistake: a
choice made otherwise. So every mistake is told by its name, and two at once by both names: where no
single slip gives the learner's numbers, pairs of them are tried before the check says "unknown".
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from numbers import Integral
from typing import Any, NoReturn

import torch
from torch import Tensor

Formula = Callable[..., Tensor]


class Mistake(Exception):
    """A wrong answer; the message says what is wrong with it."""


class Slip:
    """A known mistake: what to say of it, and which choices of the formula it makes otherwise."""

    def __init__(self, says: str, **choices: Any) -> None:
        self.says, self.choices = says, choices


def same(a: Tensor, b: Tensor, part: float = 1e-4) -> bool:
    """Equal up to `part` of the largest entry; float32 rounded 5e-7 of it away."""
    return a.shape == b.shape and bool((a - b).abs().max() <= part * b.abs().max())


def compare(
    given: object,
    formula: Formula,
    slips: Sequence[Slip],
    axes: str,
    *,
    total: str | None = None,
) -> None:
    """Raise `Mistake` unless `given` is `formula()`; name the mistakes where they are known.

    Args:
        given: what the learner's function returned.
        formula: gives the right tensor, and with choices made otherwise a wrong one.
        slips: the known mistakes, those told first where several would give the same numbers.
        axes: the axes of the right tensor, in words.
        total: what the rows should add up to, in words, where their sum helps to see a mistake.
    """
    right = formula()
    given = _tensor(given, axes, right)
    if same(given, right):
        return
    at_fault = _explain(given, formula, slips)
    if at_fault:
        told = (
            f"your rows sum to {given.sum():.2f}, {total} is {right.sum():.2f}: " if total else ""
        )
        raise Mistake(told + _say(at_fault))
    if given.shape != right.shape:
        raise Mistake(
            f"a tensor [{axes}] = {list(right.shape)} is wanted, and yours has the shape"
            f" {list(given.shape)}."
        )
    factor = float((given * right).sum() / right.square().sum())
    if right.ndim and same(given, factor * right, part=1e-3):
        raise Mistake(
            "all your numbers are the same multiple of what is right: a divisor or a factor is"
            " wrong, in one place. What do you divide by, and how often?"
        )
    worst = int((given - right).abs().flatten().argmax())
    entry = [int(i) for i in torch.unravel_index(torch.tensor(worst), right.shape)]
    farthest, own = float(given.flatten()[worst]), float(right.flatten()[worst])
    where = f"entry {entry} is farthest off, {farthest:.3f}, which" if entry else f"{farthest:.3f}"
    raise Mistake(
        f"this is wrong, and not in a way known to this check: {where} is too"
        f" {'high' if farthest > own else 'low'}. The hints lead to the formula; compare it with"
        " yours term by term."
    )


def tell(given: object, known: Iterable[tuple[object, str]], otherwise: str) -> NoReturn:
    """Raise `Mistake` with what is said of the known wrong answer that `given` is."""
    raise Mistake(next((says for wrong, says in known if given == wrong), otherwise))


def two_numbers(given: object, wanted: str) -> tuple[int, int]:
    """A pair of whole numbers, however the learner holds them; `Mistake` for anything else."""
    pair = given.tolist() if isinstance(given, Tensor) else given
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise Mistake(f"two numbers are wanted, {wanted}, not {pair!r:.60}.")
    if not all(isinstance(one, Integral | Tensor) for one in pair):
        raise Mistake(f"two whole numbers are wanted, {wanted}, not {pair!r:.60}.")
    first, second = (int(one) for one in pair)
    return first, second


def _tensor(given: object, axes: str, right: Tensor) -> Tensor:
    if not isinstance(given, Tensor):
        raise Mistake(f"a tensor [{axes}] is wanted, and you returned a {type(given).__name__}.")
    given = given.detach().cpu().double()
    if not given.isfinite().all():
        raise Mistake("there are NaN or infinite entries in what you returned.")
    return given


def _explain(given: Tensor, formula: Formula, slips: Sequence[Slip]) -> tuple[Slip, ...]:
    """The slip, or the pair of them, that gives these numbers; none where there is none."""
    for one in slips:
        if same(given, formula(**one.choices), part=1e-3):  # with or without the norm's ε
            return (one,)
    for a, b in combinations(slips, 2):
        if not a.choices.keys() & b.choices.keys():
            if same(given, formula(**a.choices, **b.choices), part=1e-3):
                return (a, b)
    return ()


def _say(slips: Sequence[Slip]) -> str:
    if len(slips) == 1:
        return slips[0].says
    return f"there are two mistakes at once. First: {slips[0].says} Second: {slips[1].says}"
