"""What the output loss compares, and where: `output_loss`."""

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

Make = Callable[..., CurriculumTrainer]


def batches_of(trainer: CurriculumTrainer) -> list[dict[str, Any]]:
    """The micro-batches that a training run sees."""
    captured: list[dict[str, Any]] = []
    original = trainer.training_step

    def spy(model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        captured.append(dict(inputs))
        return original(model, inputs, num_items_in_batch)

    trainer.training_step = spy  # type: ignore[method-assign]
    trainer.train()
    return captured


@pytest.mark.parametrize("method", ["one_shot", "joint"])
def test_a_run_with_mean_squares_of_logits_has_their_loss(make_trainer: Make, method: str) -> None:
    trainer = make_trainer(method=method, output_loss="mse", max_steps=1, ragged=True)
    (batch,) = batches_of(trainer)
    student, teacher = llama(2, 16, seed=2), llama(4, 24, seed=1)
    counts = batch["attention_mask"][:, 1:].bool()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    squares = (student(**inputs).logits - teacher(**inputs).logits).square().mean(-1)[:, :-1]
    line = trainer.metrics_file.read()[0]
    assert line["output_loss" if method == "joint" else "loss"] == pytest.approx(
        squares[counts].mean().item(), rel=1e-3
    )
    assert trainer.curriculum.output_loss == "mse"


def test_sentence_encoders_have_no_output_loss(tmp_path: Path) -> None:
    models = [EmbeddingModel(BertModel(bert_config(num_hidden_layers=2))) for _ in range(2)]
    rows = Dataset.from_dict({"input_ids": [[2, 7, 3]] * 8})
    args = CurriculumConfig(str(tmp_path / "o"), method="one_shot", output_loss="mse", max_steps=2, use_cpu=True)
    with pytest.raises(
        ValueError, match="output_loss='mse' is for logits, but this task is embedding: leave output_loss"
    ):
        CurriculumTrainer(*models, args, rows)
