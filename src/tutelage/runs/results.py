"""What a distillation ends with."""

from dataclasses import dataclass, field

from tutelage.core.records import Record, Sealed

RESULT_FILE = "result.json"


@dataclass(frozen=True)
class ModelMetrics(Record):
    """A model's size and its held-out metrics by name."""

    parameters: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Budget(Record):
    """What a run has spent."""

    steps: int
    samples: int
    tokens: int
    student_flops: float
    teacher_flops: float
    seconds: float  # of training; evaluation and saving are left out

    @property
    def flops(self) -> float:
        """Of student and teacher together."""
        return self.student_flops + self.teacher_flops


@dataclass(frozen=True)
class RunResult(Sealed):
    """A finished distillation; `result.json` holds it."""

    names: dict[str, str]  # of teacher, student and dataset, as they were given
    task: str
    method: str
    seed: int
    student: ModelMetrics
    teacher: ModelMetrics
    budget: Budget
    environment: dict[str, str | int]
    files: dict[str, str] = field(default_factory=dict)  # SHA-256 of each file of the student, by path below the folder
