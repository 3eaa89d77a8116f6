"""The stage objective: one module whose forward is the loss of the current stage.

Public names: `StageObjective`.

This is what the trainer wraps (DDP, autocast), so wrappers see a normal forward that returns a loss. The teacher is held
outside the module tree: it is never wrapped, saved, or given to the optimiser.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tutelage.core.blocks import FINAL, find_blocks, forward_to
from tutelage.core.curriculum import Curriculum, HiddenStage, OutputStage, Stage
from tutelage.core.heads import OutputHead
from tutelage.core.inputs import (
    at_positions,
    batch_size,
    label_positions,
    last_token,
    model_inputs,
    output_tensor,
    position_mask,
)
from tutelage.core.losses import embedding_loss, hidden_loss, logits_loss, output_loss
from tutelage.core.topk import TopK
from tutelage.targets import rows
from tutelage.targets.live import LiveTeacher, TargetMap
from tutelage.tasks.base import Task, backbone, hidden_size


class StageObjective(nn.Module):
    """Holds the student; `forward(batch)` gives the loss of the current stage.

    Args:
        student: the model that trains.
        teacher: where targets come from; None if no stage needs one, or batches bring them along (`tutelage.targets.rows`).
        curriculum: the stages.
        task: what the models put out.
        maps: target map of each hidden stage.
        outputs: outputs shared by both heads, where a vocabulary is padded; None for all.
        container: dotted name of the student's list of blocks.
        chunk_size: positions whose logits are held at a time.
        embedding_loss: `cosine` or `mse`.
        teacher_head: the teacher's output head where there is no teacher.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: LiveTeacher | None,
        curriculum: Curriculum,
        task: Task,
        maps: list[TargetMap | None],
        *,
        outputs: int | None = None,
        container: str | None = None,
        chunk_size: int | None = None,
        embedding_loss: str = "cosine",
        teacher_head: OutputHead | None = None,
    ):
        super().__init__()
        self.student = student
        # a tuple hides the teacher and the maps from nn.Module's registration
        self._outside = (teacher, maps, teacher_head)
        self.curriculum, self.task = curriculum, task
        self.blocks = find_blocks(backbone(student), container)
        self.outputs, self.chunk_size, self.embedding_loss = outputs, chunk_size, embedding_loss
        self.stage_index = 0

    @property
    def teacher(self) -> LiveTeacher | None:
        """Where targets come from."""
        return self._outside[0]

    @property
    def maps(self) -> list[TargetMap | None]:
        """Target map of each stage."""
        return self._outside[1]

    @property
    def stage(self) -> Stage:
        """The current stage."""
        return self.curriculum.stages[self.stage_index]

    @property
    def student_width(self) -> int:
        """r."""
        return hidden_size(self.student)

    @property
    def student_head(self) -> OutputHead:
        """The student's output head."""
        return OutputHead.of(self.student, self.outputs)

    @property
    def teacher_head(self) -> OutputHead | None:
        """The teacher's output head."""
        return self._outside[2] if self.teacher is None else OutputHead.of(self.teacher.model, self.outputs)

    @property
    def _label_weight(self) -> float:
        assert isinstance(self.stage, OutputStage)
        return self.stage.label_weight

    def count_items(self, batch: dict[str, Any]) -> torch.Tensor:
        """What the loss of the current stage is a mean over: non-padding positions, labelled positions, or sequences."""
        ids = batch.get("input_ids")
        sequences = self.task.plain or self._pooled(self.stage)
        if isinstance(self.stage, HiddenStage) and ids is not None and not sequences:
            mask = batch.get("attention_mask")
            return torch.tensor(ids.numel(), device=ids.device) if mask is None else mask.sum()
        if isinstance(self.stage, OutputStage) and self.task.per_position:
            return label_positions(batch, self.task.causal)[0].sum()
        return torch.tensor(batch_size(batch), device=ids.device if ids is not None else None)

    def forward(self, num_items: torch.Tensor | int | None = None, **batch: Any) -> dict[str, torch.Tensor]:
        """Loss of the current stage over `batch`, as a sum divided by `num_items` (default: this batch's own count)."""
        if isinstance(self.stage, HiddenStage):
            loss = self._hidden_stage(batch)
        elif self.task.name == "embedding":
            loss = self._embedding_stage(batch)
        elif self.task.whole:
            loss = self._logits_stage(batch)
        else:
            loss = self._output_stage(batch)
        count = self.count_items(batch) if num_items is None else num_items
        return {"loss": loss / count}

    def _pooled(self, stage: Stage) -> bool:
        """A classifier's `final` place is one pooled state a sequence."""
        hidden = isinstance(stage, HiddenStage) and stage.student_place == FINAL
        return self.task.name == "sequence_classification" and hidden

    def hidden_states(self, index: int, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What hidden stage `index` compares: the student's states and their targets, (..., R), and which count, (...)."""
        stage, network = self.curriculum.stages[index], backbone(self.student)
        assert isinstance(stage, HiddenStage)
        if rows.STATES in batch:
            target, keep = rows.dequantized(batch), batch[rows.KEEP]
        else:
            target, keep = self.live_states(index, batch)
        state = forward_to(network, stage.student_place, blocks=self.blocks, **model_inputs(network, batch))
        return last_token(state, batch) if self._pooled(stage) else state, target, keep

    def live_states(self, index: int, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Targets of a hidden stage from the teacher, and which positions count."""
        stage, target_map = self.curriculum.stages[index], self.maps[index]
        assert self.teacher is not None and target_map is not None and isinstance(stage, HiddenStage)
        with torch.inference_mode():
            hidden = self.teacher.hidden(stage.teacher_place, batch)
            if self._pooled(stage):
                hidden = last_token(hidden, batch)
            target = target_map(hidden)
            keep = position_mask(batch, hidden) & target_map.standardizer.keep(hidden)
        # autograd saves the mask, which it refuses for a tensor made in inference mode; the target it need not save
        return target, keep.clone()

    def _hidden_stage(self, batch: dict[str, Any]) -> torch.Tensor:
        return hidden_loss(*self.hidden_states(self.stage_index, batch))

    def _output_stage(self, batch: dict[str, Any]) -> torch.Tensor:
        state = forward_to(self.student, FINAL, **model_inputs(self.student, batch))
        teacher_state, teacher_head, stored = None, None, rows.TOP_IDS in batch
        if self.stage.needs_teacher and not stored:
            assert self.teacher is not None
            teacher_state, teacher_head = self.teacher.hidden(FINAL, batch), self.teacher_head
        if self.task.per_position:
            mask, labels = label_positions(batch, self.task.causal)
            state = at_positions(state, mask)
            teacher_state = None if teacher_state is None else at_positions(teacher_state, mask)
        else:
            labels = batch.get("labels")
            state = last_token(state, batch)
            teacher_state = None if teacher_state is None else last_token(teacher_state, batch)
        return output_loss(
            state,
            self.student_head,
            teacher_state,
            teacher_head,
            labels,
            temperature=self.curriculum.temperature,
            label_weight=self._label_weight,
            chunk_size=self.chunk_size,
            top_k=self.curriculum.top_k,
            targets=TopK(batch[rows.TOP_IDS], batch[rows.LOG_PROBS], batch[rows.LOG_REST]) if stored else None,
        )

    def _embedding_stage(self, batch: dict[str, Any]) -> torch.Tensor:
        target = self._whole_output(batch)
        return embedding_loss(self.student(**model_inputs(self.student, batch)), target, self.embedding_loss)

    def _whole_output(self, batch: dict[str, Any]) -> torch.Tensor:
        if rows.OUTPUT in batch:
            return batch[rows.OUTPUT]
        assert self.teacher is not None
        return self.teacher.output(batch).clone()

    def _logits_stage(self, batch: dict[str, Any]) -> torch.Tensor:
        target = self._whole_output(batch) if self.stage.needs_teacher else None
        return logits_loss(
            output_tensor(self.student(**model_inputs(self.student, batch))),
            target,
            batch.get("labels"),
            temperature=self.curriculum.temperature,
            label_weight=self._label_weight,
        )
