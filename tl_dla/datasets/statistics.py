"""Moments over many examples: the same to the last bit in any order, in any number of processes.

For each row x over n examples, from the sums Σx, Σx² and Σ|x| and the counts of either sign:

    mean = Σx / n          std² = (n Σx² − (Σx)²) / (n (n − 1))          sem = std / √n
    interval = mean ± t · sem,    t the quantile of Student's distribution with n − 1 degrees
    sign agreement = the share of examples in which x has the sign of the mean
    cancellation = Σ|x| / |Σx|:  1 where every example has one sign, large where they cancel

Floating-point addition depends on its order, and n Σx² − (Σx)² cancels. Both are cured by keeping
every sum as two float64 numbers, the sum and what its rounding lost (Knuth's two-sum, Dekker's
product: about 106 bits). The squares of float32 numbers are exact in float64, so sums of shards
merge in any order to the same float64 numbers.

References: Knuth, The Art of Computer Programming 2, section 4.2.2; Dekker 1971, "A floating-point
technique for extending the available precision"; Abramowitz and Stegun 1964, 26.7.3 to 26.7.5.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Sums:
    """Sums over `n` examples for each label: Σx, Σx², Σ|x|, how many x > 0 and how many x < 0.

    `high + low` is the sum: `low` holds what rounding took from `high`. A label that only some
    examples have is 0 in the others.
    """

    labels: tuple[str, ...]
    n: int
    high: Float[Tensor, "moment label"]
    low: Float[Tensor, "moment label"]

    @staticmethod
    def of(labels: Sequence[str], values: Float[Tensor, "example label"]) -> "Sums":
        """The sums over float32 values, one line per example."""
        x = values.double()
        moments = torch.stack([x, x * x, x.abs(), (x > 0).double(), (x < 0).double()], 1)
        return Sums(tuple(labels), len(x), *_add_up(moments, torch.zeros_like(moments)))

    @staticmethod
    def merge(parts: Sequence["Sums"]) -> "Sums":
        """The sums over all examples of all parts."""
        labels = tuple(dict.fromkeys(label for part in parts for label in part.labels))
        highs, lows = [], []
        for part in parts:
            columns = [labels.index(label) for label in part.labels]
            if columns == list(range(len(labels))):
                highs.append(part.high)
                lows.append(part.low)
                continue
            for target, source in ((highs, part.high), (lows, part.low)):
                padded = source.new_zeros(source.shape[0], len(labels))
                padded[:, columns] = source
                target.append(padded)
        n = sum(part.n for part in parts)
        return Sums(labels, n, *_add_up(torch.stack(highs), torch.stack(lows)))

    def select(self, labels: Sequence[str]) -> "Sums":
        """The sums of some labels, in the order given."""
        columns = [self.labels.index(label) for label in labels]
        return Sums(tuple(labels), self.n, self.high[:, columns], self.low[:, columns])


@dataclass(frozen=True, eq=False)
class RowStatistics:
    """What the examples say of each row, in logits (float64).

    Attributes:
        n: how many examples.
        mean: the mean over examples.
        std: the standard deviation over examples (n − 1 in the denominator; NaN for one example).
        sem: the standard error of the mean.
        low: the lower end of the confidence interval of the mean.
        high: its upper end.
        sign_agreement: the share of examples in which the row has the sign of its mean.
        cancellation: Σ|x| / |Σx| over examples: 1 where all have one sign; NaN where all are 0.
    """

    n: int
    mean: Float[Tensor, " row"]
    std: Float[Tensor, " row"]
    sem: Float[Tensor, " row"]
    low: Float[Tensor, " row"]
    high: Float[Tensor, " row"]
    sign_agreement: Float[Tensor, " row"]
    cancellation: Float[Tensor, " row"]

    @staticmethod
    def of(sums: Sums, confidence: float) -> "RowStatistics":
        """The statistics that these sums give, with intervals of this confidence."""
        n = sums.n
        (total, square, size, positive, negative), total_low, square_low = (
            sums.high,
            sums.low[0],
            sums.low[1],
        )
        mean = (total + total_low) / n
        std = torch.full_like(mean, torch.nan)
        if n > 1:
            std = (_n_squares_less_square(n, total, total_low, square, square_low)).clamp(min=0)
            std = (std / (n * (n - 1))).sqrt()
        sem = std / n**0.5
        half = sem * student_t(confidence, n - 1) if n > 1 else sem
        agree = torch.where(
            mean > 0, positive, torch.where(mean < 0, negative, n - positive - negative)
        )
        return RowStatistics(
            n, mean, std, sem, mean - half, mean + half, agree / n, size / (total + total_low).abs()
        )


def student_t(confidence: float, degrees: int) -> float:
    """The t for which |T| ≤ t with this probability, T of Student's distribution.

    By bisection of the finite series for whole degrees of freedom (Abramowitz and Stegun 26.7.3,
    26.7.4), above 200 degrees by the expansion around the normal quantile (26.7.5), whose error is
    there below 1e-10.

    >>> round(student_t(0.95, 10), 6)
    2.228139
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    if degrees > 200:
        terms = (
            (z**3 + z) / 4,
            (5 * z**5 + 16 * z**3 + 3 * z) / 96,
            (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
            (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
        )
        return z + sum(term / degrees**k for k, term in enumerate(terms, 1))
    low, high = z, 2 * z
    while _within(high, degrees) < confidence:
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if _within(middle, degrees) < confidence else (low, middle)
    return low


def _within(t: float, degrees: int) -> float:
    """The probability of |T| ≤ t."""
    angle, odd = math.atan(t / math.sqrt(degrees)), degrees % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for m in range(1 + odd, degrees, 2):
        total += term
        term *= math.cos(angle) ** 2 * m / (m + 1)
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


# ---- sums of two numbers -----------------------------------------------------------------------


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The sum, and what its rounding lost."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _two_product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The product, and what its rounding lost."""
    product = a * b
    (a_high, a_low), (b_high, b_low) = _split(a), _split(b)
    lost = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    return product, lost


def _split(a: Tensor) -> tuple[Tensor, Tensor]:
    """A float64 as two halves of 26 bits, whose products are exact."""
    scaled = a * (2.0**27 + 1)
    high = scaled - (scaled - a)
    return high, a - high


def _add_up(
    high: Float[Tensor, "part moment label"], low: Float[Tensor, "part moment label"]
) -> tuple[Float[Tensor, "moment label"], Float[Tensor, "moment label"]]:
    """The sum over the first axis, by halves, normalised so that `high` is the rounded sum."""
    if not len(high):
        return high.sum(0), low.sum(0)
    while (half := len(high) // 2) > 0:
        total, lost = _two_sum(high[:half], high[half : 2 * half])
        lost = lost + low[:half] + low[half : 2 * half]
        high = torch.cat([total, high[2 * half :]])
        low = torch.cat([lost, low[2 * half :]])
    return _two_sum(high[0], low[0])


def _n_squares_less_square(
    n: int, total: Tensor, total_low: Tensor, square: Tensor, square_low: Tensor
) -> Tensor:
    """The difference n Σx² − (Σx)², in twice the precision of float64."""
    first, first_low = _two_product(square, torch.full_like(square, n))
    second, second_low = _two_product(total, total)
    second_low = second_low + 2 * total * total_low
    difference, lost = _two_sum(first, -second)
    return difference + (lost + first_low + n * square_low - second_low)
