"""How the samples to solve a parity grow with its dimension: the paper's guarantee, measured.

Public names: `run_scaling`, `SCALING_SIZES`, `ScalingSettings`.

Theory (arXiv:2503.17494, arXiv:2410.05464): one-shot distillation from a converged teacher needs d^Omega(k) samples, as
learning from labels does; with a curriculum the exponent in d no longer grows with k.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from tutelage.core.errors import UserError
from tutelage.io.files import write_atomically
from tutelage.reproduction.compare import compare
from tutelage.reproduction.display import Table, listed, save_plot
from tutelage.reproduction.recipe import Recipe, change_fields
from tutelage.reproduction.recipes import resolve
from tutelage.reproduction.results import MethodResult
from tutelage.reproduction.runner import Workers
from tutelage.reproduction.scaling_fit import (
    SCALING_METHODS,
    MethodFit,
    PowerLaw,
    ScalingPoint,
    ScalingResult,
    ScalingSettings,
    fit_methods,
)
from tutelage.runs.environment import environment
from tutelage.runs.plots import COLORS

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
        folder: the experiment's; each comparison has a folder below it, and finished comparisons are not repeated.
        jobs: number of runs at the same time.
        command: the command that repeats the experiment, for the record.
        log: called with a line of progress.

    Raises:
        UserError: an unknown size or field, or settings that cannot work, before the first comparison.
    """
    size = name.partition("/")[2] or "laptop"
    if size not in SCALING_SIZES:
        raise UserError(f"unknown size {size!r} of scaling: there are {', '.join(SCALING_SIZES)}")
    settings = change_fields(SCALING_SIZES[size], overrides, "scaling")
    cells = [(k, teacher, d) for k in settings.ks for teacher in settings.teachers for d in settings.ds]
    recipes = [_recipe(settings, *cell) for cell in cells]  # all of them, so that none is refused after others have run
    result = ScalingResult(size, command or f"tutelage compare {name}", settings, environment())
    with contextlib.ExitStack() as stack:
        workers = 1 if jobs == 1 else stack.enter_context(Workers(jobs))
        for (k, teacher, d), recipe in zip(cells, recipes, strict=True):
            log(f"k={k} d={d}, {teacher} teacher")
            place = folder / f"k{k}-{teacher}-d{d}"
            made = compare(recipe, place, SCALING_METHODS, jobs=workers, command=None, log=lambda line: None)
            points = [_point(k, teacher, d, method) for method in made.methods]
            result = _write(folder, dataclasses.replace(result, points=(*result.points, *points)))
    return result


def _recipe(settings: ScalingSettings, k: int, teacher: str, d: int) -> Recipe:
    """The parity of one comparison."""
    shared = {name: value for name, value in vars(settings).items() if name not in ("ks", "ds", "teachers")}
    return resolve("parity-mlp/laptop", {**shared, "d": d, "k": k, "teacher": teacher})


def _point(k: int, teacher: str, d: int, method: MethodResult) -> ScalingPoint:
    rate = None if method.candidate is None else method.candidate.learning_rate
    return ScalingPoint(k, teacher, d, method.name, rate, tuple(run.to_target("samples") for run in method.runs))


def _write(folder: Path, result: ScalingResult) -> ScalingResult:
    """Fit what there is so far, and write the record, the plot and the table."""
    fits = fit_methods(result.settings, result.points)
    fitted = dataclasses.replace(result, fits=fits, verdict=_verdict(fits))
    write_atomically(folder / "scaling.json", fitted.to_json() + "\n")
    _plot(fitted, folder / "scaling.png")
    _write_table(fitted, folder / "report.md")
    return fitted


def _verdict(fits: Sequence[MethodFit]) -> str:
    """One line for each fit."""
    lines = []
    for fit in fits:
        where, law = f"k={fit.k}, {fit.teacher} teacher: {fit.method}", fit.law
        if law.exponent is None:
            lines.append(f"{where} solved too few dimensions to fit.")
            continue
        left_out = f", {law.unreached} runs beyond the budget left out" if law.unreached else ""
        line = f"{where} needs about d^{law.exponent:.2f} samples (95% interval {_interval(law)}{left_out})."
        if fit.after_stage is not None and fit.after_stage.exponent is not None:
            line += (
                f" Its hidden stage is equally long in every dimension; what comes after it grows like "
                f"d^{fit.after_stage.exponent:.2f} ({_interval(fit.after_stage)})."
            )
        lines.append(line)
    return "\n".join(lines)


