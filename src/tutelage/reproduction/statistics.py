"""Medians, ratios and differences of runs that may never reach their target.

A run that never reaches its target is *beyond the budget*: infinity in sorting, None in results."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

from tutelage.core.errors import check_finite, check_range
from tutelage.core.records import Record

FEWEST_FOR_INTERVAL = 5  # pairs from which a mean difference gets a t interval; with fewer, their range


@dataclass(frozen=True)
class Estimate(Record):
    """A median over runs, the smallest and the largest; None stands for beyond the budget, or for no runs."""

    median: float | None = None
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        for name in ("low", "median", "high"):
            check_range(name, getattr(self, name), 0)


NO_ESTIMATE = Estimate()


@dataclass(frozen=True)
class PairedRatio(Record):
    """The cost of one method divided by that of a second method, over pairs of runs."""

    estimate: Estimate
    pairs: int  # pairs of which at least one run reached the target; the others say nothing
    unreached: int = 0
    """Pairs in which the second method did not reach the target: its budget is used in place of its cost."""

    def __post_init__(self) -> None:
        check_range("pairs", self.pairs, 0)
        check_range("unreached", self.unreached, 0, self.pairs)

    @property
    def is_bound(self) -> bool:
        """Whether the true ratio may be smaller, since the second method did not always reach the target."""
        return self.unreached > 0


@dataclass(frozen=True)
class PairedDifference(Record):
    """The mean of the differences of pairs of runs, and how sure it is."""

    mean: float | None = None  # None without pairs
    low: float | None = None
    high: float | None = None
    """With `FEWEST_FOR_INTERVAL` pairs the ends of the t interval of 95%, otherwise the smallest and largest difference."""
    pairs: int = 0

    def __post_init__(self) -> None:
        check_finite(**{name: value for name in ("mean", "low", "high") if (value := getattr(self, name)) is not None})
        check_range("pairs", self.pairs, 0)

    @property
    def kind(self) -> str:
        """What `low` and `high` are."""
        return "95% t interval" if self.pairs >= FEWEST_FOR_INTERVAL else "range"


def rounded(value: float, digits: int) -> float:
    """A number with so many significant digits."""
    return float(f"{value:.{digits}g}")


def as_good(value: float, target: float, better: str) -> bool:
    """Whether a value of a metric is at least as good as `target`; `better` is `higher` or `lower`."""
    return value >= target if better == "higher" else value <= target


def median(values: Sequence[float | None]) -> float | None:
    """The median; None stands for beyond the budget, and is never mixed with a number: the upper of the two middle ones."""
    ordered = sorted(math.inf if value is None else value for value in values)
    if not ordered:
        return None
    lower, upper = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    return None if math.isinf(upper) else (lower + upper) / 2


def median_and_range(values: Sequence[float | None]) -> Estimate:
    """The median, the smallest and the largest of values; None stands for beyond the budget."""
    if not values:
        return NO_ESTIMATE
    reached = [value for value in values if value is not None]
    high = max(reached) if len(reached) == len(values) else None
    return Estimate(median(values), min(reached, default=None), high)


def paired_ratio(over: Sequence[float | None], under: Sequence[float | None], budget: float) -> PairedRatio:
    """Median and range over pairs of `over / under`.

    Where only `under` is beyond the budget, its budget is used, so the ratio is an upper bound. Where only `over` is
    beyond the budget, the ratio is infinite (None)."""
    pairs = [(a, b) for a, b in zip(over, under, strict=True) if a is not None or b is not None]
    bounded = [(a, budget if b is None else b) for a, b in pairs]
    # a target may be reached before the first sample: the ratio is infinite (None) unless both reach it there
    ratios = [None if a is None or (a and not b) else (a + (not b)) / (b or 1) for a, b in bounded]  # 0 / 0 is 1
    return PairedRatio(median_and_range(ratios), len(pairs), sum(b is None for _, b in pairs))


def paired_difference(over: Sequence[float], under: Sequence[float]) -> PairedDifference:
    """Mean of `over - under`, with its t interval or range."""
    found = [a - b for a, b in zip(over, under, strict=True)]
    if not found:
        return PairedDifference()
    low, high = interval(found)
    return PairedDifference(fmean(found), low, high, len(found))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95% t interval of the mean of values, or their smallest and largest where there are few."""
    if len(values) < FEWEST_FOR_INTERVAL:
        return min(values), max(values)
    half = t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


def t_quantile(degrees: int) -> float:
    """The 97.5% quantile of Student's t distribution, by its expansion around the normal one (Abramowitz and Stegun,
    26.7.5); from 4 degrees of freedom on, the error is below 0.2%."""
    z, n = NormalDist().inv_cdf(0.975), degrees
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / n**power for power, term in enumerate(terms, 1))
