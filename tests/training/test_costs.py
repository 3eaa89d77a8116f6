"""Operations are counted as torch counts them."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from tests.conftest import VOCAB, bert_config
from tests.training.conftest import llama
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
