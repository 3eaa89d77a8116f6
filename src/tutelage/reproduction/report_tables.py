"""The tables of a comparison's report.

Public names: `summary_table`, `detail_tables`.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tutelage.reproduction.display import Table, show_number
from tutelage.reproduction.report_curves import MethodCurves
from tutelage.reproduction.results import Comparison, MethodResult, Ratio, Trial
from tutelage.reproduction.statistics import FEWEST_FOR_INTERVAL, Estimate

_VALUE_ROWS = 12  # rows of a method in the table of a plot's values
_COST_NAMES = {"samples": "samples", "flops": "FLOPs", "seconds": "seconds"}


def summary_table(comparison: Comparison) -> Table:
    """The small table of the first screen: samples to the target, final metric, ratio to one-shot."""
    metric, target, baseline = comparison.metric, comparison.target, comparison.baseline
    with_ratio = target is not None and baseline is not None
    columns = ["method"]
    columns += [] if target is None else [f"samples to {metric} {show_number(target)}"]
    columns += [f"final {metric}"]
    columns += [f"ratio to {baseline.name}"] if with_ratio and baseline is not None else []
    rows = []
    for method in comparison.methods:
        row = [method.name]
        row += [] if target is None else [_reached(method, comparison)]
        row += [_median(method.finals(metric))]
        if with_ratio and baseline is not None:
            ratio = comparison.ratio(method.name, baseline.name)
            row += ["1"] if method is baseline else [_ratio(ratio)]
        rows.append(tuple(row))
    return Table("Results", tuple(columns), rows, _facts(comparison))


def detail_tables(comparison: Comparison, curves: Sequence[MethodCurves]) -> list[Table]:
    """Everything else, in the order in which a reader may ask for it; tables without rows are left out."""
    tables = [
        _legend(comparison),
        _details(comparison),
        _ratios(comparison),
        _learning_rates(comparison),
        _every_run(comparison),
        _values(curves, comparison.metric),
        _pairs("Settings", {**comparison.settings, "command": comparison.command}),
        _teacher(comparison),
        _pairs("Environment", comparison.environment),
    ]
    return [table for table in tables if table.rows]


def _facts(comparison: Comparison) -> str:
    """Budget, metric, target and seeds in a few sentences."""
    samples = show_number(comparison.budget)
    if comparison.match == "samples":
        budget = f"Budget of every method: {samples} samples."
    else:
        unit = _COST_NAMES[comparison.match]
        budget = f"Budget of one-shot: {samples} samples; every other method got the same number of {unit}."
    direction = f"Held-out {comparison.metric}: {comparison.better} is better"
    goal = "there is no target, so the final values are compared"
    if comparison.target is not None:
        goal = f"the target is {show_number(comparison.target)}"
    seeds = ", ".join(map(str, comparison.seeds))
    over = f"Medians over seeds {seeds}." if len(comparison.seeds) > 1 else f"Seed {seeds}."
    return f"{budget} {direction}; {goal}. {over}"


def _legend(comparison: Comparison) -> Table:
    """What the names stand for."""
    rows = [(m.name, m.variant.method, m.variant.settings or "the recipe's own") for m in comparison.methods]
    return Table("Methods", ("name", "method", "settings"), rows, "Settings not named here are the recipe's own.")


def _details(comparison: Comparison) -> Table:
    metric, target = comparison.metric, comparison.target
    columns = ["method", "learning rate"]
    columns += [] if target is None else ["samples to target, median", _spread(comparison)]
    rows = []
    for method in comparison.methods:
        row = [method.name, _candidate(method)]
        if target is not None:
            beyond = _beyond(method, comparison) if method.runs else "-"
            row += [_reached(method, comparison), _interval(method.samples_to_target, beyond)]
        row += [_median(method.finals(metric), with_range=True), _median([run.seconds for run in method.runs])]
        rows.append(tuple(row))
    columns += [f"final {metric}, median (range)", "seconds, median"]
    return Table("Results in detail", tuple(columns), rows)


def _candidate(method: MethodResult) -> str:
    if method.diverged:
        return "all diverged"
    if method.candidate is None:
        return "-"
    return ", ".join(filter(None, (show_number(method.candidate.learning_rate), method.candidate.schedule)))


def _ratios(comparison: Comparison) -> Table:
    """The ratios with their intervals and notes."""
    rows = []
    for ratio in comparison.ratios:
        estimate = ratio.paired.estimate
        interval = _interval(estimate, "unbounded") if ratio.paired.pairs else "-"
        names = f"{ratio.over} / {ratio.under}"
        rows.append((names, _COST_NAMES[ratio.cost], show_number(estimate.median), interval, _note(ratio)))
    note = "The cost to the target of the first method, divided by that of the second one, on the same seed."
    return Table("Ratios", ("ratio", "of", "median", _spread(comparison), "note"), rows, note)


def _note(ratio: Ratio) -> str:
    if not ratio.paired.pairs:
        return "neither reached the target" if ratio.seeds else "no seed in common yet"
    if ratio.paired.is_bound:
        return (
            f"at most: {ratio.under} did not reach the target on {ratio.paired.unreached} of {ratio.paired.pairs} seeds, "
            "so its budget stands in for its cost"
        )
    return ""


def _spread(comparison: Comparison) -> str:
    """What the two numbers beside a median are: with few seeds, their bootstrap interval is their range."""
    return "95% interval" if len(comparison.seeds) >= FEWEST_FOR_INTERVAL else "range"


def _ratio(ratio: Ratio | None) -> str:
    if ratio is None or not ratio.paired.pairs:
        return "-"
    estimate, bound = ratio.paired.estimate, ratio.paired.is_bound
    if estimate.median is not None:
        return f"{'at most ' if bound else ''}{show_number(estimate.median)}"
    if bound:
        return "unknown"
    return "not reached" if estimate.low is None else f"at least {show_number(estimate.low)}"


def _learning_rates(comparison: Comparison) -> Table:
    """Scores by learning rate, one row per method and schedule."""
    units = {trial.unit for method in comparison.methods for trial in method.trials}
    cells: dict[tuple[str, str], dict[float, str]] = {}  # text by (method, schedule) and rate
    for method in comparison.methods:
        for trial in method.trials:
            text = _score(trial) + (f" {trial.unit}" if len(units) > 1 else "")
            text += " ✓" if trial.candidate == method.candidate else ""
            row = cells.setdefault((method.name, trial.candidate.schedule or ""), {})
            row[trial.candidate.learning_rate] = text
    rates = sorted({rate for row in cells.values() for rate in row})
    rows = [(" ".join(filter(None, key)), *(row.get(rate, "") for rate in rates)) for key, row in cells.items()]
    unit = f"Scores are {next(iter(units))}. " if len(units) == 1 else ""
    note = f"{unit}✓ marks what the method was then run with."
    return Table("Learning rates tried", ("method", *(f"{rate:g}" for rate in rates)), rows, note)


def _score(trial: Trial) -> str:
    if trial.diverged:
        return "diverged"
    if trial.score is None and trial.stopped_after is not None:
        return f"> {show_number(trial.stopped_after)}"
    return show_number(trial.score)


def _every_run(comparison: Comparison) -> Table:
    metric, target = comparison.metric, comparison.target
    rows = []
    for method in comparison.methods:
        for run in method.runs:
            row = [method.name, str(run.seed)]
            if target is not None:
                reached = run.to_target("samples")
                row.append(_beyond(method, comparison) if reached is None else show_number(reached))
                row += [show_number(run.to_target(cost)) for cost in ("flops", "seconds")]
            final = show_number(run.final.get(metric)) + (" (diverged)" if run.diverged else "")
            rows.append((*row, final, show_number(run.seconds)))
    to_target = () if target is None else ("samples to target", "FLOPs to target", "seconds to target")
    return Table("Every run", ("method", "seed", *to_target, f"final {metric}", "seconds"), rows)


def _pairs(title: str, values: Mapping[str, Any]) -> Table:
    rows = [
        (name.replace("_", " "), value if isinstance(value, str) else json.dumps(value))
        for name, value in values.items()
        if value is not None
    ]
    return Table(title, ("what", "value"), rows)


def _teacher(comparison: Comparison) -> Table:
    teacher = comparison.teacher
    known = {"description": teacher.description, "samples": teacher.samples, "converged at": teacher.converged_at}
    return _pairs("Teacher", {**known, **teacher.metrics})


def _values(curves: Sequence[MethodCurves], metric: str) -> Table:
    """A few points of each method's median against samples: the plot as text."""
    rows = []
    for curve in curves:
        band = curve.axes["samples"].band
        size = len(band.x)
        for index in np.unique(np.linspace(0, size - 1, min(size, _VALUE_ROWS)).round().astype(int)) if size else ():
            values = (band.x[index], band.median[index], band.low[index], band.high[index])
            rows.append((curve.name, *map(show_number, values)))
    columns = ("method", "samples", f"median {metric}", "smallest seed", "largest seed")
    return Table("Values of the curves", columns, rows)


def _beyond(method: MethodResult, comparison: Comparison) -> str:
    """How a target that a method never reached is shown: by the samples that it had."""
    if comparison.match == "samples":
        return f"> {show_number(comparison.budget)}"
    ends = [run.curve[-1].samples for run in method.runs if run.curve]
    return f"> {show_number(max(ends))}" if ends else "not reached"


def _reached(method: MethodResult, comparison: Comparison) -> str:
    median = method.samples_to_target.median
    return _beyond(method, comparison) if median is None and method.runs else show_number(median)


def _interval(estimate: Estimate, beyond: str) -> str:
    low, high = (beyond if end is None else show_number(end) for end in (estimate.low, estimate.high))
    return low if low == high else f"{low} to {high}"


def _median(values: Sequence[float], with_range: bool = False) -> str:
    if not values:
        return "-"
    text = show_number(statistics.median(values))
    low, high = show_number(min(values)), show_number(max(values))
    return f"{text}\n({low} to {high})" if with_range and low != high else text
