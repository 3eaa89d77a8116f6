"""Rows that hold several sequences, as transformers' collators and models know them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BloomConfig, BloomForCausalLM, DataCollatorWithFlattening

from tests.training.conftest import LENGTH, VOCAB, llama, token_rows
from tutelage import CurriculumTrainer
from tutelage.tasks.language import CausalCollator
from tutelage.tasks.registry import detect_task
from tutelage.training.packing import PackingCheck

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


def bert(layers: int, width: int, seed: int) -> BertForMaskedLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": 32, "num_attention_heads": 2}
    return BertForMaskedLM(BertConfig(vocab_size=VOCAB, max_position_embeddings=32, **sizes))


class Flattening(DataCollatorWithFlattening):
    """Keeps only some of the entries that tell sequences apart."""

    def __init__(self, *entries: str, mask: bool = False) -> None:
        super().__init__(return_flash_attn_kwargs=True, return_seq_idx=True)
        self.entries, self.mask = ("input_ids", "labels", *entries), mask

    def __call__(self, *given: Any, **settings: Any) -> dict[str, Any]:
        batch = super().__call__(*given, **settings)
        extra = {"attention_mask": torch.ones_like(batch["input_ids"])} if self.mask else {}
        return {key: value for key, value in batch.items() if key in self.entries} | extra


LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


@pytest.mark.parametrize(
    ("build", "collator"),
    [
        (llama, Flattening(*LENGTHS)),
        (llama, Flattening("seq_idx")),
        (llama, Flattening("position_ids", mask=True)),
        (bert, Flattening("position_ids")),
        (bert, Flattening("position_ids", "seq_idx", *LENGTHS)),
    ],
)
def test_packed_rows_that_would_be_read_as_one_sequence_are_refused(
    make_trainer: Make, build: Any, collator: Any
) -> None:
    models = {"student": build(2, 16, 2), "teacher_model": build(4, 24, 1)}
    trainer = make_trainer(**models, ragged=True, data_collator=collator)
    with pytest.raises(
        ValueError, match=f"several sequences, which {type(trainer.model).__name__} reads as one where a batch"
    ):
        trainer.train()


def test_the_teacher_must_tell_packed_sequences_apart_too() -> None:
    """And a student in training mode is left in it."""
    student, teacher = llama(2, 16, seed=2).train(), bert(2, 16, 1)
    batch = DataCollatorWithFlattening()(list(token_rows(2, ragged=True)))
    task = detect_task(student)
    assert PackingCheck([student], task)(batch) is batch
    assert student.training
    with pytest.raises(ValueError, match="which BertForMaskedLM reads as one where a batch has position_ids"):
        PackingCheck([student, teacher], task)(batch)


@pytest.mark.parametrize("build", [llama, bert])
def test_positions_of_rows_that_are_not_packed_are_no_reason_to_refuse(make_trainer: Make, build: Any) -> None:
    def collate(rows: Any) -> dict[str, torch.Tensor]:
        batch = CausalCollator(always_mask=True)(rows)
        mask = batch["attention_mask"].flip(1)  # padding at the left
        return {
            "input_ids": batch["input_ids"].flip(1),
            "labels": batch["labels"].flip(1),
            "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).masked_fill(mask == 0, 1),
        }

    models = {"student": build(2, 16, 2), "teacher_model": build(4, 24, 1)}
    make_trainer(**models, ragged=True, data_collator=collate, max_steps=2, method="one_shot").train()


def test_models_run_on_short_rows_once_and_not_at_each_step(make_trainer: Make) -> None:
    trainer = make_trainer(ragged=True, data_collator=DataCollatorWithFlattening(), max_steps=3)
    compared: list[nn.Module] = []
    check = trainer.check_packing
    tells_apart = check._tells_apart
    object.__setattr__(check, "_tells_apart", lambda *given: compared.append(given[0]) or tells_apart(*given))
    trainer.train()
    assert compared == [trainer.model, *trainer.source.models]
