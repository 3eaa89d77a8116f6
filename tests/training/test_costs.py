"""Operations are counted as torch counts them."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from tests.conftest import VOCAB, bert_config
from tests.training.conftest import llama
from tests.training.test_router import experts, padded_batch
from tutelage import CurriculumConfig, RunOptions, plan
from tutelage.training.costs import FlopCounter

MODELS = {
    "llama": lambda: llama(2, 16, seed=0),
    "bert": lambda: BertForMaskedLM(bert_config(num_hidden_layers=2)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_the_counter_counts_as_torchs(name: str, mode: Any) -> None:
    model: nn.Module = MODELS[name]()
    batch = {"input_ids": torch.arange(1, 25).reshape(2, 12), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    batch["attention_mask"][1, 8:] = 0
    mine, theirs = FlopCounter(), FlopCounterMode(display=False)
    for counter in (mine, theirs):
        with counter, mode():
            loss = model(**batch, labels=batch["input_ids"]).loss
            if loss.requires_grad:
                loss.backward()
    assert mine.total == theirs.get_total_flops() > 0


def test_a_mixture_of_experts_counts_the_experts_that_run() -> None:
    """torch has no formula for the grouped product that runs them; the other ways to run them are ordinary products."""
    totals = {}
    for how in ("grouped_mm", "batched_mm", "eager"):
        model = experts(hidden_size=32, intermediate_size=64)
        model.set_experts_implementation(how)
        with FlopCounter() as counter:
            model(**padded_batch()).loss.backward()
        totals[how] = counter.total
    assert totals["grouped_mm"] == totals["batched_mm"] == totals["eager"] > 0


def test_a_mixture_of_experts_can_be_planned(tmp_path: Path) -> None:
    experts().save_pretrained(tmp_path)
    args = CurriculumConfig(teacher_model_name_or_path=str(tmp_path), max_steps=2)
    planned = plan(RunOptions(student="layers=1,hidden_size=16", max_length=32), args)
    assert planned.stages[-1].student_flops_per_token > 2 * planned.student.parameters
