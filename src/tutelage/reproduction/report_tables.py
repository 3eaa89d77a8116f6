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
from tutelage.reproduction.results import Comparison, MethodResult, Ratio, Trial
from tutelage.reproduction.search import RATE
from tutelage.reproduction.statistics import Estimate
from tutelage.reproduction.variants import COSTS

_VALUE_ROWS = 12  # rows of a method in the table of a plot's values
COST_NAMES = {"samples": "samples", "flops": "FLOPs", "seconds": "seconds"}


def summary_table(comparison: Comparison) -> Table:
    """The small table of the first screen: samples to the target, final metric, ratio to one-shot, and the search."""
    metric, target = comparison.metric, comparison.target
    columns = ["method", f"final {metric}"]
    rows = [[method.name, _median(method.finals(metric))] for method in comparison.methods]
    if target is not None:
        columns.insert(1, f"samples to {metric} {show_number(target)}")
        for row, method in zip(rows, comparison.methods, strict=True):
            row.insert(1, _reached(method, comparison))
            if (rival := comparison.rival(method)) is not None:
                row.append("1" if method is rival else _ratio(comparison.ratio(method.name, rival.name)))
        rivals = {rival.name for method in comparison.methods if (rival := comparison.rival(method))}
        columns += [f"ratio to {listed(sorted(rivals))}"] if len(rivals) == 1 else []
        columns += ["ratio to one-shot of the same start"] if len(rivals) > 1 else []
    for row, method in zip(rows, comparison.methods, strict=True):
        row.append(_trials(method))
    return Table("Results", [*columns, "trials"], rows, _facts(comparison))


def _trials(method: MethodResult) -> str:
    """How many candidates were tried, and what is at an edge of them."""
    at_edge = f" (at an edge: {listed(method.edges)})" if method.edges else ""
    return f"{method.trials or 1}{at_edge}"


def detail_tables(comparison: Comparison, curves: Sequence[MethodCurves]) -> list[Table]:
    """Everything else, in the order in which a reader may ask for it; tables without rows are left out."""
    legend = [(m.name, m.variant.method, m.variant.settings or "the recipe's own") for m in comparison.methods]
    note = "Settings not named here are the recipe's own."
    tables = [
        Table("Methods", ("name", "method", "settings"), legend, note),
        _details(comparison),
        _ratios(comparison),
        _differences(comparison),
        _tried(comparison),
        _every_run(comparison),
        _values(curves, comparison.metric),
        _pairs("Settings", {**comparison.settings, "command": comparison.command}),
        *_teachers(comparison),
        _pairs("Environment", comparison.environment),
    ]
    return [table for table in tables if table.rows]


def _teachers(comparison: Comparison) -> list[Table]:
    several = len(comparison.teachers) > 1
    tables = []
    for number, record in enumerate(comparison.teachers, 1):
        teacher = record.to_dict()
        metrics = teacher.pop("metrics")
        tables.append(_pairs(f"Teacher {number}" if several else "Teacher", {**teacher, **metrics}))
    return tables


def _facts(comparison: Comparison) -> str:
    samples, unit = show_number(comparison.budget), COST_NAMES[comparison.match]
    budget = f"Budget of every method: {samples} samples"
    if comparison.match != "samples":
        budget = f"Budget of one-shot: {samples} samples; every other method got the same number of {unit}"
    if any(method.variant.budget_fraction != 1 or method.variant.match for method in comparison.methods):
        budget += ", unless its settings give a budget or match a cost"
    goal = "there is no target, so the final values are compared"
    if comparison.target is not None:
        goal = f"the target is {show_number(comparison.target)}"
    seeds = listed(comparison.seeds)
    over = f"Medians over seeds {seeds}" if len(comparison.seeds) > 1 else f"Seed {seeds}"
    teachers = len(comparison.teachers)
    over += f", each with {teachers} teachers." if teachers > 1 else ", one teacher."
    return f"{budget}. Held-out {comparison.metric}: {comparison.better} is better; {goal}. {over}"


def _details(comparison: Comparison) -> Table:
    metric, target = comparison.metric, comparison.target
    to_target = [] if target is None else ["samples to target, median", "range"]
    columns = ["method", "chosen", "trials", *to_target, f"final {metric}, median (range)", "seconds, median"]
    rows = []
    for method in comparison.methods:
        row = [method.name, _candidate(method), _trials(method)]
        if target is not None:
            beyond = _beyond(method) if method.runs else "-"
            row += [_reached(method, comparison), _interval(method.samples_to_target, beyond)]
        row += [_median(method.finals(metric), with_range=True), _median([run.seconds for run in method.runs])]
        rows.append(row)
    return Table("Results in detail", columns, rows)


def _candidate(method: MethodResult) -> str:
    if not method.tunings:
        return "-"
    candidate = method.tunings[0].candidate
    if candidate is None:
        return "all diverged"
    return listed([show_number(candidate.learning_rate), *_words(candidate.settings)])


