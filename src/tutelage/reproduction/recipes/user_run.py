"""A comparison on the user's own teacher, student and data, described in a YAML file.

Public names: `own_system`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import set_seed

from tutelage.core.errors import UserError
from tutelage.reproduction.comparison_setting import RecipeFields, System, Teacher
from tutelage.reproduction.recipes.fields import read_fields
from tutelage.reproduction.variants import CONTROLLED
from tutelage.runs.options import ConfigParser, as_flags, read_options
from tutelage.runs.settings import RunArguments, fill_defaults, prepare_run
from tutelage.tasks.loading import load_config
from tutelage.tasks.students import make_student, student_config
from tutelage.training.config import CurriculumConfig


@dataclass(frozen=True)
class OwnFields(RecipeFields):
    """What a comparison adds to the options of `tutelage distill`."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Reported seeds."""
    tuning_seeds: tuple[int, ...] = (1000,)
    """Seeds on which the learning rate is chosen."""
    learning_rates: tuple[float, ...] = (1e-3, 3e-3)
    """The grid that every method gets."""
    batch_size: int = 16
    """Sequences a step."""
    budget_samples: int = 3_200
    """Sequences that each method may train on."""
    eval_every: int = 640
    """Sequences between evaluations."""
    eval_samples: int = 256
    """Held-out sequences."""
    tuning_share: float = 1.0
    """Share of the budget that tuning runs get."""


def own_system(file: Path, overrides: Mapping[str, Any]) -> System:
    """The system of a YAML file: options of `tutelage distill`, and fields of `OwnFields`.

    Raises:
        UserError: no such file, not YAML, an unknown option, or what `tutelage distill` refuses.
    """
    given = {**read_options(file, "student: layers=2"), **overrides}
    # the keys that name models and data, for distill as for compare
    options = {
        "teacher_model_name_or_path" if key == "teacher" else key: value
        for key, value in given.items()
        if value is not None
    }
    own = {field.name for field in dataclasses.fields(OwnFields)} - {"eval_samples"}
    run_names = {field.name for field in dataclasses.fields(RunArguments)}
    config_names = {field.name for field in dataclasses.fields(CurriculumConfig)}
    for key in options:
        if key not in own | run_names | config_names:
            raise UserError(f"config {str(file)!r} has an unknown option {key!r}")
    for key in CONTROLLED:
        if key in options and key not in ("teacher_model_name_or_path", "task"):
            raise UserError(
                f"config {str(file)!r}: {key} is set by the comparison itself; use --methods, --output_dir, seeds, "
                "budget_samples, learning_rates, batch_size and eval_every"
            )
    fields: OwnFields = read_fields(OwnFields(), {key: options[key] for key in options if key in own}, str(file))
    run, config = _parse({key: options[key] for key in options if key in run_names | config_names})
    run.eval_samples = run.eval_samples or fields.eval_samples
    arguments = {key: getattr(config, key) for key in options if key in config_names}
    fill_defaults(run, config)
    prepared = prepare_run(run, config)
    teacher = prepared.teacher
    train_dataset = prepared.train_dataset
    assert teacher is not None and run.student is not None and train_dataset is not None
    base = load_config(str(config.teacher_model_name_or_path))
    shape = student_config(run.student, base)

    def student(seeds: Any) -> Any:
        set_seed(31 + seeds[0])
        return make_student(str(run.student), prepared.task, shape, teacher).float()

    lower = prepared.task.name != "embedding"
    arguments.pop("teacher_model_name_or_path", None)
    return System(
        recipe=file.stem,
        size="own",
        fields=fields,
        task=prepared.task.name,
        metric="loss" if lower else "cosine",
        better="lower" if lower else "higher",
        target=None,
        arguments=arguments,
        make_teacher=lambda _: Teacher(teacher, {"description": f"given: {prepared.names['teacher']}"}),
        make_student=student,
        train_data=lambda seeds, count: train_dataset.shuffle(seed=seeds[0]),
        eval_data=lambda seeds: prepared.eval_dataset,
        collator=prepared.collator,
        default_methods=("extraction", "extraction:warm_start=none,normalize=none", "one_shot"),
        tokenizer=prepared.tokenizer,
        identity={key: str(value) for key, value in sorted(options.items()) if key not in own},
        again=functools.partial(own_system, file, dict(overrides)),
    )


def _parse(options: Mapping[str, Any]) -> tuple[RunArguments, CurriculumConfig]:
    """Options as `tutelage distill` parses its flags."""
    kinds: Any = (RunArguments, CurriculumConfig)
    flags = ["--output_dir=unused", *as_flags(options)]
    run, config = ConfigParser(kinds).parse_args_into_dataclasses(flags, look_for_args_file=False)
    return run, config
