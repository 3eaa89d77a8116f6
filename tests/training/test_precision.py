"""The precision that a student's weights are trained in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from tests.conftest import llama_config
from tests.training.conftest import llama
from tutelage import CurriculumTrainer
from tutelage.core.errors import UserError
from tutelage.tasks.registry import TASKS
from tutelage.tasks.students import make_student, student_config


def changed(trainer: CurriculumTrainer, before: dict[str, torch.Tensor]) -> float:
    """Fraction of the weights that training has changed."""
    after = trainer.model.state_dict()
    differing = sum(int((after[name].float() != value.float()).sum()) for name, value in before.items())
    return differing / sum(value.numel() for value in before.values())


@pytest.mark.parametrize("by_name", [False, True])
def test_a_student_in_half_precision_is_trained_in_float32(
    make_trainer: Callable[..., CurriculumTrainer], tmp_path: Path, by_name: bool
) -> None:
    """Small updates of bfloat16 weights round to nothing."""
    student = llama(2, 16, seed=2).bfloat16()
    student.save_pretrained(tmp_path / "student")
    before = {name: value.clone() for name, value in student.state_dict().items()}
    settings = {"method": "one_shot", "learning_rate": 1e-5, "warmup_steps": 0.0}
    with pytest.warns(UserWarning, match=r"comes in bfloat16 and is trained in float32; .* are lost in rounding"):
        trainer = make_trainer(student=str(tmp_path / "student") if by_name else student, **settings)
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    trainer.train()
    assert changed(trainer, before) > 0.9
    kept = llama(2, 16, seed=2).bfloat16()
    stored = make_trainer(output="stored", student=kept, student_dtype="stored", **settings)
    stored.train()
    assert {parameter.dtype for parameter in stored.model.parameters()} == {torch.bfloat16}
    assert changed(stored, before) < 0.5


def test_a_preset_does_not_inherit_the_teachers_precision() -> None:
    config = student_config("layers=2,hidden_size=16", llama_config(dtype="bfloat16"))
    student = make_student("layers=2,hidden_size=16", TASKS["causal_lm"], config)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}


# ---- Attention ----

LONG = {"max_position_embeddings": 300}


def long_rows(length: int) -> Dataset:
    """Four rows, of which one has this many tokens."""
    return Dataset.from_dict({"input_ids": [[1, 2, 3, *[4] * (length - 3)], [5, 6], [7, 8], [9, 10]]})


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"bf16": True}, "eager"),  # faster on the CPU
        ({"bf16": True, "train_dataset": long_rows(129)}, "sdpa"),  # and slower for long rows
        ({"bf16": True, "train_dataset": long_rows(128)}, "eager"),
        ({"bf16": True, "train_dataset": long_rows(20).to_iterable_dataset()}, "sdpa"),
        ({}, "sdpa"),
        ({"bf16": True, "attn_implementation": "sdpa"}, "sdpa"),
        ({"attn_implementation": "eager"}, "eager"),
    ],
)
def test_attention_of_student_and_teacher(
    make_trainer: Callable[..., CurriculumTrainer], fields: dict[str, Any], expected: str
) -> None:
    models = {"student": llama(1, 16, 2, **LONG), "teacher_model": llama(2, 16, 1, **LONG)}
    trainer = make_trainer(method="one_shot", max_steps=1, **models, **fields)
    for model in (trainer.model, *trainer.source.models):
        assert model.config._attn_implementation == expected
    trainer.train()
    trainer.save_model()
    assert "attn_implementation" not in (trainer.folder / "config.json").read_text(encoding="utf-8")


def test_attention_that_there_is_not_is_refused(make_trainer: Callable[..., CurriculumTrainer]) -> None:
    with pytest.raises(UserError, match="attn_implementation 'fast' cannot be used for LlamaForCausalLM"):
        make_trainer(attn_implementation="fast")
