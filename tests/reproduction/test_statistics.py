"""Medians, ranges, ratios and differences, also where some runs never reach the target."""

from __future__ import annotations

import statistics

import pytest

from tutelage.reproduction.statistics import (
    Estimate,
    PairedDifference,
    PairedRatio,
    interval,
    median,
    median_and_range,
    paired_difference,
    paired_ratio,
    t_quantile,
)


@pytest.mark.parametrize("values", [[5], [4, 1], [3.0, 1.0, 2.0], [7, 7, 7, 7], [9, 2, 5, 30, 11, 3]])
def test_median_of_runs_that_all_arrive(values: list[float]) -> None:
    assert median_and_range(values) == Estimate(statistics.median(values), min(values), max(values))
    assert median(values) == statistics.median(values)


@pytest.mark.parametrize(
    ("values", "expected"),
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
def test_a_run_that_never_arrives_counts_as_beyond_the_budget(
    values: list[float | None], expected: float | None
) -> None:
    reached = [value for value in values if value is not None]
    assert median(values) == expected
    assert median_and_range(values) == Estimate(expected, min(reached, default=None), None)


def test_nothing_to_average() -> None:
    assert median_and_range([]) == Estimate(None, None, None)
    assert median([]) is None


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


# ---- Differences ----


@pytest.mark.parametrize(
    ("degrees", "quantile"),  # as printed in tables of the 97.5% quantiles
    [(4, 2.776445), (5, 2.570582), (7, 2.364624), (9, 2.262157), (14, 2.144787), (29, 2.045230), (99, 1.984217)],
)
def test_t_quantiles_are_those_of_the_tables(degrees: int, quantile: float) -> None:
    assert t_quantile(degrees) == pytest.approx(quantile, rel=0.002)
    assert t_quantile(10**9) == pytest.approx(statistics.NormalDist().inv_cdf(0.975))


def test_from_five_pairs_on_a_difference_has_a_t_interval() -> None:
    over, under = [3.0, 5.0, 4.0, 6.0, 7.0], [1.0, 2.0, 3.0, 4.0, 5.0]
    found = paired_difference(over, under)
    apart = [2.0, 3.0, 1.0, 2.0, 2.0]
    half = 2.776445 * statistics.stdev(apart) / 5**0.5
    assert (found.mean, found.pairs, found.kind) == (2.0, 5, "95% t interval")
    assert found.low == pytest.approx(2.0 - half, rel=1e-3) and found.high == pytest.approx(2.0 + half, rel=1e-3)
    assert interval(apart) == (found.low, found.high)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_with_fewer_pairs_a_difference_has_a_range(count: int) -> None:
    over = [3.0, 5.0, 4.0, 6.0][:count]
    found = paired_difference(over, [1.0, 1.0, 1.0, 1.0][:count])
    apart = [value - 1 for value in over]
    assert found == PairedDifference(statistics.mean(apart), min(apart), max(apart), count)
    assert found.kind == "range"


def test_a_difference_is_paired() -> None:
    """Runs that vary much, always by the same amount apart."""
    found = paired_difference([10.5, 200.5, 3.5, 41.5, 5.5, 60.5], [10.0, 200.0, 3.0, 41.0, 5.0, 60.0])
    assert found == PairedDifference(0.5, 0.5, 0.5, 6)
    with pytest.raises(ValueError, match="zip"):
        paired_difference([1.0], [1.0, 2.0])


def test_without_pairs_there_is_no_difference() -> None:
    assert paired_difference([], []) == PairedDifference(None, None, None, 0)
