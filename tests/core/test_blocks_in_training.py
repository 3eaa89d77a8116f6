"""Stopping at a place while the student trains with gradient checkpointing, and heads that do more than a product."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForSequenceClassification,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from tests.core.test_blocks import BASE
from tutelage.core.blocks import FINAL
from tutelage.core.forward import forward_to
from tutelage.core.heads import OutputHead

IDS = torch.arange(5, 27).view(2, 11)


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**BASE, use_cache=False))


def bert() -> nn.Module:
    return BertForMaskedLM(BertConfig(**BASE, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", [llama, bert])
def test_gradient_checkpointing_changes_no_gradient(kind: Any, reentrant: bool) -> None:
    torch.manual_seed(0)
    plain, recomputing = kind().train(), kind().train()
    recomputing.load_state_dict(plain.state_dict())
    # named anew in the course of transformers 5
    enable = getattr(recomputing, "activation_checkpointing_enable", None) or recomputing.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    runs = [0]
    attention = next(
        module
        for name, module in recomputing.named_modules()
        if name.endswith("0.attention") or name.endswith("0.self_attn")
    )
    attention.register_forward_hook(lambda *_: runs.__setitem__(0, runs[0] + 1))
    for place in (0, 1, 2, 3, FINAL):
        runs[0] = 0
        for model in (plain, recomputing):
            model.zero_grad(set_to_none=True)
            forward_to(model, place, input_ids=IDS).square().sum().backward()
        assert runs[0] == (0 if place == 0 else 2)  # once forward, once again for the backward pass
        for left, right in zip(recomputing.parameters(), plain.parameters(), strict=True):
            assert (left.grad is None) == (right.grad is None)
            if right.grad is not None:
                torch.testing.assert_close(left.grad, right.grad, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kind", "config", "scale"),
    [
        (CohereForCausalLM, CohereConfig(**BASE, logit_scale=0.25), 0.25),
        (GraniteForCausalLM, GraniteConfig(**BASE, logits_scaling=8.0), 0.125),
    ],
)
@torch.no_grad()
def test_scaled_logits(kind: Any, config: Any, scale: float) -> None:
    torch.manual_seed(0)
    model = kind(config).eval()
    head = OutputHead.of(model)
    assert (head.scale, head.softcap) == (scale, None)
    torch.testing.assert_close(
        head(forward_to(model, FINAL, input_ids=IDS)), model(input_ids=IDS).logits, rtol=0, atol=0
    )


@torch.no_grad()
def test_a_classifier_on_a_soft_capped_model_does_not_cap() -> None:
    torch.manual_seed(0)
    model = Gemma2ForSequenceClassification(Gemma2Config(**BASE, final_logit_softcapping=0.01, num_labels=3)).eval()
    last = forward_to(model, FINAL, input_ids=IDS)[:, -1]  # no padding: the state that the model pools
    torch.testing.assert_close(OutputHead.of(model)(last), model(input_ids=IDS).logits)
