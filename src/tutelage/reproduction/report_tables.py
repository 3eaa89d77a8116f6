"""The tables of a comparison's report, and its curricula in words."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tutelage.core.blocks import FINAL
from tutelage.core.curriculum import Curriculum
from tutelage.core.stages import JointStage, OutputStage, Stage
from tutelage.reproduction.display import Table, listed, show_number
from tutelage.reproduction.report_curves import MethodCurves
from tutelage.reproduction.results import COSTS, Comparison, MethodResult, Ratio, Trial
from tutelage.reproduction.statistics import FEWEST_FOR_INTERVAL, Estimate

_VALUE_ROWS = 12  # rows of a method in the table of a plot's values
COST_NAMES = {"samples": "samples", "flops": "FLOPs", "seconds": "seconds"}


def summary_table(comparison: Comparison) -> Table:
    """The small table of the first screen: samples to the target, final metric, ratio to one-shot."""
    metric, target, baseline = comparison.metric, comparison.target, comparison.baseline
    columns = ["method", f"final {metric}"]
    rows = [[method.name, _median(method.finals(metric))] for method in comparison.methods]
    if target is not None:
        columns.insert(1, f"samples to {metric} {show_number(target)}")
        for row, method in zip(rows, comparison.methods, strict=True):
            row.insert(1, _reached(method, comparison))
            if baseline is not None:
                row.append("1" if method is baseline else _ratio(comparison.ratio(method.name, baseline.name)))
        columns += [] if baseline is None else [f"ratio to {baseline.name}"]
    return Table("Results", columns, rows, _facts(comparison))


def detail_tables(comparison: Comparison, curves: Sequence[MethodCurves]) -> list[Table]:
    """Everything else, in the order in which a reader may ask for it; tables without rows are left out."""
    teacher = comparison.teacher.to_dict()
    metrics = teacher.pop("metrics")
    legend = [(m.name, m.variant.method, m.variant.settings or "the recipe's own") for m in comparison.methods]
    note = "Settings not named here are the recipe's own."
    tables = [
        Table("Methods", ("name", "method", "settings"), legend, note),
        _details(comparison),
        _ratios(comparison),
        _learning_rates(comparison),
        _every_run(comparison),
        _values(curves, comparison.metric),
        _pairs("Settings", {**comparison.settings, "command": comparison.command}),
        _pairs("Teacher", {**teacher, **metrics}),
        _pairs("Environment", comparison.environment),
    ]
    return [table for table in tables if table.rows]


def _facts(comparison: Comparison) -> str:
    samples, unit = show_number(comparison.budget), COST_NAMES[comparison.match]
    budget = f"Budget of every method: {samples} samples"
    if comparison.match != "samples":
        budget = f"Budget of one-shot: {samples} samples; every other method got the same number of {unit}"
    if any(method.variant.budget_fraction != 1 for method in comparison.methods):
        budget += ", unless its settings give a budget"
    goal = "there is no target, so the final values are compared"
    if comparison.target is not None:
        goal = f"the target is {show_number(comparison.target)}"
    seeds = listed(comparison.seeds)
    over = f"Medians over seeds {seeds}." if len(comparison.seeds) > 1 else f"Seed {seeds}."
    return f"{budget}. Held-out {comparison.metric}: {comparison.better} is better; {goal}. {over}"


def _details(comparison: Comparison) -> Table:
    metric, target = comparison.metric, comparison.target
    to_target = [] if target is None else ["samples to target, median", _spread(comparison)]
    columns = ["method", "learning rate", *to_target, f"final {metric}, median (range)", "seconds, median"]
    rows = []
    for method in comparison.methods:
        row = [method.name, _candidate(method)]
        if target is not None:
            beyond = _beyond(method) if method.runs else "-"
            row += [_reached(method, comparison), _interval(method.samples_to_target, beyond)]
        row += [_median(method.finals(metric), with_range=True), _median([run.seconds for run in method.runs])]
        rows.append(row)
    return Table("Results in detail", columns, rows)


def _candidate(method: MethodResult) -> str:
    if method.candidate is None:
        return "all diverged" if method.diverged else "-"
    return listed(filter(None, (show_number(method.candidate.learning_rate), method.candidate.schedule)))


def _ratios(comparison: Comparison) -> Table:
    rows = []
    for ratio in comparison.ratios:
        estimate = ratio.paired.estimate
        interval = _interval(estimate, "unbounded") if ratio.paired.pairs else "-"
        names = f"{ratio.over} / {ratio.under}"
        rows.append((names, COST_NAMES[ratio.cost], show_number(estimate.median), interval, _note(ratio)))
    note = "The cost to the target of the first method, divided by that of the second method, on the same seed."
    return Table("Ratios", ("ratio", "of", "median", _spread(comparison), "note"), rows, note)


def _note(ratio: Ratio) -> str:
    if not ratio.paired.pairs:
        return "neither reached the target" if ratio.seeds else "no seed in common yet"
    if not ratio.paired.is_bound:
        return ""
    return (
        f"at most: {ratio.under} did not reach the target on {ratio.paired.unreached} of {ratio.paired.pairs} seeds, "
        "so its budget is used in place of its cost"
    )


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
    note = f"{unit}✓ marks the learning rate that the method was then run with."
    return Table("Learning rates tried", ("method", *(f"{rate:g}" for rate in rates)), rows, note)


def _score(trial: Trial) -> str:
    if trial.score is None and trial.stopped_after is not None and not trial.diverged:
        return f"> {show_number(trial.stopped_after)}"
    return "diverged" if trial.diverged else show_number(trial.score)


def _every_run(comparison: Comparison) -> Table:
    metric, target = comparison.metric, comparison.target
    rows = []
    for method in comparison.methods:
        for run in method.runs:
            row = [method.name, str(run.seed)]
            if target is not None:
                row += [show_number(run.to_target(cost)) for cost in COSTS]
                row[2] = _beyond(method) if run.at_target is None else row[2]
            final = show_number(run.final.get(metric)) + (" (diverged)" if run.diverged else "")
            rows.append((*row, final, show_number(run.seconds)))
    to_target = () if target is None else ("samples to target", "FLOPs to target", "seconds to target")
    return Table("Every run", ("method", "seed", *to_target, f"final {metric}", "seconds"), rows)


def _pairs(title: str, values: Mapping[str, Any]) -> Table:
    known = {name.replace("_", " "): value for name, value in values.items() if value is not None}
    rows = [(name, value if isinstance(value, str) else json.dumps(value)) for name, value in known.items()]
    return Table(title, ("what", "value"), rows)


def _values(curves: Sequence[MethodCurves], metric: str) -> Table:
    """A few points of each method's median against samples: the plot as text."""
    rows = []
    for curve in curves:
        band = curve.axes["samples"].band
        size = len(band.x)
        for index in np.unique(np.linspace(0, size - 1, min(size, _VALUE_ROWS)).round().astype(int)):
            values = (band.x[index], band.median[index], band.low[index], band.high[index])
            rows.append((curve.name, *map(show_number, values)))
    columns = ("method", "samples", f"median {metric}", "smallest seed", "largest seed")
    return Table("Values of the curves", columns, rows)


