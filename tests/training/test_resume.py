"""Resuming: a finished run, and runs that must not be resumed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.training.conftest import llama, token_rows
from tutelage import CurriculumTrainer
from tutelage.core.errors import UserError
from tutelage.targets.maps import save_target_maps
from tutelage.targets.source import StatisticsFile
from tutelage.training.records import last_complete_checkpoint

Make = Callable[..., CurriculumTrainer]


def weights(trainer: CurriculumTrainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def test_resuming_a_finished_run_trains_nothing(make_trainer: Make) -> None:
    settings = {"save_strategy": "steps", "save_steps": 4, "lr_scheduler_type": "constant"}
    first = make_trainer(**settings)
    first.train()
    again = make_trainer(**settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 8
    for name, value in weights(again).items():
        assert torch.equal(value, weights(first)[name]), name
    again.evaluate()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"learning_rate": 2e-2}, "learning rate"),
        ({"per_device_train_batch_size": 2}, "batch size"),
        ({"teacher_model": llama(4, 24, seed=5)}, "teacher"),
        ({"train_dataset": token_rows(seed=4)}, "data"),
        ({"seed": 7}, "seed"),
    ],
)
def test_resuming_as_a_different_run_is_refused(make_trainer: Make, change: dict[str, Any], what: str) -> None:
    settings = {"save_strategy": "steps", "save_steps": 4}
    make_trainer(**settings).train()
    with pytest.raises(ValueError, match=rf"was created with a different {what}\. Resume with the original settings"):
        make_trainer(**settings, **change).train(resume_from_checkpoint=True)


def test_resuming_from_the_checkpoint_of_a_different_curriculum_is_refused(make_trainer: Make, tmp_path: Path) -> None:
    make_trainer("one", save_strategy="steps", save_steps=4).train()
    other = make_trainer("two", layer_map="1:2", max_steps=12)
    with pytest.raises(ValueError, match="was created with a different curriculum"):
        other.train(resume_from_checkpoint=str(last_complete_checkpoint(tmp_path / "one")))


# ---- Residual targets, whose basis the student's trained weights are in ----

STARTED = {"method": "joint", "student_init": "teacher", "max_steps": 2, "warmup_steps": 0.0}
STARTED |= {"save_strategy": "steps", "save_steps": 1}
STATISTICS = "target_stats.safetensors"


def narrower() -> nn.Module:
    """A student whose attention heads have the size of the teacher's."""
    return llama(2, 16, seed=2, head_dim=12)


def resumed(make_trainer: Make, output: str, checkpoint: Path, **settings: Any) -> dict[str, torch.Tensor]:
    trainer = make_trainer(output, student=narrower(), **STARTED, **settings)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return weights(trainer)


def test_a_run_resumes_in_a_new_folder_with_the_statistics_beside_its_checkpoint(
    make_trainer: Make, tmp_path: Path
) -> None:
    whole = make_trainer("old", student=narrower(), **STARTED)
    whole.train()
    found = resumed(make_trainer, "new", tmp_path / "old" / "checkpoint-1")
    assert all(torch.equal(value, found[name]) for name, value in weights(whole).items())
    assert (tmp_path / "new" / STATISTICS).read_bytes() == (tmp_path / "old" / STATISTICS).read_bytes()


def test_statistics_of_a_different_run_are_not_read(tmp_path: Path) -> None:
    new, old = (tmp_path / name / STATISTICS for name in ("new", "old"))
    run = {"teacher": "1", "data": "2"}
    file = StatisticsFile(new, read=True, write=True, checkpoint=str(old.parent / "checkpoint-1"), run=run)
    for path, teacher, expected in ((new, "3", None), (old, "4", None), (old, "1", old), (new, "1", new)):
        path.parent.mkdir(exist_ok=True)
        save_target_maps([], path, {**run, "teacher": teacher})
        assert file.found() == expected
    assert replace(file, read=False).found() is None


def test_a_lost_residual_basis_is_computed_again(make_trainer: Make, tmp_path: Path) -> None:
    whole = make_trainer("run", student=narrower(), **STARTED)
    whole.train()
    kept = (tmp_path / "run" / STATISTICS).read_bytes()
    (tmp_path / "run" / STATISTICS).unlink()
    with pytest.warns(UserWarning, match=rf"{STATISTICS} of this run is not in '.*run': .* are computed again"):
        found = resumed(make_trainer, "run", tmp_path / "run" / "checkpoint-1")
    assert all(torch.equal(value, found[name]) for name, value in weights(whole).items())
    assert (tmp_path / "run" / STATISTICS).read_bytes() == kept


def test_a_lost_residual_basis_of_a_stream_is_not_computed_again(make_trainer: Make, tmp_path: Path) -> None:
    """A stream may be shuffled, and other text has a different basis."""
    stream = token_rows().to_iterable_dataset()
    make_trainer("old", student=narrower(), train_dataset=stream, **STARTED).train()
    (tmp_path / "old" / STATISTICS).unlink()
    message = (
        f"{STATISTICS} of this run is not in '.*new' or '.*old', and .* from a stream.*: put the file there, or start"
    )
    with pytest.raises(UserError, match=message):
        resumed(make_trainer, "new", tmp_path / "old" / "checkpoint-1", train_dataset=stream)
