"""From settings as given to one resolved run: budget, defaults, and what an extracted curriculum decides."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import BertForSequenceClassification, Trainer, TrainingArguments

from tests.conftest import bert_config
from tests.training.conftest import llama, token_rows
from tutelage import CurriculumConfig, CurriculumTrainer, extract
from tutelage.core.blocks import FINAL
from tutelage.core.curriculum import Curriculum
from tutelage.core.errors import UserError
from tutelage.core.stages import HiddenStage
from tutelage.runs.distill import distill
from tutelage.runs.inputs import RunOptions
from tutelage.targets.extracted import ExtractedTargets
from tutelage.targets.folder import ExtractedCurriculum
from tutelage.targets.source import FixedSettings, Reading
from tutelage.tasks.language import CausalCollator
from tutelage.training.config import PRESETS
from tutelage.training.resolution import build_curriculum, deviations, resolve

Make = Callable[..., CurriculumTrainer]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("accumulation", "epochs"), [(4, 3), (3, 1.5), (1, 2)])
def test_epochs_give_the_steps_that_transformers_gives(
    make_trainer: Make, tmp_path: Path, accumulation: int, epochs: float, drop_last: bool
) -> None:
    budget = {
        "num_train_epochs": epochs,
        "gradient_accumulation_steps": accumulation,
        "per_device_train_batch_size": 5,
        "dataloader_drop_last": drop_last,
        "use_cpu": True,
        "report_to": "none",
    }
    plain = Trainer(
        llama(2, 16, seed=2),
        TrainingArguments(str(tmp_path / "plain"), **budget),
        train_dataset=token_rows(),
        data_collator=CausalCollator(),
    )
    loader = plain.get_train_dataloader()
    expected = plain.set_initial_training_values(plain.args, loader)[-1]
    trainer = make_trainer(method="one_shot", max_steps=-1, **budget)
    assert trainer.curriculum.total_steps == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"method": "one_shot", "num_stages": 1, "projection": "pca"},
            "method 'one_shot' does not read num_stages and projection: leave them out, or use method extraction or joint",
        ),
        (
            {"method": "joint", "stage_steps": [2]},
            "'joint' does not read stage_steps: leave it out, or use method extraction",
        ),
        (
            {"method": "one_shot", "stage_fraction": 0.25},
            "'one_shot' does not read stage_fraction: leave it out, or use",
        ),
        ({"method": "one_shot", "hidden_weight": 2.0}, "'one_shot' does not read hidden_weight: leave it out, or use"),
        (
            {"method": "one_shot", "normalize": "none"},
            "'one_shot' does not read normalize: leave it out, or use method",
        ),
        (
            {"method": "one_shot", "warm_start": "embedding", "projection": "pca"},
            "'one_shot' does not read projection:",
        ),
        ({"method": "progressive", "projection_seed": 1}, "'progressive' does not read projection_seed: leave it out"),
        (
            {"method": "extraction", "teacher_checkpoints": ["a"]},
            "'extraction' does not read teacher_checkpoints: .*progre",
        ),
        (
            {"method": "scratch", "warm_start": "head"},
            "'scratch' does not read warm_start: leave it out, or use method ex",
        ),
        (
            {"method": "scratch", "temperature": 2.0},
            "'scratch' does not read temperature: leave it out, or use method ext",
        ),
        (
            {"method": "scratch", "output_loss": "mse", "hidden_weight": 1.0},
            "read hidden_weight and output_loss: leave them",
        ),
    ],
)
def test_settings_that_a_method_does_not_read_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_curriculum(CurriculumConfig(use_cpu=True, **fields), (2, 4), 8)


@pytest.mark.parametrize("method", ["one_shot", "scratch"])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_setting_as_in_the_preset_is_not_refused(method: str, preset: str) -> None:
    """A method may be left to read less than the others of a comparison, where nothing deviates."""
    fields = {name: PRESETS[preset][name] for name in ("stage_fraction", "projection", "normalize", "temperature")}
    args = CurriculumConfig(use_cpu=True, method=method, preset=preset, warm_start="none", label_weight=0.0, **fields)
    assert build_curriculum(args, (2, 4), 8).method == method


def test_fewer_stages_are_at_blocks_that_the_student_starts_from() -> None:
    settings = {"student_init": "teacher", "method": "extraction", "num_stages": 2, "start_blocks": "1,2,11,12"}
    curriculum = resolve(
        CurriculumConfig(use_cpu=True, max_steps=8, **settings), (4, 12), FixedSettings(), None, "head"
    )
    stages = [(stage.student_place, stage.teacher_place) for stage in curriculum.curriculum.hidden_stages]
    assert stages == [(2, 2), (4, 12)]


@pytest.mark.parametrize("choice", ["1,13", [1, 13], [1]])
def test_start_blocks_are_checked_as_text_and_as_a_list(choice: Any) -> None:
    args = CurriculumConfig(use_cpu=True, method="one_shot", student_init="teacher", start_blocks=choice)
    with pytest.raises(UserError, match="does not name 2 blocks of the teacher, 1 to 12"):
        build_curriculum(args, (2, 12), 8)


# ---- Presets ----

RANDOM, TEACHER = {"student_init": "random"}, {"student_init": "teacher"}
PAPER = {"projection": "gaussian", "normalize": "none", "warm_start": "none", "temperature": 1.0}


@pytest.mark.parametrize(
    ("fields", "expected", "places"),
    [
        ({"preset": "paper"}, PAPER, [1, 2]),
        ({"preset": "paper", "num_stages": 1}, PAPER, [2]),
        ({"preset": "paper", "normalize": "standardize"}, {**PAPER, "normalize": "standardize"}, [1, 2]),
        ({"preset": "paper", "warm_start": "head"}, {**PAPER, "warm_start": "head"}, [FINAL]),
        ({"preset": "default"}, {**PAPER, "normalize": "standardize", "warm_start": "head"}, [FINAL]),
        ({}, {**PAPER, "normalize": "standardize", "warm_start": "head"}, [FINAL]),
        ({"projection": "pca", "num_stages": 2}, {**PAPER, "projection": "pca", "normalize": "standardize"}, [1, 2]),
    ],
)
def test_what_is_not_given_is_as_in_the_preset(fields: dict[str, Any], expected: dict[str, Any], places: Any) -> None:
    args = CurriculumConfig(use_cpu=True, max_steps=8, **fields)
    run = resolve(args, (2, 4), FixedSettings(), None, "head")
    assert {name: getattr(run.curriculum, name) for name in expected} == expected
    assert run.curriculum.method == "extraction"
    assert run.curriculum.places("student") == places
    assert sum(stage.steps for stage in run.curriculum.hidden_stages) == 4


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(UserError, match="unknown preset 'papers': use one of default, paper"):
        CurriculumConfig(use_cpu=True, preset="papers")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, RANDOM),
        ({"projection": "gaussian", "temperature": 1, "per_device_train_batch_size": 4}, RANDOM),
        ({"projection": "pca", "label_weight": 0.5}, {"projection": "pca", "label_weight": 0.5, **RANDOM}),
        ({"warm_start": "none"}, {"warm_start": "none", **RANDOM}),
        ({"method": "one_shot", "top_k": 3}, {"method": "one_shot", "top_k": 3, **RANDOM}),
        ({"projection": "learned"}, {"projection": "learned", **RANDOM}),
        (
            {"method": "one_shot", "warm_start": "head", "projection": "pca"},
            {"method": "one_shot", "warm_start": "head", "projection": "pca", **RANDOM},
        ),
        (
            {"method": "joint", "output_loss": "mse", "output_positions": "all", **TEACHER},
            {"output_loss": "mse", "output_positions": "all"},
        ),
        ({"method": "joint", **TEACHER}, {}),
        ({"method": "joint", "projection": "pca", **TEACHER}, {"projection": "pca"}),
        ({"method": "extraction", "warm_start": "none", **TEACHER}, {"method": "extraction"}),
        (
            {"method": "one_shot", "residual_basis": "logits", **TEACHER},
            {"method": "one_shot", "residual_basis": "logits"},
        ),
        ({"preset": "paper", **TEACHER}, {"projection": "residual", **TEACHER}),
        ({"preset": "paper"}, {}),
        ({"preset": "paper", "warm_start": "none", "stage_fraction": 0.5}, {}),
        ({"preset": "paper", "layer_map": "1:3"}, {"layer_map": "1:3"}),
        ({"preset": "paper", "warmup_steps": 0.1}, {"warmup_steps": 0.1}),
        ({"preset": "paper", "disable_dropout": False}, {"disable_dropout": False}),
        ({"preset": "paper", "embedding_loss": "mse"}, {"embedding_loss": "mse"}),
        ({"preset": "paper", "normalize": "standardize"}, {"normalize": "standardize"}),
    ],
)
def test_deviations_are_the_settings_that_differ_from_the_preset(
    fields: dict[str, Any], expected: dict[str, Any]
) -> None:
    args = CurriculumConfig(use_cpu=True, max_steps=8, **fields)
    assert deviations(args, resolve(args, (2, 4), FixedSettings(), None, "head").curriculum) == expected


def test_an_extracted_curriculum_goes_before_the_preset(extracted: Path) -> None:
    made = ExtractedCurriculum(extracted)
    fixed = ExtractedTargets(made).fixed_settings(2)
    args = CurriculumConfig(use_cpu=True, preset="paper", max_steps=8)
    curriculum = resolve(args, (2, 4), fixed, None, "none").curriculum
    assert made.curriculum.warm_start == curriculum.warm_start == "head"
    expected = {"projection": "rademacher", "projection_seed": 5, "temperature": 2.0, "warm_start": "head", "top_k": 64}
    assert deviations(args, curriculum) == expected


def test_classifiers_get_the_papers_stages_by_default(classifier_teacher: Path, tmp_path: Path) -> None:
    rows = Dataset.from_dict({"input_ids": [[2, 7, 3]] * 8, "labels": [0] * 8})
    args = CurriculumConfig(output_dir=str(tmp_path / "o"), max_steps=8, use_cpu=True)
    student = BertForSequenceClassification(bert_config(num_hidden_layers=2, num_labels=3))
    trainer = CurriculumTrainer(student, str(classifier_teacher), args, rows)
    assert trainer.curriculum.warm_start == "none"
    assert [stage.student_place for stage in trainer.curriculum.stages if isinstance(stage, HiddenStage)] == [1, 2]
    assert FINAL not in [stage.teacher_place for stage in trainer.curriculum.hidden_stages]


# ---- What an extracted curriculum decides ----


@pytest.fixture(scope="module")
def extracted(causal_teacher: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made with settings that are not the defaults."""
    folder = tmp_path_factory.mktemp("extracted") / "curriculum"
    fields = {"normalize": "none", "temperature": 2.0, "projection": "rademacher", "projection_seed": 5, **RANDOM}
    args = settings(folder, teacher_model_name_or_path=str(causal_teacher), calibration_samples=8, **fields)
    options = RunOptions(student="layers=2,hidden_size=16", dataset=str(corpus / "text.jsonl"), max_length=16)
    extract(options, args, log=lambda line: None)
    return folder


