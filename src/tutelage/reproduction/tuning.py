"""Choosing a method's learning rate and settings, on seeds and held-out data that are not reported."""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from tutelage.core.errors import UserError
from tutelage.reproduction import schedules
from tutelage.reproduction.display import listed
from tutelage.reproduction.recipe import Recipe
from tutelage.reproduction.results import RunRecord, Trial, Tuning
from tutelage.reproduction.runner import Runner
from tutelage.reproduction.search import RATE, WORST, Axis, Score, Search
from tutelage.reproduction.statistics import median
from tutelage.reproduction.teachers import Teacher
from tutelage.reproduction.variants import Candidate, Variant

# Where finals are compared, a candidate that is worse than the best by this fraction on the first tuning seed is not run on the
# others.
_CLEARLY_WORSE = 0.01


def axes_of(recipe: Recipe, variant: Variant, teacher: Teacher) -> dict[str, Axis]:
    """What is searched for a variant: the rate, what the recipe searches for its method, and what the variant asks for."""
    fixed = variant.overrides.get(RATE)
    rates = Axis(recipe.learning_rates, grows=True) if fixed is None else Axis((fixed,))
    axes = {RATE: rates}
    for name, values in variant.search.items():  # before the recipe's own, so that they are tried while trials are left
        ordered = not any(isinstance(value, str | bool) for value in values)
        middle = values[(len(values) - 1) // 2] if ordered else values[0]
        axes[name] = Axis(tuple(values), start=middle, ordered=ordered)
    if recipe.trials != 1:
        axes = {**axes, **recipe.axes(variant.method, teacher), **axes}
    # what the variant's own schedule makes void is not searched
    used = schedules.clean({**dict.fromkeys(axes), "schedule": variant.overrides.get("schedule", "two")})
    taken = variant.overrides.keys() - {RATE}
    for same in ({"layer_map", "num_stages"}, {"stage_steps", "stage_fraction"}):  # two names of one thing
        taken |= same if taken & same else set()
    return {name: axis for name, axis in axes.items() if name in used and name not in taken}


def is_searched(recipe: Recipe, axes: Mapping[str, Axis]) -> bool:
    """Whether there is more than one candidate."""
    grows = recipe.trials is not None
    return recipe.trials != 1 and any(len(axis.values) > 1 or (grows and axis.grows) for axis in axes.values())


def first_candidate(axes: Mapping[str, Axis]) -> Candidate:
    """What the search begins with."""
    values = {name: axis.first for name, axis in axes.items()}
    return Candidate(values.pop(RATE), schedules.clean(values))


def tune(runner: Runner, variant: Variant, log: Callable[[str], None]) -> Tuning:
    """The best candidate on the tuning seeds (None where all diverge), and what each one scored."""
    recipe = runner.recipe
    axes = axes_of(recipe, variant, runner.teacher)
    if not is_searched(recipe, axes):
        return Tuning(first_candidate(axes))
    trials: list[Trial] = []
    first_seeds: list[float] = []  # the metric of every candidate's first tuning seed, lower is better

    def score(candidate: Candidate, best: Score | None) -> Score | None:
        try:
            runner.curriculum(variant, candidate)
        except UserError:  # such as stages that are longer than the run
            return None
        log(f"{variant.name}: tuning {candidate.label}, seeds {listed(recipe.tuning_seeds)}")
        runs = _runs(runner, variant, candidate, best, first_seeds)
        found, trial = _score(recipe, candidate, runs)
        trials.append(trial)
        return found

    search = Search(axes, recipe.trials, score, schedules.clean)
    best = search.run()
    diverged = all(trial.diverged for trial in trials)
    return Tuning(None if diverged else best, tuple(trials), () if diverged else search.edges)


def _runs(
    runner: Runner, variant: Variant, candidate: Candidate, best: Score | None, first_seeds: list[float]
) -> list[RunRecord]:
    """The runs of the tuning seeds, or as many as show that the candidate cannot be the best."""
    recipe, seeds, limit = runner.recipe, runner.recipe.tuning_seeds, None
    if recipe.stop_at_target and best is not None:
        # One that can no longer win is stopped. The median of an even number of seeds is the mean of the middle two, so
        # a slow one loses for certain only at twice the best.
        limit = best[0] * (1 if len(seeds) % 2 else 2)

    def make(chosen: Sequence[int]) -> list[RunRecord]:
        return [run for runs in runner.runs(variant, candidate, chosen, "tuning", limit) for run in runs]

    if recipe.replicated:  # all seeds are one run
        return make(seeds)
    (first,) = make(seeds[:1])
    if recipe.stop_at_target:
        return [first, *(make(seeds[1:]) if _arrival(recipe, first) is not None else [])]
    mine = WORST[0] if first.diverged is not None else _signed(recipe, first.final[recipe.metric])
    so_far = min(first_seeds, default=WORST[0])
    first_seeds.append(mine)
    if mine > so_far + _CLEARLY_WORSE * abs(so_far):
        return [first]
    return [first, *make(seeds[1:])]


def _arrival(recipe: Recipe, run: RunRecord) -> int | None:
    """Samples to the target; None where a run did not reach it."""
    target = recipe.target
    assert target is not None
    point = run.first(recipe.metric, lambda value: recipe.reached(value, target))
    return None if point is None else point.samples


def _signed(recipe: Recipe, value: float) -> float:
    return -value if recipe.better == "higher" else value


def _score(recipe: Recipe, candidate: Candidate, runs: Sequence[RunRecord]) -> tuple[Score, Trial]:
    unit = "samples to target" if recipe.stop_at_target else f"final {recipe.metric}"
    count = len(runs)
    if any(run.diverged is not None for run in runs):
        return WORST, Trial(candidate, unit, seeds=count, diverged=True)
    final = median([run.final[recipe.metric] for run in runs])
    assert final is not None
    if not recipe.stop_at_target:
        # one that was dropped may have a better first seed than the best one's median
        dropped = count < len(recipe.tuning_seeds)
        found = WORST if dropped else (_signed(recipe, final), 0.0)
        return found, Trial(candidate, unit, score=final, final=final, seeds=count)
    samples = median([_arrival(recipe, run) for run in runs])
    if samples is None:
        stopped = runs[0].curve[-1].samples
        # the mean tells one that some seeds reach from one that none reaches
        nearness = fmean(run.final[recipe.metric] for run in runs)
        return (WORST[0], _signed(recipe, nearness)), Trial(
            candidate, unit, final=final, stopped_after=stopped, seeds=count
        )
    return (samples, _signed(recipe, final)), Trial(candidate, unit, score=samples, final=final, seeds=count)
