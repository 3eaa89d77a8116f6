"""What a stage costs, and what it reaches."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from tutelage.core.inputs import batch_positions
from tutelage.core.stages import HiddenStage, JointStage
from tutelage.targets.source import TargetSource
from tutelage.training.objective import StageObjective


@dataclass(frozen=True)
class StageCost:
    """Floating-point operations of one training step of a stage, per position (padding included), and its reach."""

    student_flops: float  # student forward and backward, FLOPs per position
    teacher_flops: float  # teacher forward, FLOPs per position
    reached: frozenset[str]  # names of the student's parameters that the stage's loss depends on

    @property
    def flops(self) -> float:
        """Student and teacher together, FLOPs per position."""
        return self.student_flops + self.teacher_flops


class FlopCounter(TorchDispatchMode):
    """Counts as torch's `FlopCounterMode` does, whose bookkeeping by module makes it several times slower."""

    _whole: ClassVar[set[int]] = set()  # operators, by id, that cannot be decomposed

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        formula, named = flop_registry.get(func.overloadpacket), kwargs or {}
        if str(func.overloadpacket) == "aten._grouped_mm":  # of a mixture of experts; torch has no formula for it
            formula = _grouped_product
        if formula is None and func.namespace == "aten" and id(func) not in self._whole:
            with self:  # under inference mode compound operators arrive as they are
                result = func.decompose(*args, **named)
            if result is not NotImplemented:
                return result
            self._whole.add(id(func))
        result = func(*args, **named)
        if formula is not None:
            self.total += formula(*args, **named, out_val=result)
        return result


def _grouped_product(left: torch.Tensor, right: torch.Tensor, *_args: Any, **_kwargs: Any) -> int:
    """Operations of a product in groups, each of which has rows, columns or an inner part of its own."""
    groups = left.shape[0] if left.dim() == right.dim() == 3 else 1
    return 2 * groups * left.shape[-2] * left.shape[-1] * right.shape[-1]


def measure_stage(objective: StageObjective, index: int, batch: dict[str, Any]) -> StageCost:
    """Count one stage's FLOPs on `batch` with torch's counter, and find the parameters that get a gradient.

    Gradients, the random state and the current stage are left as they were. Works on the meta device too."""
    parameters = dict(objective.student.named_parameters())
    previous, grads = objective.stage_index, [(parameter, parameter.grad) for parameter in objective.parameters()]
    objective.stage_index = index
    objective.zero_grad(set_to_none=True)
    device_types = {parameter.device.type for parameter in parameters.values()} - {"meta", "cpu"}
    counter = FlopCounter()
    try:
        with objective.source.computing():
            with torch.random.fork_rng(device_type=next(iter(device_types), "cuda")), counter, torch.enable_grad():
                objective(**batch)["loss"].backward()
            teacher = _teacher_flops(objective, batch)
        reached = frozenset(name for name, parameter in parameters.items() if parameter.grad is not None)
    finally:
        objective.stage_index = previous
        for parameter, grad in grads:
            parameter.grad = grad
    positions = batch_positions(batch)
    return StageCost((counter.total - teacher) / positions, teacher / positions, reached)


def _teacher_flops(objective: StageObjective, batch: dict[str, Any]) -> int:
    """Operations that the targets of a step cost; 0 where the batch contains them."""
    source, counter = objective.source, FlopCounter()
    if not objective.stage.needs_teacher:
        return 0
    with counter, torch.no_grad():
        if isinstance(objective.stage, HiddenStage):
            source.hidden(objective.stage_index, batch)
            return counter.total
        joint, output = isinstance(objective.stage, JointStage), objective.stage.output
        target = source.joint(objective.stage_index, batch)[1] if joint else source.output(batch)
        if target is not None and output is not None and output.needs_teacher:
            source.task.teacher_outputs(target, objective.with_positions(batch))
    return counter.total


def measure_states(source: TargetSource, stage: HiddenStage, batch: dict[str, Any]) -> float:
    """FLOPs per position of the teacher's forward that a hidden stage is calibrated on."""
    counter = FlopCounter()
    with source.computing(), counter, torch.no_grad():
        source.stage_states(stage, batch)
    return counter.total / batch_positions(batch)
