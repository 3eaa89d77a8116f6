"""Methods under comparison: named variants, and what tuning chooses for them."""

import dataclasses
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tutelage.core.curriculum import METHODS
from tutelage.core.errors import UserError, check_choice, check_positive
from tutelage.core.records import Record
from tutelage.runs.options import read_value
from tutelage.training.config import CurriculumConfig

PACES = ("two", "pace-4", "pace-2", "pace-1")
SHARES = ("two", "even", "half")
SCHEDULES = (*PACES, *SHARES[1:])
PROGRESSIVE: dict[str, Any] = {
    "schedule": str,  # one of `SCHEDULES`
    "checkpoint": int,  # with `two`: checkpoints after the one in the middle of the teacher's transition; default: 0
    "phase_samples": int,  # with `two`: samples on which the checkpoint teaches; default: half of the teacher's
}
"""Settings of progressive distillation that are searched, and their types."""

COSTS = ("samples", "flops", "seconds")
_LARGEST_BUDGET = 16.0  # times the comparison's
_BETWEEN = "|"  # between the values of a setting that are searched

# The comparison sets these itself, to the same value for every method.
_OF_THE_RUN = "method task output_dir overwrite_output_dir resume_from_checkpoint curriculum_dir seed data_seed"
_OF_THE_BUDGET = "max_steps num_train_epochs per_device_train_batch_size gradient_accumulation_steps"
_OF_EVALUATION = "eval_strategy eval_steps eval_on_start save_strategy save_steps save_total_limit logging_steps"
_OF_THE_TEACHER = "train_sampling_strategy teacher_model_name_or_path teacher_checkpoints disable_tqdm report_to"
CONTROLLED = tuple(" ".join((_OF_THE_RUN, _OF_THE_BUDGET, _OF_EVALUATION, _OF_THE_TEACHER)).split())


@dataclass(frozen=True)
class Variant(Record):
    """A method and the settings in which it differs from the recipe."""

    name: str
    method: str  # one of `METHODS`
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    """`CurriculumConfig` fields, and for progressive distillation those of `PROGRESSIVE`; none of them is searched."""
    budget_fraction: float = 1.0  # the budget that it gets, in units of the comparison's
    search: dict[str, list[Any]] = dataclasses.field(default_factory=dict)  # values that are tried, by field
    match: str | None = None  # the cost, one of `COSTS`, that is equal to one-shot's; None: that of the comparison

    def __post_init__(self) -> None:
        check_choice("method", self.method, METHODS)
        if not 0 < self.budget_fraction <= _LARGEST_BUDGET:
            found = f"budget_fraction must be above 0 and at most {_LARGEST_BUDGET:g}, got {self.budget_fraction}"
            raise UserError(found)
        if self.match is not None:
            check_choice("match", self.match, COSTS)

    @property
    def start(self) -> Any:
        """What the student starts from, where that is not the recipe's own."""
        return self.overrides.get("student_init")

    def is_plain(self, *methods: str) -> bool:
        """Whether it is one of these methods with nothing of its own but the start."""
        own = set(self.overrides) <= {"student_init"} and not self.search and self.match is None
        return own and self.budget_fraction == 1 and self.method in methods

    @property
    def settings(self) -> str:
        """What differs from the recipe, in words; empty for a plain method."""
        shown = {**self.overrides, **({} if self.budget_fraction == 1 else {"budget": self.budget_fraction})}
        shown |= {} if self.match is None else {"match": self.match}
        shown |= {key: _BETWEEN.join(map(_as_text, values)) for key, values in self.search.items()}
        return ", ".join(f"{key}={_as_text(value)}" for key, value in shown.items())


@dataclass(frozen=True)
class Candidate(Record):
    """What tuning chooses."""

    learning_rate: float
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)  # as `Variant.overrides`

    def __post_init__(self) -> None:
        check_positive("learning_rate", self.learning_rate)

    @property
    def label(self) -> str:
        """Short name, also of its folder."""
        return " ".join([f"{self.learning_rate:g}", *(f"{key}={_as_text(v)}" for key, v in self.settings.items())])


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
    """A named variant, from `CurriculumConfig` fields as text or values; `1|3|10` are values that are searched.

    There are also `method` (default: the name where it is a method, else extraction), `budget` (in units of the
    comparison's budget), `match` (the cost that is equal to one-shot's) and, for progressive, those of `PROGRESSIVE`.

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
    if not 0 < fraction <= _LARGEST_BUDGET:
        found = f"budget is in units of the comparison's, above 0 and at most {_LARGEST_BUDGET:g}, got {fraction:g}"
        raise UserError(f"variant {name!r}: {found}")
    match = given.pop("match", None)
    if match is not None and (match not in COSTS or method in ("one_shot", "progressive")):
        what = "extraction, joint and scratch, whose last stage then gets another length"
        raise UserError(f"variant {name!r}: match={match} must be one of {', '.join(COSTS)}, for {what}")
    hints = {**typing.get_type_hints(CurriculumConfig), **PROGRESSIVE}
    overrides: dict[str, Any] = {}
    search: dict[str, list[Any]] = {}
    for key, value in given.items():
        _check_field(name, method, key)
        texts = _as_text(value).split(_BETWEEN)
        values = [_read(name, key, text, hints[key]) for text in texts]
        if key == "schedule" and not set(values) <= set(SCHEDULES):
            raise UserError(f"variant {name!r}: schedule={value} is not one of {', '.join(SCHEDULES)}")
        if len(values) == 1:
            overrides[key] = values[0]
        else:
            search[key] = values
    return Variant(name, method, overrides, fraction, search, match)


def _check_field(name: str, method: str, key: str) -> None:
    """Raise UserError for a field that a variant of this method cannot set."""
    if key in PROGRESSIVE:
        if method != "progressive":
            raise UserError(f"variant {name!r}: {key} is for progressive, not for {method}")
    elif key in CONTROLLED:
        raise UserError(f"variant {name!r} cannot set {key}: the comparison sets it, the same for every method")
    elif key not in {field.name for field in dataclasses.fields(CurriculumConfig)}:
        raise UserError(f"variant {name!r} has the unknown field {key!r}: fields are those of CurriculumConfig")


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
