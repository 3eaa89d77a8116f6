"""What the output loss compares, and where: `output_loss`, `output_positions`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import BertForMaskedLM, BertForSequenceClassification, BertModel

from tests.conftest import bert_config
from tests.training.conftest import VOCAB, batches_of, llama, token_rows
from tests.training.test_joint import assert_equal, bert_sizes, weights
from tutelage import CurriculumConfig, CurriculumTrainer
from tutelage.tasks.embedding import EmbeddingModel
from tutelage.tasks.language import CausalCollator

Make = Callable[..., CurriculumTrainer]


def bert(layers: int, width: int, seed: int) -> BertForMaskedLM:
    torch.manual_seed(seed)
    return BertForMaskedLM(bert_sizes(layers, width))


def masked(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Every third token is masked; whatever the other rows of the batch, a row has the same masks."""
    batch = CausalCollator(always_mask=True)(rows)
    chosen = batch["attention_mask"].bool() & (torch.arange(batch["input_ids"].shape[1]) % 3 == 1)
    batch["labels"] = batch["input_ids"].masked_fill(~chosen, -100)
    batch["input_ids"] = batch["input_ids"].masked_fill(chosen, VOCAB - 1)
    return batch


def masked_trainer(make_trainer: Make, output: str, **settings: Any) -> CurriculumTrainer:
    models = {"student": bert(2, 16, seed=2), "teacher_model": bert(4, 24, seed=1)}
    fields = {"output_positions": "all", "student_init": "random", **settings}
    return make_trainer(output, ragged=True, data_collator=masked, **models, **fields)


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


@pytest.mark.parametrize("method", ["one_shot", "joint"])
def test_outputs_are_compared_at_all_positions_that_are_no_padding(make_trainer: Make, method: str) -> None:
    trainer = masked_trainer(make_trainer, "run", method=method, max_steps=1)
    (batch,) = batches_of(trainer)
    counts, inputs = batch["attention_mask"].bool(), {name: batch[name] for name in ("input_ids", "attention_mask")}
    log_q = bert(2, 16, seed=2)(**inputs).logits.log_softmax(-1)
    log_p = bert(4, 24, seed=1).eval()(**inputs).logits.log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)[counts].mean()
    line = trainer.metrics_file.read()[0]
    assert line["output_loss" if method == "joint" else "loss"] == pytest.approx(divergence.item(), rel=1e-3)
    found = trainer.objective.count_items(batch)
    assert found.tolist() == ([counts.sum()] * 3 if method == "joint" else counts.sum())


@pytest.mark.parametrize("method", ["one_shot", "joint"])
def test_accumulating_gradients_over_all_positions_changes_nothing(make_trainer: Make, method: str) -> None:
    settings = {"method": method, "optim": "sgd", "max_steps": 2}
    whole = masked_trainer(make_trainer, "whole", per_device_train_batch_size=16, **settings)
    parts = masked_trainer(
        make_trainer, "parts", per_device_train_batch_size=8, gradient_accumulation_steps=2, **settings
    )
    whole.train()
    parts.train()
    assert_equal(weights(whole), weights(parts), exact=False)


def test_outputs_at_all_positions_cost_more_and_evaluations_stay_as_they_are(make_trainer: Make) -> None:
    costs, metrics = [], []
    for positions in ("labelled", "all"):
        trainer = masked_trainer(make_trainer, positions, output_positions=positions, method="one_shot", max_steps=1)
        metrics.append(trainer.evaluate())
        trainer.train()
        costs.append(trainer.transition.costs[0])
    assert costs[1].teacher_flops > costs[0].teacher_flops
    assert costs[1].student_flops > costs[0].student_flops
    assert metrics[0]["eval_loss"] == metrics[1]["eval_loss"]


def test_all_positions_are_refused_without_a_masked_model(make_trainer: Make, tmp_path: Path) -> None:
    message = "output_positions='all' is for masked language models, .* but this task is {}: leave output_positions out"
    with pytest.raises(ValueError, match=message.format("causal_lm")):
        make_trainer(method="one_shot", output_positions="all")
    for models, task in (
        ([BertForSequenceClassification(bert_sizes(2, 16)) for _ in range(2)], "sequence_classification"),
        ([EmbeddingModel(BertModel(bert_sizes(2, 16))) for _ in range(2)], "embedding"),
    ):
        rows = token_rows(8).add_column("labels", [0, 1] * 4)
        args = CurriculumConfig(str(tmp_path / task), output_positions="all", max_steps=8, use_cpu=True)
        with pytest.raises(ValueError, match=message.format(task)):
            CurriculumTrainer(*models, args, rows)
