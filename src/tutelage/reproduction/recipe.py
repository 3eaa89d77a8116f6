"""What methods are compared on: a teacher, students, data, and the settings that all methods have in common."""

import dataclasses
import json
import typing
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn
from torch.utils.data import DataLoader

from tutelage.core.errors import LARGEST, UserError, check_positive, check_range
from tutelage.reproduction import schedules
from tutelage.reproduction.search import Axis
from tutelage.reproduction.statistics import as_good
from tutelage.reproduction.teachers import Teacher, TeacherRule, trained_teacher
from tutelage.reproduction.variants import PACES, Variant, plain_variant
from tutelage.runs.options import RENAMED, read_value, type_name
from tutelage.tasks.base import EvaluationTools
from tutelage.tasks.loading import load_model
from tutelage.tasks.registry import get_task

# The random streams of evaluation and of teachers are far from those that students train on.
EVAL_SEED = 1_000_000_007
TEACHER_SEED = 2_000_000_011

TRAINED = "trained"
"""The value of `teacher` that asks for a teacher trained now."""
FIXED = {"fixed": True}
"""Metadata of a dataclass field that no command line or file can change."""

_Fields = TypeVar("_Fields")


@dataclass(frozen=True)
class Recipe(ABC):
    """A system to compare methods on: its numbers are fields, everything else is a method.

    A recipe can be pickled, so that a worker process gets the recipe itself; what it has computed stays behind."""

    about: ClassVar[str] = ""  # one line for `tutelage compare --list`
    replicated: ClassVar[bool] = False  # whether all seeds train side by side in one model
    stop_at_target: ClassVar[bool] = False  # whether a run ends when all its seeds have reached the target

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of the reported runs: initial student, data order and random projection."""
    tuning_seeds: tuple[int, ...] = (1000, 1001)
    """Seeds on which learning rates and other settings are chosen; never reported."""
    learning_rates: tuple[float, ...] = (0.03, 0.1, 0.3)  # the learning rates that are tried for every method
    trials: int | None = None
    """Candidates that are tried for each method: these rates and further ones, and the settings that are searched; default:
    these rates, and the settings' own values, none beyond them. 1 tries nothing."""
    batch_size: int = 64
    budget_samples: int = 1_920_000  # examples that each method may train on
    eval_every: int = 8_000  # examples between evaluations
    fine_eval_every: int | None = None
    """Examples between evaluations where a run reached the target, to find where exactly; default: no finer ones."""
    eval_samples: int = 4096  # held-out examples, and as many others for tuning
    size: str = field(default="own", kw_only=True, metadata=FIXED)  # `smoke`, `laptop`, `paper` or `own`

    def __post_init__(self) -> None:
        at_least_one(self, "batch_size", "budget_samples", "eval_every", "eval_samples")
        for seed in (*self.seeds, *self.tuning_seeds):
            check_range("each of the seeds", seed, 0, LARGEST)
        for rate in self.learning_rates:
            check_positive("each of the learning_rates", rate)
        if self.fine_eval_every is not None:
            check_range("fine_eval_every", self.fine_eval_every, 1, self.eval_every)
        if self.trials is not None and self.trials != 1 and self.trials < len(self.learning_rates):
            found = f"trials={self.trials} is less than the number of learning_rates, {len(self.learning_rates)}"
            raise UserError(f"{found}: all of them are tried for every method; give more trials, or fewer rates")
        at_least_one(self, *(() if self.trials is None else ("trials",)))
        if self.budget_samples < self.batch_size:
            raise UserError(f"budget_samples {self.budget_samples} is less than one batch of {self.batch_size}")

    def __getstate__(self) -> dict[str, Any]:
        return {part.name: getattr(self, part.name) for part in dataclasses.fields(self)}

    @property
    @abstractmethod
    def name(self) -> str:
        """Name in reports."""

    @property
    @abstractmethod
    def task(self) -> str:
        """Name of the task (`tutelage.tasks`)."""

    @property
    @abstractmethod
    def metric(self) -> str:
        """What is compared: a key of the evaluation."""

    @property
    @abstractmethod
    def better(self) -> str:
        """`higher` or `lower`."""

    @property
    def target(self) -> float | None:
        """Value of the metric to reach; None takes the median of one-shot's final values."""
        return None

    @property
    @abstractmethod
    def default_methods(self) -> tuple[Variant, ...]:
        """The methods that are compared by default."""

    @property
    def further_methods(self) -> tuple[Variant, ...]:
        """Variants that are compared where they are asked for by name."""
        return ()

    def named(self, name: str) -> Variant:
        """The variant of the recipe that has this name, else the method; UserError where there is neither."""
        known = {variant.name: variant for variant in (*self.default_methods, *self.further_methods)}
        return known[name] if name in known else plain_variant(name)

    def reached(self, value: float, target: float) -> bool:
        """Whether a value of the metric is as good as `target`."""
        return as_good(value, target, self.better)

    def settings(self) -> dict[str, Any]:
        """The fields that a user can change, and their values."""
        return {part.name: getattr(self, part.name) for part in _changeable(self)}

    def identity(self) -> dict[str, Any]:
        """What the runs depend on besides `settings()`: for the record, and to recognise the same comparison."""
        return {}

    def all_settings(self) -> dict[str, Any]:
        """Everything that the runs depend on, as JSON values."""
        whole = {**self.settings(), **self.identity(), "metric": self.metric, "target": self.target}
        return typing.cast(dict[str, Any], json.loads(json.dumps(whole, default=str)))

    def check(self) -> None:
        """Raise UserError where the data cannot be used; reads them if need be."""

    @abstractmethod
    def arguments(self) -> dict[str, Any]:
        """`CurriculumConfig` fields of every method."""

    def method_arguments(self, method: str) -> dict[str, Any]:
        """`CurriculumConfig` fields of one method, in addition to `arguments()`."""
        return {}

    def axes(self, method: str, teacher: Teacher) -> dict[str, Axis]:
        """What is searched for a method besides its rate."""
        return {}

    @abstractmethod
    def make_teacher(self, folder: Path) -> Teacher:
        """Train, load or build the teacher; a recipe may keep things in `folder`, that of the comparison.
        Raises UserError: the teacher does not converge, or does not fit the recipe."""

    def sketch_teacher(self) -> nn.Module | None:
        """An untrained teacher of the finished one's shape; None where the shape is not known before it is loaded."""
        return None

    @abstractmethod
    def make_student(self, seeds: Sequence[int]) -> nn.Module:
        """The initial student of a seed, or of several seeds where they are replicated."""

    @abstractmethod
    def train_data(self, seeds: Sequence[int], count: int) -> Any:
        """At least `count` training examples, in the order of the seeds."""

    @abstractmethod
    def eval_data(self, seeds: Sequence[int], tuning: bool = False) -> Any:
        """Held-out examples of the seeds; those for `tuning` are others."""

    @property
    @abstractmethod
    def collator(self) -> Any:
        """Makes batches of examples."""

    @property
    def tokenizer(self) -> Any:
        """Tokenizer of text; None for other data."""
        return None


