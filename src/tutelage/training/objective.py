"""The stage objective: one module whose forward is the loss of the current stage.

This is what the trainer wraps (DDP, autocast), so wrappers see a normal forward that returns a loss. The target source is held
outside the module tree: a teacher is never wrapped, saved, or given to the optimiser."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from tutelage.core.blocks import find_blocks
from tutelage.core.curriculum import Curriculum, HiddenStage, OutputStage, Stage
from tutelage.core.losses import OutputSettings, hidden_loss
from tutelage.targets.source import TargetSource

Result = TypeVar("Result")


class StageObjective(nn.Module):
    """Holds the student; `forward(batch)` gives the loss of the current stage.

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
        """What the loss of the current stage is a mean over: non-padding positions, labelled positions, or sequences."""
        return self.task.count_items(self.stage, batch)

    def forward(self, num_items: torch.Tensor | int | None = None, **batch: Any) -> dict[str, torch.Tensor]:
        """Loss of the current stage over `batch`, as a sum divided by `num_items` (default: this batch's own count)."""
        if isinstance(self.stage, OutputStage):
            loss = self._output_loss(self.stage, batch)
        else:
            loss = hidden_loss(*self.hidden_states(self.stage_index, batch))
        count = self.count_items(batch) if num_items is None else num_items
        return {"loss": loss / count}

    def call(self, function: Callable[..., Result], *args: Any) -> Result:
        """`function(*args)`, as a second forward (`tutelage.training.sharding.run_student`)."""
        return function(*args)

    def hidden_states(self, index: int, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What hidden stage `index` compares: the student's states and their targets, (..., R), and which count, (...)."""
        stage = self.curriculum.stages[index]
        assert isinstance(stage, HiddenStage)
        target, keep = self.source.hidden(index, batch)
        state = self.task.stage_state(
            stage, self.task.state_at(self.student, stage.student_place, batch, self.blocks), batch
        )
        unit = 1.0 if (target_map := self.source.maps[index]) is None else target_map.unit
        return state if unit == 1 else state / unit, target, keep

    def _output_loss(self, stage: OutputStage, batch: dict[str, Any]) -> torch.Tensor:
        """(1 - label_weight) t^2 KL(teacher || student) + label_weight CE; the KL is taken in `tutelage.core.losses`."""
        temperature, top_k = self.curriculum.temperature, self.curriculum.top_k
        settings = OutputSettings(
            temperature,
            stage.label_weight,
            top_k,
            self.chunk_size,
            self.embedding_loss,
            self.source.outputs,
            self.router_coefficient,
        )
        target = self.source.output(batch) if stage.needs_teacher else None
        return self.task.output_loss(self.student, batch, target, settings)
