"""What follows from the runs of a comparison: its target, medians, ratios and verdict."""

import dataclasses
import itertools
import statistics

from tutelage.reproduction.results import Comparison, Difference, MethodResult, Ratio, RunRecord
from tutelage.reproduction.statistics import PairedRatio, as_good, median_and_range, paired_difference, paired_ratio
from tutelage.reproduction.variants import COSTS

_LONGEST_HEADLINE = 4  # lines


def summarise(comparison: Comparison, target: float | None) -> Comparison:
    """The comparison with everything that follows from its runs computed anew.

    `target` is the value of the metric to reach; None takes the median of one-shot's final values, and ratios are then about
    the final value of the second method."""
    fixed = target is not None
    if target is None and comparison.baseline is not None:
        runs = [run for run in comparison.baseline.runs if run.diverged is None]
        finals = [run.final[comparison.metric] for run in runs]
        target = statistics.median(finals) if finals else None
    comparison = dataclasses.replace(comparison, target=target)
    methods = tuple(_timed(method, comparison) for method in comparison.methods)
    comparison = dataclasses.replace(comparison, methods=methods)
    ratios = [
        ratio_of(over, under, cost) if fixed else ratio_to_final(over, under, cost, comparison)
        for over, under in itertools.permutations(methods, 2)
        if over.variant.method == "extraction" or _rivals(over, under, comparison)
        for cost in COSTS
    ]
    differences = [
        difference_of(over, under, comparison.metric)
        for under, over in itertools.permutations(methods, 2)
        if _rivals(over, under, comparison) or _both_hidden(over, under)
    ]
    comparison = dataclasses.replace(comparison, ratios=tuple(ratios), differences=tuple(differences))
    return dataclasses.replace(comparison, verdict=verdict(comparison))


def ratio_of(over: MethodResult, under: MethodResult, cost: str) -> Ratio:
    """Cost to the target of `over` in units of that of `under`, paired by teacher and seed."""
    pairs = _pairs(over, under)
    paired = paired_ratio(
        [mine.to_target(cost) for mine, _ in pairs],
        [theirs.to_target(cost) for _, theirs in pairs],
        budget=max((theirs.curve[-1].cost(cost) for _, theirs in pairs), default=0),
    )
    return Ratio(over.name, under.name, cost, len(pairs), paired)


def ratio_to_final(over: MethodResult, under: MethodResult, cost: str, comparison: Comparison) -> Ratio:
    """Cost at which `over` is as good as the run of `under` with its teacher and seed is at the end, in units of what that run
    cost; where one diverged or `over` is never as good, the ratio is infinite (None)."""
    metric, mine, theirs = comparison.metric, [], []
    pairs = [(a, b) for a, b in _pairs(over, under) if metric in b.final and b.diverged is None]
    for run, other in pairs:
        final = other.final[metric]
        point = run.first(metric, lambda value, final=final: as_good(value, final, comparison.better))  # type: ignore[misc]
        mine.append(None if point is None or run.diverged is not None else point.cost(cost))
        theirs.append(other.curve[-1].cost(cost))
    return Ratio(over.name, under.name, cost, len(pairs), paired_ratio(mine, theirs, budget=0), to_final=True)


def _rivals(over: MethodResult, under: MethodResult, comparison: Comparison) -> bool:
    """Whether the second of two methods is what the first is compared to."""
    return under in (comparison.baseline, comparison.rival(over)) or _comparable(over, under)


def _both_hidden(over: MethodResult, under: MethodResult) -> bool:
    """Whether one of two methods learns hidden states in stages, and the other one together with the output."""
    mine, theirs = over.variant, under.variant
    alike = mine.budget_fraction == theirs.budget_fraction and mine.start == theirs.start
    return alike and (mine.method, theirs.method) == ("extraction", "joint")


def _comparable(over: MethodResult, under: MethodResult) -> bool:
    """Whether two methods start alike, and the second is plain one-shot or progressive distillation."""
    mine, theirs = over.variant, under.variant
    plain = theirs.is_plain("one_shot", "progressive")
    return plain and mine.start == theirs.start and mine.method in ("extraction", "joint")


def difference_of(over: MethodResult, under: MethodResult, metric: str) -> Difference:
    """Final metric of `over` minus that of `under`, paired by teacher and seed, where neither diverged. With several teachers,
    whose own runs are alike, it is the mean difference of each that counts."""
    by_teacher: dict[int, list[tuple[float, float]]] = {}
    for a, b in _pairs(over, under):
        if a.diverged is None and b.diverged is None and metric in a.final and metric in b.final:
            by_teacher.setdefault(a.teacher, []).append((a.final[metric], b.final[metric]))
    pairs = [pair for runs in by_teacher.values() for pair in runs]
    if len(by_teacher) > 1:
        pairs = [tuple(map(statistics.fmean, zip(*runs, strict=True))) for runs in by_teacher.values()]  # type: ignore[misc]
    return Difference(over.name, under.name, paired_difference([a for a, _ in pairs], [b for _, b in pairs]))


def _pairs(over: MethodResult, under: MethodResult) -> list[tuple[RunRecord, RunRecord]]:
    theirs = {run.pair: run for run in under.runs}
    return [(run, theirs[run.pair]) for run in over.runs if run.pair in theirs]


def _timed(method: MethodResult, comparison: Comparison) -> MethodResult:
    target, runs = comparison.target, []
    for run in method.runs:
        at_target = None
        if target is not None and run.diverged is None:
            at_target = run.first(comparison.metric, lambda value: as_good(value, target, comparison.better))
        runs.append(dataclasses.replace(run, at_target=at_target))
    estimate = median_and_range([run.to_target("samples") for run in runs])
    return dataclasses.replace(method, runs=tuple(runs), samples_to_target=estimate)


