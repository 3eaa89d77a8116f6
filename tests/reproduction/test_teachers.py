"""Records of trained teachers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.reproduction.comparing import TRAINED, tiny
from tutelage.core.errors import UserError
from tutelage.reproduction import teachers
from tutelage.reproduction.recipes import resolve
from tutelage.reproduction.teachers import Checkpoint, TrainedTeacher
from tutelage.training.checks import TrainingDiverged


def test_a_record_is_read_back_as_it_was_written() -> None:
    record = TrainedTeacher(
        description="trained from labels for 640 examples",
        samples=640,
        converged_at=None,
        transition=1,
        metrics={"loss": 0.5},
        curve=((0, 0.7), (640, 0.5)),
        checkpoints=(Checkpoint(320, "at-320"), Checkpoint(640, "at-640")),
        settings={"d": 8, "rule": {"metric": "loss"}},
        files={"final/model.safetensors": "0" * 64},
    )
    assert TrainedTeacher.from_json(record.to_json()) == record


def test_a_teachers_folder_is_named_after_all_that_it_depends_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teachers, "_train", lambda folder, recipe: asked.append(folder))
    asked: list[Path] = []

    def folder(**fields: Any) -> str:
        with pytest.raises(UserError, match=r"cannot read '.*teacher.json': No such file"):  # nothing was trained
            teachers.trained_teacher(tiny(**fields))
        return asked[-1].name.removesuffix(".unfinished")

    first = folder()
    others = [folder(teacher_width=9), folder(teacher_factor=3.0), folder(teacher_learning_rate=0.2)]
    assert len({first, *others}) == 4 and first.startswith("parity-mlp-")
    assert folder(student_width=9) == first


def test_a_teacher_that_diverges_is_trained_again_at_half_of_its_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_at = teachers._train_at
    tried: list[float] = []

    def diverging_at_first(rate: float, folder: Path, recipe: Any) -> None:
        tried.append(rate)
        (folder / "left").mkdir()  # what a first attempt left behind must not stay
        if len(tried) < limit:
            raise TrainingDiverged("the loss is nan")
        train_at(rate, folder, recipe)

    monkeypatch.setattr(teachers, "_train_at", diverging_at_first)
    recipe, limit = resolve("parity-mlp/smoke", {**TRAINED, "teacher_learning_rate": 0.4}), 2
    teacher = teachers.trained_teacher(recipe)
    assert tried == [0.4, 0.2]
    assert teacher.description.endswith(", at learning rate 0.2, since training diverged at 0.4")
    tried, limit = [], 4
    with pytest.raises(TrainingDiverged):
        teachers.trained_teacher(resolve("parity-mlp/smoke", {**TRAINED, "teacher_learning_rate": 0.8}))
    assert tried == [0.8, 0.4, 0.2]
