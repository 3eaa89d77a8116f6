"""How the samples to solve a parity grow with its dimension: the paper's guarantee, measured.

Public names: `run_scaling`, `SCALING_SIZES`, `ScalingFields`, `fit_exponent`.

Theory (arXiv:2503.17494, arXiv:2410.05464): one-shot distillation from a converged teacher needs d^Omega(k) samples, as
learning from labels does; with a curriculum the exponent in d no longer grows with k.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from tutelage.core.errors import UserError
from tutelage.io.files import write_atomically
from tutelage.reproduction.compare import compare
from tutelage.reproduction.recipe import change_fields
from tutelage.reproduction.recipes import resolve
from tutelage.reproduction.workers import Workers
from tutelage.runs.environment import environment
from tutelage.runs.plots import COLORS, save_figure

METHODS = ("extraction", "one_shot", "scratch")
_DRAWS = 2000


@dataclass(frozen=True)
class ScalingFields:
    """The numbers of a scaling experiment."""

    ks: tuple[int, ...] = (3, 4)
    """Parities."""
    ds: tuple[int, ...] = (16, 24, 32, 48, 64)
    """Dimensions."""
    teachers: tuple[str, ...] = ("planted", "trained")
    """Kinds of teacher; trained ones are trained past convergence."""
    teacher_width: int = 2000
    """Hidden width of the teachers."""
    student_width: int = 100
    """Hidden width of the students."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Reported seeds."""
    tuning_seeds: tuple[int, ...] = (1000, 1001)
    """Seeds on which each method's learning rate is chosen, for each parity."""
    learning_rates: tuple[float, ...] = (3.0, 1.0, 0.3, 10.0)
    """The grid that every method gets."""
    budget_samples: int = 960_000
    """Examples within which a parity must be solved."""
    eval_every: int = 3_200
    """Examples between evaluations."""
    stage_samples: int = 16_000
    """Examples of the hidden stage."""
    target: float = 0.99
    """Held-out accuracy that counts as solved."""


