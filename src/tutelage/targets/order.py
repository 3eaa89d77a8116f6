"""The order in which examples are read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Reading:
    """Which device reads which examples of an optimiser step."""

    step_examples: int  # G, the examples of an optimiser step over all devices and micro-batches
    batch_size: int  # examples of a device's micro-batch
    devices: int = 1  # devices that take micro-batches in turn
    seed: int = 0  # of the order


def epoch_order(count: int, seed: int, epoch: int, sequential: bool = False) -> np.ndarray:
    """The order in which the trainer's sampler reads `count` examples in an epoch."""
    if sequential:
        return np.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed + epoch)).numpy()
