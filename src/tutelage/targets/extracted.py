"""Targets from an extracted curriculum on disk, without a teacher."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, final

from torch import nn

from tutelage.core.blocks import FINAL, Place
from tutelage.core.curriculum import RESIDUAL, Curriculum
from tutelage.core.errors import UserError
from tutelage.core.heads import OutputHead
from tutelage.core.stages import HiddenStage
from tutelage.core.topk import TopK
from tutelage.targets import rows
from tutelage.targets.folder import ExtractedCurriculum, check_storable
from tutelage.targets.maps import save_target_maps
from tutelage.targets.source import Batches, Device, FixedSettings, HiddenTarget, Reading, StatisticsFile, TargetSource
from tutelage.targets.stored_rows import StoredRows, collate
from tutelage.tasks.base import Batch, OutputTarget
from tutelage.tasks.loading import load_config
from tutelage.tasks.registry import get_task
from tutelage.tasks.students import weights_of


@final
class ExtractedTargets(TargetSource):
    """An extracted curriculum in the teacher's place; its rows bring their targets along."""

    in_step_order = True

    def __init__(self, folder: ExtractedCurriculum):
        super().__init__(get_task(folder.identity.task))
        self.folder = folder
        self.blocks, self.method = folder.identity.teacher.blocks, folder.curriculum.method
        self.tokenizer = folder.tokenizer
        self._widths: dict[Place, int] = {}

    def fixed_settings(self, student_blocks: int) -> FixedSettings:
        identity, curriculum = self.folder.identity, self.folder.curriculum
        hidden = [stage for stage in curriculum.stages if isinstance(stage, HiddenStage)]
        return FixedSettings(
            where=f"the extracted curriculum in {str(self.folder.store)!r}",
            values={**self.folder.settings, "calibration_samples": identity.calibration_samples},
            layer_map=self.folder.layer_map(student_blocks) if curriculum.hidden_stages else None,
            hidden_steps={stage.teacher_place: stage.steps for stage in hidden},
            output_steps=curriculum.total_steps - sum(stage.steps for stage in hidden),
            warm_start=curriculum.warm_start,
            stage_trains=curriculum.stage_trains if hidden else None,
            step_examples=identity.step_examples,
            rows=identity.data.rows,
        )

    def attach(self, curriculum: Curriculum, student: nn.Module, outputs: int | None = None) -> None:
        check_storable(curriculum)
        self.folder.stages(curriculum)
        widths, extracted = self.task.widths(student, curriculum.places("student")), self.folder.identity.width
        if (width := max(widths.values(), default=0)) > extracted:
            raise UserError(
                f"the extracted curriculum in {str(self.folder.store)!r} has projections of width {extracted}, but the student "
                f"has width {width}: extract again with --projection_dim {width}, or choose a narrower student"
            )
        residual = curriculum.projection == RESIDUAL and bool(curriculum.hidden_stages)
        if residual and set(widths.values()) != {extracted}:
            raise UserError(
                f"the extracted curriculum in {str(self.folder.store)!r} was made for a student of width {extracted} that "
                f"starts from its teacher, but the student has width {width}: leave the student out, or extract "
                "again for this one (for several shapes: with --student_init random)"
            )
        if residual:
            self._check_weights(student)
        if curriculum.transplants and curriculum.transplant_stage is None:
            raise UserError(
                f"warm_start={curriculum.warm_start!r} without a hidden stage needs the teacher, which an extracted curriculum "
                "does not contain: use warm_start='none', or train with the teacher itself"
            )
        transplants = curriculum.transplant_stage is not None
        if transplants and self.folder.identity.head is None:
            raise UserError(
                f"the extracted curriculum in {str(self.folder.store)!r} contains no output head to start from: extract it "
                "with --warm_start head, or train with --warm_start none"
            )
        if transplants and self.folder.identity.centered and not self.task.head_has_bias(student):
            raise UserError(
                "the curriculum was extracted for a student whose output head has a bias, but this student's head has none: "
                "use --warm_start none, or extract again with this student"
            )
        if "embedding" in curriculum.warm_start:
            raise UserError(
                f"warm_start={curriculum.warm_start!r} needs the teacher's embedding, which an extracted curriculum does not "
                "contain: use 'head' or 'none', or train with the teacher itself"
            )
        super().attach(curriculum, student, outputs)
        self._widths = widths

    def _check_weights(self, student: nn.Module) -> None:
        """Residual targets are in the coordinates of the first weights that the extraction gave its student."""
        weights, where = weights_of(student), f"the extracted curriculum in {str(self.folder.store)!r}"
        if weights == "teacher":
            return
        if weights == "own":
            what = "the student brings its own weights: they learn from these targets only if they come from"
            warnings.warn(f"{what} the start that is stored in {where}", stacklevel=3)
            return
        raise UserError(
            f"{where} has targets for the student that is stored in it, with its first weights, but this model has others: "
            f"give the folder {str(self.folder.student)!r} as the student, or extract with --student_init random"
        )

    def stored_start(self, student: str) -> bool:
        starts = self.folder.curriculum.student_init == "teacher"
        return starts and Path(student).resolve() == self.folder.student.resolve()

    @property
    def output_count(self) -> int | None:
        return self.folder.identity.teacher.outputs or None

    @property
    def output_names(self) -> tuple[str, ...] | None:
        return self.task.output_names(load_config(str(self.folder.teacher_config)))

    def identity(self) -> dict[str, str]:
        return {"extraction": self.folder.identity.digest}

    def hidden(self, index: int, batch: Batch) -> HiddenTarget:
        return rows.dequantized(batch), batch[rows.KEEP]

    def joint(self, index: int, batch: Batch) -> tuple[list[HiddenTarget], OutputTarget | None]:
        numbers = range(len(self.stage(index).pairs))
        hidden = [(rows.dequantized(batch, number), batch[rows.numbered(rows.KEEP, number)]) for number in numbers]
        return hidden, self.output(batch)

    def output(self, batch: Batch) -> OutputTarget | None:
        if rows.TOP_IDS in batch:
            return OutputTarget(top_k=TopK(batch[rows.TOP_IDS], batch[rows.LOG_PROBS], batch[rows.LOG_REST]))
        return OutputTarget(whole=batch[rows.OUTPUT]) if rows.OUTPUT in batch else None

    def output_head(self) -> OutputHead | None:
        head = self.folder.head
        return head if head is None or self.outputs is None else replace(head, outputs=self.outputs)

    def prepare(self, file: StatisticsFile, batches: Batches, device: Device, width: int | None = None) -> None:
        assert self.curriculum is not None
        if not self.curriculum.hidden_stages:
            return
        maps = self.folder.target_maps(self.curriculum, self._widths if width is None else width)
        if file.write:
            save_target_maps(maps, file.path, file.run)
        self.maps = [target_map.to(device) for target_map in maps]

    def training_rows(self, dataset: Any, reading: Reading) -> StoredRows:
        assert self.curriculum is not None
        return StoredRows(self.folder, self.curriculum, self._widths, reading)

    def evaluation_rows(self, dataset: Any) -> Any:
        return self.folder.evaluation if dataset is None else dataset

    def calibration_rows(self, dataset: Any, count: int, size: int) -> list[Any]:
        return list(self.folder.calibration(self._widths.get(FINAL, self.folder.identity.width), size))

    def example_rows(self, dataset: StoredRows, index: int) -> Any:
        return dataset.__getitems__([int(dataset.starts[index])])

    def collate_with(self, collator: Callable[[Any], Batch]) -> Callable[[Any], Batch]:
        return partial(collate, collator, getattr(self.tokenizer, "pad_token_id", None) or 0)

    @property
    def columns(self) -> tuple[str, ...]:
        return (rows.OUTPUT,)
