"""Comparisons on a parity so small that a run takes a fraction of a second."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tutelage.reproduction.compare import compare
from tutelage.reproduction.recipe import Recipe
from tutelage.reproduction.recipes import resolve
from tutelage.reproduction.results import Comparison, MethodResult, RunRecord
from tutelage.reproduction.variants import Variant

TINY: dict[str, Any] = {
    "d": 8,
    "k": 2,
    "teacher": "planted",
    "teacher_width": 64,
    "student_width": 16,
    "seeds": (0, 1),
    "tuning_seeds": (1000,),
    "learning_rates": (0.1,),
    "batch_size": 16,
    "budget_samples": 960,
    "eval_every": 80,
    "eval_samples": 64,
    "stage_samples": 320,
    "target": 0.9,
}
# a teacher that is trained: on two bits it takes a second
TRAINED = {**TINY, "d": 6, "teacher": "trained", "teacher_max_samples": 32_000, "teacher_checkpoint_every": 320}
METHODS = ("extraction", "one_shot", "scratch")


def tiny(**fields: Any) -> Recipe:
    """The tiny parity of the first bits, with some fields changed."""
    fields = {**TINY, **fields}
    return resolve("parity-mlp/smoke", {"support": tuple(range(fields["k"])), **fields})


def changed(recipe: Recipe, **attributes: Any) -> Recipe:
    """The recipe with attributes of its class changed, in this process only."""
    kind = type(type(recipe).__name__, (type(recipe),), attributes)
    made: Recipe = kind(**{field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)})
    return made


def silent(line: str) -> None:
    """Log nothing."""


def made(
    recipe: Recipe, folder: Path, methods: Sequence[str | Variant] | None = METHODS, **settings: Any
) -> Comparison:
    """A comparison, after checking that what is returned is what is on disk."""
    result = compare(recipe, folder, methods, log=silent, **settings)
    assert Comparison.read(folder) == result
    return result


def names(result: Comparison) -> list[str]:
    """Names of the methods, in order."""
    return [method.name for method in result.methods]


def timeless_runs(result: MethodResult) -> tuple[RunRecord, ...]:
    """The runs without what a clock says."""

    def without(run: RunRecord) -> RunRecord:
        curve = tuple(dataclasses.replace(point, seconds=0.0) for point in run.curve)
        at_target = None if run.at_target is None else dataclasses.replace(run.at_target, seconds=0.0)
        return dataclasses.replace(run, curve=curve, at_target=at_target)

    return tuple(map(without, result.runs))


def timeless(result: Comparison) -> Comparison:
    """A comparison without what a clock says, nor how many processes it used."""
    methods = tuple(dataclasses.replace(method, runs=timeless_runs(method)) for method in result.methods)
    ratios = tuple(ratio for ratio in result.ratios if ratio.cost != "seconds")
    return dataclasses.replace(result, methods=methods, ratios=ratios, environment={})
