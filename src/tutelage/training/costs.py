"""What a stage costs, and what it reaches.

Public names: `StageCost`, `measure_stage`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from tutelage.core.blocks import FINAL
from tutelage.core.curriculum import HiddenStage
from tutelage.core.inputs import at_positions, batch_positions, label_positions
from tutelage.training.objective import StageObjective


@dataclass(frozen=True)
class StageCost:
    """Floating-point operations of one training step of a stage, a position (padding included), and its reach."""

    student_flops: float
    """Student forward and backward, FLOPs a position."""
    teacher_flops: float
    """Teacher forward, FLOPs a position."""
    reached: frozenset[str]
    """Names of the student's parameters that the stage's loss depends on."""

    @property
    def flops(self) -> float:
        """Student and teacher together, FLOPs a position."""
        return self.student_flops + self.teacher_flops


def measure_stage(objective: StageObjective, index: int, batch: dict[str, Any]) -> StageCost:
    """Count one stage's FLOPs on `batch` with torch's counter, and find the parameters that get a gradient.

    Gradients, the random state and the current stage are left as they were. Works on the meta device too.
    """
    previous, grads = objective.stage_index, {n: p.grad for n, p in objective.student.named_parameters()}
    objective.stage_index = index
    objective.student.zero_grad(set_to_none=True)
    device_types = {p.device.type for p in objective.student.parameters()} - {"meta", "cpu"}
    try:
        with torch.random.fork_rng(device_type=next(iter(device_types), "cuda"), enabled=True):
            counter = FlopCounterMode(display=False)
            with counter, torch.enable_grad():
                objective(**batch)["loss"].backward()
        reached = frozenset(n for n, p in objective.student.named_parameters() if p.grad is not None)
        teacher = _teacher_flops(objective, batch)
    finally:
        objective.stage_index = previous
        for name, parameter in objective.student.named_parameters():
            parameter.grad = grads[name]
    positions = batch_positions(batch)
    total = counter.get_total_flops()
    return StageCost((total - teacher) / positions, teacher / positions, reached)


def _teacher_flops(objective: StageObjective, batch: dict[str, Any]) -> int:
    stage, teacher = objective.stage, objective.teacher
    if teacher is None or not stage.needs_teacher:
        return 0
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        if isinstance(stage, HiddenStage):
            target_map = objective.maps[objective.stage_index]
            assert target_map is not None
            target_map(teacher.hidden(stage.teacher_place, batch))
        elif objective.task.whole:
            teacher.output(batch)
        else:
            state = teacher.hidden(FINAL, batch)
            if objective.task.per_position:
                state = at_positions(state, label_positions(batch, objective.task.causal)[0])
            head = objective.teacher_head
            assert head is not None
            head(state)
    return counter.get_total_flops()
