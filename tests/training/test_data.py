"""Collators and tokenizers of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset

from tests.conftest import WORDS, make_tokenizer, save_llama, sentences
from tests.training.conftest import token_rows
from tutelage import CurriculumConfig, CurriculumTrainer
from tutelage.tasks.language import CausalCollator
from tutelage.tasks.loading import load_tokenizer

Make = Callable[..., CurriculumTrainer]


def test_a_collator_is_found_from_the_task(causal_teacher: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(causal_teacher))
    rows = Dataset.from_dict({"input_ids": tokenizer(sentences(12))["input_ids"]})  # type: ignore[index]
    trainer = CurriculumTrainer(
        model=str(causal_teacher),
        teacher_model=str(causal_teacher),
        args=CurriculumConfig(output_dir=str(tmp_path / "o"), max_steps=2, use_cpu=True, save_strategy="no"),
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


def test_two_folders_with_different_tokenizers_are_refused(causal_teacher: Path, tmp_path: Path) -> None:
    other = save_llama(tmp_path / "other")
    make_tokenizer(words=tuple(reversed(WORDS))).save_pretrained(other)
    args = CurriculumConfig(output_dir=str(tmp_path / "o"), max_steps=2, use_cpu=True)
    with pytest.raises(ValueError, match="different tokenizers"):
        CurriculumTrainer(str(other), str(causal_teacher), args, token_rows())
