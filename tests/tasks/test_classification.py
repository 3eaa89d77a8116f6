"""Classifiers of token sequences: which position's state is classified."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForSequenceClassification

from tests.conftest import llama_config
from tutelage.targets.live import LiveTargets
from tutelage.tasks.base import EvaluationTools

END = 2  # of a text, and the padding token
ROWS = torch.tensor([[5, 6, 7, END], [5, 6, END, END], [END, 8, 9, 10]])


@pytest.mark.parametrize("mask", [None, torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [0, 1, 1, 1]])])
def test_the_outputs_of_a_decoder_are_those_that_the_model_gives(mask: torch.Tensor | None) -> None:
    """It pools at the last token that is not the padding token, also where the mask says that it is text."""
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(llama_config(num_labels=3, pad_token_id=END)).eval()
    batch = {"input_ids": ROWS, "labels": torch.zeros(3, dtype=torch.long)}
    if mask is not None:
        batch["attention_mask"] = mask
    source = LiveTargets(model)
    target = source.output(batch)
    with torch.no_grad():
        expected = model(**batch).logits
    torch.testing.assert_close(source.task.teacher_outputs(target, batch), expected)
    loss = torch.nn.functional.cross_entropy(expected, batch["labels"]).item()
    assert source.task.evaluate(model, [batch], lambda _: None, EvaluationTools())["loss"] == pytest.approx(loss)
