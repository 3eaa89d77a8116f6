"""How the samples to solve a parity grow with its dimension: the paper's guarantee, measured.

Theory (arXiv:2503.17494, arXiv:2410.05464): one-shot distillation from a converged teacher needs d^Omega(k) samples, as
learning from labels does; with a curriculum the exponent in d no longer grows with k."""

import contextlib
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from tutelage.core.errors import UserError, check_finite, check_positive, check_range
from tutelage.core.records import Record
from tutelage.io.files import write_atomically
from tutelage.reproduction.compare import compare
from tutelage.reproduction.display import Table, listed, save_plot
from tutelage.reproduction.recipe import change_fields
from tutelage.reproduction.recipes import resolve
from tutelage.reproduction.sealed import write_sealed
from tutelage.reproduction.workers import Workers
from tutelage.runs.environment import environment
from tutelage.runs.escaping import as_code, as_label, as_markdown
from tutelage.runs.plots import COLORS

SCALING_METHODS = ("extraction", "one_shot", "scratch")
_DRAWS = 2000


@dataclass(frozen=True)
class ScalingSettings(Record):
    """The numbers of a scaling experiment."""

    ks: tuple[int, ...] = (3, 4)  # numbers of support bits
    ds: tuple[int, ...] = (16, 24, 32, 48, 64)  # dimensions
    teachers: tuple[str, ...] = ("planted", "trained")  # kinds of teacher; trained ones are trained past convergence
    teacher_width: int = 2000
    student_width: int = 100
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    tuning_seeds: tuple[int, ...] = (1000, 1001)
    """Seeds on which each method's learning rate is chosen, for each parity."""
    learning_rates: tuple[float, ...] = (3.0, 1.0, 0.3, 10.0)  # the learning rates that are tried for every method
    budget_samples: int = 960_000  # examples within which a parity must be solved
    eval_every: int = 3_200  # examples between evaluations
    stage_samples: int = 16_000  # examples of the hidden stage
    target: float = 0.99  # held-out accuracy that counts as solved

    def __post_init__(self) -> None:
        for name in ("ks", "ds", "teachers", "seeds", "learning_rates"):
            values = getattr(self, name)
            if not values:
                raise UserError(f"{name} are empty: give at least one")
            if len(set(values)) != len(values):
                raise UserError(f"{name} are repeated: {', '.join(map(str, values))}")
        if len(self.ds) < 2:
            raise UserError(f"an exponent needs at least two values of ds, got {list(self.ds)}")
        check_range("budget_samples", self.budget_samples, 1)
        check_range("stage_samples", self.stage_samples, 1)


@dataclass(frozen=True)
class ScalingPoint(Record):
    """A method at one k, teacher and dimension."""

    k: int
    teacher: str
    d: int
    method: str
    learning_rate: float | None  # the one chosen; None where training diverged at all of them
    samples: tuple[float | None, ...]  # samples to the target of each seed; None where it was not reached

    def __post_init__(self) -> None:
        check_range("k", self.k, 1)
        check_range("d", self.d, 1)
        check_positive("learning_rate", self.learning_rate)
        for value in self.samples:
            check_range("samples", value, 0)


@dataclass(frozen=True)
class PowerLaw(Record):
    """samples = exp(intercept) * d^exponent; both are None with fewer than two dimensions to fit."""

    exponent: float | None
    ci95: tuple[float | None, float | None]  # bootstrap 95% interval of the exponent
    intercept: float | None
    unreached: int  # runs left out because they did not reach the target: the true slope is then steeper than the fit

    def __post_init__(self) -> None:
        low, high = self.ci95
        check_finite(exponent=self.exponent, low=low, high=high, intercept=self.intercept)
        check_range("unreached", self.unreached, 0)


@dataclass(frozen=True, kw_only=True)
class MethodFit(PowerLaw):
    """How the samples of a method grow."""

    k: int
    teacher: str
    method: str
    after_stage: PowerLaw | None = None  # of extraction: the same for its output stage alone

    def matches(self, point: ScalingPoint) -> bool:
        """Whether the fit is (also) to this point."""
        return (point.k, point.teacher, point.method) == (self.k, self.teacher, self.method)


