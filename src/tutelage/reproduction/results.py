"""What a comparison found, as values that are written to disk and read back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutelage.core.curriculum import Curriculum
from tutelage.core.errors import UserError, check_choice, check_finite, check_range
from tutelage.core.records import Record
from tutelage.reproduction.sealed import read_sealed, write_sealed
from tutelage.reproduction.statistics import NO_ESTIMATE, Estimate, PairedRatio
from tutelage.reproduction.teachers import TeacherRecord
from tutelage.reproduction.variants import Candidate, Variant

COMPARISON_FILE = "comparison.json"
COSTS = ("samples", "flops", "seconds")


@dataclass(frozen=True)
class CurvePoint(Record):
    """One evaluation of a student, and what its training had cost by then."""

    samples: int
    flops: float  # of training, those of the teacher included
    seconds: float
    metrics: dict[str, float]  # held-out metrics; a value that was not finite is left out

    def __post_init__(self) -> None:
        for name in COSTS:
            check_range(name, getattr(self, name), 0)
        check_finite(**self.metrics)

    def cost(self, name: str) -> float:
        """The cost called `name`, one of `COSTS`."""
        return float(getattr(self, name))


@dataclass(frozen=True)
class RunRecord(Record):
    """A finished run of one seed."""

    seed: int
    curve: tuple[CurvePoint, ...]  # evaluations in order of samples; the first one is of the untrained student
    diverged: str | None = None  # what diverged, where training had to stop
    at_target: CurvePoint | None = None
    """The first point of the curve at the target; None where there is none, or no target."""

    def __post_init__(self) -> None:
        check_range("seed", self.seed, 0)
        samples = [point.samples for point in self.curve]
        if samples != sorted(samples):
            raise UserError(f"the curve of seed {self.seed} is not in order of samples")

    @property
    def final(self) -> dict[str, float]:
        """Metrics at the end; empty without evaluations."""
        return self.curve[-1].metrics if self.curve else {}

    @property
    def seconds(self) -> float:
        """Training time of the whole run."""
        return self.curve[-1].seconds if self.curve else 0.0

    def first(self, metric: str, good: Callable[[float], bool]) -> CurvePoint | None:
        """The first point whose metric is good enough."""
        return next((point for point in self.curve if metric in point.metrics and good(point.metrics[metric])), None)

    def to_target(self, cost: str) -> float | None:
        """Cost at which the target was reached; None where it was not."""
        return None if self.at_target is None else self.at_target.cost(cost)


@dataclass(frozen=True)
class Trial(Record):
    """What a candidate scored on the tuning seeds."""

    candidate: Candidate
    unit: str  # what `score` is: `samples to target` or `final METRIC`
    score: float | None = None
    """Median over the tuning seeds; None where the target was not reached, or training diverged."""
    final: float | None = None  # median of the final metric
    stopped_after: int | None = None  # samples after which a run that did not reach the target was stopped
    diverged: bool = False

    def __post_init__(self) -> None:
        check_finite(score=self.score, final=self.final)
        check_range("stopped_after", self.stopped_after, 0)


@dataclass(frozen=True)
class MethodResult(Record):
    """A variant: how it was tuned, and its runs."""

    variant: Variant
    candidate: Candidate | None = None  # what tuning chose; None before tuning, or where every candidate diverged
    trials: tuple[Trial, ...] = ()  # empty where there was a single candidate
    curriculum: Curriculum | None = None  # checkpoints of a teacher by name, without their folder
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
class Ratio(Record):
    """Cost to the target of one variant in units of that of a second variant."""

    over: str
    under: str
    cost: str  # one of `COSTS`
    seeds: int  # seeds that both have run
    paired: PairedRatio  # over the seeds on which at least one reached the target

    def __post_init__(self) -> None:
        check_choice("cost", self.cost, COSTS)
        check_range("seeds", self.seeds, 0)


@dataclass(frozen=True)
class Comparison(Record):
    """Everything that a comparison found and how it was made: `comparison.json`."""

    recipe: str
    size: str
    command: str | None  # the command that repeats it
    complete: bool  # whether all of its runs are finished
    match: str  # the cost, one of `COSTS`, that is equal for all variants
    budget: int  # samples of a one-shot run
    metric: str
    better: str  # `higher` or `lower`
    target: float | None
    seeds: tuple[int, ...]
    settings: dict[str, Any]  # fields of the recipe, as JSON values
    teacher: TeacherRecord
    environment: dict[str, Any]
    methods: tuple[MethodResult, ...] = ()
    ratios: tuple[Ratio, ...] = ()
    verdict: str = ""

    def __post_init__(self) -> None:
        check_choice("match", self.match, COSTS)
        check_choice("better", self.better, ("higher", "lower"))
        check_range("budget", self.budget, 1)
        check_finite(target=self.target)
        for seed in self.seeds:
            check_range("seeds", seed, 0)

    def method(self, name: str) -> MethodResult:
        """The result of a variant; KeyError where there is none."""
        return {method.name: method for method in self.methods}[name]

    def ratio(self, over: str, under: str, cost: str = "samples") -> Ratio | None:
        """The ratio of two variants, where it was computed."""
        return next((r for r in self.ratios if (r.over, r.under, r.cost) == (over, under, cost)), None)

    @property
    def baseline(self) -> MethodResult | None:
        """One-shot distillation: the variant called `one_shot`, or the first one of that method."""
        found = [method for method in self.methods if method.variant.method == "one_shot"]
        return min(found, key=lambda method: method.name != "one_shot", default=None)

    @classmethod
    def read(cls, folder: Path) -> Comparison:
        """The comparison of a folder; UserError where the folder has none, or its file cannot be read."""
        path = folder / COMPARISON_FILE
        if not path.is_file():
            raise UserError(f"found no {COMPARISON_FILE} in {str(folder)!r}: make one with tutelage compare")
        try:
            return read_sealed(path, cls, needs_digest=False)  # results of earlier versions have none
        except UserError as error:
            raise UserError(
                f"{error}. The file was damaged or edited, or it was written by an earlier version of tutelage, or is not a "
                "comparison: delete it and give the command of the comparison again, which reads the finished runs"
            ) from error

    def write(self, folder: Path) -> None:
        """Write the file that `read` reads."""
        write_sealed(folder / COMPARISON_FILE, self)
