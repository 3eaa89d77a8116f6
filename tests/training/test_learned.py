"""`projection=learned`: a linear map from the student to the teacher, trained with the student and thrown away."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training.conftest import batches_of, llama
from tests.training.test_joint import PLAIN, assert_equal, weights
from tutelage import CurriculumTrainer
from tutelage.core.curriculum import Curriculum
from tutelage.core.projection import RandomProjection
from tutelage.core.stages import HiddenStage, OutputStage

Make = Callable[..., CurriculumTrainer]
PLACES = [(1, 2), ("final", "final")]
STAGES = tuple(HiddenStage(3, *pair, learning_rate=3e-2) for pair in PLACES)
MAPS = "learned_maps.safetensors"


def stages_trainer(make_trainer: Make, output: str, **settings: Any) -> CurriculumTrainer:
    curriculum = Curriculum("own", (*STAGES, OutputStage(2)), projection="learned", projection_seed=3)
    return make_trainer(output, curriculum=curriculum, **settings)


def test_joint_with_learned_maps_equals_a_plain_loop(make_trainer: Make) -> None:
    """Three AdamW steps; each map goes from the student's width to the teacher's and trains with the student."""
    settings = {"method": "joint", "max_steps": 3, "layer_map": "1:2,final:final", "hidden_weight": 0.5, **PLAIN}
    trainer = make_trainer(projection="learned", projection_seed=3, weight_decay=0.0, **settings)
    captured = batches_of(trainer)
    student, teacher = llama(2, 16, seed=2), llama(4, 24, seed=1).eval()
    maps = torch.nn.ModuleList([torch.nn.Linear(16, 24) for _ in PLACES])
    for linear, place in zip(maps, (2, 5), strict=True):  # the final place counts as a block after the last
        linear.weight.data.copy_(RandomProjection(16, 24, (3, place)).matrix().T)
        linear.bias.data.zero_()
    optimizer = torch.optim.AdamW([*student.parameters(), *maps.parameters()], lr=1e-2, weight_decay=0.0)
    for batch in captured:
        ids = batch["input_ids"]
        with torch.no_grad():
            theirs = teacher(input_ids=ids, output_hidden_states=True)
            log_p = theirs.logits[:, :-1].log_softmax(-1)
        mine = student(input_ids=ids, output_hidden_states=True)
        loss = (log_p.exp() * (log_p - mine.logits[:, :-1].log_softmax(-1))).sum(-1).mean()
        for number, (my_place, their_place) in enumerate([(1, 2), (2, 4)]):
            hidden, found = theirs.hidden_states[their_place], trainer.source.maps[number].standardizer
            target, keep = (hidden - found.mean) / found.scale, hidden.norm(dim=-1) <= found.sink_norm
            distance = (maps[number](mine.hidden_states[my_place]) - target).square().mean(-1)
            loss = loss + 0.5 * distance[keep].sum() / keep.numel() / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert_equal(weights(trainer), student.state_dict(), exact=False)
    for mine, plain in zip(trainer.objective.learned, maps, strict=True):
        torch.testing.assert_close(mine.weight.T, plain.weight, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(mine.bias, plain.bias, rtol=1e-4, atol=1e-6)


def test_learned_maps_train_in_their_stage_alone_and_are_in_no_student(make_trainer: Make, tmp_path: Path) -> None:
    often = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 0}
    trainer = stages_trainer(make_trainer, "run", warmup_steps=0, **often)
    trainer.train()
    trainer.save_model()
    found = [load_file(tmp_path / "run" / f"checkpoint-{step}" / MAPS) for step in range(1, 9)]
    for number, (first, last) in enumerate([(0, 2), (3, 5)]):
        name = f"{number}.weight"
        moved = [step for step in range(1, 8) if not torch.equal(found[step][name], found[step - 1][name])]
        assert moved == list(range(max(1, first), last + 1))
    names = set(llama(2, 16, seed=2).state_dict())
    assert load_file(tmp_path / "run" / "model.safetensors").keys() == names
    assert load_file(tmp_path / "run" / "checkpoint-3" / "model.safetensors").keys() == names
    assert not (tmp_path / "run" / MAPS).exists()


@pytest.mark.parametrize("step", [2, 3, 5])
def test_a_run_with_learned_maps_resumes_where_it_was(make_trainer: Make, tmp_path: Path, step: int) -> None:
    """In a stage, between two, and in the second one."""
    whole = stages_trainer(make_trainer, "run", save_strategy="steps", save_steps=1, save_total_limit=0)
    whole.train()
    again = stages_trainer(make_trainer, "run")
    again.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
    assert_equal(weights(whole), weights(again))
    assert_equal(whole.objective.learned.state_dict(), again.objective.learned.state_dict())


def test_a_checkpoint_without_its_learned_maps_is_damaged(make_trainer: Make, tmp_path: Path) -> None:
    stages_trainer(make_trainer, "run", save_strategy="steps", save_steps=2).train()
    (tmp_path / "run" / "checkpoint-8" / MAPS).unlink()
    with pytest.raises(ValueError, match=r"checkpoint-8' is damaged.*learned_maps.safetensors is missing"):
        stages_trainer(make_trainer, "run").train(resume_from_checkpoint=True)


def test_flops_of_learned_maps_are_counted(make_trainer: Make) -> None:
    costs = {}
    for method, settings in (("joint", {"projection": "learned"}), ("one_shot", {})):
        trainer = make_trainer(method, method=method, max_steps=1, **settings)
        trainer.train()
        costs[method] = trainer.transition.costs[0]
    maps = 3 * 2 * 16 * 24 * 2  # forward, and backward to state and weight, of two maps at a position
    assert costs["joint"].student_flops == costs["one_shot"].student_flops + maps
    assert costs["joint"].teacher_flops == costs["one_shot"].teacher_flops
    assert all(parameter.grad is None for parameter in trainer.objective.parameters())


def test_a_student_that_starts_from_its_teacher_may_learn_maps(make_trainer: Make) -> None:
    student = llama(2, 16, seed=2, head_dim=12)
    trainer = make_trainer(
        method="joint", student=student, student_init="teacher", projection="learned", warm_start=None, max_steps=2
    )
    trainer.train()
    assert (trainer.curriculum.student_init, trainer.curriculum.projection) == ("teacher", "learned")
    assert trainer.source.maps[0].unit == 1


def test_stages_with_learned_maps_have_no_transplant(make_trainer: Make) -> None:
    trainer = make_trainer(method="extraction", projection="learned", warm_start=None, student_init="random")
    assert (trainer.curriculum.warm_start, len(trainer.curriculum.hidden_stages)) == ("none", 2)
    with pytest.raises(
        ValueError, match=r"'head' needs a student that learns a fixed projection.*use warm_start='none'"
    ):
        make_trainer(method="extraction", projection="learned", warm_start="head", student_init="random")
