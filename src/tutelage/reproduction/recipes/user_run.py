"""A comparison on the user's own teacher, student and data, described in a YAML file.

Public names: `UserRecipe`, `user_recipe`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn
from transformers import set_seed

from tutelage.core.errors import UserError
from tutelage.reproduction.recipe import FIXED, Recipe, change_fields
from tutelage.reproduction.teachers import Teacher
from tutelage.reproduction.variants import CONTROLLED, Variant, parse_variant
from tutelage.runs.options import ConfigParser, as_flags, read_options
from tutelage.runs.settings import Run, RunArguments, fill_defaults, prepare_run
from tutelage.tasks.loading import load_config
from tutelage.tasks.students import make_student, student_config
from tutelage.training.config import CurriculumConfig


@dataclass(frozen=True)
class UserRecipe(Recipe):
    """The user's own run: what a comparison adds to the options of `tutelage distill`."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Reported seeds."""
    tuning_seeds: tuple[int, ...] = (1000,)
    """Seeds on which the learning rate is chosen."""
    learning_rates: tuple[float, ...] = (1e-3, 3e-3)
    """The learning rates that are tried for every method."""
    batch_size: int = 16
    """Sequences per step."""
    budget_samples: int = 3_200
    """Sequences that each method may train on."""
    eval_every: int = 640
    """Sequences between evaluations."""
    eval_samples: int = 256
    """Held-out sequences."""
    tuning_share: float = 1.0
    """Fraction of the budget that tuning runs get."""
    title: str = field(default="own", kw_only=True, metadata=FIXED)
    """Name in reports: that of the file."""
    options: dict[str, Any] = field(default_factory=dict, kw_only=True, metadata=FIXED)
    """Options of `tutelage distill` that were given, as text."""

    @property
    def name(self) -> str:
        return self.title

    @property
    def task(self) -> str:
        return self._run.task.name

    @property
    def metric(self) -> str:
        return "cosine" if self.task == "embedding" else "loss"

    @property
    def better(self) -> str:
        return "higher" if self.metric == "cosine" else "lower"

    @property
    def default_methods(self) -> tuple[Variant, ...]:
        names = ("extraction", "extraction:warm_start=none,normalize=none", "one_shot")
        return tuple(parse_variant(name) for name in names)

    def identity(self) -> dict[str, Any]:
        return {key: str(value) for key, value in sorted(self.options.items())}

    def check(self) -> None:
        self._run  # noqa: B018 - loads models and data

    @cached_property
    def _prepared(self) -> _Prepared:
        return _prepare(self.options, self.eval_samples)

    @property
    def _run(self) -> Run:
        return self._prepared.run

    def arguments(self) -> dict[str, Any]:
        return self._prepared.arguments

    def make_teacher(self, folder: Path) -> Teacher:
        assert self._run.teacher is not None
        return Teacher(self._run.teacher, f"given: {self._run.names['teacher']}")

    def make_student(self, seeds: Sequence[int]) -> nn.Module:
        made = self._prepared
        set_seed(31 + seeds[0])
        return make_student(made.student, made.run.task, made.shape, made.run.teacher).float()

    def train_data(self, seeds: Sequence[int], count: int) -> Any:
        assert self._run.train_dataset is not None
        return self._run.train_dataset.shuffle(seed=seeds[0])

    def eval_data(self, seeds: Sequence[int]) -> Any:
        return self._run.eval_dataset

    @property
    def collator(self) -> Any:
        return self._run.collator

    @property
    def tokenizer(self) -> Any:
        return self._run.tokenizer


def user_recipe(file: Path, overrides: Mapping[str, Any]) -> UserRecipe:
    """The recipe of a YAML file: options of `tutelage distill`, and fields of `UserRecipe`.

    Args:
        file: the file.
        overrides: options that replace the file's.

    Raises:
        UserError: no such file, not YAML, an unknown option, or what `tutelage distill` refuses.
    """
    given = {**read_options(file, "student: layers=2"), **overrides}
    options = {
        "teacher_model_name_or_path" if key == "teacher" else key: value
        for key, value in given.items()
        if value is not None
    }
    numbers = {part.name for part in dataclasses.fields(UserRecipe) if part.metadata != FIXED}
    run_options = {part.name for part in (*dataclasses.fields(RunArguments), *dataclasses.fields(CurriculumConfig))}
    for key in options:
        if key not in numbers | run_options:
            raise UserError(f"config {str(file)!r} has an unknown option {key!r}")
    for key in CONTROLLED:
        if key in options and key not in ("teacher_model_name_or_path", "task"):
            raise UserError(
                f"config {str(file)!r}: {key} is set by the comparison itself; use --methods, --output_dir, seeds, "
                "budget_samples, learning_rates, batch_size and eval_every"
            )
    rest = {key: value for key, value in options.items() if key not in numbers}
    changes = {key: value for key, value in options.items() if key in numbers}
    recipe = change_fields(UserRecipe(title=file.stem, options=rest), changes, str(file))
    recipe.check()
    return recipe


@dataclass(frozen=True)
class _Prepared:
    """What the options of `tutelage distill` come to."""

    run: Run
    student: str
    """As it was named."""
    shape: Any
    """Configuration of the student."""
    arguments: dict[str, Any]
    """`CurriculumConfig` fields that were given."""


def _prepare(options: Mapping[str, Any], eval_samples: int) -> _Prepared:
    """Parse options as `tutelage distill` parses its flags, with its defaults, and load models and data."""
    kinds: Any = (RunArguments, CurriculumConfig)
    flags = ["--output_dir=unused", *as_flags(options)]
    run, config = ConfigParser(kinds).parse_args_into_dataclasses(flags, look_for_args_file=False)
    names = {part.name for part in dataclasses.fields(CurriculumConfig)} - {"teacher_model_name_or_path"}
    arguments = {key: getattr(config, key) for key in options if key in names}
    run.eval_samples = eval_samples
    fill_defaults(run, config)
    shape = student_config(str(run.student), load_config(str(config.teacher_model_name_or_path)))
    return _Prepared(prepare_run(run, config), str(run.student), shape, arguments)
