"""Sums over shards: exact, and the same numbers in every order; intervals: Student's own."""

import math
from fractions import Fraction

import pytest
import torch

from tl_dla.datasets.statistics import RowStatistics, Sums, student_t

LABELS = ["a", "b", "c"]


def awkward(n=400):
    """Float32 rows that plain sums get wrong: of many sizes, with means far above the spread."""
    generator = torch.Generator().manual_seed(4)
    noise = torch.randn(n, 3, generator=generator)
    sizes = 10.0 ** torch.randint(-6, 7, (n,), generator=generator)
    return torch.stack([noise[:, 0] * sizes, 3e4 + 0.01 * noise[:, 1], noise[:, 2]], 1)


def exact(column):
    """Mean and variance by rational arithmetic."""
    x = [Fraction(value) for value in column.double().tolist()]
    mean = sum(x) / len(x)
    return mean, sum((value - mean) ** 2 for value in x) / (len(x) - 1)


def test_mean_and_standard_deviation_are_the_exact_ones_rounded():
    values = awkward()
    got = RowStatistics.of(Sums.of(LABELS, values), 0.95)
    for row in range(3):
        mean, variance = exact(values[:, row])
        assert float(got.mean[row]) == pytest.approx(float(mean), rel=4e-16)
        assert float(got.std[row]) == pytest.approx(math.sqrt(variance), rel=1e-15)
        assert float(got.sem[row]) == pytest.approx(math.sqrt(variance / len(values)), rel=1e-15)


@pytest.mark.parametrize("seed", range(20))
def test_any_order_and_any_parts_give_the_same_bits(seed):
    values = awkward()
    whole = Sums.of(LABELS, values)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(values), generator=generator)
    sizes = torch.randint(1, 40, (100,), generator=generator).cumsum(0)
    cuts = [0, *(int(i) for i in sizes if i < len(values)), len(values)]
    parts = [Sums.of(LABELS, values[order[a:b]]) for a, b in zip(cuts, cuts[1:], strict=False)]
    half = len(parts) // 2
    nested = Sums.merge([Sums.merge(parts[half:]), Sums.merge(parts[:half])])
    for merged in (Sums.merge(parts), nested):
        assert merged.n == whole.n
        assert torch.equal(merged.high, whole.high)
        a, b = RowStatistics.of(merged, 0.9), RowStatistics.of(whole, 0.9)
        assert torch.equal(a.mean, b.mean) and torch.equal(a.std, b.std)
        assert torch.equal(a.high, b.high) and torch.equal(a.cancellation, b.cancellation)


def test_signs_and_cancellation_by_hand():
    values = torch.tensor([[3.0, 1.0, 0.0], [-1.0, -2.0, 0.0], [2.0, 0.0, 0.0]])
    got = RowStatistics.of(Sums.of(LABELS, values), 0.95)
    assert got.sign_agreement.tolist() == pytest.approx([2 / 3, 1 / 3, 1.0])
    assert got.cancellation[:2].tolist() == pytest.approx([6 / 4, 3 / 1])
    assert got.cancellation[2].isnan()


def test_a_row_that_some_examples_lack_is_zero_in_them():
    first = Sums.of(["a", "rest"], torch.tensor([[1.0, 5.0], [2.0, 7.0]]))
    second = Sums.of(["a"], torch.tensor([[3.0], [4.0]]))
    third = Sums.of(["other", "a"], torch.tensor([[9.0, 5.0]]))
    merged = Sums.merge([first, second, third])
    assert merged.labels == ("a", "rest", "other")
    values = torch.tensor([[1.0, 5, 0], [2, 7, 0], [3, 0, 0], [4, 0, 0], [5, 0, 9]])
    assert torch.equal(merged.high, Sums.of(merged.labels, values).high)
    assert merged.select(["other"]).high[0].tolist() == [9.0]


def test_one_example_has_a_mean_and_no_spread():
    got = RowStatistics.of(Sums.of(["a"], torch.tensor([[2.5]])), 0.95)
    assert float(got.mean) == 2.5 and got.std.isnan() and got.low.isnan() and got.high.isnan()


def within(t, degrees):
    """P(|T| ≤ t) by integrating Student's density (an independent computation)."""
    x = torch.linspace(0, t, 400_001, dtype=torch.float64)
    log_norm = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)
    log_norm -= 0.5 * math.log(degrees * math.pi)
    density = torch.exp(log_norm - (degrees + 1) / 2 * torch.log1p(x**2 / degrees))
    return 2 * float(torch.trapezoid(density, x))


@pytest.mark.parametrize("degrees", [1, 2, 3, 7, 10, 50, 199, 200, 201, 999, 99_999])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_student_t_encloses_the_probability(degrees, confidence):
    assert within(student_t(confidence, degrees), degrees) == pytest.approx(confidence, abs=2e-9)


@pytest.mark.parametrize(
    ("degrees", "table"), [(1, 12.706205), (2, 4.302653), (5, 2.570582), (30, 2.042272)]
)
def test_student_t_is_that_of_the_tables(degrees, table):
    assert student_t(0.95, degrees) == pytest.approx(table, abs=1e-6)


def test_the_interval_covers_the_mean_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(6, 20_000, generator=generator) + 2
    got = RowStatistics.of(Sums.of([str(i) for i in range(20_000)], values), 0.9)
    covered = ((got.low <= 2) & (got.high >= 2)).double().mean()
    assert float(covered) == pytest.approx(0.9, abs=0.01)
