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
from tutelage.reproduction.statistics import NO_ESTIMATE, Estimate, PairedDifference, PairedRatio
from tutelage.reproduction.teachers import TeacherRecord
from tutelage.reproduction.variants import COSTS, Candidate, Variant

COMPARISON_FILE = "comparison.json"


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
    teacher: int = 0  # index of its teacher in `Comparison.teachers`

    @property
    def pair(self) -> tuple[int, int]:
        """Teacher and seed: runs of two methods that have them in common are compared."""
        return self.teacher, self.seed

    def __post_init__(self) -> None:
        check_range("seed", self.seed, 0)
        check_range("teacher", self.teacher, 0)
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
    seeds: int = 1  # tuning seeds that were run; fewer than all where it was clearly worse

    def __post_init__(self) -> None:
        check_finite(score=self.score, final=self.final)
        check_range("stopped_after", self.stopped_after, 0)
        check_range("seeds", self.seeds, 1)


@dataclass(frozen=True)
class Tuning(Record):
    """What a method's search found for one teacher."""

    candidate: Candidate | None = None  # what was chosen; None where every candidate diverged
    trials: tuple[Trial, ...] = ()  # empty where there was a single candidate
    edges: tuple[str, ...] = ()
    """Settings whose chosen value is the smallest or largest one tried: a wider search may change the result."""


@dataclass(frozen=True)
class MethodResult(Record):
    """A variant: how it was tuned, and its runs."""

    variant: Variant
    tunings: tuple[Tuning, ...] = ()  # one for each teacher that it was tuned with, the first; empty before tuning
    curriculum: Curriculum | None = None  # of the first teacher; its checkpoints by name, without their folder
    runs: tuple[RunRecord, ...] = ()
    samples_to_target: Estimate = NO_ESTIMATE
    """Median over the runs, smallest and largest; a run that never reached the target counts as beyond the budget."""

    @property
    def name(self) -> str:
        """Short name of the variant."""
        return self.variant.name

    @property
    def diverged(self) -> bool:
        """Whether every candidate diverged, for a teacher."""
        return any(tuning.candidate is None for tuning in self.tunings)

    @property
    def trials(self) -> int:
        """The number of candidates that were tried, the largest over teachers."""
        return max((len(tuning.trials) for tuning in self.tunings), default=0)

    @property
    def edges(self) -> tuple[str, ...]:
        """The settings that are at an edge of what was tried, for any teacher."""
        return tuple(dict.fromkeys(name for tuning in self.tunings for name in tuning.edges))

    def finals(self, metric: str) -> list[float]:
        """Final values of a metric, of the runs that have one."""
        return [run.final[metric] for run in self.runs if metric in run.final]


@dataclass(frozen=True)
class Ratio(Record):
    """Cost to the target of one variant in units of that of a second variant."""

    over: str
    under: str
    cost: str  # one of `COSTS`
    seeds: int  # pairs of teacher and seed that both have run
    paired: PairedRatio  # over those on which at least one reached the target
    to_final: bool = False
    """Whether it is the cost at which the first is as good as the second at its end, in units of all that the second cost."""

    def __post_init__(self) -> None:
        check_choice("cost", self.cost, COSTS)
        check_range("seeds", self.seeds, 0)


@dataclass(frozen=True)
class Difference(Record):
    """The final metric of one variant minus that of a second one, paired by teacher and seed; with several teachers, of the
    means of each."""

    over: str
    under: str
    paired: PairedDifference


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
    teachers: tuple[TeacherRecord, ...]
    environment: dict[str, Any]
    methods: tuple[MethodResult, ...] = ()
    ratios: tuple[Ratio, ...] = ()
    differences: tuple[Difference, ...] = ()  # of methods that are rivals
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

    def difference(self, over: str, under: str) -> Difference | None:
        """The difference of two variants, where it was computed."""
        return next((d for d in self.differences if (d.over, d.under) == (over, under)), None)

    @property
    def pairs(self) -> int:
        """Runs of each method: seeds for every teacher, those that are still to come among them."""
        return len(self.seeds) * max(len(self.teachers), len(self.settings.get("teacher_seeds", ())))

    @property
    def baseline(self) -> MethodResult | None:
        """One-shot distillation: the variant called `one_shot`, or the first one of that method."""
        found = [method for method in self.methods if method.variant.method == "one_shot"]
        return min(found, key=lambda method: method.name != "one_shot", default=None)

    def rival(self, method: MethodResult) -> MethodResult | None:
        """What a method is compared to: plain one-shot distillation of a student that starts as its own does, else the
        baseline."""
        start, baseline = method.variant.start, self.baseline
        found = [one for one in self.methods if one.variant.is_plain("one_shot") and one.variant.start == start]
        return min(found, key=lambda one: one is not baseline, default=baseline)

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
