"""What a scaling experiment is made of, and the exponents fitted to it.

Public names: `ScalingSettings`, `ScalingPoint`, `PowerLaw`, `MethodFit`, `ScalingResult`, `fit_exponent`,
`fit_methods`, `SCALING_METHODS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tutelage.core.errors import UserError
from tutelage.core.records import Record

SCALING_METHODS = ("extraction", "one_shot", "scratch")
_DRAWS = 2000


@dataclass(frozen=True)
class ScalingSettings(Record):
    """The numbers of a scaling experiment."""

    ks: tuple[int, ...] = (3, 4)
    """Numbers of support bits."""
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
    """The learning rates that are tried for every method."""
    budget_samples: int = 960_000
    """Examples within which a parity must be solved."""
    eval_every: int = 3_200
    """Examples between evaluations."""
    stage_samples: int = 16_000
    """Examples of the hidden stage."""
    target: float = 0.99
    """Held-out accuracy that counts as solved."""

    def __post_init__(self) -> None:
        for name in ("ks", "ds", "teachers"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise UserError(f"{name} are repeated: {', '.join(map(str, values))}")
        if len(self.ds) < 2:
            raise UserError(f"an exponent needs at least two values of ds, got {list(self.ds)}")


@dataclass(frozen=True)
class ScalingPoint(Record):
    """A method at one k, teacher and dimension."""

    k: int
    teacher: str
    d: int
    method: str
    learning_rate: float | None
    """The one chosen; None where training diverged at all of them."""
    samples: tuple[float | None, ...]
    """Samples to the target of each seed; None where it was not reached."""


@dataclass(frozen=True)
class PowerLaw(Record):
    """samples = exp(intercept) * d^exponent; both are None with fewer than two dimensions to fit."""

    exponent: float | None
    ci95: tuple[float | None, float | None]
    """Bootstrap 95% interval of the exponent."""
    intercept: float | None
    unreached: int
    """Runs left out because they did not reach the target: the true slope is then steeper than the fit."""


@dataclass(frozen=True)
class MethodFit(Record):
    """How the samples of a method grow."""

    k: int
    teacher: str
    method: str
    law: PowerLaw
    after_stage: PowerLaw | None = None
    """Of extraction: the same for its output stage alone."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; those of `law` are beside the others."""
        fields = super().to_dict()
        law = fields.pop("law")
        return {**fields, **law}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> MethodFit:
        """The inverse of `to_dict`."""
        rest = dict(fields)
        law = {part.name: rest.pop(part.name) for part in dataclasses.fields(PowerLaw)}
        return super().from_dict({**rest, "law": law})

    def matches(self, point: ScalingPoint) -> bool:
        """Whether the fit is (also) to this point."""
        return (point.k, point.teacher, point.method) == (self.k, self.teacher, self.method)


@dataclass(frozen=True)
class ScalingResult(Record):
    """A scaling experiment, finished or in progress (`scaling.json`)."""

    size: str
    command: str
    """The command that repeats it."""
    settings: ScalingSettings
    environment: dict[str, Any]
    """Versions and machine."""
    points: tuple[ScalingPoint, ...] = ()
    fits: tuple[MethodFit, ...] = ()
    verdict: str = ""
    """One line for each fit."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, with the name of the recipe."""
        return {"recipe": "scaling", **super().to_dict()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ScalingResult:
        """The inverse of `to_dict`."""
        return super().from_dict({name: value for name, value in fields.items() if name != "recipe"})


def fit_exponent(points: Sequence[tuple[int, Sequence[float | None]]]) -> PowerLaw:
    """Slope of log samples against log d over seeds and dimensions, with its bootstrap 95% interval.

    Args:
        points: d, and samples to the target of each seed (None where it was not reached).
    """
    kept = [(d, [value for value in values if value is not None]) for d, values in points]
    unreached = sum(len(values) for _, values in points) - sum(len(values) for _, values in kept)
    kept = [(d, values) for d, values in kept if values]
    if len(kept) < 2:
        return PowerLaw(None, (None, None), None, unreached)

    def slope(samples: Sequence[Any]) -> tuple[float, float]:
        x = np.concatenate([[np.log(d)] * len(values) for (d, _), values in zip(kept, samples, strict=True)])
        y = np.log(np.concatenate(samples))
        fitted = np.polyfit(x, y, 1)
        return float(fitted[0]), float(fitted[1])

    exponent, intercept = slope([values for _, values in kept])
    generator = np.random.default_rng(0)
    draws = sorted(slope([generator.choice(values, len(values)) for _, values in kept])[0] for _ in range(_DRAWS))
    low, high = (_rounded(draws[int(quantile * _DRAWS)]) for quantile in (0.025, 0.975))
    return PowerLaw(_rounded(exponent), (low, high), intercept, unreached)


def _rounded(slope: float) -> float:
    """No slope, but for rounding errors, is 0 and not -0."""
    return round(slope, 9) + 0.0


def fit_methods(settings: ScalingSettings, points: Sequence[ScalingPoint]) -> tuple[MethodFit, ...]:
    """The fits of every k, teacher and method that has points."""
    fits = []
    for k in settings.ks:
        for teacher in settings.teachers:
            for method in SCALING_METHODS:
                empty = MethodFit(k, teacher, method, PowerLaw(None, (None, None), None, 0))
                mine = [point for point in points if empty.matches(point)]
                if not mine:
                    continue
                law, after = fit_exponent([(point.d, point.samples) for point in mine]), None
                if method == "extraction":
                    after = fit_exponent([(p.d, _after_stage(p.samples, settings.stage_samples)) for p in mine])
                fits.append(MethodFit(k, teacher, method, law, after))
    return tuple(fits)


def _after_stage(samples: Sequence[float | None], stage: int) -> list[float | None]:
    """Samples of the output stage alone: the hidden stage, equally long everywhere, would flatten a slope."""
    return [None if value is None or value <= stage else value - stage for value in samples]
