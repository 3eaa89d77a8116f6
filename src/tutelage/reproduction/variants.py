"""Methods as they are named in a comparison, and the curricula they become.

Public names: `Variant`, `Candidate`, `parse_variant`, `candidates`, `build_curriculum`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tutelage.core.curriculum import METHODS, Curriculum, OutputStage, Stage
from tutelage.core.errors import UserError
from tutelage.reproduction.teachers import Teacher
from tutelage.training.config import CurriculumConfig

# How progressive distillation uses the teacher's checkpoints: at the teacher's own pace, faster, or one checkpoint from
# the middle of its transition and then the finished teacher (arXiv:2410.05464). All are searched.
SCHEDULES = ("two", "pace-4", "pace-2", "pace-1")


# What the comparison sets itself, the same for all: no method may change it.
CONTROLLED = (
    *(
        "method",
        "task",
        "output_dir",
        "overwrite_output_dir",
        "resume_from_checkpoint",
        "curriculum_dir",
        "seed",
        "data_seed",
    ),
    *("max_steps", "num_train_epochs", "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *(
        "eval_strategy",
        "eval_steps",
        "eval_on_start",
        "save_strategy",
        "save_steps",
        "save_total_limit",
        "logging_steps",
    ),
    *("train_sampling_strategy", "teacher_model_name_or_path", "teacher_checkpoints", "disable_tqdm", "report_to"),
)


@dataclass(frozen=True)
class Variant:
    """A method and the settings in which it differs from the recipe's."""

    name: str
    """As given, and as reported: `extraction:projection=logits,warm_start=head`."""
    method: str
    """One of `METHODS`."""
    overrides: dict[str, Any]
    """`CurriculumConfig` fields."""
    budget_share: float = 1.0
    """Share of the comparison's budget."""


@dataclass(frozen=True)
class Candidate:
    """What tuning chooses."""

    learning_rate: float
    schedule: str | None = None
    """Progressive: one of `SCHEDULES`."""

    @property
    def label(self) -> str:
        """Short name, also of its folder."""
        return f"{self.learning_rate:g}" + (f" {self.schedule}" if self.schedule else "")


def parse_variant(text: str) -> Variant:
    """Parse `method` or `method:field=value,field=value`; `budget=0.6` takes a share of the budget.

    Raises:
        UserError: unknown method or field.
    """
    method, _, rest = text.partition(":")
    if method not in METHODS:
        raise UserError(f"unknown method {method!r} in {text!r}: use one of {', '.join(METHODS)}")
    types = {field.name: str(field.type) for field in dataclasses.fields(CurriculumConfig)}
    overrides: dict[str, Any] = {}
    share = 1.0
    last = None
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals and last is not None:  # a comma within a value: layer_map=1:1,2:2
            overrides[last] = f"{overrides[last]},{part}"
            continue
        if key == "budget":
            share = _read(key, value, text, float)
            if not 0 < share <= 1:
                raise UserError(f"budget in {text!r} is a share from 0 to 1, got {value}")
            continue
        if key == "schedule":
            if method != "progressive" or value not in SCHEDULES:
                raise UserError(f"schedule in {text!r} belongs to progressive and is one of {', '.join(SCHEDULES)}")
        elif key in CONTROLLED:
            raise UserError(f"{key!r} in {text!r} is set by the comparison itself, the same for every method")
        elif key not in types:
            raise UserError(f"unknown field {key!r} in {text!r}: fields are those of CurriculumConfig")
        overrides[key] = value
        last = key
    typed = {key: _read(key, value, text, _kind(types.get(key, "str"))) for key, value in overrides.items()}
    return Variant(text, method, typed, share)


def _read(key: str, value: str, text: str, kind: Callable[[str], Any]) -> Any:
    try:
        return kind(value)
    except ValueError:
        raise UserError(f"cannot read {key}={value!r} in {text!r}") from None


def _kind(type_name: str) -> Callable[[str], Any]:
    """What reads a value of a field's type."""
    if "list[int]" in type_name:
        return lambda value: [int(part) for part in value.split(",")]
    if "bool" in type_name:
        return lambda value: value.lower() in ("true", "yes", "1")
    return int if "int" in type_name else float if "float" in type_name else str


def candidates(variant: Variant, learning_rates: Sequence[float]) -> list[Candidate]:
    """What may be tried for a variant: the same learning rates for all, with every schedule for progressive."""
    schedules: Sequence[str | None] = (None,)
    if variant.method == "progressive":
        schedules = [variant.overrides["schedule"]] if "schedule" in variant.overrides else SCHEDULES
    return [Candidate(rate, schedule) for schedule in schedules for rate in learning_rates]


def build_curriculum(
    args: CurriculumConfig,
    candidate: Candidate,
    blocks: tuple[int, int],
    teacher: Teacher,
    steps: int,
    batch_size: int,
    share: float = 1.0,
) -> Curriculum:
    """The curriculum of a run.

    Args:
        args: its settings.
        candidate: with the schedule, for progressive.
        blocks: of student and teacher.
        teacher: its checkpoints serve progressive.
        steps: of the whole curriculum.
        batch_size: examples a step.
        share: of the comparison's budget that `steps` is; a schedule of checkpoints is shortened alike.

    Raises:
        UserError: progressive without checkpoints, or what the builders refuse.
    """
    if args.method != "progressive":
        return args.build_curriculum(*blocks, steps)
    if not teacher.checkpoints:
        raise UserError(
            "progressive distillation needs checkpoints of the teacher's training, and this teacher has none "
            f"({teacher.description}): leave progressive out of --methods"
        )
    assert candidate.schedule is not None
    uses = _schedule(candidate.schedule, teacher, batch_size / share)
    stages: list[Stage] = []
    left = steps

    def stage(count: int, folder: str | None) -> Stage:
        return OutputStage(count, teacher_checkpoint=folder, label_weight=args.label_weight, continues=bool(stages))

    for count, folder in uses:
        count = min(count, left - 1)  # the finished teacher comes last, be it for one step
        if count < 1:
            break
        stages.append(stage(count, folder))
        left -= count
    stages.append(stage(left, None))
    return Curriculum(
        "progressive", tuple(stages), normalize=args.normalize, temperature=args.temperature, top_k=args.top_k
    )


def _schedule(name: str, teacher: Teacher, batch_size: float) -> list[tuple[int, str]]:
    """Steps on each checkpoint, early to late."""
    times = [checkpoint.samples for checkpoint in teacher.checkpoints]
    if name == "two":
        middle = teacher.checkpoints[len(times) // 2 if teacher.transition is None else teacher.transition]
        return [(max(1, int(middle.samples // 2 // batch_size)), middle.folder)]
    pace = int(name.removeprefix("pace-"))
    spans = [after - before for before, after in zip([0, *times], times, strict=False)]
    return [
        (max(1, int(span // (pace * batch_size))), checkpoint.folder)
        for span, checkpoint in zip(spans, teacher.checkpoints, strict=True)
    ]
