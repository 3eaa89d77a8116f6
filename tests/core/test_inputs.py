"""What a forward takes from a batch, and which positions count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaModel

from tutelage.core.inputs import (
    IGNORED_LABEL,
    at_positions,
    batch_positions,
    batch_sequences,
    batch_size,
    first_token,
    label_positions,
    last_token,
    model_inputs,
    position_mask,
)

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
_ = IGNORED_LABEL


def test_ignored_label_is_pytorchs() -> None:
    assert nn.CrossEntropyLoss().ignore_index == IGNORED_LABEL


class Encoder(nn.Module):
    def forward(self, input_ids: Any, attention_mask: Any = None, labels: Any = None) -> None: ...


class Decoder(nn.Module):
    def forward(
        self, input_ids: Any, attention_mask: Any = None, labels: Any = None, use_cache: Any = None
    ) -> None: ...


def test_model_inputs_are_what_the_forward_names() -> None:
    batch = {"input_ids": IDS, "token_type_ids": IDS, "labels": IDS, "length": 3, "use_cache": True}
    assert model_inputs(Encoder(), batch) == {"input_ids": IDS}
    inputs = model_inputs(Decoder(), batch)
    assert set(inputs) == {"input_ids", "use_cache"}
    assert inputs["input_ids"] is IDS and inputs["use_cache"] is False
    assert set(batch) == {"input_ids", "token_type_ids", "labels", "length", "use_cache"}


def test_position_mask() -> None:
    hidden = torch.zeros(2, 4, 3)
    mask = position_mask({"input_ids": IDS, "attention_mask": MASK}, hidden)
    assert mask.dtype == torch.bool and torch.equal(mask, MASK == 1)
    assert position_mask({"attention_mask": MASK}, hidden.to("meta")).is_meta  # where the state is
    assert torch.equal(position_mask({"input_ids": IDS}, hidden), torch.ones(2, 4, dtype=torch.bool))
    pooled = position_mask({"input_ids": IDS, "attention_mask": MASK}, hidden[:, 0])
    assert torch.equal(pooled, torch.ones(2, dtype=torch.bool))


def test_causal_labels_are_those_of_the_next_position() -> None:
    labels = torch.tensor([[5, 6, 7, 8], [9, 10, -100, -100]])
    mask, targets = label_positions({"input_ids": IDS, "attention_mask": MASK, "labels": labels}, causal=True)
    assert mask.tolist() == [[True, True, True, False], [True, False, False, False]]
    assert targets is not None and targets.tolist() == [6, 7, 8, 10]
    assert labels.tolist() == [[5, 6, 7, 8], [9, 10, -100, -100]]


def test_causal_labels_of_a_prompt_and_its_answer() -> None:
    mask, targets = label_positions(
        {"input_ids": IDS, "labels": torch.tensor([[_, _, 7, _], [_, 10, _, 3]])}, causal=True
    )
    assert mask.tolist() == [[False, True, False, False], [True, False, True, False]]
    assert targets is not None and targets.tolist() == [7, 10, 3]


def test_masked_labels_stay_where_they_are() -> None:
    mask, targets = label_positions(
        {"input_ids": IDS, "labels": torch.tensor([[_, 6, _, 8], [9, _, _, _]])}, causal=False
    )
    assert mask.tolist() == [[False, True, False, True], [True, False, False, False]]
    assert targets is not None and targets.tolist() == [6, 8, 9]


@pytest.mark.parametrize(
    ("causal", "with_mask", "expected"),
    [
        (False, True, [[1, 1, 1, 1], [1, 1, 0, 0]]),
        (False, False, [[1, 1, 1, 1], [1, 1, 1, 1]]),
        (True, True, [[1, 1, 1, 0], [1, 0, 0, 0]]),
        (True, False, [[1, 1, 1, 0], [1, 1, 1, 0]]),
    ],
)
def test_without_labels_every_position_counts(causal: bool, with_mask: bool, expected: list[list[int]]) -> None:
    batch = {"input_ids": IDS, "attention_mask": MASK} if with_mask else {"input_ids": IDS}
    mask, targets = label_positions(batch, causal)
    assert targets is None
    assert mask.dtype == torch.bool and mask.int().tolist() == expected


def test_at_positions() -> None:
    values = torch.arange(24).reshape(2, 4, 3)
    assert torch.equal(at_positions(values, MASK.bool()), torch.cat([values[0], values[1, :2]]))


def test_at_positions_of_fake_tensors_are_all_of_them() -> None:
    with FakeTensorMode():
        assert at_positions(torch.empty(2, 4, 3), torch.empty(2, 4, dtype=torch.bool)).shape == (8, 3)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ([[1, 1, 1, 1], [1, 1, 0, 0]], [3, 1]),  # padding on the right
        ([[1, 1, 1, 1], [0, 0, 1, 1]], [3, 3]),  # on the left
        ([[0, 1, 1, 0], [1, 0, 0, 0]], [2, 0]),
        (None, [3, 3]),
    ],
)
def test_last_token(mask: list[list[int]] | None, expected: list[int]) -> None:
    hidden = torch.arange(24.0).reshape(2, 4, 3)
    batch = {"input_ids": IDS} if mask is None else {"input_ids": IDS, "attention_mask": torch.tensor(mask)}
    assert torch.equal(last_token(hidden, batch), torch.stack([hidden[0, expected[0]], hidden[1, expected[1]]]))


def test_first_token() -> None:
    hidden = torch.arange(24.0).reshape(2, 4, 3)
    found = first_token(hidden, torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1]]))
    assert torch.equal(found, torch.stack([hidden[0, 0], hidden[1, 2]]))


def test_last_token_of_pooled_states() -> None:
    pooled = torch.randn(2, 3)
    assert last_token(pooled, {"attention_mask": MASK}) is pooled


def test_sizes() -> None:
    assert batch_size({"note": "x", "input_ids": IDS}) == 2
    assert batch_positions({"input_ids": IDS, "attention_mask": MASK}) == 8
    assert batch_size({"pixel_values": torch.zeros(3, 1, 4, 4)}) == 3
    assert batch_positions({"pixel_values": torch.zeros(3, 1, 4, 4)}) == 3


def test_padding_at_the_left_predicts_nothing() -> None:
    """The last position of the padding is followed by a real token, and is no input of its prediction."""
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    expected = [[False, False, True, False], [True, True, True, False]]
    found, _ = label_positions({"input_ids": IDS, "attention_mask": mask}, causal=True)
    assert found.tolist() == expected
    found, targets = label_positions({"input_ids": IDS, "attention_mask": mask, "labels": IDS}, causal=True)
    assert found.tolist() == expected
    assert targets is not None and targets.tolist() == IDS[:, 1:][torch.tensor(expected)[:, :3]].tolist()


def test_labels_at_padding_are_not_predicted() -> None:
    """Labels that were copied from the ids, padding included."""
    mask, targets = label_positions({"attention_mask": MASK, "labels": IDS}, causal=True)
    assert mask.tolist() == [[True, True, True, False], [True, False, False, False]]
    assert targets is not None and targets.tolist() == [6, 7, 8, 10]
    mask, _ = label_positions({"attention_mask": MASK, "labels": IDS}, causal=False)
    assert torch.equal(mask, MASK == 1)


def test_inputs_of_packed_sequences_reach_the_model() -> None:
    """transformers' models take them through `**kwargs`."""
    packing = {name: torch.tensor([0, 2, 4]) for name in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")}
    batch = {"input_ids": IDS, **packing, "max_length_q": 2, "max_length_k": 2, "other": IDS, "labels": IDS}
    model = LlamaModel(
        LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    assert {*model_inputs(model, batch)} == {"input_ids", *packing, "max_length_q", "max_length_k", "use_cache"}

    class Plain(nn.Module):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return input_ids

    with pytest.raises(ValueError, match=r"batch has seq_idx, cu_seq_lens_q, .* which Plain does not take"):
        model_inputs(Plain(), batch)
    with pytest.raises(ValueError, match="batch has position_ids, which Plain does not take"):
        model_inputs(Plain(), {"input_ids": IDS, "position_ids": IDS})


def test_sequences_of_packed_rows_are_counted_by_their_positions() -> None:
    batch = {"input_ids": IDS, "position_ids": torch.tensor([[0, 1, 0, 0], [0, 1, 2, 3]])}
    assert batch_sequences(batch) == 4
    assert batch_sequences({"input_ids": IDS, "attention_mask": MASK, "position_ids": MASK}) == 2
    assert batch_sequences({"input_ids": IDS}) == 2
