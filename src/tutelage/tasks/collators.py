"""Data collators for language models.

Public names: `CausalCollator`, `StableMaskingCollator`.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DataCollatorForLanguageModeling

from tutelage.core.inputs import IGNORED_LABEL


class CausalCollator:
    """Stacks packed blocks; pads ragged ones at their end, with labels ignored there.

    Args:
        pad_token_id: id of the padding; None is 0.
        always_mask: give an attention mask also where no row is padded.
    """

    def __init__(self, pad_token_id: int | None = None, always_mask: bool = False):
        self.pad_token_id, self.always_mask = pad_token_id or 0, always_mask

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        longest = int(lengths.max())

        def stack(column: str, fill: int) -> torch.Tensor:
            return pad_sequence([torch.as_tensor(row[column]) for row in rows], batch_first=True, padding_value=fill)

        batch = {"input_ids": stack("input_ids", self.pad_token_id)}
        batch["labels"] = stack("labels" if "labels" in rows[0] else "input_ids", IGNORED_LABEL)
        if "attention_mask" in rows[0]:  # rows that were padded before
            batch["attention_mask"] = stack("attention_mask", 0)
            batch["labels"][batch["attention_mask"] == 0] = IGNORED_LABEL
        elif self.always_mask or bool((lengths != longest).any()):
            batch["attention_mask"] = (torch.arange(longest) < lengths.unsqueeze(1)).long()
        return batch


class StableMaskingCollator(DataCollatorForLanguageModeling):
    """Random masking (80/10/10) seeded by the batch's content.

    The same batch is masked alike in every method and after a resume, whatever else has drawn random numbers.
    """

    def torch_call(self, examples: list[Any]) -> dict[str, Any]:
        content = hashlib.sha256(str([list(example["input_ids"]) for example in examples]).encode()).digest()
        self.generator = torch.Generator().manual_seed(int.from_bytes(content[:7], "little"))
        return super().torch_call(examples)
