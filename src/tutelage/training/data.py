"""The data of a run: what models take of it, and the first rows of datasets that can only be iterated.
Shapes: B batch, T positions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.utils.data import IterableDataset

from tutelage.core.errors import UserError
from tutelage.core.inputs import IGNORED_LABEL, text_config, usable_positions
from tutelage.tasks.base import Batch, Task


@dataclass(frozen=True)
class Limits:
    """What all models of a run take; None is no limit."""

    positions: int | None  # tokens per sequence
    entries: int | None  # of the vocabulary
    classes: int | None  # that labels may have

    @classmethod
    def of(cls, models: Sequence[nn.Module], task: Task) -> "Limits":
        configs = [text_config(task.backbone(model).config) for model in models]

        def least(values: list[int | None]) -> int | None:
            return min((value for value in values if value is not None), default=None)

        return cls(
            least([usable_positions(config) for config in configs]),
            least([getattr(config, "vocab_size", None) for config in configs]),
            least([task.output_count(model) for model in models]),
        )

    def check_tokens(self, where: str, longest: int, first: int, last: int) -> None:
        """Refuse sequences of up to `longest` tokens with the ids from `first` to `last`, found `where`."""
        if self.positions is not None and longest > self.positions:
            found = f"{where} has a sequence of {longest} tokens"
            raise UserError(f"{found}, the model has {self.positions} positions: lower max_length")
        if first < 0 or (self.entries is not None and last >= self.entries):
            wrong, most = first if first < 0 else last, (self.entries or 0) - 1
            found = f"{where} has the token id {wrong}, but ids are from 0 to {most}"
            raise UserError(f"{found}: tokenise the text with the model's tokenizer")

    def check_labels(self, where: str, labels: torch.Tensor) -> None:
        """Refuse labels of any shape that are no class; -100 is none."""
        if self.classes is None or labels.is_floating_point():
            return
        wrong = labels[((labels < 0) & (labels != IGNORED_LABEL)) | (labels >= self.classes)]
        if len(wrong):
            found = f"{where} has the label {wrong[0]}, but the model has the classes 0 to {self.classes - 1}"
            raise UserError(f"{found}: correct the labels")


@dataclass(frozen=True)
class CheckedCollator:
    """A collator whose batches fit the models. Where datasets cannot be looked at as a whole, UserError comes from here, not
    an index error from the model."""

    collator: Callable[[Any], Batch]
    limits: Limits

    @property
    def tokenizer(self) -> Any:
        return getattr(self.collator, "tokenizer", None)

    def __call__(self, rows: Any) -> Batch:
        batch = self.collator(rows)
        ids, where = batch.get("input_ids"), "a batch of the data"
        mask = batch.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.dim() != 2:
            found = f"in {where} attention_mask has the shape {tuple(mask.shape)}: expected (B, T), which says what is padding"
            raise UserError(f"{found}; the model makes the mask of pairs of positions itself")
        if isinstance(ids, torch.Tensor) and ids.numel():
            first, last = (int(value) for value in ids.aminmax())
            self.limits.check_tokens(where, _longest(batch, ids), first, last)
        if isinstance(labels := batch.get("labels"), torch.Tensor):
            self.limits.check_labels(where, labels)
        return batch


def checked(collator: Callable[[Any], Batch], models: Sequence[nn.Module], task: Task) -> Callable[[Any], Batch]:
    """`collator`, with a check that its batches fit the models, where the data of the task are token ids."""
    return CheckedCollator(collator, Limits.of(models, task)) if task.tokenized else collator


def _longest(batch: Batch, ids_BT: torch.Tensor) -> int:
    """Tokens of the longest sequence, padding included; of rows that hold several sequences, where their positions say so."""
    if (positions := batch.get("position_ids")) is not None:
        return int(positions.max()) + 1
    return 1 if "cu_seq_lens_q" in batch else ids_BT.shape[-1]


@dataclass(frozen=True)
class FirstRows:
    """The first `count` rows of a dataset that can only be iterated, read once, when they are needed."""

    dataset: IterableDataset[Any]
    count: int

    @cached_property
    def _rows(self) -> list[Any]:
        return list(islice(iter(self.dataset), self.count))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[index]


def readable_rows(dataset: Any, count: int) -> Any:
    """`dataset`, or the first `count` rows of one that can only be iterated."""
    return FirstRows(dataset, count) if isinstance(dataset, IterableDataset) else dataset
