"""Comparing a learner's tensor with the right one, and with what known mistakes would give."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

Mistakes = Iterable[tuple[str, Tensor]]


class Mistake(Exception):
    """A wrong answer; the message says what is wrong with it."""


def same(a: Tensor, b: Tensor, part: float = 1e-4) -> bool:
    """Equal up to `part` of the largest entry; float32 rounded 5e-7 of it away."""
    return a.shape == b.shape and bool((a - b).abs().max() <= part * b.abs().max())


def compare(given: Any, expected: Tensor, axes: str, mistakes: Mistakes) -> None:
    """Raise `Mistake` unless `given` is `expected`; name the mistake where it is a known one."""
    if not isinstance(given, Tensor):
        raise Mistake(f"a tensor [{axes}] is wanted, and you returned a {type(given).__name__}.")
    given = given.detach().double().cpu()
    if same(given, expected):
        return
    for sentence, value in mistakes:
        if same(given, value, part=1e-3):  # with or without the norm's ε
            raise Mistake(_with_sums(sentence, given, expected))
    if given.shape != expected.shape:
        raise Mistake(
            f"a tensor [{axes}] = {list(expected.shape)} is wanted, and yours has the shape"
            f" {list(given.shape)}."
        )
    if not given.isfinite().all():
        raise Mistake("there are NaN or infinite entries in what you returned.")
    worst = int((given - expected).abs().flatten().argmax())
    raise Mistake(
        f"the numbers are wrong, and not in a way known to this check: entry"
        f" {[int(i) for i in torch.unravel_index(torch.tensor(worst), expected.shape)]} is"
        f" {given.flatten()[worst]:.3f} where {expected.flatten()[worst]:.3f} is right. The hint"
        " has the formula; compare it with yours term by term."
    )


def _with_sums(sentence: str, given: Tensor, expected: Tensor) -> str:
    return sentence.format(given=f"{given.sum():.2f}", expected=f"{expected.sum():.2f}")