def verdict(comparison: Comparison) -> str:
    """One line per variant (whether it reached the target, after how many samples), and one per ratio that matters."""
    methods = [method for method in comparison.methods if method.runs]
    if not methods:
        return "No run has finished yet."
    if comparison.target is None:
        return _final_values(comparison, methods)
    lines = [_reached(method, comparison) for method in methods]
    for over, under in itertools.product(methods, methods):
        if _comparable(over, under):
            lines.append(_compared(over, under, comparison))
    return "\n".join(filter(None, lines))


def headline(comparison: Comparison) -> str:
    """The verdict where it is short, else its lines on the variants of extraction that did best, one for each start of the
    student, and on their rivals."""
    variants = [m for m in comparison.methods if m.variant.method == "extraction" and m.runs]
    lines, baseline = comparison.verdict.splitlines(), comparison.baseline
    if len(lines) <= _LONGEST_HEADLINE or comparison.target is None or not variants or baseline is None:
        return comparison.verdict
    found = []
    starts = list(dict.fromkeys(method.variant.start for method in variants))
    for start in starts:
        alike = [method for method in variants if method.variant.start == start]
        best = min(alike, key=lambda method: _rank(method, comparison))
        rival = comparison.rival(best)
        found.append(_reached(best, comparison))
        if rival is not None and rival.runs:
            found += [_reached(rival, comparison), _compared(best, rival, comparison)]
        if len(alike) > 1:
            found.append(f"{best.name} is the best of {len(alike)} variants of extraction, chosen on these same runs.")
    return "\n".join(filter(None, found))


def _rank(method: MethodResult, comparison: Comparison) -> tuple[float, float]:
    """Samples to the target, then the final metric; lower is better."""
    samples = method.samples_to_target.median
    final = statistics.median(method.finals(comparison.metric) or [float("inf")])
    return float("inf") if samples is None else samples, -final if comparison.better == "higher" else final


def _final_values(comparison: Comparison, methods: list[MethodResult]) -> str:
    finals = {m.name: statistics.median(values) for m in methods if (values := m.finals(comparison.metric))}
    if not finals:
        return f"No run has a final {comparison.metric}."
    best = (max if comparison.better == "higher" else min)(finals, key=lambda name: finals[name])
    listed = ", ".join(f"{name} {value:.4g}" for name, value in finals.items())
    return f"{best} ended best. Final {comparison.metric}, median over seeds: {listed}."


def _reached(method: MethodResult, comparison: Comparison) -> str:
    target = f"{comparison.metric} {comparison.target:.4g}"
    count = sum(run.at_target is not None for run in method.runs)
    seeds = f"{count} of {len(method.runs)} runs"
    median = method.samples_to_target.median
    if median is not None:
        return f"{method.name} reached {target} in {seeds}, after {median:,.0f} samples (median)."
    most = max((run.curve[-1].samples for run in method.runs if run.curve), default=0)
    finals = method.finals(comparison.metric)
    ended = f"; median final {comparison.metric}: {statistics.median(finals):.4g}" if finals else ""
    return f"{method.name} did not reach {target} within {most:,} samples ({seeds} reached it{ended})."


def _compared(over: MethodResult, under: MethodResult, comparison: Comparison) -> str:
    ratio = comparison.ratio(over.name, under.name)
    if ratio is None or ratio.seeds == 0:
        return ""  # they have no finished seed in common
    paired, estimate = ratio.paired, ratio.paired.estimate
    if not paired.pairs:
        return f"Neither {over.name} nor {under.name} reached the target."
    if estimate.median is None and ratio.to_final:
        return f"In most pairs {over.name} was never as good as {under.name} at the end: {under.name} is better here."
    if estimate.median is None:
        return (
            f"In most pairs {over.name} did not reach the target within the budget where {under.name} did: "
            f"{under.name} is better here."
        )
    goal = f" to reach its final {comparison.metric}" if ratio.to_final else ""
    text = f"{over.name} needed {_times(paired)} the samples of {under.name}{goal} ({_spread(paired)})"
    flops = comparison.ratio(over.name, under.name, "flops")
    if flops is not None and flops.paired.estimate.median is not None:
        text += f" and {_times(flops.paired)} its FLOPs"
    return text + _judged(ratio)


def _times(paired: PairedRatio) -> str:
    return f"{'at most ' if paired.is_bound else ''}{paired.estimate.median:.2g} times"


def _spread(paired: PairedRatio) -> str:
    """The range over pairs of runs."""
    if paired.pairs == 1:
        return "1 pair of runs"
    ends = (paired.estimate.low, paired.estimate.high)
    low, high = ("beyond the budget" if end is None else f"{end:.2g}" for end in ends)
    return f"{low} to {high} over {paired.pairs} pairs of runs"


def _judged(ratio: Ratio) -> str:
    paired, low, high = ratio.paired, ratio.paired.estimate.low, ratio.paired.estimate.high
    if paired.pairs < ratio.seeds:
        return f" on {paired.pairs} of {ratio.seeds} pairs; on the other pairs neither reached the target."
    if paired.pairs < 3:
        return ": too few runs to decide."
    if high is not None and high < 1:
        return f": {ratio.over} is better in all of them."
    if low is not None and low > 1 and not paired.is_bound:
        return f": {ratio.under} is better in all of them."
    return ": neither is better in all of them."
