"""Batches that a stage is measured and calibrated on."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from tutelage.targets.source import TargetSource

Batch = dict[str, Any]


@dataclass(frozen=True)
class StageFeed:
    """Takes rows from a run's training data."""

    source: TargetSource
    rows: Any  # for training
    collate: Callable[[Any], Batch]  # from rows to a batch on the device
    samples: int  # examples of the calibration pass
    batch_size: int

    def calibration(self) -> list[Batch]:
        """The first training examples (those of the extraction, where there is one), in batches."""
        return self._calibration

    @cached_property
    def _calibration(self) -> list[Batch]:
        with torch.random.fork_rng(devices=[]):  # masking collators may draw
            lists = self.source.calibration_rows(self.rows, self.samples, self.batch_size)
            return [self.collate(rows) for rows in lists]

    def example(self, index: int) -> Batch:
        """A batch of one training example, of stage `index` where examples belong to stages."""
        return self.collate(self.source.example_rows(self.rows, index))
