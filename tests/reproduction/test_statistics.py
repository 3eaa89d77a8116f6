"""Medians, intervals and ratios where some runs never reach the target."""

from __future__ import annotations

import statistics

import numpy as np
import pytest

from tutelage.reproduction.statistics import Estimate, PairedRatio, median_interval, paired_ratio


def bounds(values: list[float] | list[float | None]) -> tuple[float | None, float | None, float | None]:
    found = median_interval(values)
    return found.median, found.low, found.high


@pytest.mark.parametrize("values", [[5], [4, 1], [3.0, 1.0, 2.0], [7, 7, 7, 7], [9, 2, 5, 30, 11, 3]])
def test_median_of_runs_that_all_arrive(values: list[float]) -> None:
    median, low, high = bounds(values)
    assert median == statistics.median(values)
    assert low is not None and high is not None
    assert min(values) <= low <= median <= high <= max(values)
    if len(set(values)) == 1:
        assert (low, high) == (values[0], values[0])


@pytest.mark.parametrize(
    ("values", "median"),
    [
        ([1, 2, None], 2),
        ([1, None, None], None),
        ([None], None),
        ([None, 3], None),  # the upper of the two middle ones is beyond the budget
        ([1, 2, 3, None], 2.5),
        ([4, None, 2, None], None),
        ([None, None, 1, 2, 3], 3),
    ],
)
def test_a_run_that_never_arrives_counts_as_beyond_the_budget(values: list[float | None], median: float | None) -> None:
    found, low, high = bounds(values)
    assert found == median
    finite = [value for value in values if value is not None]
    if low is not None:
        assert min(finite) <= low
    if len(values) - len(finite) >= 1:
        assert high is None  # one missing run in few: resamples of it alone are within the 95%


def test_nothing_to_average() -> None:
    assert median_interval([]) == Estimate(None, None, None)


def test_interval_is_the_bootstraps() -> None:
    """Against a bootstrap with other draws: the interval of 25 runs agrees within a grid step."""
    values = [float(value) for value in np.random.default_rng(5).permutation(25)]
    median, low, high = bounds(values)
    generator = np.random.default_rng(99)
    draws = [statistics.median(generator.choice(values, 25)) for _ in range(4000)]
    expected = np.quantile(draws, [0.025, 0.975])
    assert median == 12
    assert low == pytest.approx(expected[0], abs=1.0) and high == pytest.approx(expected[1], abs=1.0)
    assert median_interval(values) == Estimate(median, low, high)  # the same every time


def test_ratio_is_paired_by_seed() -> None:
    result = paired_ratio([1, 20, 300], [10, 100, 1000], budget=5000)
    assert result.estimate.median == pytest.approx(0.2)  # of 0.1, 0.2, 0.3; not 20 / 100 by accident of order
    assert (result.estimate.low, result.estimate.high) == (pytest.approx(0.1), pytest.approx(0.3))
    assert result.pairs == 3
    assert not result.is_bound
    assert paired_ratio([300, 1, 20], [1000, 10, 100], budget=5000).estimate.median == pytest.approx(0.2)


def test_where_the_second_never_arrives_the_ratio_is_a_bound() -> None:
    result = paired_ratio([10, 10, 10], [40, None, None], budget=100)
    assert result.estimate.median == pytest.approx(0.1)
    assert (result.estimate.low, result.estimate.high) == (pytest.approx(0.1), pytest.approx(0.25))
    assert result.is_bound and (result.unreached, result.pairs) == (2, 3)


def test_where_the_first_never_arrives_the_ratio_is_infinite() -> None:
    result = paired_ratio([None, None, 10], [40, 50, 20], budget=100)
    assert (result.estimate.median, result.pairs) == (None, 3)
    assert result.estimate.high is None
    assert not result.is_bound


def test_where_neither_arrives_nothing_is_compared() -> None:
    assert paired_ratio([None, 10], [None, 20], budget=100).pairs == 1
    nothing = paired_ratio([None, None], [None, None], budget=100)
    assert nothing == PairedRatio(Estimate(None, None, None), pairs=0)
    assert paired_ratio([], [], budget=0).pairs == 0


def test_unequal_numbers_of_runs_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        paired_ratio([1.0], [1.0, 2.0], budget=10)


def test_a_target_that_holds_before_training_does_not_divide_by_zero() -> None:
    """An easy target, or a student that starts from weights: both are there after no sample at all."""
    assert paired_ratio([0], [0], budget=100).estimate.median == 1.0
    assert paired_ratio([50], [0], budget=100).estimate.median is None
    assert paired_ratio([0], [50], budget=100).estimate.median == 0.0
