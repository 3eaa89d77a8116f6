"""A comparison on the user's teacher, student and data, described in a YAML file."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from torch import nn
from transformers import set_seed

from tutelage.core.errors import UserError
from tutelage.reproduction.recipe import FIXED, Recipe, change_fields
from tutelage.reproduction.search import RATE
from tutelage.reproduction.teachers import Teacher
from tutelage.reproduction.variants import CONTROLLED, Variant, plain_variant, read_methods
from tutelage.runs.inputs import RunInputs, RunOptions, load_inputs, with_defaults
from tutelage.runs.options import OptionParser, as_flags, read_options, renamed
from tutelage.targets.live import LiveTargets
from tutelage.tasks.loading import load_config
from tutelage.tasks.students import make_student, student_config
from tutelage.training.config import CurriculumConfig


@dataclass(frozen=True)
class UserRecipe(Recipe):
    """The user's run: what a comparison adds to the options of `tutelage distill`."""

    seeds: tuple[int, ...] = (0, 1, 2)
    tuning_seeds: tuple[int, ...] = (1000,)
    learning_rates: tuple[float, ...] = (1e-3, 3e-3)
    batch_size: int = 16
    budget_samples: int = 3_200
    eval_every: int = 640
    eval_samples: int = field(default=256, metadata=FIXED)  # a user gives max_samples, as on every command
    name: str = field(default="own", kw_only=True, metadata=FIXED)
    methods: tuple[Variant, ...] = field(default=(), kw_only=True, metadata=FIXED)
    """The methods that the file lists; empty takes extraction and one-shot."""
    options: dict[str, Any] = field(default_factory=dict, kw_only=True, metadata=FIXED)
    """Options of `tutelage distill` that were given, as text."""

    @property
    def task(self) -> str:
        return self._run.task.name

    @property
    def metric(self) -> str:
        return self._run.task.metric

    @property
    def better(self) -> str:
        return self._run.task.better

    @property
    def default_methods(self) -> tuple[Variant, ...]:
        return self.methods or tuple(map(plain_variant, ("joint", "extraction", "one_shot")))

    def identity(self) -> dict[str, Any]:
        return {key: str(value) for key, value in sorted(self.options.items())}

    def check(self) -> None:
        self._run  # noqa: B018 - loads models and data

    @cached_property
    def _given(self) -> tuple[RunOptions, CurriculumConfig]:
        """The options as `tutelage distill` parses its flags, with its defaults."""
        flags = ["--output_dir=unused", *as_flags(self.options)]
        parser = OptionParser((RunOptions, CurriculumConfig))
        run, config = parser.parse_args_into_dataclasses(flags, look_for_args_file=False)
        return with_defaults(dataclasses.replace(run, max_samples=run.max_samples or self.eval_samples), config)

    @cached_property
    def _run(self) -> RunInputs:
        return load_inputs(*self._given)

    def arguments(self) -> dict[str, Any]:
        names = {part.name for part in dataclasses.fields(CurriculumConfig)} - {"teacher_model_name_or_path"}
        return {key: getattr(self._given[1], key) for key in self.options if key in names}

    def make_teacher(self, folder: Path) -> Teacher:
        return Teacher(self._teacher, f"given: {self._run.names['teacher']}")

    @property
    def _teacher(self) -> nn.Module:
        source = self._run.source
        assert isinstance(source, LiveTargets), "a comparison has a teacher"
        return source.model

    def make_student(self, seeds: Sequence[int]) -> nn.Module:
        (run, config), task = self._given, self._run.task
        shape = student_config(str(run.student), load_config(str(config.teacher_model_name_or_path)), task)
        set_seed(31 + seeds[0])
        return make_student(str(run.student), task, shape, task.teacher_shape(self._teacher)).float()

    def train_data(self, seeds: Sequence[int], count: int) -> Any:
        assert self._run.train_dataset is not None
        return self._run.train_dataset.shuffle(seed=seeds[0])

    def eval_data(self, seeds: Sequence[int], tuning: bool = False) -> Any:
        rows = self._run.eval_dataset  # every other one is for tuning
        if tuning and len(rows) < 2:
            raise UserError(
                "there is one held-out example, but tuning and report need one each: give more held-out data"
            )
        return rows.select(range(int(tuning), len(rows), 2))

    @property
    def collator(self) -> Any:
        return self._run.collator

    @property
    def tokenizer(self) -> Any:
        return self._run.tokenizer


def user_recipe(file: Path | None, overrides: Mapping[str, Any]) -> UserRecipe:
    """The recipe of a YAML file: options of `tutelage distill`, fields of `UserRecipe`, and `methods`.

    `overrides` replace the file's options. Without a file, the embedded teacher, student and text are the defaults.

    Raises UserError: no such file, not YAML, an unknown option, or what `tutelage distill` refuses."""
    of_file = {} if file is None else read_options(file, "student: layers=2")
    if {"teacher", "teacher_model_name_or_path"} <= of_file.keys():
        raise UserError(f"config '{file}': teacher and teacher_model_name_or_path are the same option: leave one out")
    given = {**of_file, **overrides}
    where = "the command line" if file is None else f"config {str(file)!r}"
    methods = _methods(file) if "methods" in given else ()
    full = {"teacher": "teacher_model_name_or_path"}
    options = {full.get(key, key): value for key, value in given.items() if value is not None and key != "methods"}
    numbers = {part.name for part in dataclasses.fields(UserRecipe) if part.metadata != FIXED}
    run_options = {part.name for part in (*dataclasses.fields(RunOptions), *dataclasses.fields(CurriculumConfig))}
    for key in options:
        if key not in numbers | run_options:
            raise UserError(f"{where} has an unknown option {key!r}{renamed(key)}")
    for key in (*CONTROLLED, RATE):
        if key in options and key not in ("teacher_model_name_or_path", "task"):
            found = f"{where}: {key} is set by the comparison itself; use --methods, --output_dir, seeds"
            raise UserError(f"{found}, budget_samples, learning_rates, batch_size and eval_every")
    changes = {key: options.pop(key) for key in list(options) if key in numbers}
    name = "own" if file is None else file.stem
    recipe = change_fields(UserRecipe(name=name, options=options, methods=methods), changes, where)
    recipe.check()
    return recipe


def _methods(file: Path | None) -> tuple[Variant, ...]:
    """The methods of a file, whose values stay text: YAML alone takes `1:2` for 62."""
    if file is None:
        raise UserError("methods are given by --methods and --variant")
    given = yaml.load(file.read_text(encoding="utf-8"), yaml.BaseLoader)["methods"]
    if isinstance(given, dict):
        given = {name: {} if settings in ("", "null", "~") else settings for name, settings in given.items()}
    return read_methods(given)
