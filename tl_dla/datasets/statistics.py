"""Moments over many examples: the same to the last bit in any order, in any number of processes.

For each row x over n examples, from the sums Σx, Σx², Σx³ and Σ|x| and the counts of either sign:

    mean = Σx / n          std² = Σ(x − mean)² / (n − 1)          sem = std / √n
    skewness γ = (Σ(x − mean)³ / n) / (Σ(x − mean)² / n)^1.5
    sign agreement = the share of examples in which x has the sign of the mean
    cancellation = Σ|x| / |Σx|:  1 where every example has one sign, large where they cancel

The interval of the mean is Student's, mean ± t · sem, widened on either side to Hall's where that
reaches further: mean − h(t) · sem and mean − h(−t) · sem, with t the quantile of Student's
distribution with n − 1 degrees and

    h(t) = 3 (√n / γ) (∛(1 + γ (t / √n − γ / 6n)) − 1)          (h(t) = t where γ = 0)

Student's assumes that means over n examples are spread as a normal distribution is, and covers too
seldom where the examples are skewed; Hall's takes the skewness out, but trusts that the examples
show it. How often 95 % intervals cover the true mean (simulated, 20,000 samples each; BCa 4,000):

    n = 5, 10, 20, 30    Student                the two together       scipy's BCa bootstrap
    normal               0.95 0.95 0.95 0.95    0.96 0.96 0.96 0.95    0.84 0.90 0.92 0.94
    exponential          0.88 0.90 0.92 0.93    0.92 0.94 0.96 0.96    0.80 0.87 0.92 0.92
    lognormal (σ = 1)    0.82 0.84 0.87 0.88    0.89 0.91 0.93 0.94    0.76 0.83 0.87 0.89
    one in 20 is 10 σ    0.89 0.83 0.79 0.83    0.92 0.85 0.81 0.84    0.72 0.74 0.76 0.81

No interval knows of outliers that are not among the examples: where a few prompts of hundreds carry
the effect, hundreds are needed. The bootstrap is not used, as it covers least for few examples.

Floating-point addition depends on its order, and central moments cancel. Both are cured by keeping
every sum as two float64 numbers, the sum and what its rounding lost (Knuth's two-sum, about 106
bits), and by rational arithmetic at the end. Squares of float32 numbers are exact in float64, and
cubes in two of them, so sums of shards merge in any order to the same float64 numbers. A query
over the stored rows does not keep this (polars and DuckDB give other last bits in each run, and
lose 1e-11 of a standard deviation where the mean is large), and needs all rows in one place.

References: Hall 1992, "On the removal of skewness by transformation", J. R. Stat. Soc. B 54; Knuth,
The Art of Computer Programming 2, section 4.2.2; Abramowitz and Stegun 1964, 26.7.3 to 26.7.5.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from statistics import NormalDist

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Sums:
    """Sums over `n` examples for each label: Σx, Σx², Σx³, Σ|x|, how many x > 0, how many x < 0.

    `high + low` is the sum: `low` holds what rounding took from `high`. A label that only some
    examples have is 0 in the others.
    """

    labels: tuple[str, ...]
    n: int
    high: Float[Tensor, "moment label"]
    low: Float[Tensor, "moment label"]

    @staticmethod
    def of(labels: Sequence[str], values: Float[Tensor, "example label"]) -> "Sums":
        """The sums over float32 values (below 1e19), one line per example."""
        x = values.double()
        square = x * x
        # Both halves of the square have few enough bits for their products with x to be exact.
        upper = square.float().double()
        cube, cube_low = _two_sum(upper * x, (square - upper) * x)
        moments = torch.stack([x, square, cube, x.abs(), (x > 0).double(), (x < 0).double()], 1)
        low = torch.zeros_like(moments)
        low[:, 2] = cube_low
        return Sums(tuple(labels), len(x), *_add_up(moments, low))

    @staticmethod
    def merge(parts: Sequence["Sums"]) -> "Sums":
        """The sums over all examples of all parts."""
        labels = tuple(dict.fromkeys(label for part in parts for label in part.labels))
        parts = [part.select(labels) for part in parts]
        n = sum(part.n for part in parts)
        high, low = torch.stack([p.high for p in parts]), torch.stack([p.low for p in parts])
        return Sums(labels, n, *_add_up(high, low))

    def select(self, labels: Sequence[str]) -> "Sums":
        """The sums of these labels, in the order given: 0 for one that no example has."""
        place = {label: i for i, label in enumerate(self.labels)}
        columns = [place.get(label, -1) for label in labels]
        high, low = (nn.functional.pad(x, (0, 1))[:, columns] for x in (self.high, self.low))
        return Sums(tuple(labels), self.n, high, low)


@dataclass(frozen=True, eq=False)
class RowStatistics:
    """What the examples say of each row, in logits (float64).

    Attributes:
        n: how many examples.
        mean: the mean over examples.
        std: the standard deviation over examples (n − 1 in the denominator; NaN for one example).
        sem: the standard error of the mean.
        low: the lower end of the confidence interval of the mean (NaN for one example).
        high: its upper end.
        skewness: the third central moment over std³: 0 for a symmetric spread; NaN without spread.
        sign_agreement: the share of examples in which the row has the sign of its mean.
        cancellation: Σ|x| / |Σx| over examples: 1 where all have one sign; NaN where all are 0.
    """

    n: int
    mean: Float[Tensor, " row"]
    std: Float[Tensor, " row"]
    sem: Float[Tensor, " row"]
    low: Float[Tensor, " row"]
    high: Float[Tensor, " row"]
    skewness: Float[Tensor, " row"]
    sign_agreement: Float[Tensor, " row"]
    cancellation: Float[Tensor, " row"]

    @staticmethod
    def of(sums: Sums, confidence: float) -> "RowStatistics":
        """The statistics that these sums give, with intervals of this confidence."""
        n = sums.n
        total = sums.high[0] + sums.low[0]
        size, positive, negative = sums.high[3:]
        mean = total / n
        second, third = _central(n, sums.high[:3], sums.low[:3])
        std = (second * n / (n - 1)).sqrt() if n > 1 else torch.full_like(mean, torch.nan)
        sem = std / n**0.5
        skewness = third / second**1.5
        low = high = mean * torch.nan
        if n > 1:
            t = student_t(confidence, n - 1)
            low = mean - sem * _hall(t, n, skewness).clamp(min=t)
            high = mean - sem * _hall(-t, n, skewness).clamp(max=-t)
        agree = torch.where(
            mean > 0, positive, torch.where(mean < 0, negative, n - positive - negative)
        )
        return RowStatistics(n, mean, std, sem, low, high, skewness, agree / n, size / total.abs())


def _central(
    n: int, high: Float[Tensor, "3 row"], low: Float[Tensor, "3 row"]
) -> tuple[Float[Tensor, " row"], Float[Tensor, " row"]]:
    """The second and third central moments from Σx, Σx² and Σx³, by rational arithmetic."""
    second, third = [], []
    for row in zip(*high.tolist(), *low.tolist(), strict=True):
        if not all(map(math.isfinite, row)):
            second.append(math.nan)
            third.append(math.nan)
            continue
        mean, square, cube = ((Fraction(row[i]) + Fraction(row[i + 3])) / n for i in range(3))
        second.append(float(square - mean**2))
        third.append(float(cube - 3 * mean * square + 2 * mean**3))
    return high.new_tensor(second).clamp(min=0), high.new_tensor(third)


def _hall(t: float, n: int, skewness: Float[Tensor, " row"]) -> Float[Tensor, " row"]:
    """Hall's h(t): t as a quantile of (mean − μ) / sem where that is skewed."""
    inside = 1 + skewness * (t / n**0.5 - skewness / (6 * n))
    root = inside.sign() * inside.abs() ** (1 / 3)
    some = skewness.abs() > 1e-6  # below, h(t) − t is less than the rounding of this formula
    return torch.where(some, 3 * n**0.5 / skewness * (root - 1), torch.full_like(skewness, t))


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
