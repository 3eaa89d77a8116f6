"""Methods under comparison: named variants, what is tuned for them, and the curricula they become."""

import dataclasses
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tutelage.core.curriculum import METHODS, Curriculum
from tutelage.core.errors import UserError, check_choice, check_positive
from tutelage.core.records import Record
from tutelage.core.stages import OutputStage
from tutelage.reproduction.teachers import Teacher
from tutelage.runs.options import read_value
from tutelage.training.config import CurriculumConfig
from tutelage.training.resolution import build_curriculum as method_curriculum
from tutelage.training.resolution import shared_settings

# How progressive distillation uses the teacher's checkpoints: at the teacher's pace, faster, or one checkpoint from
# the middle of its transition and then the finished teacher (arXiv:2410.05464). All are searched.
SCHEDULES = ("two", "pace-4", "pace-2", "pace-1")

# The comparison sets these itself, to the same value for every method.
_OF_THE_RUN = "method task output_dir overwrite_output_dir resume_from_checkpoint curriculum_dir seed data_seed"
_OF_THE_BUDGET = "max_steps num_train_epochs learning_rate per_device_train_batch_size gradient_accumulation_steps"
_OF_EVALUATION = "eval_strategy eval_steps eval_on_start save_strategy save_steps save_total_limit logging_steps"
_OF_THE_TEACHER = "train_sampling_strategy teacher_model_name_or_path teacher_checkpoints disable_tqdm report_to"
CONTROLLED = tuple(" ".join((_OF_THE_RUN, _OF_THE_BUDGET, _OF_EVALUATION, _OF_THE_TEACHER)).split())


@dataclass(frozen=True)
class Variant(Record):
    """A method and the settings in which it differs from the recipe."""

    name: str
    method: str  # one of `METHODS`
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    """`CurriculumConfig` fields; `schedule` too for progressive distillation."""
    budget_fraction: float = 1.0  # fraction of the comparison's budget that it gets

    def __post_init__(self) -> None:
        check_choice("method", self.method, METHODS)
        if not 0 < self.budget_fraction <= 1:
            raise UserError(f"budget_fraction must be above 0 and at most 1, got {self.budget_fraction}")

    @property
    def settings(self) -> str:
        """The overrides and the fraction of the budget in words; empty for a plain method."""
        shown = {**self.overrides, **({} if self.budget_fraction == 1 else {"budget": self.budget_fraction})}
        return ", ".join(f"{key}={_as_text(value)}" for key, value in shown.items())


@dataclass(frozen=True)
class Candidate(Record):
    """What tuning chooses."""

    learning_rate: float
    schedule: str | None = None  # progressive: one of `SCHEDULES`

    def __post_init__(self) -> None:
        check_positive("learning_rate", self.learning_rate)
        if self.schedule is not None:
            check_choice("schedule", self.schedule, SCHEDULES)

    @property
    def label(self) -> str:
        """Short name, also of its folder."""
        return f"{self.learning_rate:g}" + (f" {self.schedule}" if self.schedule else "")


def plain_variant(method: str) -> Variant:
    """A method with the recipe's settings; UserError where it is unknown."""
    if ":" in method:
        name, _, settings = method.partition(":")
        raise UserError(
            f"{method!r} is not the name of a method. Give settings to a named variant: "
            f"--variant NAME:method={name},{settings}, or in a comparison file methods: {{NAME: {{method: {name}, ...}}}}"
        )
    if method not in METHODS:
        raise UserError(f"unknown method {method!r}: use one of {', '.join(METHODS)}, or define it with --variant")
    return Variant(method, method)


def make_variant(name: str, settings: Mapping[str, Any]) -> Variant:
    """A named variant, from `CurriculumConfig` fields as text or values.

    There are also `method` (default: the name where it is a method, else extraction), `budget` (a fraction of the
    comparison's budget) and, for progressive, `schedule`.

    Raises UserError: a bad name, an unknown method or field, or a value that cannot be read."""
    if not re.fullmatch(r"[\w.+-]+", name):
        raise UserError(f"{name!r} cannot name a variant: use letters, digits and the signs . _ + -")
    given = dict(settings)
    method = str(given.pop("method", name if name in METHODS else "extraction"))
    if method not in METHODS:
        raise UserError(f"variant {name!r} has the unknown method {method!r}: use one of {', '.join(METHODS)}")
    if name in METHODS and name != method:
        raise UserError(f"variant {name!r} has the method {method}, but {name} is a method: choose a different name")
    fraction = _read(name, "budget", given.pop("budget", 1.0), float)
    if not 0 < fraction <= 1:
        raise UserError(f"variant {name!r}: budget is a fraction, above 0 and at most 1, got {fraction:g}")
    fields = {field.name for field in dataclasses.fields(CurriculumConfig)}
    for key, value in given.items():
        if key == "schedule":
            if method != "progressive" or value not in SCHEDULES:
                raise UserError(f"variant {name!r}: schedule={value} is for progressive, one of {', '.join(SCHEDULES)}")
        elif key in CONTROLLED:
            raise UserError(f"variant {name!r} cannot set {key}: the comparison sets it, the same for every method")
        elif key not in fields:
            raise UserError(f"variant {name!r} has the unknown field {key!r}: fields are those of CurriculumConfig")
    hints = {**typing.get_type_hints(CurriculumConfig), "schedule": str}
    overrides = {key: _read(name, key, value, hints[key]) for key, value in given.items()}
    return Variant(name, method, overrides, fraction)


