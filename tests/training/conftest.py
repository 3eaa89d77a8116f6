"""Tiny models and data for the training tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from tutelage import CurriculumConfig, CurriculumTrainer
from tutelage.tasks.language import CausalCollator

VOCAB, LENGTH = 61, 12


def llama(layers: int, width: int, seed: int, **fields: Any) -> LlamaForCausalLM:
    """A tiny Llama whose states differ enough between tokens to learn from."""
    torch.manual_seed(seed)
    settings = {"num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.2}
    settings |= {"max_position_embeddings": 32, **fields}
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, **settings
    )
    return LlamaForCausalLM(config)


def token_rows(count: int = 48, ragged: bool = False, seed: int = 0) -> Dataset:
    """Random token blocks."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (count, LENGTH), generator=generator).tolist()
    if ragged:
        ids = [row[: 5 + index % 8] for index, row in enumerate(ids)]
    return Dataset.from_dict({"input_ids": ids})


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


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., CurriculumTrainer]:
    """A `CurriculumTrainer` of a 2-block student under a 4-block teacher."""

    def make(output: str = "run", ragged: bool = False, student: Any = None, **settings: Any) -> CurriculumTrainer:
        extras = {
            key: settings.pop(key)
            for key in ("curriculum", "callbacks", "compute_metrics", "teacher_model", "train_dataset", "data_collator")
            if key in settings
        }
        defaults = {
            "max_steps": 8,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            "calibration_samples": 16,
            "warm_start": "none",
        }
        args = CurriculumConfig(output_dir=str(tmp_path / output), **{**defaults, **settings})
        extras.setdefault("teacher_model", None if args.method == "scratch" else llama(4, 24, seed=1))
        return CurriculumTrainer(
            model=student if student is not None else llama(2, 16, seed=2),
            args=args,
            train_dataset=extras.pop("train_dataset", token_rows(ragged=ragged)),
            eval_dataset=token_rows(8, seed=9),
            data_collator=extras.pop("data_collator", None) or CausalCollator(),
            **extras,
        )

    return make
