"""Evaluation during and after training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import BertModel

from tests.conftest import bert_config
from tests.training.conftest import llama
from tutelage import CurriculumConfig, CurriculumTrainer
from tutelage.tasks.embedding import EmbeddingModel
from tutelage.tasks.language import CausalCollator
from tutelage.tasks.loading import load_tokenizer

Make = Callable[..., CurriculumTrainer]


def test_a_finished_teacher_measures_progressive(make_trainer: Make, tmp_path: Path) -> None:
    """Metrics against the teacher are against the finished one, whichever checkpoint a stage learns from."""
    checkpoint = tmp_path / "early"
    llama(4, 24, seed=8).save_pretrained(checkpoint)
    trainer = make_trainer(
        method="progressive",
        teacher_checkpoints=[str(checkpoint)],
        eval_strategy="steps",
        eval_steps=2,
        eval_with_teacher=True,
    )
    trainer.train()
    losses = {record["eval_teacher_loss"] for record in trainer.metrics_file.read() if "eval_teacher_loss" in record}
    assert len(losses) == 1


def test_the_teacher_stays_as_it_is_where_an_evaluation_does_without(
    make_trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama(4, 24, seed=8).save_pretrained(tmp_path / "early")
    trainer = make_trainer(method="progressive", teacher_checkpoints=[str(tmp_path / "early")])
    trainer.source.use_checkpoint(str(tmp_path / "early"))
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", None)
    assert trainer.evaluate()["eval_loss"] > 0


def test_the_best_encoder_is_loaded_at_the_end(embedding_teacher: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    student = EmbeddingModel(BertModel(bert_config(num_hidden_layers=1)), embedding_size=32)
    ids = Dataset.from_dict({"input_ids": [[2, 7 + i % 9, 9, 3] for i in range(16)], "attention_mask": [[1] * 4] * 16})
    args = CurriculumConfig(
        output_dir=str(tmp_path / "o"),
        method="one_shot",
        max_steps=4,
        learning_rate=1.0,  # the first checkpoint is the best
        per_device_train_batch_size=4,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="cosine",
        greater_is_better=True,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
    )
    trainer = CurriculumTrainer(student, str(embedding_teacher), args, ids, ids, load_tokenizer(str(embedding_teacher)))
    trainer.train()
    best = max(record["eval_cosine"] for record in trainer.metrics_file.read() if "eval_cosine" in record)
    assert trainer.evaluate()["eval_cosine"] == pytest.approx(best, abs=1e-6)


def test_a_collator_that_draws_draws_the_same_at_every_evaluation(make_trainer: Make) -> None:
    def dropping(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = CausalCollator()(rows)
        batch["labels"][torch.rand(batch["labels"].shape) < 0.5] = -100
        return batch

    trainer = make_trainer()
    trainer.data_collator = dropping
    before = torch.get_rng_state()
    first = trainer.evaluate()["eval_loss"]
    assert torch.equal(torch.get_rng_state(), before)  # training's own draws go on as if nothing had been evaluated
    torch.rand(3)
    assert trainer.evaluate()["eval_loss"] == first
