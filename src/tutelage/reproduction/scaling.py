"""How the samples to solve a parity grow with its dimension: the paper's guarantee, measured.

Theory (arXiv:2503.17494, arXiv:2410.05464): one-shot distillation from a converged teacher needs d^Omega(k) samples, as
learning from labels does; with a curriculum the exponent in d no longer grows with k."""

import contextlib
import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from tutelage.core.errors import UserError, check_finite, check_range
from tutelage.core.records import Record
from tutelage.core.stages import HiddenStage
from tutelage.io.files import write_atomically
from tutelage.reproduction.compare import compare
from tutelage.reproduction.display import Table, listed, save_plot
from tutelage.reproduction.recipe import Recipe, change_fields
from tutelage.reproduction.recipes import resolve
from tutelage.reproduction.results import Comparison, MethodResult
from tutelage.reproduction.sealed import write_sealed
from tutelage.reproduction.statistics import FEWEST_FOR_INTERVAL, interval, median
from tutelage.reproduction.teachers import TeacherNotFinished
from tutelage.reproduction.variants import Candidate
from tutelage.reproduction.workers import Workers
from tutelage.runs.environment import environment
from tutelage.runs.escaping import as_code, as_label, as_markdown
from tutelage.runs.plots import COLORS

SCALING_METHODS = ("extraction", "one_shot", "scratch")
_FLOOR = 2  # evaluations: what is solved as soon as that cannot be told from what is solved sooner


@dataclass(frozen=True)
class ScalingSettings(Record):
    """The numbers of a scaling experiment."""

    ks: tuple[int, ...] = (3, 4)  # numbers of support bits
    ds: tuple[int, ...] = (16, 24, 32, 48, 64)  # dimensions
    extraction_cells: tuple[str, ...] = ("4:128", "4:256", "5:16", "5:24", "5:32", "5:48", "5:64")
    """Further parities, as k:d, on which extraction alone is run; the others would not solve most of them in the budget."""
    teachers: tuple[str, ...] = ("planted", "trained")  # kinds of teacher; trained ones are trained past convergence
    teacher_seeds: tuple[int, ...] = (0, 1, 2)  # of each kind; the exponent is fitted for each teacher
    teacher_width: int = 2000
    student_width: int = 100
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    tuning_seeds: tuple[int, ...] = (1000, 1001, 1002)
    """Seeds on which each method's rate and stage are chosen, for each parity, with its first teacher."""
    learning_rates: tuple[float, ...] = (0.3, 1.0, 3.0)  # the learning rates that are tried for every method
    trials: int | None = 10  # candidates that are tried for every method: rates, and for extraction its stage
    budget_samples: int = 960_000  # examples within which a parity must be solved
    eval_every: int = 3_200  # examples between evaluations
    fine_eval_every: int = 400  # examples between evaluations around the one that finds the parity solved
    stage_samples: int = 16_000  # examples of the hidden stage with which the search begins
    target: float = 0.99  # held-out accuracy that counts as solved

    def __post_init__(self) -> None:
        for name in ("ks", "ds", "teachers", "teacher_seeds", "seeds", "learning_rates", "extraction_cells"):
            values = getattr(self, name)
            if not values and name != "extraction_cells":
                raise UserError(f"{name} are empty: give at least one")
            if len(set(values)) != len(values):
                raise UserError(f"{name} are repeated: {', '.join(map(str, values))}")
        if len(self.ds) < 2:
            raise UserError(f"an exponent needs at least two values of ds, got {list(self.ds)}")
        for cell in self.extraction_cells:
            if not re.fullmatch(r"\d+:\d+", cell):
                raise UserError(f"extraction_cells are given as k:d, e.g. 4:128, got {cell!r}")
        check_range("budget_samples", self.budget_samples, 1)
        check_range("stage_samples", self.stage_samples, 1)

    @property
    def cells(self) -> list[tuple[int, int, tuple[str, ...]]]:
        """Every parity (k, d), and the methods that are run on it."""
        both = [(k, d, SCALING_METHODS) for k, d in itertools.product(self.ks, self.ds)]
        known = {(k, d) for k, d, _ in both}
        more = [tuple(map(int, cell.split(":"))) for cell in self.extraction_cells]
        return sorted([*both, *((k, d, ("extraction",)) for k, d in more if (k, d) not in known)])