def parse_variant(text: str) -> Variant:
    """A variant as written on the command line: `NAME:key=value,key=value`.
    Raises UserError: not of this form, or what `make_variant` refuses."""
    name, colon, rest = text.partition(":")
    settings: dict[str, str] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if equals:
            last, settings[key] = key, value
        elif settings:
            settings[last] += f",{part}"  # a comma within a value: layer_map=1:1,2:2
        else:
            raise UserError(f"cannot read {part!r} in the variant {text!r}: write NAME:key=value,key=value")
    if not colon or not settings:
        raise UserError(f"the variant {text!r} has no settings: write NAME:key=value,key=value")
    return make_variant(name, settings)


def read_methods(value: Any) -> tuple[Variant, ...]:
    """The `methods` of a comparison file: a mapping of names to settings, or a list of names of methods.
    Raises UserError: neither of the two, or what `make_variant` refuses."""
    if isinstance(value, str):
        value = value.split()
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return tuple(plain_variant(name) for name in value)
    if not isinstance(value, Mapping) or not value:
        raise UserError(
            f"methods must be a mapping of names to settings, e.g. {{one_shot: {{}}, mine: {{layer_map: final:final}}}}, or "
            f"a list of names, got {value!r}"
        )
    for name, settings in value.items():
        if settings and not isinstance(settings, Mapping):
            raise UserError(f"variant {name!r} needs a mapping, e.g. {{warm_start: head}}, got {settings!r}")
    return tuple(make_variant(str(name), given) if given else plain_variant(str(name)) for name, given in value.items())


def _read(name: str, key: str, value: Any, hint: Any) -> Any:
    may_be_text = str in typing.get_args(hint)  # then it stays text, also where it is `none`
    try:
        return read_value(_as_text(value), str if may_be_text else hint)
    except ValueError:
        raise UserError(f"variant {name!r}: cannot read {key}={_as_text(value)!r}") from None


def _as_text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


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
    fraction: float = 1.0,
) -> Curriculum:
    """The curriculum of a run of `steps` steps, `fraction` of the comparison's budget, of `batch_size` examples each.

    `blocks` are the numbers of blocks of student and teacher. Progressive distillation uses the candidate's schedule, which
    `fraction` shortens too, and the teacher's checkpoints; UserError where there are none, or for what the builders refuse."""
    if args.method != "progressive":
        return method_curriculum(args, blocks, steps)
    if not teacher.checkpoints:
        found = "progressive distillation needs checkpoints of the teacher's training, and this teacher has none"
        raise UserError(f"{found} ({teacher.description}): leave progressive out of --methods")
    assert candidate.schedule is not None
    uses: list[tuple[int, str | None]] = []
    left = steps
    for count, folder in _schedule(candidate.schedule, teacher, batch_size / fraction):
        count = min(count, left - 1)  # the finished teacher comes last, at least for one step
        if count < 1:
            break
        uses.append((count, folder))
        left -= count
    stages = tuple(
        OutputStage(count, teacher_checkpoint=folder, label_weight=args.label_weight, continues=number > 0)
        for number, (count, folder) in enumerate([*uses, (left, None)])
    )
    return Curriculum("progressive", stages, **shared_settings(args, blocks))


def _schedule(name: str, teacher: Teacher, batch_size: float) -> list[tuple[int, str]]:
    times = [checkpoint.samples for checkpoint in teacher.checkpoints]
    if name == "two":
        middle = teacher.checkpoints[len(times) // 2 if teacher.transition is None else teacher.transition]
        return [(max(1, int(middle.samples // 2 // batch_size)), middle.folder)]
    pace = int(name.removeprefix("pace-"))
    return [
        (max(1, int((checkpoint.samples - before) // (pace * batch_size))), checkpoint.folder)
        for before, checkpoint in zip([0, *times], teacher.checkpoints, strict=False)
    ]
