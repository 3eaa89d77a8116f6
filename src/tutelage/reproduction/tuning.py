"""Choosing a learning rate, and for progressive distillation a schedule, on seeds that are not reported."""

import dataclasses
from collections.abc import Callable, Sequence

from tutelage.reproduction.display import listed
from tutelage.reproduction.recipe import Recipe
from tutelage.reproduction.results import RunRecord, Trial
from tutelage.reproduction.runner import Runner
from tutelage.reproduction.statistics import median_interval
from tutelage.reproduction.variants import Candidate, Variant, candidates

_Score = tuple[float, float]  # lower is better: samples to the target or the metric, then the final metric
_WORST = (float("inf"), float("inf"))


def tune(runner: Runner, variant: Variant, log: Callable[[str], None]) -> tuple[Candidate | None, tuple[Trial, ...]]:
    """The best candidate on the tuning seeds (None where all diverge), and what each one scored.

    Progressive distillation tries every schedule at every rate where a run ends at the target, since slow candidates end early;
    otherwise every rate on the first schedule, and the other schedules at the best rate."""
    recipe = runner.recipe
    tried = candidates(variant, recipe.learning_rates)
    if len(tried) == 1:
        return tried[0], ()
    short = dataclasses.replace(variant, budget_fraction=variant.budget_fraction * recipe.tuning_share)
    first_schedule, best_rate = tried[0].schedule, tried[0].learning_rate
    trials: list[Trial] = []
    best: tuple[_Score, Candidate] | None = None
    for candidate in tried:
        other_schedule = candidate.schedule != first_schedule and not recipe.stop_at_target
        if other_schedule and candidate.learning_rate != best_rate:
            continue
        limit = None
        if best is not None and recipe.stop_at_target:
            # One that can no longer win is stopped. The median of an even number of seeds is the mean of the middle two, so
            # a slow one loses for certain only at twice the best.
            limit = best[0][0] * (1 if len(recipe.tuning_seeds) % 2 else 2)
        log(f"{variant.name}: tuning {candidate.label}, seeds {listed(recipe.tuning_seeds)}")
        made = runner.runs(short, candidate, recipe.tuning_seeds, "tuning", limit)
        score, trial = _score(recipe, candidate, [record for records in made for record in records])
        trials.append(trial)
        if best is None or score < best[0]:
            best = (score, candidate)
            if candidate.schedule == first_schedule:
                best_rate = candidate.learning_rate
    assert best is not None
    return None if all(trial.diverged for trial in trials) else best[1], tuple(trials)


def _score(recipe: Recipe, candidate: Candidate, runs: Sequence[RunRecord]) -> tuple[_Score, Trial]:
    unit = "samples to target" if recipe.stop_at_target else f"final {recipe.metric}"
    if any(run.diverged is not None for run in runs):
        return _WORST, Trial(candidate, unit, diverged=True)
    finals = sorted(run.final[recipe.metric] for run in runs)
    final = finals[len(finals) // 2]
    signed = -final if recipe.better == "higher" else final
    if not recipe.stop_at_target:
        return (signed, 0.0), Trial(candidate, unit, score=final, final=final)
    target = recipe.target
    assert target is not None
    points = [run.first(recipe.metric, lambda value: recipe.reached(value, target)) for run in runs]
    median = median_interval([None if point is None else point.samples for point in points]).median
    if median is None:
        stopped = runs[0].curve[-1].samples
        return (float("inf"), signed), Trial(candidate, unit, final=final, stopped_after=stopped)
    return (median, signed), Trial(candidate, unit, score=median, final=final)
