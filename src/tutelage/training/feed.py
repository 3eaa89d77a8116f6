"""Batches that a stage is measured and calibrated on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from tutelage.targets.source import TargetSource

Batch = dict[str, Any]


@dataclass(frozen=True)
class CollatedBatches(Sequence[Batch]):
    """Batches that are collated when they are asked for, the same every time: one is in memory at a time."""

    rows: Sequence[Any]  # of each batch
    collate: Callable[[Any], Batch]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        with torch.random.fork_rng(devices=[]):  # masking collators may draw
            torch.default_generator.manual_seed(index)
            return self.collate(self.rows[index])


@dataclass(frozen=True)
class StageFeed:
    """Takes rows from a run's training data."""

    source: TargetSource
    rows: Any  # for training
    collate: Callable[[Any], Batch]  # from rows to a batch on the device
    samples: int  # examples of the calibration pass
    batch_size: int

    def calibration(self) -> Sequence[Batch]:
        """The first training examples (those of the extraction, where there is one), in batches."""
        return CollatedBatches(self._calibration_rows, self.collate)

    @cached_property
    def _calibration_rows(self) -> list[Any]:
        return self.source.calibration_rows(self.rows, self.samples, self.batch_size)

    def example(self, index: int) -> Batch:
        """A batch of one training example, of stage `index` where examples belong to stages."""
        return self.collate(self.source.example_rows(self.rows, index))