@dataclass(frozen=True)
class ScalingPoint(Record):
    """A method at one k, kind of teacher and dimension."""

    k: int
    teacher: str
    d: int
    method: str
    candidate: Candidate | None  # what was chosen; None where training diverged at every candidate
    stage_samples: int  # examples of its hidden stage; 0 without one
    samples: tuple[tuple[float | None, ...], ...]
    """Samples to the target, by teacher and then by seed; None where it was not reached."""
    edges: tuple[str, ...] = ()  # as `Tuning.edges`

    def __post_init__(self) -> None:
        check_range("k", self.k, 1)
        check_range("d", self.d, 1)
        check_range("stage_samples", self.stage_samples, 0)
        for value in itertools.chain(*self.samples):
            check_range("samples", value, 0)


@dataclass(frozen=True, kw_only=True)
class MethodFit(Record):
    """How the samples of a method grow: samples = exp(intercept) * d^exponent."""

    k: int
    teacher: str
    method: str
    exponent: float | None = None  # mean over the teachers' own exponents; None with fewer than two dimensions to fit
    spread: tuple[float | None, float | None] = (None, None)
    """Of the exponent over teachers: 95% t interval from five on, otherwise their range."""
    intercept: float | None = None
    exponents: tuple[float, ...] = ()  # of each teacher
    unreached: int = 0  # runs left out, beyond the budget: the true slope is then steeper than the fit
    at_floor: tuple[int, ...] = ()  # dimensions left out because they are solved as soon as that can be seen
    common_ds: tuple[int, ...] = ()  # the dimensions that every k and method has, where this one has further ones
    common_exponents: tuple[float, ...] = ()  # of each teacher, over these alone: those of other ranges do not compare

    def __post_init__(self) -> None:
        low, high = self.spread
        check_finite(exponent=self.exponent, low=low, high=high, intercept=self.intercept)
        check_range("unreached", self.unreached, 0)

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
    left_out: tuple[str, ...] = ()  # parities without a result, and why
    recipe: str = "scaling"


def power_law(points: Sequence[tuple[int, Sequence[float]]]) -> tuple[float, float] | None:
    """Slope and intercept of log samples against log d; None with fewer than two dimensions. `points` has d and samples."""
    kept = [(d, values) for d, values in points if values]
    if len(kept) < 2:
        return None
    x = np.concatenate([[np.log(d)] * len(values) for d, values in kept])
    slope, intercept = np.polyfit(x, np.log(np.concatenate([values for _, values in kept])), 1)
    return round(float(slope), 9) + 0.0, float(intercept)  # no slope, but for rounding errors, is 0 and not -0


def fit_methods(settings: ScalingSettings, points: Sequence[ScalingPoint]) -> tuple[MethodFit, ...]:
    """The fits of every k, kind of teacher and method that has points."""
    groups: dict[tuple[int, str, str], list[ScalingPoint]] = {}
    for point in points:
        groups.setdefault((point.k, point.teacher, point.method), []).append(point)
    common = set.intersection(*({point.d for point in mine} for mine in groups.values())) if groups else set()
    fits = []
    for (k, teacher, method), mine in sorted(groups.items()):
        floor = tuple(point.d for point in mine if _at_floor(settings, point))
        used = [point for point in mine if point.d not in floor]
        unreached = sum(value is None for point in used for value in itertools.chain(*point.samples))
        fit = MethodFit(k=k, teacher=teacher, method=method, unreached=unreached, at_floor=floor)
        if found := _laws(settings, used):
            slopes, intercepts = (tuple(values) for values in zip(*found, strict=True))
            law_of_all = {"exponent": fmean(slopes), "spread": interval(slopes), "intercept": fmean(intercepts)}
            fit = dataclasses.replace(fit, **law_of_all, exponents=slopes)  # type: ignore[arg-type]
        shared = [point for point in used if point.d in common]
        if len(shared) < len(used) and (found := _laws(settings, shared)):
            ds = tuple(point.d for point in shared)
            fit = dataclasses.replace(fit, common_ds=ds, common_exponents=tuple(slope for slope, _ in found))
        fits.append(fit)
    return tuple(fits)


def _laws(settings: ScalingSettings, points: Sequence[ScalingPoint]) -> list[tuple[float, float]]:
    """The power law of each teacher that has enough points."""
    of_each = (
        [(p.d, [v for v in p.samples[index] if v is not None]) for p in points if index < len(p.samples)]
        for index in range(len(settings.teacher_seeds))
    )
    return [law for law in map(power_law, of_each) if law is not None]


def _at_floor(settings: ScalingSettings, point: ScalingPoint) -> bool:
    """Whether the median run was solved as soon as that can be seen, after its hidden stage."""
    middle = median([value for values in point.samples for value in values])
    return middle is not None and middle - point.stage_samples <= _FLOOR * settings.fine_eval_every