def _beyond(method: MethodResult) -> str:
    """A target that a method never reached is shown by the samples that the method had."""
    ends = [run.curve[-1].samples for run in method.runs if run.curve]
    return f"> {show_number(max(ends))}" if ends else "not reached"


def _reached(method: MethodResult, comparison: Comparison) -> str:
    median = method.samples_to_target.median
    return _beyond(method) if median is None and method.runs else show_number(median)


def _interval(estimate: Estimate, beyond: str) -> str:
    low, high = (beyond if end is None else show_number(end) for end in (estimate.low, estimate.high))
    return low if low == high else f"{low} to {high}"


def _median(values: Sequence[float], with_range: bool = False) -> str:
    if not values:
        return "-"
    text = show_number(statistics.median(values))
    low, high = show_number(min(values)), show_number(max(values))
    return f"{text}\n({low} to {high})" if with_range and low != high else text


def stage_words(stage: Stage) -> str:
    """What a stage does."""
    matched = []
    for pair in stage.pairs:
        places = (pair.student_place, pair.teacher_place)
        student, teacher = ("final state" if place == FINAL else f"block {place}" for place in places)
        matched.append(f"student's {student} learns teacher's {teacher}")
    words = ", ".join(matched)
    if isinstance(stage, JointStage):
        words = f"output of the teacher and (weight {stage.hidden_weight:g}) {words}"
        words += f", labels (weight {stage.label_weight:g})" if stage.label_weight else ""
    elif isinstance(stage, OutputStage) and stage.needs_teacher:
        words = "output of the teacher"
        if stage.teacher_checkpoint:
            words = f"output of teacher checkpoint {Path(stage.teacher_checkpoint).name}"
        words += f" and labels (weight {stage.label_weight:g})" if stage.label_weight else ""
    elif not matched:
        words = "labels alone"
    rate = f" at learning rate {stage.learning_rate:g}" if stage.learning_rate else ""
    return f"{words}, {stage.steps:,} steps{rate}"


def settings_words(curriculum: Curriculum) -> str:
    """The settings that hidden stages have in common, and the temperature."""
    hidden = (
        f"projection {curriculum.projection}, normalize {curriculum.normalize}, warm start {curriculum.warm_start}, "
    )
    return f"{hidden if curriculum.hidden_stages else ''}temperature {curriculum.temperature:g}"