SCALING_SIZES = {
    "smoke": ScalingFields(
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
    "laptop": ScalingFields(),
    "paper": ScalingFields(
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
) -> dict[str, Any]:
    """Compare methods at every (k, teacher, d) and fit exponents; writes scaling.json, scaling.png and report.md.

    Args:
        name: `scaling` or `scaling/SIZE`.
        overrides: fields of `ScalingFields`.
        folder: the experiment's; each comparison has a folder below it, and finished ones are not made again.
        jobs: runs made side by side.
        command: how to make it again, for the record.
        log: called with a line of progress.
    """
    size = name.partition("/")[2] or "laptop"
    if size not in SCALING_SIZES:
        raise UserError(f"unknown size {size!r} of scaling: there are {', '.join(SCALING_SIZES)}")
    fields: ScalingFields = change_fields(SCALING_SIZES[size], overrides, "scaling")
    for field in ("ks", "ds", "teachers"):
        values = getattr(fields, field)
        if len(set(values)) != len(values):
            raise UserError(f"{field} are repeated: {', '.join(map(str, values))}")
    if len(set(fields.ds)) < 2:
        raise UserError(f"an exponent needs at least two values of ds, got {list(fields.ds)}")
    shared = {
        key: getattr(fields, key)
        for key in (
            "teacher_width",
            "student_width",
            "seeds",
            "tuning_seeds",
            "learning_rates",
            "budget_samples",
            "eval_every",
            "stage_samples",
            "target",
        )
    }
    systems = {  # all of them first, so that what one refuses is refused before the others run
        (k, teacher, d): resolve("parity-mlp/laptop", {**shared, "d": d, "k": k, "teacher": teacher})
        for k in fields.ks
        for teacher in fields.teachers
        for d in fields.ds
    }
    points: list[dict[str, Any]] = []
    written: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        workers = 1 if jobs == 1 else stack.enter_context(Workers(jobs))
        for (k, teacher, d), system in systems.items():
            log(f"k={k} d={d}, {teacher} teacher")
            cell = folder / f"k{k}-{teacher}-d{d}"
            result = compare(system, cell, METHODS, jobs=workers, command=None, log=lambda line: None)
            for method in result.methods:
                points.append(
                    {
                        "k": k,
                        "teacher": teacher,
                        "d": d,
                        "method": method.name,
                        "learning_rate": None if method.candidate is None else method.candidate.learning_rate,
                        "samples": [run.to_target("samples") for run in method.runs],
                    }
                )
            written = _write(folder, name, command, fields, points)
    return written


def fit_exponent(points: Sequence[tuple[int, Sequence[float | None]]]) -> dict[str, Any]:
    """Slope of log samples against log d over seeds and dimensions, with its bootstrap 95% interval.

    Args:
        points: d, and samples to the target of each seed (None where it was not reached).

    Returns:
        `exponent`, `ci95`, `intercept`, `unreached` (runs left out: the true slope is then steeper than the fit);
        `exponent` is None with fewer than two dimensions left.
    """
    kept = [(d, [value for value in values if value is not None]) for d, values in points]
    unreached = sum(len(values) for _, values in points) - sum(len(values) for _, values in kept)
    kept = [(d, values) for d, values in kept if values]
    if len(kept) < 2:
        return {"exponent": None, "ci95": [None, None], "intercept": None, "unreached": unreached}

    def slope(samples: Sequence[Any]) -> tuple[float, float]:
        x = np.concatenate([[np.log(d)] * len(values) for (d, _), values in zip(kept, samples, strict=True)])
        y = np.log(np.concatenate(samples))
        fitted = np.polyfit(x, y, 1)
        return float(fitted[0]), float(fitted[1])

    exponent, intercept = slope([values for _, values in kept])
    exponent = round(exponent, 9) + 0.0  # no slope, but for rounding, is 0 and not -0
    generator = np.random.default_rng(0)
    draws = sorted(slope([generator.choice(values, len(values)) for _, values in kept])[0] for _ in range(_DRAWS))
    interval = [round(draws[int(share * _DRAWS)], 9) + 0.0 for share in (0.025, 0.975)]
    return {"exponent": exponent, "ci95": interval, "intercept": intercept, "unreached": unreached}


def _write(
    folder: Path, name: str, command: str | None, fields: ScalingFields, points: list[dict[str, Any]]
) -> dict[str, Any]:
    fits = []
    for k in fields.ks:
        for teacher in fields.teachers:
            for method in METHODS:
                mine = [p for p in points if (p["k"], p["teacher"], p["method"]) == (k, teacher, method)]
                if mine:
                    fit = fit_exponent([(p["d"], p["samples"]) for p in mine])
                    if method == "extraction":
                        after = [(p["d"], _after_stage(p["samples"], fields.stage_samples)) for p in mine]
                        fit["after_stage"] = fit_exponent(after)
                    fits.append({"k": k, "teacher": teacher, "method": method, **fit})
    result = {
        "recipe": "scaling",
        "size": name.partition("/")[2] or "laptop",
        "command": command or f"tutelage compare {name}",
        "settings": dataclasses.asdict(fields),
        "environment": environment(),
        "points": points,
        "fits": fits,
        "verdict": _verdict(fits),
    }
    write_atomically(folder / "scaling.json", json.dumps(result, indent=1) + "\n")
    _plot(fields, points, fits, folder / "scaling.png")
    write_atomically(folder / "report.md", _report(result))
    return result


def _after_stage(samples: Sequence[float | None], stage: int) -> list[float | None]:
    """Samples of the output stage alone: the hidden stage, equally long everywhere, would flatten a slope."""
    return [None if value is None or value <= stage else value - stage for value in samples]


def _verdict(fits: Sequence[dict[str, Any]]) -> str:
    lines = []
    for fit in fits:
        where = f"k={fit['k']}, {fit['teacher']} teacher: {fit['method']}"
        if fit["exponent"] is None:
            lines.append(f"{where} solved too few dimensions to fit.")
            continue
        low, high = fit["ci95"]
        left_out = f", {fit['unreached']} runs beyond the budget left out" if fit["unreached"] else ""
        lines.append(
            f"{where} needs about d^{fit['exponent']:.2f} samples (95% interval {low:.2f} to {high:.2f}{left_out})."
        )
        after = fit.get("after_stage", {})
        if after.get("exponent") is not None:
            low, high = after["ci95"]
            lines[-1] += (
                f" Its hidden stage is equally long in every dimension; what comes after it grows like "
                f"d^{after['exponent']:.2f} ({low:.2f} to {high:.2f})."
            )
    return "\n".join(lines)


def _plot(fields: ScalingFields, points: Sequence[dict[str, Any]], fits: Sequence[dict[str, Any]], path: Path) -> None:
    """Log-log points and fitted lines, a panel for each k and teacher, beside the theory's slopes."""
    rows, columns = len(fields.ks), len(fields.teachers)
    figure, axes = plt.subplots(
        rows, columns, figsize=(5.5 * columns, 4.2 * rows), layout="constrained", squeeze=False, sharey=True
    )
    for row, k in enumerate(fields.ks):
        for column, teacher in enumerate(fields.teachers):
            axis = axes[row][column]
            for color, method in zip(COLORS, METHODS, strict=False):
                mine = [p for p in points if (p["k"], p["teacher"], p["method"]) == (k, teacher, method)]
                for point in mine:
                    reached = [value for value in point["samples"] if value is not None]
                    axis.plot([point["d"]] * len(reached), reached, "o", color=color, markersize=4, alpha=0.6)
                    if len(reached) < len(point["samples"]):
                        axis.plot(point["d"], fields.budget_samples, "^", color=color, markersize=7, alpha=0.6)
                for fit in fits:
                    if (fit["k"], fit["teacher"], fit["method"]) == (k, teacher, method) and fit[
                        "exponent"
                    ] is not None:
                        x = np.array([fields.ds[0], fields.ds[-1]])
                        label = f"{method}: d^{fit['exponent']:.2f}"
                        axis.plot(x, np.exp(fit["intercept"]) * x ** fit["exponent"], color=color, label=label)
            _theory(axis, fields, k, points)
            axis.set(xscale="log", yscale="log", xlabel="d", title=f"k = {k}, {teacher} teacher")
            axis.set_xticks(fields.ds, [str(d) for d in fields.ds])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            if axis.get_legend_handles_labels()[0]:
                axis.legend(fontsize=8)
        axes[row][0].set_ylabel(f"samples to {fields.target:.0%}")
    save_figure(figure, path, dpi=120)


def _theory(axis: Any, fields: ScalingFields, k: int, points: Sequence[dict[str, Any]]) -> None:
    """Slopes to compare with: d^(k-1), the correlational lower bound for learning from labels, and d^0."""
    values = [v for p in points if p["k"] == k for v in p["samples"] if v is not None]
    if not values:
        return
    x, start = np.array([fields.ds[0], fields.ds[-1]], dtype=float), min(values)
    for slope, style in ((k - 1, ":"), (0, "--")):
        axis.plot(x, start * (x / x[0]) ** slope, style, color="grey", linewidth=1, label=f"slope {slope} (theory)")
    axis.set_ylim(min(values) * 0.5, fields.budget_samples * 2)


def _report(result: dict[str, Any]) -> str:
    settings, machine = result["settings"], result["environment"]
    lines = [
        f"# scaling/{result['size']}",
        "",
        f"`{result['command']}`; {machine['machine']}, torch {machine['torch']}, transformers {machine['transformers']}.",
        "",
        "Samples to "
        f"{settings['target']:.0%} held-out accuracy, median over seeds {', '.join(map(str, settings['seeds']))} "
        f"(budget {settings['budget_samples']:,}; the learning rate of each cell is chosen on other seeds).",
        "",
        "| k | teacher | method | exponent in d | 95% interval | "
        + " | ".join(f"d={d}" for d in settings["ds"])
        + " |",
        "|" + "---|" * (5 + len(settings["ds"])),
    ]
    for fit in result["fits"]:
        cells = []
        for d in settings["ds"]:
            found = [
                p
                for p in result["points"]
                if (p["k"], p["teacher"], p["method"], p["d"]) == (fit["k"], fit["teacher"], fit["method"], d)
            ]
            cells.append(_cell(found[0]["samples"]) if found else "-")
        shown = "-" if fit["exponent"] is None else f"{fit['exponent']:.2f}"
        interval = "-" if fit["exponent"] is None else f"{fit['ci95'][0]:.2f} to {fit['ci95'][1]:.2f}"
        head = f"| {fit['k']} | {fit['teacher']} | {fit['method']} | {shown} | {interval} | "
        lines.append(head + " | ".join(cells) + " |")
    lines += [
        "",
        "![Samples against d](scaling.png)",
        "",
        *[f"- {line}" for line in result["verdict"].splitlines()],
        "",
    ]
    return "\n".join(lines)


def _cell(samples: Sequence[float | None]) -> str:
    reached = sorted(value for value in samples if value is not None)
    if len(reached) < len(samples):
        return f"{len(reached)}/{len(samples)} solved"
    return f"{reached[len(reached) // 2]:,.0f}"
