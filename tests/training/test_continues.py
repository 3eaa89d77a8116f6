"""Output stages that go on with the previous one's optimiser and schedule; only the teacher's weights change."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from tests.training.conftest import llama
from tutelage import CurriculumTrainer, HiddenStage, OutputStage, one_shot
from tutelage.core.curriculum import Curriculum
from tutelage.targets.live import LiveTargets

Make = Callable[..., CurriculumTrainer]
SCHEDULED = {"lr_scheduler_type": "cosine", "warmup_steps": 0.25, "learning_rate": 1e-2}


def weights(trainer: CurriculumTrainer) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    assert left.keys() == right.keys()
    return all(torch.equal(left[name], right[name]) for name in left)


def rates(trainer: CurriculumTrainer) -> list[float]:
    return [record["learning_rate"] for record in trainer.metrics_file.read() if "learning_rate" in record]


def checkpoint(folder: Path, seed: int) -> str:
    llama(4, 24, seed=seed).save_pretrained(folder)
    return str(folder)


def stages(*counts: int, teachers: tuple[str | None, ...], continues: bool = True) -> Curriculum:
    made = tuple(
        OutputStage(count, teacher_checkpoint=name, continues=continues and number > 0)
        for number, (count, name) in enumerate(zip(counts, teachers, strict=True))
    )
    return Curriculum("progressive", made)


def test_stages_that_continue_under_one_teacher_are_one_long_stage(make_trainer: Make, tmp_path: Path) -> None:
    same_teacher = checkpoint(tmp_path / "copy", seed=1)  # the weights of the finished teacher
    split = make_trainer("split", curriculum=stages(3, 2, 3, teachers=(None, same_teacher, None)), **SCHEDULED)
    whole = make_trainer("whole", curriculum=one_shot(8), **SCHEDULED)
    split.train()
    whole.train()
    assert same(weights(split), weights(whole))
    assert rates(split) == rates(whole)
    assert [record["stage"] for record in split.metrics_file.read() if "loss" in record] == [1, 1, 1, 2, 2, 3, 3, 3]


def test_a_stage_that_does_not_continue_begins_anew(make_trainer: Make, tmp_path: Path) -> None:
    same_teacher = checkpoint(tmp_path / "copy", seed=1)
    split = make_trainer("split", curriculum=stages(4, 4, teachers=(same_teacher, None), continues=False), **SCHEDULED)
    whole = make_trainer("whole", curriculum=one_shot(8), **SCHEDULED)
    split.train()
    whole.train()
    assert not same(weights(split), weights(whole))
    assert rates(split)[:4] == rates(split)[4:] != rates(whole)[4:]


@pytest.mark.parametrize("continues", [True, False])
def test_only_a_stage_that_does_not_continue_has_a_new_optimiser(
    make_trainer: Make, tmp_path: Path, continues: bool
) -> None:
    seen: list[tuple[int, int, float]] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            optimizer = kwargs["optimizer"]
            (steps,) = {int(entry["step"]) for entry in optimizer.state.values()}
            seen.append((state.global_step, steps, optimizer.param_groups[0]["lr"]))

    early = checkpoint(tmp_path / "early", seed=7)
    curriculum = stages(3, 3, teachers=(early, None), continues=continues)
    trainer = make_trainer(curriculum=curriculum, callbacks=[Watch()], lr_scheduler_type="linear", warmup_steps=0)
    trainer.train()
    assert [steps for _, steps, _ in seen] == ([1, 2, 3, 4, 5, 6] if continues else [1, 2, 3, 1, 2, 3])
    expected = [5, 4, 3, 2, 1, 0] if continues else [2, 1, 0, 2, 1, 0]
    assert [rate for *_, rate in seen] == pytest.approx([1e-2 * left / (6 if continues else 3) for left in expected])


def test_the_teacher_changes_where_stages_continue(make_trainer: Make, tmp_path: Path) -> None:
    early = checkpoint(tmp_path / "early", seed=7)
    changed = make_trainer("changed", curriculum=stages(4, 4, teachers=(early, None)), **SCHEDULED)
    whole = make_trainer("whole", curriculum=one_shot(8), **SCHEDULED)
    changed.train()
    whole.train()
    assert not same(weights(changed), weights(whole))
    assert rates(changed) == rates(whole)
    assert isinstance(changed.source, LiveTargets)
    assert same(changed.source.model.state_dict(), llama(4, 24, seed=1).state_dict())  # the finished teacher again


def test_a_hidden_stage_before_them_keeps_its_own_schedule(make_trainer: Make, tmp_path: Path) -> None:
    early = checkpoint(tmp_path / "early", seed=7)
    hidden = HiddenStage(3, 1, 2)
    outputs = (OutputStage(2, teacher_checkpoint=early), OutputStage(3, continues=True))
    curriculum = Curriculum("extraction", (hidden, *outputs))
    assert [curriculum.schedule_steps(index) for index in range(3)] == [3, 5, 3]
    trainer = make_trainer(curriculum=curriculum, lr_scheduler_type="linear", warmup_steps=0)
    trainer.train()
    assert rates(trainer) == pytest.approx([1e-2 * share for share in (1, 2 / 3, 1 / 3, 1, 0.8, 0.6, 0.4, 0.2)])


@pytest.mark.parametrize("stop", [2, 3, 4, 7])
def test_resume_equals_uninterrupted_bit_for_bit(make_trainer: Make, tmp_path: Path, stop: int) -> None:
    """Stopped before, at the start of, and within stages that continue the first."""

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == stop

    early, middle = checkpoint(tmp_path / "early", seed=7), checkpoint(tmp_path / "middle", seed=8)
    curriculum = stages(3, 3, 2, teachers=(early, middle, None))
    settings = {"curriculum": curriculum, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 8, **SCHEDULED}
    whole = make_trainer("whole", **settings)
    whole.train()
    make_trainer("parts", callbacks=[Stop()], **settings).train()
    assert not (tmp_path / "parts" / f"checkpoint-{stop + 1}").exists()
    resumed = make_trainer("parts", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert same(weights(whole), weights(resumed))
    assert rates(whole) == rates(resumed)
    shutil.rmtree(tmp_path / "parts")


@pytest.mark.parametrize(
    ("made", "number"),
    [
        ((OutputStage(2, continues=True),), 1),
        ((OutputStage(2, continues=True), OutputStage(2)), 1),
        ((HiddenStage(2, 1, 1), OutputStage(2, continues=True)), 2),
        ((OutputStage(2), HiddenStage(2, 1, 1), OutputStage(2, continues=True)), 3),
    ],
)
def test_only_an_output_stage_continues_and_only_an_output_stage(
    made: tuple[HiddenStage | OutputStage, ...], number: int
) -> None:
    with pytest.raises(
        ValueError, match=f"stage {number} cannot continue the stage before it: both must be output stages"
    ):
        Curriculum("custom", made)


def test_continuing_is_stored_with_the_curriculum() -> None:
    curriculum = stages(3, 2, 3, teachers=("a", "b", None))
    again = Curriculum.from_json(curriculum.to_json())
    assert again == curriculum
    assert [stage.continues for stage in again.stages] == [False, True, True]
    assert [curriculum.schedule_steps(index) for index in range(3)] == [8, 5, 3]
