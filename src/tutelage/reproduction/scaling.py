"""How the samples to solve a parity grow with its dimension: the paper's guarantee, measured.

Public names: `run_scaling`, `SCALING_SIZES`, `ScalingSettings`.

Theory (arXiv:2503.17494, arXiv:2410.05464): one-shot distillation from a converged teacher needs d^Omega(k) samples, as
learning from labels does; with a curriculum the exponent in d no longer grows with k.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tutelage.core.errors import UserError
from tutelage.io.files import write_atomically
from tutelage.reproduction.compare import compare
from tutelage.reproduction.recipe import Recipe, change_fields
from tutelage.reproduction.recipes import resolve
from tutelage.reproduction.scaling_fit import (
    SCALING_METHODS,
    Cell,
    ScalingPoint,
    ScalingResult,
    ScalingSettings,
    fit_methods,
)
from tutelage.reproduction.scaling_report import plot_scaling, verdict_of, write_table
from tutelage.reproduction.workers import Workers
from tutelage.runs.environment import environment

SCALING_SIZES = {
    "smoke": ScalingSettings(
        ks=(2,),
        ds=(8, 16),
        teachers=("planted",),
        teacher_width=200,
        student_width=50,
        seeds=(0, 1),
        learning_rates=(0.1,),
        budget_samples=64_000,
        stage_samples=6_400,
    ),
    "laptop": ScalingSettings(),
    "paper": ScalingSettings(
        ds=(16, 32, 64, 128, 256), teacher_width=10_000, student_width=1000, budget_samples=100_000_000
    ),
}


def run_scaling(
    name: str,
    overrides: Mapping[str, Any],
    folder: Path,
    *,
    jobs: int = 1,
    command: str | None = None,
    log: Any = print,
) -> ScalingResult:
    """Compare methods at every (k, teacher, d) and fit exponents; writes scaling.json, scaling.png and report.md.

    Args:
        name: `scaling` or `scaling/SIZE`.
        overrides: fields of `ScalingSettings`.
        folder: the experiment's; each comparison has a folder below it, and finished ones are not made again.
        jobs: runs made side by side.
        command: how to make it again, for the record.
        log: called with a line of progress.

    Raises:
        UserError: an unknown size or field, or settings that cannot work, before the first comparison.
    """
    size = name.partition("/")[2] or "laptop"
    if size not in SCALING_SIZES:
        raise UserError(f"unknown size {size!r} of scaling: there are {', '.join(SCALING_SIZES)}")
    settings = change_fields(SCALING_SIZES[size], overrides, "scaling")
    recipes = _recipes(settings)
    empty = ScalingResult(
        size=size,
        command=command or f"tutelage compare {name}",
        settings=settings,
        environment=environment(),
        points=(),
        fits=(),
        verdict="",
    )
    points: list[ScalingPoint] = []
    result = empty
    with contextlib.ExitStack() as stack:
        workers = 1 if jobs == 1 else stack.enter_context(Workers(jobs))
        for cell, recipe in recipes.items():
            log(f"k={cell.k} d={cell.d}, {cell.teacher} teacher")
            points += _compared(cell, recipe, folder, workers)
            result = _write(folder, dataclasses.replace(empty, points=tuple(points)))
    return result


def _recipes(settings: ScalingSettings) -> dict[Cell, Recipe]:
    """The recipe of every cell: all of them first, so that what one refuses is refused before the others run."""
    shared = {part.name: getattr(settings, part.name) for part in dataclasses.fields(settings)}
    ks, ds, teachers = (shared.pop(name) for name in ("ks", "ds", "teachers"))
    cells = [Cell(k, teacher, d) for k in ks for teacher in teachers for d in ds]
    return {
        cell: resolve("parity-mlp/laptop", {**shared, "d": cell.d, "k": cell.k, "teacher": cell.teacher})
        for cell in cells
    }


def _compared(cell: Cell, recipe: Recipe, folder: Path, workers: int | Workers) -> list[ScalingPoint]:
    """The comparison of a cell, made or read back."""
    place = folder / f"k{cell.k}-{cell.teacher}-d{cell.d}"
    result = compare(recipe, place, SCALING_METHODS, jobs=workers, command=None, log=lambda line: None)
    return [
        ScalingPoint(
            cell,
            method.name,
            None if method.candidate is None else method.candidate.learning_rate,
            tuple(run.to_target("samples") for run in method.runs),
        )
        for method in result.methods
    ]


def _write(folder: Path, result: ScalingResult) -> ScalingResult:
    """Fit what there is so far, and write the record, the plot and the table."""
    fits = fit_methods(result.settings, result.points)
    fitted = dataclasses.replace(result, fits=fits, verdict=verdict_of(fits))
    write_atomically(folder / "scaling.json", fitted.to_json() + "\n")
    plot_scaling(fitted, folder / "scaling.png")
    write_table(fitted, folder / "report.md")
    return fitted