@dataclass(frozen=True)
class ScalingResult(Record):
    """A scaling experiment, finished or in progress (`scaling.json`)."""

    size: str
    command: str  # the command that repeats it
    settings: ScalingSettings
    environment: dict[str, Any]
    points: tuple[ScalingPoint, ...] = ()
    fits: tuple[MethodFit, ...] = ()
    verdict: str = ""  # one line for each fit
    recipe: str = "scaling"


def fit_exponent(points: Sequence[tuple[int, Sequence[float | None]]]) -> PowerLaw:
    """Slope of log samples against log d over seeds and dimensions, with its bootstrap 95% interval.

    `points` has d, and samples to the target of each seed (None where it was not reached)."""
    kept = [(d, [value for value in values if value is not None]) for d, values in points]
    unreached = sum(len(values) for _, values in points) - sum(len(values) for _, values in kept)
    kept = [(d, values) for d, values in kept if values]
    if len(kept) < 2:
        return PowerLaw(None, (None, None), None, unreached)
    x = np.concatenate([[np.log(d)] * len(values) for d, values in kept])

    def slope(samples: Sequence[Any]) -> tuple[float, float]:
        fitted = np.polyfit(x, np.log(np.concatenate(samples)), 1)
        return round(float(fitted[0]), 9) + 0.0, float(fitted[1])  # no slope, but for rounding errors, is 0 and not -0

    exponent, intercept = slope([values for _, values in kept])
    generator = np.random.default_rng(0)
    draws = sorted(slope([generator.choice(values, len(values)) for _, values in kept])[0] for _ in range(_DRAWS))
    return PowerLaw(exponent, (draws[int(0.025 * _DRAWS)], draws[int(0.975 * _DRAWS)]), intercept, unreached)


def fit_methods(settings: ScalingSettings, points: Sequence[ScalingPoint]) -> tuple[MethodFit, ...]:
    """The fits of every k, teacher and method that has points."""
    fits, stage = [], settings.stage_samples
    for k, teacher, method in itertools.product(settings.ks, settings.teachers, SCALING_METHODS):
        mine = [(p.d, p.samples) for p in points if (p.k, p.teacher, p.method) == (k, teacher, method)]
        if not mine:
            continue
        after = None
        if method == "extraction":  # the hidden stage, equally long everywhere, would flatten a slope
            after = fit_exponent(
                [(d, [n - stage if n and n > stage else None for n in samples]) for d, samples in mine]
            )
        law = vars(fit_exponent(mine))
        fits.append(MethodFit(**law, k=k, teacher=teacher, method=method, after_stage=after))
    return tuple(fits)