_SMOKE: dict[str, Any] = {
    **{"ks": (2,), "ds": (8, 16), "teachers": ("planted",), "teacher_width": 200, "student_width": 50},
    **{"seeds": (0, 1), "learning_rates": (0.1,), "budget_samples": 64_000, "stage_samples": 6_400},
    **{"extraction_cells": (), "teacher_seeds": (0,), "trials": 1},
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
    cells = [(teacher, *cell) for teacher in settings.teachers for cell in settings.cells]
    of_cells = ("ks", "ds", "teachers", "extraction_cells")
    shared = {name: value for name, value in vars(settings).items() if name not in of_cells}
    recipes = [  # all of them, so that none is refused after others have run
        resolve("parity-mlp/laptop", {**shared, "d": d, "k": k, "teacher": teacher}) for teacher, k, d, _ in cells
    ]
    result = ScalingResult(size, command or f"tutelage compare {name}", settings, environment())
    with contextlib.ExitStack() as stack:
        workers = 1 if jobs == 1 else stack.enter_context(Workers(jobs))
        for (teacher, k, d, methods), recipe in zip(cells, recipes, strict=True):
            log(f"k={k} d={d}, {teacher} teacher")
            place = folder / f"k{k}-{teacher}-d{d}"
            try:
                made = compare(recipe, place, methods, jobs=workers, command=None, log=lambda line: None)
            except TeacherNotFinished as error:  # the other parities must not wait for this one
                message = f"k={k}, d={d}, {teacher} teacher is left out: {error}"
                log(message)
                result = _write(folder, dataclasses.replace(result, left_out=(*result.left_out, message)))
                continue
            found = [_point(made, method, recipe, (k, teacher, d)) for method in made.methods]
            result = _write(folder, dataclasses.replace(result, points=(*result.points, *found)))
    return result


def _point(made: Comparison, method: MethodResult, recipe: Recipe, cell: tuple[int, str, int]) -> ScalingPoint:
    k, teacher, d = cell
    stages = () if method.curriculum is None else method.curriculum.stages
    stage = sum(stage.steps for stage in stages if isinstance(stage, HiddenStage)) * recipe.batch_size
    of_each = ([run for run in method.runs if run.teacher == index] for index in range(len(made.teachers)))
    samples = tuple(tuple(run.to_target("samples") for run in runs) for runs in of_each)
    return ScalingPoint(k, teacher, d, method.name, method.tunings[0].candidate, stage, samples, method.edges)


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
        seen = f" Left out, since it is solved as soon as that can be seen: d = {listed(fit.at_floor)}."
        floor = seen if fit.at_floor else ""
        if fit.exponent is None:
            lines.append(f"{where} has too few dimensions to fit.{floor}")
            continue
        left_out = f"; {fit.unreached} runs beyond the budget left out" if fit.unreached else ""
        lines.append(
            f"{where} needs about d^{fit.exponent:.2f} samples ({_spread(fit)}{left_out}).{floor}{_common(fit)}"
        )
    return "\n".join(lines)


def _common(fit: MethodFit) -> str:
    if not fit.common_ds:
        return ""
    low, high = min(fit.common_exponents), max(fit.common_exponents)
    law = f"d^{fmean(fit.common_exponents):.2f} ({low:.2f} to {high:.2f})"
    return f" Over the dimensions that all have, {min(fit.common_ds)} to {max(fit.common_ds)}: {law}."


def _spread(fit: MethodFit) -> str:
    if len(fit.exponents) == 1:
        return "one teacher"
    kind = "95% t interval" if len(fit.exponents) >= FEWEST_FOR_INTERVAL else "range"
    low, high = fit.spread
    return f"{low:.2f} to {high:.2f}, {kind} over {len(fit.exponents)} teachers"


def _plot(result: ScalingResult, path: Path) -> None:
    """Log-log points and fitted lines, one panel for each k and teacher, beside the theory's slopes."""
    settings = result.settings
    ks = sorted({k for k, _, _ in settings.cells})
    rows, columns = len(ks), len(settings.teachers)
    figure = Figure(figsize=(5.5 * columns, 4.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey="row")
    for row, k in enumerate(ks):
        for column, teacher in enumerate(settings.teachers):
            axis = axes[row][column]
            _panel(axis, result, [fit for fit in result.fits if (fit.k, fit.teacher) == (k, teacher)])
            _theory(axis, result, k)
            axis.set(xscale="log", yscale="log", xlabel="d", title=as_label(f"k = {k}, {teacher} teacher"))
            ds = sorted({d for other, d, _ in settings.cells if other == k})
            axis.set_xticks(ds, [str(d) for d in ds])
            axis.minorticks_off()
        axes[row][0].set_ylabel(f"samples to {settings.target:.0%}")
    save_plot(figure, path)


def _panel(axis: Any, result: ScalingResult, fits: Sequence[MethodFit]) -> None:
    """Each method's points, an arrow at the budget where a seed did not arrive, and its line."""
    settings = result.settings
    for fit in fits:
        color = COLORS[SCALING_METHODS.index(fit.method)]
        for point in filter(fit.matches, result.points):
            values = list(itertools.chain(*point.samples))
            reached = [value for value in values if value is not None]
            filled = "none" if point.d in fit.at_floor else color  # hollow where it is left out of the fit
            style = {"color": color, "markerfacecolor": filled, "markersize": 4, "alpha": 0.6}
            axis.plot([point.d] * len(reached), reached, "o", **style)
            if len(reached) < len(values):
                axis.plot(point.d, settings.budget_samples, "^", color=color, markersize=7, alpha=0.6)
        if fit.exponent is not None and fit.intercept is not None:
            x = np.array(_ends(result, fit.k))
            label = f"{fit.method}: d^{fit.exponent:.2f}"
            axis.plot(x, np.exp(fit.intercept) * x**fit.exponent, color=color, label=label)


def _theory(axis: Any, result: ScalingResult, k: int) -> None:
    """Slopes to compare with: d^(k-1), the correlational lower bound for learning from labels, and d^0."""
    settings = result.settings
    mine = [value for p in result.points if p.k == k for value in itertools.chain(*p.samples)]
    values = [value for value in mine if value is not None]
    if values:
        x, start = np.array(_ends(result, k), dtype=float), min(values)
        for slope, style in ((k - 1, ":"), (0, "--")):
            axis.plot(x, start * (x / x[0]) ** slope, style, color="grey", linewidth=1, label=f"slope {slope} (theory)")
        axis.set_ylim(start * 0.5, settings.budget_samples * 2)


def _ends(result: ScalingResult, k: int) -> tuple[int, int]:
    """The smallest and largest dimension at a k."""
    ds = [d for other, d, _ in result.settings.cells if other == k]
    return min(ds), max(ds)


def _write_table(result: ScalingResult, path: Path) -> None:
    settings, machine = result.settings, result.environment
    ds = sorted({d for _, d, _ in settings.cells})
    columns = ["k", "teacher", "method", "exponent in d", "over teachers", *(f"d={d}" for d in ds)]
    tried = f"{settings.trials} candidates" if settings.trials else "the learning rates"
    note = (
        f"Samples to {settings.target:.0%} held-out accuracy, median over {len(settings.teacher_seeds)} teachers of each "
        f"kind with seeds {listed(settings.seeds)} (budget {settings.budget_samples:,}). For each cell {tried} of every method "
        "were tried on other seeds. (f): left out of the fit, solved as soon as that can be seen. (e): a setting is at an edge."
    )
    parts = [
        f"# scaling/{result.size}",
        f"{as_code(result.command)}; {machine['machine']}, torch {machine['torch']}, transformers {machine['transformers']}.",
        Table("scaling", columns, [_row(fit, result) for fit in result.fits], note).to_markdown(),
        "![Samples against d](scaling.png)",
        "\n".join(f"- {as_markdown(line)}" for line in (*result.verdict.splitlines(), *result.left_out)),
    ]
    write_atomically(path, "\n\n".join(parts) + "\n")


def _row(fit: MethodFit, result: ScalingResult) -> list[str]:
    points = {point.d: point for point in result.points if fit.matches(point)}
    law = ["-", "-"] if fit.exponent is None else [f"{fit.exponent:.2f}", _spread(fit)]
    ds = sorted({d for _, d, _ in result.settings.cells})
    return [str(fit.k), fit.teacher, fit.method, *law, *(_cell(points.get(d), fit) for d in ds)]


def _cell(point: ScalingPoint | None, fit: MethodFit) -> str:
    values = [] if point is None else list(itertools.chain(*point.samples))
    if point is None or not values:
        return "-"
    reached, marks = [value for value in values if value is not None], " (f)" * (point.d in fit.at_floor)
    marks += " (e)" * bool(point.edges)
    if len(reached) < len(values):
        return f"{len(reached)}/{len(values)} solved{marks}"
    return f"{median(values):,.0f}{marks}"
