"""Intervals are Student's, at every number of values."""

import statistics

import pytest

from crossflow.benchmarks.estimate import Estimate, student_factor


@pytest.mark.parametrize(
    ("degrees", "factor"), [(1, 12.706), (2, 4.303), (15, 2.131), (16, 2.120), (30, 2.042), (100, 1.984)]
)
def test_student_factors_equal_the_published_table(degrees: int, factor: float) -> None:
    assert student_factor(degrees) == pytest.approx(factor, abs=5e-4)


@pytest.mark.parametrize(("count", "factor"), [(3, 4.303), (20, 2.093)])
def test_the_interval_of_a_mean_is_students(count: int, factor: float) -> None:
    values = [float(value % 7) for value in range(count)]
    estimate = Estimate.of(values)
    assert estimate.mean == pytest.approx(sum(values) / count)
    assert estimate.half == pytest.approx(factor * statistics.stdev(values) / count**0.5, rel=1e-3)


def test_a_single_value_has_no_interval() -> None:
    assert Estimate.of([1.0]) == Estimate(1.0, None)
    assert not Estimate.of([1.0]).excludes_zero


@pytest.mark.parametrize(
    ("values", "excludes"), [([1.0, 1.1, 0.9], True), ([1.0, -1.0, 0.5], False), ([-2, -2.1], True)]
)
def test_an_interval_excludes_zero_when_it_lies_on_one_side(values: list[float], excludes: bool) -> None:
    assert Estimate.of(values).excludes_zero is excludes