def _words(settings: Mapping[str, Any]) -> list[str]:
    return [f"{name.replace('_', ' ')} {value}" for name, value in settings.items()]


def _differences(comparison: Comparison) -> Table:
    """Final values against one another."""
    rows = []
    for found in comparison.differences:
        paired = found.paired
        if paired.mean is not None:
            ends = f"{show_number(paired.low)} to {show_number(paired.high)}"
            rows.append(
                (f"{found.over} - {found.under}", show_number(paired.mean), ends, paired.kind, str(paired.pairs))
            )
    columns = (f"difference of final {comparison.metric}", "mean", "from, to", "which is", "pairs")
    note = "Runs of the same teacher and seed are paired"
    note += "; then the means of each teacher." if len(comparison.teachers) > 1 else "."
    return Table("Differences", columns, rows, note)


def _ratios(comparison: Comparison) -> Table:
    rows = []
    for ratio in comparison.ratios:
        estimate = ratio.paired.estimate
        interval = _interval(estimate, "unbounded") if ratio.paired.pairs else "-"
        names = f"{ratio.over} / {ratio.under}"
        rows.append((names, COST_NAMES[ratio.cost], show_number(estimate.median), interval, _note(ratio)))
    note = "The cost to the target of the first method, divided by that of the second, for the same teacher and seed."
    if any(ratio.to_final for ratio in comparison.ratios):
        note = "The cost at which the first method is as good as the second is at its end, divided by all that the second cost."
    return Table("Ratios", ("ratio", "of", "median", "range", "note"), rows, note)


def _note(ratio: Ratio) -> str:
    if not ratio.paired.pairs:
        return "neither reached the target" if ratio.seeds else "no seed in common yet"
    if not ratio.paired.is_bound:
        return ""
    return (
        f"at most: {ratio.under} did not reach the target on {ratio.paired.unreached} of {ratio.paired.pairs} pairs, "
        "so its budget is used in place of its cost"
    )


def _ratio(ratio: Ratio | None) -> str:
    if ratio is None or not ratio.paired.pairs:
        return "-"
    estimate, bound = ratio.paired.estimate, ratio.paired.is_bound
    if estimate.median is not None:
        return f"{'at most ' if bound else ''}{show_number(estimate.median)}"
    if bound:
        return "unknown"
    return "not reached" if estimate.low is None else f"at least {show_number(estimate.low)}"


def _tried(comparison: Comparison) -> Table:
    """Every candidate, and its score on the tuning seeds."""
    rows = []
    for method in comparison.methods:
        for tuning in method.tunings:
            for trial in tuning.trials:
                chosen = " ✓" if trial.candidate == tuning.candidate else ""
                settings = listed(_words(trial.candidate.settings)) or "-"
                rate = show_number(trial.candidate.learning_rate)
                rows.append((method.name, rate, settings, _score(trial) + chosen, trial.unit, str(trial.seeds)))
    note = (
        "✓ marks what the method was then run with. One that is clearly worse on the first tuning seed has no others."
    )
    return Table("Trials", ("method", RATE.replace("_", " "), "settings", "score", "of", "tuning seeds"), rows, note)


def _score(trial: Trial) -> str:
    if trial.score is None and trial.stopped_after is not None and not trial.diverged:
        return f"> {show_number(trial.stopped_after)}"
    return "diverged" if trial.diverged else show_number(trial.score)


def _every_run(comparison: Comparison) -> Table:
    metric, target = comparison.metric, comparison.target
    rows = []
    for method in comparison.methods:
        for run in method.runs:
            row = [method.name, str(run.teacher + 1), str(run.seed)]
            if target is not None:
                row += [show_number(run.to_target(cost)) for cost in COSTS]
                row[3] = _beyond(method) if run.at_target is None else row[3]
            final = show_number(run.final.get(metric)) + (" (diverged)" if run.diverged else "")
            rows.append((*row, final, show_number(run.seconds)))
    to_target = () if target is None else ("samples to target", "FLOPs to target", "seconds to target")
    return Table("Every run", ("method", "teacher", "seed", *to_target, f"final {metric}", "seconds"), rows)


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
    """The settings that stages have in common, and what the student starts from."""
    words = []
    if curriculum.calibrated_pairs:
        words += [f"projection {curriculum.projection}", f"normalize {curriculum.normalize}"]
    if curriculum.calibrated_pairs or curriculum.starts_there:
        words.append(f"warm start {curriculum.warm_start}")
    if curriculum.student_init != "random":
        words.append(f"starts from the {curriculum.student_init}")
    mean_square = curriculum.output_loss == "mse"
    words.append("mean square of the logits" if mean_square else f"temperature {curriculum.temperature:g}")
    if curriculum.output_positions != "labelled":
        words.append("outputs of all positions")
    return ", ".join(words)
