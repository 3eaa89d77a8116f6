"""Medians, intervals and ratios of runs that may never reach their target.

A run that never reaches its target is *beyond the budget*: infinity in sorting, None in results."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tutelage.core.errors import check_range
from tutelage.core.records import Record

_DRAWS = 2000
FEWEST_FOR_INTERVAL = 5  # seeds: the bootstrap interval of a median of five covers about 94%, that of three 74%


@dataclass(frozen=True)
class Estimate(Record):
    """A median over runs and its bootstrap 95% interval; None stands for beyond the budget, or for no runs."""

    median: float | None = None
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        for name in ("low", "median", "high"):
            check_range(name, getattr(self, name), 0)


NO_ESTIMATE = Estimate()


@dataclass(frozen=True)
class PairedRatio(Record):
    """The median over seeds of the cost of one method divided by that of a second method."""

    estimate: Estimate
    pairs: int  # seeds on which at least one of the two reached the target; the others say nothing
    unreached: int = 0
    """Pairs in which the second method did not reach the target: its budget is used in place of its cost."""

    def __post_init__(self) -> None:
        check_range("pairs", self.pairs, 0)
        check_range("unreached", self.unreached, 0, self.pairs)

    @property
    def is_bound(self) -> bool:
        """Whether the true ratio may be smaller, since the second method did not always reach the target."""
        return self.unreached > 0


def as_good(value: float, target: float, better: str) -> bool:
    """Whether a value of a metric is at least as good as `target`; `better` is `higher` or `lower`."""
    return value >= target if better == "higher" else value <= target


def median_interval(values: Sequence[float | None]) -> Estimate:
    """The median of values and its interval; None stands for beyond the budget."""
    if not values:
        return NO_ESTIMATE
    numbers = np.array([math.inf if value is None else value for value in values])
    draws = np.random.default_rng(0).integers(0, len(numbers), (_DRAWS, len(numbers)))
    medians = np.sort(_medians(numbers[draws]))
    low, high = medians[int(0.025 * _DRAWS)], medians[int(0.975 * _DRAWS)]
    return Estimate(_finite(_medians(numbers)), _finite(low), _finite(high))


def paired_ratio(over: Sequence[float | None], under: Sequence[float | None], budget: float) -> PairedRatio:
    """Median over seeds of `over / under`, paired by seed, with its bootstrap 95% interval.

    Where only `under` is beyond the budget, its budget is used, so the ratio is an upper bound. Where only `over` is
    beyond the budget, the ratio is infinite (None)."""
    pairs = [(a, b) for a, b in zip(over, under, strict=True) if a is not None or b is not None]
    bounded = [(a, budget if b is None else b) for a, b in pairs]
    # a target may be reached before the first sample: the ratio is infinite (None) unless both reach it there
    ratios = [None if a is None or (a and not b) else (a + (not b)) / (b or 1) for a, b in bounded]  # 0 / 0 is 1
    return PairedRatio(median_interval(ratios), len(pairs), sum(b is None for _, b in pairs))


def _medians(rows: np.ndarray) -> Any:
    """Medians over the last axis that never mix a finite number with infinity (the upper of the two middle ones)."""
    ordered, middle = np.sort(rows, axis=-1), rows.shape[-1] // 2
    lower, upper = ordered[..., middle - 1], ordered[..., middle]
    return upper if rows.shape[-1] % 2 else np.where(np.isinf(upper), upper, (lower + upper) / 2)


def _finite(value: float) -> float | None:
    return None if math.isinf(value) else float(value)