_SMOKE: dict[str, Any] = {
    **{"ks": (2,), "ds": (8, 16), "teachers": ("planted",), "teacher_width": 200, "student_width": 50},
    **{"seeds": (0, 1), "learning_rates": (0.1,), "budget_samples": 64_000, "stage_samples": 6_400},
}
SCALING_SIZES = {
    "smoke": ScalingSettings(**_SMOKE),
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

    `name` is `scaling` or `scaling/SIZE`, `overrides` fields of `ScalingSettings`. Each comparison has a folder below
    `folder`, and finished ones are not repeated. `jobs`, `command` and `log` are those of `compare`.

    Raises UserError: an unknown size or field, or settings that cannot work, before the first comparison."""
    size = name.partition("/")[2] or "laptop"
    if size not in SCALING_SIZES:
        raise UserError(f"unknown size {size!r} of scaling: there are {', '.join(SCALING_SIZES)}")
    settings = change_fields(SCALING_SIZES[size], overrides, "scaling")
    cells = list(itertools.product(settings.ks, settings.teachers, settings.ds))
    shared = {name: value for name, value in vars(settings).items() if name not in ("ks", "ds", "teachers")}
    recipes = [  # all of them, so that none is refused after others have run
        resolve("parity-mlp/laptop", {**shared, "d": d, "k": k, "teacher": teacher}) for k, teacher, d in cells
    ]
    result = ScalingResult(size, command or f"tutelage compare {name}", settings, environment())
    with contextlib.ExitStack() as stack:
        workers = 1 if jobs == 1 else stack.enter_context(Workers(jobs))
        for (k, teacher, d), recipe in zip(cells, recipes, strict=True):
            log(f"k={k} d={d}, {teacher} teacher")
            place = folder / f"k{k}-{teacher}-d{d}"
            made = compare(recipe, place, SCALING_METHODS, jobs=workers, command=None, log=lambda line: None)
            points = list(result.points)
            for method in made.methods:
                rate = None if method.candidate is None else method.candidate.learning_rate
                samples = tuple(run.to_target("samples") for run in method.runs)
                points.append(ScalingPoint(k, teacher, d, method.name, rate, samples))
            result = _write(folder, dataclasses.replace(result, points=tuple(points)))
    return result


def _write(folder: Path, result: ScalingResult) -> ScalingResult:
    fits = fit_methods(result.settings, result.points)
    fitted = dataclasses.replace(result, fits=fits, verdict=_verdict(fits))
    write_sealed(folder / "scaling.json", fitted)
    _plot(fitted, folder / "scaling.png")
    _write_table(fitted, folder / "report.md")
    return fitted


def _verdict(fits: Sequence[MethodFit]) -> str:
    lines = []
    for fit in fits:
        where = f"k={fit.k}, {fit.teacher} teacher: {fit.method}"
        if fit.exponent is None:
            lines.append(f"{where} solved too few dimensions to fit.")
            continue
        left_out = f", {fit.unreached} runs beyond the budget left out" if fit.unreached else ""
        line = f"{where} needs about d^{fit.exponent:.2f} samples (95% interval {_interval(fit)}{left_out})."
        if fit.after_stage is not None and fit.after_stage.exponent is not None:
            line += (
                f" Its hidden stage is equally long in every dimension; what comes after it grows like "
                f"d^{fit.after_stage.exponent:.2f} ({_interval(fit.after_stage)})."
            )
        lines.append(line)
    return "\n".join(lines)


def _interval(law: PowerLaw) -> str:
    return "{:.2f} to {:.2f}".format(*law.ci95)


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
            axis.set(xscale="log", yscale="log", xlabel="d", title=as_label(f"k = {k}, {teacher} teacher"))
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
        if fit.exponent is not None and fit.intercept is not None:
            x = np.array([settings.ds[0], settings.ds[-1]])
            label = f"{fit.method}: d^{fit.exponent:.2f}"
            axis.plot(x, np.exp(fit.intercept) * x**fit.exponent, color=color, label=label)


def _theory(axis: Any, result: ScalingResult, k: int) -> None:
    """Slopes to compare with: d^(k-1), the correlational lower bound for learning from labels, and d^0."""
    settings = result.settings
    values = [value for p in result.points if p.k == k for value in p.samples if value is not None]
    if values:
        x, start = np.array([settings.ds[0], settings.ds[-1]], dtype=float), min(values)
        for slope, style in ((k - 1, ":"), (0, "--")):
            axis.plot(x, start * (x / x[0]) ** slope, style, color="grey", linewidth=1, label=f"slope {slope} (theory)")
        axis.set_ylim(start * 0.5, settings.budget_samples * 2)


def _write_table(result: ScalingResult, path: Path) -> None:
    settings, machine = result.settings, result.environment
    columns = ["k", "teacher", "method", "exponent in d", "95% interval", *(f"d={d}" for d in settings.ds)]
    note = (
        f"Samples to {settings.target:.0%} held-out accuracy, median over seeds {listed(settings.seeds)} (budget "
        f"{settings.budget_samples:,}; the learning rate of each cell is chosen on other seeds)."
    )
    parts = [
        f"# scaling/{result.size}",
        f"{as_code(result.command)}; {machine['machine']}, torch {machine['torch']}, transformers {machine['transformers']}.",
        Table("scaling", columns, [_row(fit, result) for fit in result.fits], note).to_markdown(),
        "![Samples against d](scaling.png)",
        "\n".join(f"- {as_markdown(line)}" for line in result.verdict.splitlines()),
    ]
    write_atomically(path, "\n\n".join(parts) + "\n")


def _row(fit: MethodFit, result: ScalingResult) -> list[str]:
    samples = {point.d: point.samples for point in result.points if fit.matches(point)}
    law = ["-", "-"] if fit.exponent is None else [f"{fit.exponent:.2f}", _interval(fit)]
    cells = []
    for seeds in (samples.get(d, ()) for d in result.settings.ds):
        reached = sorted(value for value in seeds if value is not None)
        solved = f"{len(reached)}/{len(seeds)} solved" if seeds else "-"
        cells.append(f"{reached[len(reached) // 2]:,.0f}" if seeds and len(reached) == len(seeds) else solved)
    return [str(fit.k), fit.teacher, fit.method, *law, *cells]
