"""Warm starts of methods without hidden stages: the teacher's head and embedding before the first step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import BertModel

from tests.training.conftest import llama
from tests.training.test_joint import assert_equal, bert_sizes, weights
from tutelage import CurriculumConfig, CurriculumTrainer
from tutelage.core.curriculum import Curriculum
from tutelage.core.stages import OutputStage
from tutelage.targets.live import LiveTargets
from tutelage.targets.source import NoTargets
from tutelage.tasks.embedding import EmbeddingModel
from tutelage.tasks.parity import ParityData, ParityMLP, ParityMLPConfig
from tutelage.tasks.registry import get_task

Make = Callable[..., CurriculumTrainer]
METHODS = {
    "one_shot": {"method": "one_shot"},
    "joint": {"method": "joint"},
    "joint-final": {"method": "joint", "layer_map": "1:2,final:final"},
    "progressive": {"method": "progressive"},
}


def first_weights(trainer: CurriculumTrainer) -> dict[str, torch.Tensor]:
    """The student's weights at its first step."""
    found: list[dict[str, torch.Tensor]] = []
    original = trainer.training_step

    def spy(*args: Any) -> torch.Tensor:
        found.append(weights(trainer))
        return original(*args)

    trainer.training_step = spy  # type: ignore[method-assign]
    trainer.train()
    return found[0]


def made(make_trainer: Make, tmp_path: Path, output: str = "run", **settings: Any) -> CurriculumTrainer:
    if settings.get("method") == "progressive":
        llama(4, 24, seed=5).save_pretrained(tmp_path / "checkpoint")
        settings["teacher_checkpoints"] = [str(tmp_path / "checkpoint")]
    return make_trainer(output, max_steps=2, **settings)


