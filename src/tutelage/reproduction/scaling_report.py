"""The plot, the table and the verdict of a scaling experiment.

Public names: `plot_scaling`, `write_table`, `verdict_of`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from tutelage.io.files import write_atomically
from tutelage.reproduction.scaling_fit import SCALING_METHODS, MethodFit, PowerLaw, ScalingResult
from tutelage.runs.plots import COLORS, save_figure


def verdict_of(fits: Sequence[MethodFit]) -> str:
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


def plot_scaling(result: ScalingResult, path: Path) -> None:
    """Log-log points and fitted lines, one panel for each k and teacher, beside the theory's slopes."""
    settings = result.settings
    rows, columns = len(settings.ks), len(settings.teachers)
    figure, axes = plt.subplots(
        rows, columns, figsize=(5.5 * columns, 4.2 * rows), layout="constrained", squeeze=False, sharey=True
    )
    for row, k in enumerate(settings.ks):
        for column, teacher in enumerate(settings.teachers):
            axis = axes[row][column]
            _panel(axis, result, [fit for fit in result.fits if (fit.k, fit.teacher) == (k, teacher)])
            _theory(axis, result, k)
            axis.set(xscale="log", yscale="log", xlabel="d", title=f"k = {k}, {teacher} teacher")
            axis.set_xticks(settings.ds, [str(d) for d in settings.ds])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            if axis.get_legend_handles_labels()[0]:
                axis.legend(fontsize=8)
        axes[row][0].set_ylabel(f"samples to {settings.target:.0%}")
    save_figure(figure, path, dpi=120)


def _panel(axis: Any, result: ScalingResult, fits: Sequence[MethodFit]) -> None:
    """Each method's points, an arrow at the budget where a seed did not arrive, and its line."""
    settings = result.settings
    for fit in fits:
        color = COLORS[SCALING_METHODS.index(fit.method)]
        for point in filter(fit.matches, result.points):
            reached = [value for value in point.samples if value is not None]
            axis.plot([point.cell.d] * len(reached), reached, "o", color=color, markersize=4, alpha=0.6)
            if len(reached) < len(point.samples):
                axis.plot(point.cell.d, settings.budget_samples, "^", color=color, markersize=7, alpha=0.6)
        if fit.law.exponent is not None and fit.law.intercept is not None:
            x = np.array([settings.ds[0], settings.ds[-1]])
            label = f"{fit.method}: d^{fit.law.exponent:.2f}"
            axis.plot(x, np.exp(fit.law.intercept) * x**fit.law.exponent, color=color, label=label)


def _theory(axis: Any, result: ScalingResult, k: int) -> None:
    """Slopes to compare with: d^(k-1), the correlational lower bound for learning from labels, and d^0."""
    settings = result.settings
    values = [value for p in result.points if p.cell.k == k for value in p.samples if value is not None]
    if not values:
        return
    x, start = np.array([settings.ds[0], settings.ds[-1]], dtype=float), min(values)
    for slope, style in ((k - 1, ":"), (0, "--")):
        axis.plot(x, start * (x / x[0]) ** slope, style, color="grey", linewidth=1, label=f"slope {slope} (theory)")
    axis.set_ylim(min(values) * 0.5, settings.budget_samples * 2)


def write_table(result: ScalingResult, path: Path) -> None:
    """Write the report: one row for each fit, then the verdict."""
    settings, machine = result.settings, result.environment
    lines = [
        f"# scaling/{result.size}",
        "",
        f"`{result.command}`; {machine['machine']}, torch {machine['torch']}, transformers {machine['transformers']}.",
        "",
        f"Samples to {settings.target:.0%} held-out accuracy, median over seeds {', '.join(map(str, settings.seeds))} "
        f"(budget {settings.budget_samples:,}; the learning rate of each cell is chosen on other seeds).",
        "",
        f"| k | teacher | method | exponent in d | 95% interval | {' | '.join(f'd={d}' for d in settings.ds)} |",
        "|" + "---|" * (5 + len(settings.ds)),
        *(_row(fit, result) for fit in result.fits),
        "",
        "![Samples against d](scaling.png)",
        "",
        *(f"- {line}" for line in result.verdict.splitlines()),
        "",
    ]
    write_atomically(path, "\n".join(lines))


def _row(fit: MethodFit, result: ScalingResult) -> str:
    samples = {point.cell.d: point.samples for point in result.points if fit.matches(point)}
    unknown = fit.law.exponent is None
    cells = [
        *(str(fit.k), fit.teacher, fit.method),
        *(("-", "-") if unknown else (f"{fit.law.exponent:.2f}", _interval(fit.law))),
        *(_cell(samples[d]) if d in samples else "-" for d in result.settings.ds),
    ]
    return f"| {' | '.join(cells)} |"


def _cell(samples: Sequence[float | None]) -> str:
    reached = sorted(value for value in samples if value is not None)
    if len(reached) < len(samples):
        return f"{len(reached)}/{len(samples)} solved"
    return f"{reached[len(reached) // 2]:,.0f}"
