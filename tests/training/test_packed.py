"""Rows that hold several sequences, as transformers' collators and models know them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, DataCollatorWithFlattening

from tests.training.conftest import LENGTH, VOCAB, llama, token_rows
from tutelage import CurriculumTrainer

Make = Callable[..., CurriculumTrainer]


@pytest.mark.parametrize(("attention", "described"), [("eager", False), ("sdpa", True)])
def test_training_on_flattened_batches_equals_training_on_padded_ones(
    make_trainer: Make, attention: str, described: bool
) -> None:
    flattening = DataCollatorWithFlattening(return_flash_attn_kwargs=described, return_seq_idx=described)
    settings = {"layer_map": "1:2,final:final", "max_steps": 6, "gradient_accumulation_steps": 2, "label_weight": 0.3}
    trainers = []
    for name, collator in (("padded", None), ("flattened", flattening)):
        student, teacher = llama(2, 16, seed=2), llama(4, 24, seed=1)
        for model in (student, teacher):
            model.set_attn_implementation(attention)
        extras = {"student": student, "teacher_model": teacher, "data_collator": collator}
        trainers.append(make_trainer(name, ragged=True, **extras, **settings))
        trainers[-1].train()
    padded, flattened = trainers
    for mine, theirs in zip(flattened.model.parameters(), padded.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-5)
    assert flattened.progress.samples == padded.progress.samples == 48
    assert flattened.progress.tokens == padded.progress.tokens
    metrics = [trainer.evaluate() for trainer in trainers]
    assert metrics[1]["eval_loss"] == pytest.approx(metrics[0]["eval_loss"], rel=1e-4)


@pytest.mark.parametrize("column", ["position_ids", "seq_idx"])
def test_columns_that_tell_packed_sequences_apart_are_not_dropped(make_trainer: Make, column: str) -> None:
    rows = token_rows()
    rows = rows.add_column(column, [[0] * LENGTH] * len(rows))
    trainer = make_trainer("collator", train_dataset=rows)
    with pytest.raises(ValueError, match=f"rows have {column}, which this collator does not pass on"):
        trainer.train()


def test_packed_rows_are_refused_for_a_model_without_positions(make_trainer: Make) -> None:
    student = BloomForCausalLM(BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=2, n_head=2))
    trainer = make_trainer(student=student, ragged=True, data_collator=DataCollatorWithFlattening())
    with pytest.raises(ValueError, match="batch has position_ids, which BloomForCausalLM does not take"):
        trainer.train()
