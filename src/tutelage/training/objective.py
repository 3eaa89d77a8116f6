"""The stage objective: one module whose forward is the loss of the current stage.

This is what the trainer wraps (DDP, autocast), so wrappers see a normal forward that returns a loss. The target source is held
outside the module tree: a teacher is never wrapped, saved, or given to the optimiser."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from tutelage.core.blocks import find_blocks
from tutelage.core.curriculum import Curriculum
from tutelage.core.losses import OutputSettings, hidden_loss
from tutelage.core.stages import HiddenStage, JointStage, OutputStage, Stage
from tutelage.targets.source import TargetSource
from tutelage.tasks.base import OutputTarget

Result = TypeVar("Result")


class StageObjective(nn.Module):
    """Holds the student, and the maps that are trained with it and thrown away; `forward(batch)` gives the loss of the current
    stage.

    `source` has a curriculum attached. `container` is the dotted name of the student's list of blocks, `chunk_size` the
    positions whose logits are held at a time, `embedding_loss` `cosine` or `mse`."""

    def __init__(
        self,
        student: nn.Module,
        source: TargetSource,
        *,
        container: str | None = None,
        chunk_size: int | None = None,
        embedding_loss: str = "cosine",
    ):
        super().__init__()
        self.student, self.task = student, source.task
        self._outside = (source,)  # a tuple hides it from nn.Module's registration
        self.learned = nn.ModuleList(source.learned_maps())  # one per pair of places; empty if projections are fixed
        self.blocks = find_blocks(self.task.backbone(student), container)
        self.chunk_size, self.embedding_loss = chunk_size, embedding_loss
        self.router_coefficient = self.task.router_coefficient(student)
        self.stage_index = 0

    @property
    def source(self) -> TargetSource:
        """Where targets come from."""
        return self._outside[0]

    @property
    def curriculum(self) -> Curriculum:
        """The stages."""
        assert self.source.curriculum is not None, "attach a curriculum to the source first"
        return self.source.curriculum

    @property
    def stage(self) -> Stage:
        """The current stage."""
        return self.curriculum.stages[self.stage_index]

    def count_items(self, batch: dict[str, Any]) -> torch.Tensor:
        """What the loss of the current stage is a mean over: non-padding positions, labelled positions, or sequences. Of a
        joint stage: what its output loss and each of its hidden losses are means over, (1 + pairs,)."""
        batch = self.with_positions(batch)
        if not isinstance(self.stage, JointStage):
            return self.task.count_items(self.stage, batch)
        parts = (self.stage.output, *self.stage.pairs)
        return torch.stack([self.task.count_items(part, batch) for part in parts])

    def forward(self, num_items: torch.Tensor | int | None = None, **batch: Any) -> dict[str, torch.Tensor]:
        """Loss of the current stage over `batch`, as a sum divided by `num_items` (default: this batch's own count).

        Beside `loss`, a joint stage gives what it consists of: `output_loss`, and `hidden_loss`, the mean of its pairs'."""
        batch = self.with_positions(batch)
        count, stage = self.count_items(batch) if num_items is None else num_items, self.stage
        if isinstance(stage, JointStage):
            return self._joint_loss(stage, batch, count)
        if isinstance(stage, OutputStage):
            loss = self._output_loss(stage, self.source.output(batch) if stage.needs_teacher else None, batch)
        else:
            loss = hidden_loss(*self.hidden_states(self.stage_index, batch))
        return {"loss": loss / count}

    def with_positions(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch whose labels say where outputs are compared; without labels that is wherever there is no padding."""
        if self.curriculum.output_positions == "labelled":
            return batch
        return {name: value for name, value in batch.items() if name != "labels"}

    def call(self, function: Callable[..., Result], *args: Any) -> Result:
        """`function(*args)`, as a second forward (`tutelage.training.sharding.run_student`)."""
        return function(*args)

    def hidden_states(self, index: int, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What hidden stage `index` compares: the student's states and their targets, (..., R), and which count, (...)."""
        stage = self.curriculum.stages[index]
        assert isinstance(stage, HiddenStage)
        target, keep = self.source.hidden(index, batch)
        state = self.task.state_at(self.student, stage.student_place, batch, self.blocks)
        return self._compared(self.curriculum.pair_numbers[index][0], state, batch), target, keep

    def _compared(self, number: int, state: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
        """What the student's state at the place of pair `number` is compared as: in the unit, or the width, of its targets."""
        state = self.task.stage_state(self.curriculum.hidden_stages[number], state, batch)
        if self.learned:
            return self.learned[number](state)
        unit = self.source.maps[number].unit
        return state if unit == 1 else state / unit

    @torch.compiler.disable  # hooks inside
    def _joint_loss(
        self, stage: JointStage, batch: dict[str, Any], count: torch.Tensor | int
    ) -> dict[str, torch.Tensor]:
        """Output loss and mean hidden loss, each divided by its own count, from one forward of the student."""
        targets, output = self.source.joint(self.stage_index, batch)
        if not stage.output.needs_teacher:
            output = None
        with self.task.watched(self.student, [pair.student_place for pair in stage.pairs], self.blocks) as states:
            losses = [self._output_loss(stage, output, batch)]
        numbers = self.curriculum.pair_numbers[self.stage_index]
        for number, pair, target in zip(numbers, stage.pairs, targets, strict=True):
            losses.append(hidden_loss(self._compared(number, states[pair.student_place], batch), *target))
        output_mean, *hidden_means = torch.stack(losses) / count
        hidden_mean = torch.stack(hidden_means).mean()
        parts = {"output_loss": output_mean.detach(), "hidden_loss": hidden_mean.detach()}
        return {"loss": output_mean + stage.hidden_weight * hidden_mean, **parts}

    def _output_loss(
        self, stage: OutputStage | JointStage, target: OutputTarget | None, batch: dict[str, Any]
    ) -> torch.Tensor:
        """(1 - label_weight) t^2 KL(teacher || student) + label_weight CE; the KL is taken in `tutelage.core.losses`."""
        curriculum = self.curriculum
        settings = OutputSettings(
            curriculum.temperature,
            stage.label_weight,
            curriculum.output_loss,
            curriculum.top_k,
            self.chunk_size,
            self.embedding_loss,
            self.source.outputs,
            self.router_coefficient,
        )
        return self.task.output_loss(self.student, batch, target, settings)