def settings(folder: Path, **fields: Any) -> CurriculumConfig:
    defaults = {
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return CurriculumConfig(str(folder), **{**defaults, **fields})


@pytest.mark.parametrize(
    ("setting", "made_with"),
    [
        ({"normalize": "standardize"}, "none"),
        ({"temperature": 1.0}, "2.0"),
        ({"projection": "gaussian"}, "rademacher"),
        ({"projection_seed": 0}, "5"),
        ({"calibration_samples": 64}, "8"),
        ({"top_k": 3}, "64"),
    ],
)
def test_a_default_given_explicitly_is_refused_where_the_extracted_curriculum_differs(
    extracted: Path, tmp_path: Path, setting: dict[str, Any], made_with: str
) -> None:
    args = settings(tmp_path / "run", curriculum_dir=str(extracted), **setting)
    name, value = next(iter(setting.items()))
    assert name == "top_k" or value == PRESETS["default"][name]
    message = re.escape(f"was made with {name}={made_with}, but {name}={value} was given: leave {name} out")
    with pytest.raises(UserError, match=message):
        distill(None, args)
    assert not (tmp_path / "run").exists()


def test_settings_as_extracted_may_be_given(extracted: Path, tmp_path: Path) -> None:
    fields = {"normalize": "none", "temperature": 2.0, "projection": "rademacher", "projection_seed": 5, "top_k": 64}
    given = distill(None, settings(tmp_path / "given", curriculum_dir=str(extracted), **fields))
    left_out = distill(None, settings(tmp_path / "left_out", curriculum_dir=str(extracted)))
    assert given.student == left_out.student
    records = [(tmp_path / name / "curriculum.json").read_text() for name in ("given", "left_out")]
    assert records[0] == records[1]
    curriculum = Curriculum.from_json(records[0])
    assert {name: getattr(curriculum, name) for name in fields} == fields


def test_epochs_are_counted_over_the_rows_of_an_extracted_curriculum(extracted: Path, tmp_path: Path) -> None:
    rows = ExtractedCurriculum(extracted).identity.data.rows
    args = settings(tmp_path / "run", curriculum_dir=str(extracted), max_steps=-1, num_train_epochs=0.5)
    steps = math.ceil(0.5 * math.ceil(rows / 4))
    assert steps != 8
    assert distill(None, args).budget.steps == steps


def test_without_a_budget_that_of_the_extraction_is_taken(extracted: Path, tmp_path: Path) -> None:
    args = settings(tmp_path / "run", curriculum_dir=str(extracted), max_steps=-1)
    assert distill(None, args).budget.steps == 8


def test_the_source_decides_what_is_left_open() -> None:
    fixed = FixedSettings(
        where="the folder",
        values={"normalize": "none", "temperature": 2.0, "calibration_samples": 8},
        layer_map=[(1, 2), (FINAL, FINAL)],
        hidden_steps={2: 3, FINAL: 4},
        output_steps=5,
        warm_start="head",
        step_examples=12,
        rows=100,
    )
    run = resolve(CurriculumConfig(use_cpu=True, gradient_accumulation_steps=3), (2, 4), fixed, None, "none")
    assert [stage.steps for stage in run.curriculum.stages] == [3, 4, 5]
    assert (run.curriculum.normalize, run.curriculum.temperature, run.curriculum.warm_start) == ("none", 2.0, "head")
    assert (run.calibration_samples, run.reading) == (8, Reading(12, 4, 1, 42))
    given = resolve(CurriculumConfig(use_cpu=True, num_train_epochs=2), (2, 4), fixed, None, "none")
    assert given.curriculum.total_steps == 2 * math.ceil(100 / 12)
    with pytest.raises(UserError, match=r"the folder was made with temperature=2\.0, but temperature=1\.0 was given"):
        resolve(CurriculumConfig(use_cpu=True, temperature=1.0), (2, 4), fixed, None, "none")


def test_an_unknown_budget_is_refused() -> None:
    with pytest.raises(UserError, match="the budget is unknown: set max_steps, or num_train_epochs with a sized"):
        resolve(CurriculumConfig(use_cpu=True), (2, 4), FixedSettings(), None, "none")


# ---- Settings stay as they were given ----


def snapshot(args: CurriculumConfig) -> dict[str, Any]:
    _ = args.device  # cached at its first use
    shared = {"distributed_state"}  # of the process
    return {name: value if name in shared else copy.deepcopy(value) for name, value in vars(args).items()}


@pytest.mark.parametrize("fields", [{}, {"method": "one_shot"}, {"max_steps": -1, "num_train_epochs": 1.0}])
def test_the_trainer_leaves_the_settings_as_they_are(tmp_path: Path, fields: dict[str, Any]) -> None:
    args = settings(tmp_path / "run", **{"per_device_train_batch_size": None, "calibration_samples": None, **fields})
    before = snapshot(args)
    student, teacher = llama(2, 16, seed=2), llama(4, 24, seed=1)
    trainer = CurriculumTrainer(student, teacher, args, token_rows(), token_rows(8), data_collator=CausalCollator())
    trainer.train()
    trainer.evaluate()
    assert vars(args) == before
    assert trainer.args is not args
    assert trainer.args.per_device_train_batch_size == 16
    assert trainer.args.max_steps == trainer.curriculum.total_steps


@pytest.mark.parametrize("stored", [False, True])
def test_distill_leaves_the_settings_as_they_are(
    extracted: Path, causal_teacher: Path, corpus: Path, tmp_path: Path, stored: bool
) -> None:
    options, fields = RunOptions(max_samples=4), {"curriculum_dir": str(extracted)}
    if not stored:
        options = RunOptions("layers=2,hidden_size=16", str(corpus / "text.jsonl"), max_length=16)
        fields = {"teacher_model_name_or_path": str(causal_teacher)}
    args = settings(tmp_path / "run", **{"disable_tqdm": False, **fields})
    before, options_before = snapshot(args), copy.deepcopy(options)
    distill(options, args)
    assert vars(args) == before
    assert options == options_before
