"""Which rows come first: the one rule of every `top`.

Rows are ranked by the number that is shown beside them, or by its magnitude: a mean where a mean is
shown. Rows of equal rank keep their order.
"""

from collections.abc import Sequence
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from tl_dla.errors import ArgumentError
from tl_dla.model.stream import Kind

By = Literal["value", "magnitude", "contrast"]


def rows_to_rank(kinds: Sequence[Kind], kind: Kind | None, k: int, by: str) -> list[int]:
    """The rows that `top` ranks: all, or those of one kind.

    Raises:
        ArgumentError: for an unknown kind or ranking, or k below 1.
    """
    if by not in ("value", "magnitude", "contrast"):
        raise ArgumentError(f'by must be "value", "magnitude" or "contrast"; {by!r} was given.')
    if k < 1:
        raise ArgumentError(f"k must be at least 1; {k} was given.")
    rows = [i for i, own in enumerate(kinds) if kind is None or own == kind]
    if not rows:
        present = ", ".join(sorted(set(kinds)))
        raise ArgumentError(f"No row is of kind {kind!r}; the kinds here are {present}.")
    return rows


def order(means: Float[Tensor, " row"], k: int, by: By, *, largest: bool = True) -> list[int]:
    """The k highest rows, or the lowest, best first."""
    key = means if by == "value" else means.abs()
    return key.argsort(descending=largest, stable=True)[:k].tolist()


def ranked(
    values: Float[Tensor, "row ..."], labels: Sequence[str], k: int, by: By, *, largest: bool
) -> list[tuple[str, float]]:
    """The k highest rows, or the lowest, as `(label, mean value)`; NaN is left out of the mean."""
    means = values.reshape(len(labels), -1).nanmean(1).cpu()
    return [(labels[i], float(means[i])) for i in order(means, k, by, largest=largest)]


def loudest(
    values: Float[Tensor, "row batch pos candidate"],
) -> Float[Tensor, "row batch pos 1"]:
    """Each row at the candidate of its largest mean magnitude."""
    size = values.abs().nan_to_num(0).mean((1, 2), keepdim=True)
    at = size.argmax(-1, keepdim=True)
    return values.gather(-1, at.expand(*values.shape[:-1], 1))
