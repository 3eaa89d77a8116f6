"""A system to compare methods on: teacher, students, data, and the settings that all methods share.

Public names: `System`, `Teacher`, `RecipeFields`, `check_positive`, `EVAL_SEED`, `TEACHER_SEED`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from tutelage.core.errors import UserError

# Streams of evaluation and of teachers are far from those that students train on.
EVAL_SEED = 1_000_000_007
TEACHER_SEED = 2_000_000_011

_COUNTS = (
    *(
        "batch_size",
        "budget_samples",
        "eval_every",
        "eval_samples",
        "stage_samples",
        "layers",
        "head_width",
        "max_length",
    ),
    *("teacher_width", "teacher_heads", "teacher_samples", "teacher_checkpoints", "teacher_batch_size"),
    *("teacher_max_samples", "teacher_checkpoint_every", "student_width", "student_heads"),
)


def check_positive(fields: Any) -> None:
    """Raise UserError where a count of a recipe is below 1."""
    for name in _COUNTS:
        if getattr(fields, name, 1) < 1:
            raise UserError(f"{name} must be at least 1, got {getattr(fields, name)}")
    if not 0 < getattr(fields, "tuning_share", 1.0) <= 1:
        raise UserError(f"tuning_share is a share of the budget, above 0 and at most 1, got {fields.tuning_share}")
    if getattr(fields, "budget_samples", 1) < getattr(fields, "batch_size", 1):
        raise UserError(f"budget_samples {fields.budget_samples} is less than one batch of {fields.batch_size}")
    for name in ("planted_noise", "teacher_sparse_samples"):
        if getattr(fields, name, 0) < 0:
            raise UserError(f"{name} must not be negative, got {getattr(fields, name)}")
    if not 1 <= getattr(fields, "teacher_factor", 1.0) < float("inf"):
        raise UserError(
            f"teacher_factor must be at least 1, so that a teacher is past convergence: got {fields.teacher_factor}"
        )
    if getattr(fields, "stage_samples", 0) >= getattr(fields, "budget_samples", float("inf")):
        raise UserError(
            f"budget too small for the stages: stage_samples {fields.stage_samples} of budget_samples {fields.budget_samples}"
        )


@dataclass(frozen=True)
class RecipeFields:
    """What every recipe can be told; recipes add their own."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of the reported runs: initial student, data order and random projection."""
    tuning_seeds: tuple[int, ...] = (1000, 1001)
    """Seeds on which learning rates and schedules are chosen; never reported."""
    learning_rates: tuple[float, ...] = (0.03, 0.1, 0.3)
    """The grid that every method gets."""
    batch_size: int = 64
    """Examples a step."""
    budget_samples: int = 1_920_000
    """Examples that each method may train on."""
    eval_every: int = 8_000
    """Examples between evaluations."""
    eval_samples: int = 4096
    """Held-out examples."""
    tuning_share: float = 1.0
    """Share of the budget that tuning runs get."""

    def __post_init__(self) -> None:
        check_positive(self)


@dataclass(frozen=True)
class Teacher:
    """A finished teacher and what is known of it."""

    model: nn.Module
    metrics: dict[str, Any]
    """`description` (how it came to be, by what rule it was stopped) and its metrics on held-out data."""
    checkpoints: tuple[tuple[int, str], ...] = ()
    """Checkpoints of its training, early to late: (examples seen, folder)."""


@dataclass(frozen=True)
class System:
    """Everything a comparison needs; made by a recipe."""

    recipe: str
    """Name in reports."""
    size: str
    """`smoke`, `laptop`, `paper` or `own`."""
    fields: RecipeFields
    """Its numbers."""
    task: str
    """`tutelage.tasks.base.TASKS`."""
    metric: str
    """What is compared, a key of the evaluation."""
    better: str
    """`higher` or `lower`."""
    target: float | None
    """Value of the metric to reach; None takes the median of one-shot's final values."""
    arguments: dict[str, Any]
    """`CurriculumConfig` fields of every method."""
    make_teacher: Callable[[Path], Teacher]
    """Trains, loads or builds the teacher; the argument is the folder for what it trains."""
    make_student: Callable[[Sequence[int]], nn.Module]
    """The initial student of a seed (of several seeds where they are replicated)."""
    train_data: Callable[[Sequence[int], int], Any]
    """Training examples in the order of a seed, at least so many."""
    eval_data: Callable[[Sequence[int]], Any]
    """Held-out examples of a seed."""
    collator: Any
    """Data collator for training."""
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    """`CurriculumConfig` fields of single methods."""
    replicated: bool = False
    """Whether all seeds train side by side in one model."""
    stop_at_target: bool = False
    """Whether a run ends when all its seeds have reached the target."""
    default_methods: tuple[str, ...] = ("extraction", "one_shot", "progressive", "scratch")
    """Methods compared unless asked otherwise."""
    identity: dict[str, Any] = field(default_factory=dict)
    """What else its runs depend on, beside the fields: for the record, and so that two are not taken for one."""
    tokenizer: Any = None
    """Tokenizer of language systems."""
    sketch_teacher: Callable[[], nn.Module] | None = None
    """An untrained teacher of the finished one's shape, where that is known before it is trained or loaded."""
    again: Callable[[], System] | None = None
    """Makes this system in another process; picklable."""

    def reached(self, value: float, target: float) -> bool:
        """Whether a value of the metric is as good as `target`."""
        return value >= target if self.better == "higher" else value <= target
