"""Sums over shards: exact, and the same numbers in every order; intervals: Student's own."""

import math
import time
from fractions import Fraction

import pytest
import torch

from tl_dla.datasets.statistics import RowStatistics, Sums, _hall, student_t

LABELS = ["a", "b", "c"]


def awkward(n=400):
    """Float32 rows that plain sums get wrong: of many sizes, with means far above the spread."""
    generator = torch.Generator().manual_seed(4)
    noise = torch.randn(n, 3, generator=generator)
    sizes = 10.0 ** torch.randint(-6, 7, (n,), generator=generator)
    return torch.stack([noise[:, 0] * sizes, 3e4 + 0.01 * noise[:, 1], noise[:, 2]], 1)


def exact(column):
    """Mean, variance and third central moment by rational arithmetic."""
    x = [Fraction(value) for value in column.double().tolist()]
    mean = sum(x) / len(x)
    third = sum((value - mean) ** 3 for value in x) / len(x)
    return mean, sum((value - mean) ** 2 for value in x) / (len(x) - 1), third


def test_mean_and_standard_deviation_are_the_exact_ones_rounded():
    values = awkward()
    got = RowStatistics.of(Sums.of(LABELS, values), 0.95)
    for row in range(3):
        mean, variance, third = exact(values[:, row])
        assert float(got.mean[row]) == pytest.approx(float(mean), rel=4e-16)
        assert float(got.std[row]) == pytest.approx(math.sqrt(variance), rel=1e-15)
        assert float(got.sem[row]) == pytest.approx(math.sqrt(variance / len(values)), rel=1e-15)
        n = len(values)
        skewness = float(third) / float(variance * (n - 1) / n) ** 1.5
        assert float(got.skewness[row]) == pytest.approx(skewness, rel=1e-14)


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
        assert torch.equal(a.skewness, b.skewness) and torch.equal(a.low, b.low)


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
    assert merged.select(["other", "none"]).high[0].tolist() == [9.0, 0.0]


def test_sums_over_every_neuron_merge_at_once():
    labels = [f"L{layer}N{neuron}" for layer in range(12) for neuron in range(3072)]
    part = Sums.of(labels, torch.ones(2, len(labels)))
    start = time.perf_counter()
    merged = Sums.merge([part, part, part])
    assert time.perf_counter() - start < 2  # 0.05 s; a search of each label takes many seconds
    assert merged.high[0].unique().tolist() == [6.0]


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


# ---- intervals ---------------------------------------------------------------------------------


def test_the_interval_is_students_for_a_symmetric_row_and_reaches_further_on_the_skewed_side():
    values = torch.tensor([[-2.0, 0, 1], [-1, 0, 2], [0, 0, 4], [1, 0, 8], [2, 10, 16]])
    got = RowStatistics.of(Sums.of(LABELS, values), 0.95)
    half = student_t(0.95, 4) * got.sem
    below, above = got.mean - got.low, got.high - got.mean
    assert got.skewness.tolist() == pytest.approx([0.0, 1.5, 0.8890], abs=1e-4)
    assert (float(below[0]), float(above[0])) == pytest.approx((float(half[0]),) * 2, rel=1e-12)
    assert below[1:].tolist() == pytest.approx(half[1:].tolist(), rel=1e-12)
    assert bool((above[1:] > 1.2 * half[1:]).all())


@pytest.mark.parametrize("skewness", [-2.0, -0.4, 1e-5, 0.7, 3.0])
@pytest.mark.parametrize("n", [5, 30, 1000])
def test_the_limit_undoes_halls_transformation(n, skewness):
    """g(T) = T + γT²/3√n + γ²T³/27n + γ/6√n, of Hall 1992, gives back the quantile."""
    for t in (-2.5, -1.0, 2.5):
        at = float(_hall(t, n, torch.tensor([skewness], dtype=torch.float64)))
        g = skewness / n**0.5
        assert at + g * at**2 / 3 + g**2 * at**3 / 27 + g / 6 == pytest.approx(t, abs=1e-9)


def samples(n, count, generator):
    """Samples of n from four distributions, with their true means."""
    normal = torch.randn(n, count, generator=generator)
    rare = torch.rand(n, count, generator=generator) < 0.05
    return {
        "normal": (normal, 0.0),
        "exponential": (torch.empty(n, count).exponential_(generator=generator), 1.0),
        "lognormal": (torch.randn(n, count, generator=generator).exp(), math.exp(0.5)),
        "outlying": (torch.randn(n, count, generator=generator) + 10 * rare, 0.5),
    }


# What the docstring of the module promises, to the second digit; Student's own are lower.
COVERAGE = {
    "normal": {5: 0.96, 10: 0.96, 20: 0.96, 30: 0.95},
    "exponential": {5: 0.92, 10: 0.94, 20: 0.96, 30: 0.96},
    "lognormal": {5: 0.89, 10: 0.91, 20: 0.93, 30: 0.94},
    "outlying": {5: 0.92, 10: 0.85, 20: 0.81, 30: 0.84},
}


@pytest.mark.slow
@pytest.mark.parametrize("n", [5, 10, 20, 30])
def test_intervals_cover_the_mean_as_often_as_the_docstring_says(n):
    generator, count = torch.Generator().manual_seed(n), 20_000
    for name, (values, mean) in samples(n, count, generator).items():
        got = RowStatistics.of(Sums.of([str(i) for i in range(count)], values), 0.95)
        covered = float(((got.low <= mean) & (got.high >= mean)).double().mean())
        half = student_t(0.95, n - 1) * got.sem
        student = float(((got.mean - mean).abs() <= half).double().mean())
        assert covered == pytest.approx(COVERAGE[name][n], abs=0.01), name
        assert covered >= max(student, 0.94 if name == "normal" else 0.0), name
        if name in ("exponential", "lognormal"):
            assert 0.95 - covered < 0.6 * (0.95 - student), name