def _interval(law: PowerLaw) -> str:
    low, high = law.ci95
    return f"{low:.2f} to {high:.2f}"


def _plot(result: ScalingResult, path: Path) -> None:
    """Log-log points and fitted lines, one panel for each k and teacher, beside the theory's slopes."""
    settings = result.settings
    rows, columns = len(settings.ks), len(settings.teachers)
    figure = Figure(figsize=(5.5 * columns, 4.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for row, k in enumerate(settings.ks):
        for column, teacher in enumerate(settings.teachers):
            axis = axes[row][column]
            _panel(axis, result, [fit for fit in result.fits if (fit.k, fit.teacher) == (k, teacher)])
            _theory(axis, result, k)
            axis.set(xscale="log", yscale="log", xlabel="d", title=f"k = {k}, {teacher} teacher")
            axis.set_xticks(settings.ds, [str(d) for d in settings.ds])
            axis.minorticks_off()
        axes[row][0].set_ylabel(f"samples to {settings.target:.0%}")
    save_plot(figure, path)


def _panel(axis: Any, result: ScalingResult, fits: Sequence[MethodFit]) -> None:
    """Each method's points, an arrow at the budget where a seed did not arrive, and its line."""
    settings = result.settings
    for fit in fits:
        color = COLORS[SCALING_METHODS.index(fit.method)]
        for point in filter(fit.matches, result.points):
            reached = [value for value in point.samples if value is not None]
            axis.plot([point.d] * len(reached), reached, "o", color=color, markersize=4, alpha=0.6)
            if len(reached) < len(point.samples):
                axis.plot(point.d, settings.budget_samples, "^", color=color, markersize=7, alpha=0.6)
        if fit.law.exponent is not None and fit.law.intercept is not None:
            x = np.array([settings.ds[0], settings.ds[-1]])
            label = f"{fit.method}: d^{fit.law.exponent:.2f}"
            axis.plot(x, np.exp(fit.law.intercept) * x**fit.law.exponent, color=color, label=label)


def _theory(axis: Any, result: ScalingResult, k: int) -> None:
    """Slopes to compare with: d^(k-1), the correlational lower bound for learning from labels, and d^0."""
    settings = result.settings
    values = [value for p in result.points if p.k == k for value in p.samples if value is not None]
    if not values:
        return
    x, start = np.array([settings.ds[0], settings.ds[-1]], dtype=float), min(values)
    for slope, style in ((k - 1, ":"), (0, "--")):
        axis.plot(x, start * (x / x[0]) ** slope, style, color="grey", linewidth=1, label=f"slope {slope} (theory)")
    axis.set_ylim(min(values) * 0.5, settings.budget_samples * 2)


def _write_table(result: ScalingResult, path: Path) -> None:
    """Write the report: one row for each fit, then the verdict."""
    settings, machine = result.settings, result.environment
    columns = ["k", "teacher", "method", "exponent in d", "95% interval", *(f"d={d}" for d in settings.ds)]
    note = (
        f"Samples to {settings.target:.0%} held-out accuracy, median over seeds {listed(settings.seeds)} (budget "
        f"{settings.budget_samples:,}; the learning rate of each cell is chosen on other seeds)."
    )
    parts = [
        f"# scaling/{result.size}",
        f"`{result.command}`; {machine['machine']}, torch {machine['torch']}, transformers {machine['transformers']}.",
        Table("scaling", columns, [_row(fit, result) for fit in result.fits], note).to_markdown(),
        "![Samples against d](scaling.png)",
        "\n".join(f"- {line}" for line in result.verdict.splitlines()),
    ]
    write_atomically(path, "\n\n".join(parts) + "\n")


def _row(fit: MethodFit, result: ScalingResult) -> list[str]:
    samples = {point.d: point.samples for point in result.points if fit.matches(point)}
    law = ["-", "-"] if fit.law.exponent is None else [f"{fit.law.exponent:.2f}", _interval(fit.law)]
    cells = [_cell(samples[d]) if d in samples else "-" for d in result.settings.ds]
    return [str(fit.k), fit.teacher, fit.method, *law, *cells]


def _cell(samples: Sequence[float | None]) -> str:
    reached = sorted(value for value in samples if value is not None)
    if len(reached) < len(samples):
        return f"{len(reached)}/{len(samples)} solved"
    return f"{reached[len(reached) // 2]:,.0f}"
