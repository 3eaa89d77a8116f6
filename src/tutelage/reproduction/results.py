"""What a comparison found, as values that are written to disk and read back.

Public names: `Comparison`, `MethodResult`, `RunRecord`, `CurvePoint`, `Trial`, `Ratio`, `TeacherRecord`, `read_runs`,
`write_runs`, `COMPARISON_FILE`, `COSTS`.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutelage.core.curriculum import Curriculum
from tutelage.core.errors import UserError
from tutelage.io.files import write_atomically
from tutelage.reproduction.statistics import NO_ESTIMATE, Estimate, PairedRatio
from tutelage.reproduction.variants import Candidate, Variant

COMPARISON_FILE = "comparison.json"
COSTS = ("samples", "flops", "seconds")


@dataclass(frozen=True)
class CurvePoint:
    """One evaluation of a student, and what its training had cost by then."""

    samples: int
    """Training examples."""
    flops: float
    """Training FLOPs, those of the teacher included."""
    seconds: float
    """Training time."""
    metrics: Mapping[str, float]
    """Held-out metrics; a value that was not finite is left out."""

    def cost(self, name: str) -> float:
        """The cost called `name`, one of `COSTS`."""
        return float(getattr(self, name))


@dataclass(frozen=True)
class RunRecord:
    """A finished run of one seed."""

    seed: int
    curve: tuple[CurvePoint, ...]
    """Evaluations in order of samples; the first one is of the untrained student."""
    diverged: str | None = None
    """What diverged, where training had to stop."""
    at_target: CurvePoint | None = None
    """The first point of the curve at the target; None where there is none, or no target."""

    @property
    def final(self) -> Mapping[str, float]:
        """Metrics at the end."""
        return self.curve[-1].metrics if self.curve else {}

    @property
    def seconds(self) -> float:
        """Training time of the whole run."""
        return self.curve[-1].seconds if self.curve else 0.0

    def to_target(self, cost: str) -> float | None:
        """Cost at which the target was reached; None where it was not."""
        return None if self.at_target is None else self.at_target.cost(cost)


@dataclass(frozen=True)
class Trial:
    """What a candidate scored on the tuning seeds."""

    candidate: Candidate
    unit: str
    """What `score` is: `samples to target` or `final METRIC`."""
    score: float | None = None
    """Median over the tuning seeds; None where the target was not reached, or training diverged."""
    final: float | None = None
    """Median of the final metric."""
    stopped_after: int | None = None
    """Samples after which a run that did not reach the target was stopped."""
    diverged: bool = False


@dataclass(frozen=True)
class MethodResult:
    """A variant: how it was tuned, and its runs."""

    variant: Variant
    candidate: Candidate | None = None
    """What tuning chose; None before tuning, or where every candidate diverged."""
    trials: tuple[Trial, ...] = ()
    """Empty where there was a single candidate."""
    curriculum: Curriculum | None = None
    """Checkpoints of a teacher by name, without their folder."""
    runs: tuple[RunRecord, ...] = ()
    samples_to_target: Estimate = NO_ESTIMATE
    """Median over the runs; a run that never reached the target counts as beyond the budget."""

    @property
    def name(self) -> str:
        """Short name of the variant."""
        return self.variant.name

    @property
    def diverged(self) -> bool:
        """Whether every candidate diverged."""
        return bool(self.trials) and self.candidate is None

    def finals(self, metric: str) -> list[float]:
        """Final values of a metric, of the runs that have one."""
        return [run.final[metric] for run in self.runs if metric in run.final]


@dataclass(frozen=True)
class Ratio:
    """Cost to the target of one variant in units of that of another one."""

    over: str
    """Name of the variant whose cost is divided."""
    under: str
    """Name of the variant whose cost it is divided by."""
    cost: str
    """One of `COSTS`."""
    seeds: int
    """Seeds that both have run."""
    paired: PairedRatio
    """Over the seeds on which at least one reached the target."""


@dataclass(frozen=True)
class TeacherRecord:
    """What is known of the teacher."""

    description: str
    """How it came to be, and by what rule its training was stopped."""
    metrics: Mapping[str, float]
    """On held-out data."""
    samples: int | None = None
    """Examples that it was trained on."""
    converged_at: int | None = None
    """Examples after which it had converged."""


@dataclass(frozen=True)
class Comparison:
    """Everything that a comparison found and how it was made: `comparison.json`."""

    recipe: str
    size: str
    command: str | None
    """How to make it again."""
    complete: bool
    """Whether all of its runs are finished."""
    match: str
    """The cost, one of `COSTS`, that is equal for all variants."""
    budget: int
    """Samples of a one-shot run."""
    metric: str
    better: str
    """`higher` or `lower`."""
    target: float | None
    seeds: tuple[int, ...]
    settings: Mapping[str, Any]
    """Fields of the recipe, as JSON values."""
    teacher: TeacherRecord
    environment: Mapping[str, Any]
    """Versions and machine, as JSON values."""
    methods: tuple[MethodResult, ...] = ()
    ratios: tuple[Ratio, ...] = ()
    verdict: str = ""

    def method(self, name: str) -> MethodResult:
        """The result of a variant; KeyError where there is none."""
        return {method.name: method for method in self.methods}[name]

    def ratio(self, over: str, under: str, cost: str = "samples") -> Ratio | None:
        """The ratio of two variants, where it was computed."""
        found = (r for r in self.ratios if (r.over, r.under, r.cost) == (over, under, cost))
        return next(found, None)

    @property
    def baseline(self) -> MethodResult | None:
        """One-shot distillation: the variant called `one_shot`, or the first one of that method."""
        found = [method for method in self.methods if method.variant.method == "one_shot"]
        return min(found, key=lambda method: method.name != "one_shot", default=None)

    def reached(self, value: float, target: float) -> bool:
        """Whether a value of the metric is as good as `target`."""
        return value >= target if self.better == "higher" else value <= target

    def to_json(self) -> str:
        """Everything, as JSON."""
        return json.dumps(_encode(self), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Comparison:
        """The inverse of `to_json`.

        Raises:
            UserError: not JSON, or JSON of something else.
        """
        made: Comparison = _parse(cls, text)
        return made

    @classmethod
    def read(cls, folder: Path) -> Comparison:
        """The comparison of a folder.

        Raises:
            UserError: the folder has none, or its file cannot be read.
        """
        path = folder / COMPARISON_FILE
        if not path.is_file():
            raise UserError(f"found no {COMPARISON_FILE} in {str(folder)!r}: make one with tutelage compare")
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except UserError as error:
            raise UserError(f"cannot read {str(path)!r}: {error}. Make it again with tutelage compare") from error

    def write(self, folder: Path) -> None:
        """Write the file that `read` reads."""
        write_atomically(folder / COMPARISON_FILE, self.to_json() + "\n")


def read_runs(path: Path) -> list[RunRecord]:
    """The records of `write_runs`."""
    runs: tuple[RunRecord, ...] = _parse(tuple[RunRecord, ...], path.read_text(encoding="utf-8"))
    return list(runs)


def write_runs(path: Path, runs: Sequence[RunRecord]) -> None:
    """Write the records of runs that were made together."""
    write_atomically(path, json.dumps(_encode(runs), allow_nan=False))


def _encode(value: Any) -> Any:
    """A value as JSON values."""
    if isinstance(value, Curriculum):
        return value.to_dict()
    if dataclasses.is_dataclass(value):
        return {field.name: _encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [_encode(item) for item in value]
    return dict(value) if isinstance(value, Mapping) else value


def _parse(hint: Any, text: str) -> Any:
    try:
        return _decode(hint, json.loads(text))
    except json.JSONDecodeError as error:
        raise UserError(f"it is not JSON ({error})") from error
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError("it was written by an earlier version of tutelage, or is something else") from error


def _decode(hint: Any, value: Any) -> Any:
    """The inverse of `_encode`, by the type of the value."""
    if isinstance(hint, types.UnionType):
        kind = next(part for part in typing.get_args(hint) if part is not type(None))
        return None if value is None else _decode(kind, value)
    if typing.get_origin(hint) is tuple:
        return tuple(_decode(typing.get_args(hint)[0], item) for item in value)
    if hint is Curriculum:
        return Curriculum.from_dict(value)
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return typing.cast(Any, hint)(**{key: _decode(hints[key], item) for key, item in value.items()})
    return value