@pytest.mark.parametrize("method", METHODS)
def test_the_head_is_transplanted_before_the_first_step(make_trainer: Make, tmp_path: Path, method: str) -> None:
    """The finished teacher's head, composed with a way back that magnifies noise at most twofold."""
    trainer = made(make_trainer, tmp_path, warm_start="head", **METHODS[method])
    found, untouched = first_weights(trainer), llama(2, 16, seed=2).state_dict()
    pairs = trainer.curriculum.calibrated_pairs
    assert [(pair.student_place, pair.teacher_place) for pair in pairs].count(("final", "final")) == 1
    target_map = trainer.source.maps[-1]
    assert target_map.moment is not None and target_map.projection is not None
    decoder = target_map.projection.decoder(target_map.moment, 2.0)
    expected = llama(4, 24, seed=1).lm_head.weight * target_map.standardizer.scale @ decoder.T
    torch.testing.assert_close(found["lm_head.weight"], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(target_map.standardizer.mean, torch.zeros(24))  # no bias, so nothing to carry a mean
    assert_equal({name: value for name, value in found.items() if name != "lm_head.weight"}, untouched)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("start", ["embedding", "head+embedding"])
def test_the_embedding_is_projected_before_the_first_step(
    make_trainer: Make, tmp_path: Path, method: str, start: str
) -> None:
    trainer = made(make_trainer, tmp_path, warm_start=start, **METHODS[method])
    found, untouched = first_weights(trainer), llama(2, 16, seed=2).state_dict()
    theirs, mine = llama(4, 24, seed=1).model.embed_tokens.weight, found.pop("model.embed_tokens.weight")
    residual = theirs @ torch.linalg.lstsq(theirs, mine).solution - mine
    assert residual.abs().max() < 1e-4 * mine.abs().max()
    moved = [name for name, value in found.items() if not torch.equal(value, untouched[name])]
    assert moved == (["lm_head.weight"] if "head" in start else [])


def test_a_transplant_without_stages_reads_projection_normalisation_and_seed(make_trainer: Make) -> None:
    settings = [{}, {"projection": "pca"}, {"projection_seed": 3}, {"normalize": "none"}]
    heads = [
        first_weights(make_trainer(str(number), method="one_shot", warm_start="head", max_steps=1, **given))
        for number, given in enumerate(settings)
    ]
    assert len({head["lm_head.weight"].sum().item() for head in heads}) == 4


def test_a_tied_student_starts_with_the_transplanted_head_as_its_embedding(make_trainer: Make) -> None:
    student = llama(2, 16, seed=2, tie_word_embeddings=True)
    trainer = make_trainer(student=student, method="one_shot", warm_start="head", max_steps=2)
    before = student.lm_head.weight.clone()
    found = first_weights(trainer)["lm_head.weight"]
    assert not torch.equal(found, before)
    assert not torch.equal(student.lm_head.weight, found)  # it trains from the first step
    assert student.lm_head.weight is student.model.embed_tokens.weight


def test_a_sentence_encoders_head_is_the_way_back_to_the_teachers_width(tmp_path: Path) -> None:
    torch.manual_seed(0)
    student = EmbeddingModel(BertModel(bert_sizes(2, 16)), embedding_size=24)
    teacher = EmbeddingModel(BertModel(bert_sizes(4, 24)))
    rows = Dataset.from_dict({"input_ids": torch.randint(1, 61, (16, 9)).tolist()})
    args = CurriculumConfig(
        str(tmp_path / "o"), method="one_shot", warm_start="head", max_steps=1, calibration_samples=16, use_cpu=True
    )
    trainer = CurriculumTrainer(student, teacher, args, rows)
    found, target_map = first_weights(trainer), trainer.source.maps[0]
    assert target_map.moment is not None and target_map.projection is not None
    expected = (target_map.projection.decoder(target_map.moment, 2.0) * target_map.standardizer.scale).T
    torch.testing.assert_close(found["head.weight"], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["head.bias"], target_map.standardizer.mean)


def test_a_run_that_began_with_a_transplant_resumes_where_it_was(make_trainer: Make, tmp_path: Path) -> None:
    settings = {"method": "one_shot", "warm_start": "head+embedding", "max_steps": 4}
    whole = make_trainer("run", save_strategy="steps", save_steps=2, **settings)
    whole.train()
    again = make_trainer("run", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert_equal(weights(whole), weights(again))


def test_the_calibration_for_a_transplant_is_counted(make_trainer: Make) -> None:
    trainer = make_trainer(method="one_shot", warm_start="head", max_steps=1)
    trainer.train()
    student, teacher = trainer.transition.setup_flops(trainer.feed, begins=True)
    whole = trainer.transition.costs[0].teacher_flops  # with the head, which the calibration does not run
    head = 2 * 24 * 61 * 11 / 12  # at all positions but the last
    assert teacher == pytest.approx(2 * 16 * 12 * (whole - head))  # twice over 16 examples of 12 tokens
    assert student == 0
    assert trainer.metrics_file.read()[0]["flops"] > teacher


@pytest.mark.parametrize("settings", [{}, {"projection": "gaussian"}])
@pytest.mark.parametrize("start", ["head", "embedding"])
def test_a_student_that_starts_from_its_teacher_has_no_warm_start(
    make_trainer: Make, settings: dict[str, Any], start: str
) -> None:
    student = llama(2, 16, seed=2, head_dim=12)
    with pytest.raises(ValueError, match=f"warm_start='{start}' would write over weights that student_init='teacher'"):
        make_trainer(student=student, method="joint", student_init="teacher", warm_start=start, **settings)


def test_replicated_students_have_no_transplant(tmp_path: Path) -> None:
    student = ParityMLP(ParityMLPConfig(8, 6, replica_seeds=[0, 1]))
    args = CurriculumConfig(str(tmp_path), method="one_shot", warm_start="head", max_steps=1, use_cpu=True)
    teacher = LiveTargets(ParityMLP(ParityMLPConfig(8, 12)), get_task("classification"))
    with pytest.raises(ValueError, match="warm_start='head' cannot be made for replicated students"):
        CurriculumTrainer(student, teacher, args, ParityData(8, 2, 16, [0, 1]))


def test_a_warm_start_needs_a_teacher() -> None:
    labels = Curriculum("own", (OutputStage(1, label_weight=1.0),), warm_start="head")
    with pytest.raises(ValueError, match="warm_start='head' needs a teacher: pass one, or use warm_start='none'"):
        NoTargets(get_task("causal_lm")).attach(labels, llama(2, 16, seed=2))