@dataclass(frozen=True)
class PaperRecipe(Recipe):
    """A recipe of the paper: it trains a teacher, unless the folder of a finished one is given."""

    teachers: ClassVar[tuple[str, ...]] = (TRAINED,)  # teachers that are not folders

    schedules: ClassVar[tuple[str, ...]] = PACES
    """Schedules of progressive distillation that are tried."""

    teacher: str = TRAINED  # `trained`, or the folder of a finished teacher
    teacher_seeds: tuple[int, ...] = (0,)
    """Seeds of the teachers; each of several is trained or built, and all methods are compared on each. Settings are chosen
    with the first."""
    teacher_learning_rate: float = 2e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.teacher_seeds or len(set(self.teacher_seeds)) != len(self.teacher_seeds):
            raise UserError(f"teacher_seeds must be different numbers, at least one, got {list(self.teacher_seeds)}")
        for seed in self.teacher_seeds:
            check_range("each of the teacher_seeds", seed, 0, LARGEST)
        check_positive("teacher_learning_rate", self.teacher_learning_rate)
        if self.teacher_is_given and not Path(self.teacher).is_dir():
            known = " or ".join(map(repr, self.teachers))
            raise UserError(f"unknown teacher {self.teacher!r}: use {known}, or the folder of a finished teacher")
        if self.teacher_is_given and len(self.teacher_seeds) > 1:
            raise UserError(f"teacher {self.teacher!r} is one finished teacher: leave teacher_seeds out")

    def axes(self, method: str, teacher: Teacher) -> dict[str, Axis]:
        if method == "extraction":
            return {**self.stage_axes(), **self.place_axes()}
        if method == "joint":
            return {"hidden_weight": Axis((0.3, 1.0, 3.0), start=1.0, grows=True), **self.place_axes()}
        return schedules.axes(teacher, self.first_phase, self.schedules) if method == "progressive" else {}

    def method_arguments(self, method: str) -> dict[str, Any]:
        own = {"extraction": self.stage_arguments(), "joint": {"hidden_weight": 1.0}}
        return {**self.places, **own[method]} if method in own else {}

    @property
    @abstractmethod
    def places(self) -> dict[str, Any]:
        """`CurriculumConfig` fields that say where hidden states are compared."""

    @abstractmethod
    def stage_arguments(self) -> dict[str, Any]:
        """`CurriculumConfig` fields of the hidden stages' length, and rate if it is their own."""

    @abstractmethod
    def stage_axes(self) -> dict[str, Axis]:
        """What is searched for the hidden stages of extraction."""

    def place_axes(self) -> dict[str, Axis]:
        """What is searched for the places where hidden states are compared, by extraction and joint alike."""
        return {}

    @property
    @abstractmethod
    def first_phase(self) -> int:
        """Samples of the phase that the search for progressive distillation begins with."""

    @property
    def teacher_seed(self) -> int:
        """Seed of the teacher, or of the first one."""
        return self.teacher_seeds[0]

    @property
    def teacher_is_given(self) -> bool:
        """Whether the teacher is read from a folder."""
        return self.teacher not in self.teachers

    def make_teacher(self, folder: Path) -> Teacher:
        if self.teacher_is_given:
            given = Teacher(self.load_teacher(self.teacher), f"given: {Path(self.teacher).name}")
            return self.checked_teacher(given)
        return self.checked_teacher(trained_teacher(self))

    def teacher_arguments(self) -> dict[str, Any]:
        """`CurriculumConfig` fields of the teacher's training."""
        return {
            **self.arguments(),
            **{"task": self.task, "seed": self.teacher_seed, "learning_rate": self.teacher_learning_rate},
            "per_device_train_batch_size": self.teacher_batch_size,
            "train_sampling_strategy": "sequential",
        }

    def sketch_teacher(self) -> nn.Module | None:
        return None if self.teacher_is_given else self.new_teacher()

    @property
    def teacher_batch_size(self) -> int:
        """Examples per step of the teacher's training."""
        return self.batch_size

    @abstractmethod
    def new_teacher(self) -> nn.Module:
        """The teacher before its training."""

    def load_teacher(self, folder: str) -> nn.Module:
        """Read a teacher from a folder; UserError where there is none of this kind."""
        return load_model(folder, get_task(self.task).auto_class)

    def evaluate(self, model: nn.Module, data: Any, batch_size: int) -> dict[str, float]:
        """Metrics of a model on held-out data."""
        with torch.random.fork_rng(devices=[]):
            batches = DataLoader(data, batch_size=batch_size, collate_fn=self.collator)
            return get_task(self.task).evaluate(model, batches, lambda batch: None, EvaluationTools())

    @abstractmethod
    def checked_teacher(self, teacher: Teacher) -> Teacher:
        """The teacher with its metrics on held-out data; UserError where it was made for other data."""

    @abstractmethod
    def teacher_rule(self) -> TeacherRule:
        """When the teacher has been trained enough."""

    @abstractmethod
    def teacher_data(self, count: int) -> tuple[Any, Any]:
        """`count` training examples of the teacher, and its evaluation data."""

    @abstractmethod
    def teacher_identity(self) -> dict[str, Any]:
        """Every setting that a trained teacher depends on, besides its rule and arguments."""


def at_least_one(recipe: Any, *names: str, most: int = LARGEST) -> None:
    """Raise UserError where one of these fields is below 1, or above `most`."""
    for name in names:
        check_range(name, getattr(recipe, name), 1, most)


def change_fields(values: _Fields, changes: Mapping[str, Any], name: str) -> _Fields:
    """The dataclass called `name` in messages, with some fields changed; text is read as the field's type.
    Raises UserError: an unknown field, or a value that cannot be read."""
    hints = typing.get_type_hints(type(values))
    known = [part.name for part in _changeable(values)]
    read = {}
    for key, value in changes.items():
        if key not in known:
            new = RENAMED.get(key)
            hint = f"it is now called {new!r}" if new in known else f"it has {', '.join(known)}"
            raise UserError(f"{name} has no field {key!r}: {hint}")
        try:
            read[key] = read_value(value, hints[key])
        except ValueError:
            raise UserError(f"cannot read {key}={value!r}: it must be {type_name(hints[key])}") from None
    return dataclasses.replace(values, **read)  # type: ignore[type-var]


def _changeable(values: Any) -> list[dataclasses.Field[Any]]:
    return [part for part in dataclasses.fields(values) if not part.metadata.get("fixed")]
