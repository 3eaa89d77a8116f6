"""What a distillation ends with.

Public names: `RunResult`, `ModelMetrics`, `Budget`, `RESULT_FILE`.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field

RESULT_FILE = "result.json"


@dataclass(frozen=True)
class ModelMetrics:
    """A model's size and its held-out metrics by name."""

    parameters: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Budget:
    """What a run has spent."""

    steps: int
    samples: int
    tokens: int
    student_flops: float
    teacher_flops: float
    seconds: float
    """Of training; evaluation and saving are left out."""

    @property
    def flops(self) -> float:
        """Of student and teacher together."""
        return self.student_flops + self.teacher_flops


@dataclass(frozen=True)
class RunResult:
    """A finished distillation; `result.json` holds it."""

    names: dict[str, str]
    """Of teacher, student and dataset, as they were given."""
    task: str
    method: str
    seed: int
    student: ModelMetrics
    teacher: ModelMetrics
    budget: Budget
    environment: dict[str, str | int]

    def to_json(self) -> str:
        """As text."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> RunResult:
        """The inverse of `to_json`."""
        fields = json.loads(text)
        for who in ("student", "teacher"):
            fields[who] = ModelMetrics(**fields[who])
        return cls(**{**fields, "budget": Budget(**fields["budget"])})
