"""Collators and tokenizers of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from tests.conftest import CLASSES, WORDS, llama_config, make_tokenizer, save_llama, sentences
from tests.conftest import VOCAB as TINY_VOCAB
from tests.training.conftest import token_rows
from tutelage import CurriculumConfig, CurriculumTrainer
from tutelage.core.blocks import FINAL
from tutelage.core.curriculum import Curriculum
from tutelage.core.stages import HiddenStage, OutputStage
from tutelage.targets.live import LiveTargets
from tutelage.targets.source import StatisticsFile
from tutelage.tasks.language import CausalCollator
from tutelage.tasks.loading import load_tokenizer
from tutelage.training.objective import StageObjective

Make = Callable[..., CurriculumTrainer]


def test_a_collator_is_found_from_the_task(causal_teacher: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(causal_teacher))
    rows = Dataset.from_dict({"input_ids": tokenizer(sentences(12))["input_ids"]})  # type: ignore[index]
    trainer = CurriculumTrainer(
        model=str(causal_teacher),
        teacher_model=str(causal_teacher),
        args=CurriculumConfig(output_dir=str(tmp_path / "o"), max_steps=8, use_cpu=True, save_strategy="no"),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
    )
    assert trainer.evaluate()["eval_loss"] > 0


def test_rows_padded_before_keep_their_mask() -> None:
    rows = [
        {"input_ids": [5, 6, 0, 0], "attention_mask": [1, 1, 0, 0]},
        {"input_ids": [7, 8, 9, 0], "attention_mask": [1, 1, 1, 0]},
    ]
    batch = CausalCollator(0)(rows)
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 0]]
    assert batch["labels"].tolist() == [[5, 6, -100, -100], [7, 8, 9, -100]]


@pytest.mark.parametrize("kind", [LlamaForCausalLM, LlamaForSequenceClassification])
def test_padding_at_the_left_gives_the_loss_of_padding_at_the_right(kind: Any, tmp_path: Path) -> None:
    """Of every stage; rotary positions are relative, so that the states are the same too."""
    models = []
    for seed, layers in enumerate((2, 4)):
        torch.manual_seed(seed)
        models.append(kind(llama_config(num_hidden_layers=layers, num_labels=CLASSES)).eval())
    ids = torch.randint(6, TINY_VOCAB, (4, 9))
    lengths = torch.tensor([9, 5, 2, 7])[:, None]
    batches: list[dict[str, torch.Tensor]] = []
    for mask in (torch.arange(9) < lengths, torch.arange(9) >= 9 - lengths):
        padded = torch.zeros_like(ids).masked_scatter(mask, ids[torch.arange(9) < lengths])
        labels = padded.clone() if kind is LlamaForCausalLM else torch.tensor([0, 1, 2, 1])
        batches.append({"input_ids": padded, "attention_mask": mask.long(), "labels": labels})
    stages = (HiddenStage(1, 1, 2), HiddenStage(1, FINAL, FINAL), OutputStage(1, label_weight=0.5))
    source = LiveTargets(models[1])
    source.attach(Curriculum("mine", stages), models[0])
    source.prepare(StatisticsFile(tmp_path / "unused", False, False), lambda: batches[:1], "cpu")
    objective = StageObjective(models[0], source)
    for index in range(3):
        objective.stage_index = index
        right, left = (objective(**batch)["loss"] for batch in batches)
        torch.testing.assert_close(left, right)


def test_two_folders_with_different_tokenizers_are_refused(causal_teacher: Path, tmp_path: Path) -> None:
    other = save_llama(tmp_path / "other")
    make_tokenizer(words=tuple(reversed(WORDS))).save_pretrained(other)
    args = CurriculumConfig(output_dir=str(tmp_path / "o"), max_steps=2, use_cpu=True)
    with pytest.raises(ValueError, match="different tokenizers"):
        CurriculumTrainer(str(other), str(causal_teacher), args, token_rows())


def test_a_mask_for_each_pair_of_positions_is_refused(make_trainer: Make) -> None:
    def collate(rows: Any) -> dict[str, torch.Tensor]:
        batch = CausalCollator(always_mask=True)(rows)
        length = batch["input_ids"].shape[1]
        below = torch.tril(torch.ones(length, length, dtype=torch.bool))
        return batch | {"attention_mask": batch["attention_mask"].bool()[:, None, None] & below}

    with pytest.raises(ValueError, match=r"attention_mask has the shape \(1, 1, 12, 12\): expected \(B, T\)"):
        make_trainer(data_collator=collate).train()
