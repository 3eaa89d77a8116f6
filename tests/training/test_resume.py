"""Resuming: a finished run, and runs that must not be resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.conftest import llama, token_rows
from tutelage import CurriculumTrainer
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
