"""What the runs of a comparison come to: its target, medians, ratios and verdict.

Public names: `summarise`, `ratio_of`.
"""

from __future__ import annotations

import dataclasses

from tutelage.reproduction.results import COSTS, Comparison, CurvePoint, MethodResult, Ratio, RunRecord
from tutelage.reproduction.statistics import median_interval, paired_ratio
from tutelage.reproduction.verdict import verdict


def summarise(comparison: Comparison, target: float | None) -> Comparison:
    """The comparison with everything that follows from its runs computed anew.

    Args:
        comparison: its variants hold the runs.
        target: value of the metric to reach; None takes the median of one-shot's final values.
    """
    if target is None:
        target = _final_of_one_shot(comparison)
    comparison = dataclasses.replace(comparison, target=target)
    methods = tuple(_timed(method, comparison) for method in comparison.methods)
    comparison = dataclasses.replace(comparison, methods=methods)
    baseline = comparison.baseline
    pairs = [
        (over, under)
        for over in methods
        for under in methods
        if over is not under and (over.variant.method == "extraction" or under is baseline)
    ]
    ratios = tuple(ratio_of(over, under, cost) for over, under in pairs for cost in COSTS)
    comparison = dataclasses.replace(comparison, ratios=ratios)
    return dataclasses.replace(comparison, verdict=verdict(comparison))


def ratio_of(over: MethodResult, under: MethodResult, cost: str) -> Ratio:
    """Cost to the target of `over` in units of that of `under`, paired by seed."""
    mine, theirs = ({run.seed: run for run in method.runs} for method in (over, under))
    seeds = [seed for seed in mine if seed in theirs]
    paired = paired_ratio(
        [mine[seed].to_target(cost) for seed in seeds],
        [theirs[seed].to_target(cost) for seed in seeds],
        budget=max((theirs[seed].curve[-1].cost(cost) for seed in seeds), default=0),
    )
    return Ratio(over.name, under.name, cost, len(seeds), paired)


def _final_of_one_shot(comparison: Comparison) -> float | None:
    if comparison.baseline is None:
        return None
    runs = [run for run in comparison.baseline.runs if run.diverged is None]
    finals = sorted(run.final[comparison.metric] for run in runs)
    return finals[len(finals) // 2] if finals else None


def _timed(method: MethodResult, comparison: Comparison) -> MethodResult:
    """A result with the points at which its runs reached the target."""
    runs = tuple(dataclasses.replace(run, at_target=_at_target(run, comparison)) for run in method.runs)
    estimate = median_interval([run.to_target("samples") for run in runs])
    return dataclasses.replace(method, runs=runs, samples_to_target=estimate)


def _at_target(run: RunRecord, comparison: Comparison) -> CurvePoint | None:
    metric, target = comparison.metric, comparison.target
    if target is None or run.diverged is not None:
        return None
    return next((p for p in run.curve if metric in p.metrics and comparison.reached(p.metrics[metric], target)), None)
