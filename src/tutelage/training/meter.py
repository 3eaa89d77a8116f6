"""Counting what a run has spent: samples, tokens, FLOPs and training seconds; and the parts of its loss."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from tutelage.core.inputs import batch_positions, batch_sequences, count_tokens
from tutelage.training.costs import StageCost
from tutelage.training.records import Progress


class Meter:
    """Keeps a run's `Progress` up to date; each of `world_size` devices counts its part, `total` sums a tensor over them."""

    def __init__(self, progress: Progress, world_size: int, total: Callable[[torch.Tensor], torch.Tensor]):
        self.progress = progress
        self._world_size, self._total = world_size, total
        self._clock: float | None = None
        # token counts stay on the device until they are needed, so that no step waits for them
        self._token_counts: list[torch.Tensor] = []
        self._parts: dict[str, torch.Tensor] = {}  # sums since they were last asked for, on the device too
        self._parts_from = 0  # the optimiser step at which these sums begin

    def start(self) -> None:
        """Let the training clock run."""
        self._clock = time.perf_counter()

    def count(self, batch: dict[str, Any], cost: StageCost) -> None:
        """Add a micro-step."""
        self._token_counts.append(count_tokens(batch))
        self.progress.samples += batch_sequences(batch) * self._world_size
        positions = batch_positions(batch) * self._world_size
        self.progress.student_flops += cost.student_flops * positions
        self.progress.teacher_flops += cost.teacher_flops * positions

    def add_parts(self, losses: Mapping[str, torch.Tensor]) -> None:
        """Add what a micro-step's `loss` consists of, if that is told beside it."""
        for name, value in losses.items():
            if name != "loss":
                self._parts[name] = value + self._parts.get(name, 0)

    def parts(self, step: int) -> dict[str, float]:
        """Means over the optimiser steps since this was last called, up to `step`; every device must call this alike."""
        steps, self._parts_from = max(1, step - self._parts_from), step
        parts, self._parts = self._parts, {}
        return {name: round(float(self._total(value)) / steps, 6) for name, value in parts.items()}

    def part_sums(self) -> dict[str, float]:
        """The sums that `parts` will divide, for a checkpoint; every device must call this alike."""
        return {name: float(self._total(value)) for name, value in self._parts.items()}

    def restore(self, first: bool) -> None:
        """Continue from the `progress` of a checkpoint; one device, the `first`, holds the sums of all."""
        self._parts_from = self.progress.logged_step
        self._parts = {name: torch.tensor(value if first else 0.0) for name, value in self.progress.parts.items()}

    def settle(self) -> Progress:
        """Bring tokens and seconds up to date; every device must call this alike."""
        if self._token_counts:
            self.progress.tokens += int(self._total(torch.stack(self._token_counts).sum()))
            self._token_counts.clear()
        if self._clock is not None:
            now = time.perf_counter()
            self.progress.seconds += now - self._clock
            self._clock = now
        return self.progress

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Leave what happens inside (evaluating, saving) out of the training seconds."""
        self.settle()
        running, self._clock = self._clock is not None, None
        try:
            yield
        finally:
            self._clock = time.perf_counter() if running else None
