"""The target maps of a run: calibrated on its own data, or read back when it is continued.

Public names: `prepare_targets`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tutelage.core.heads import OutputHead
from tutelage.targets.extracted import ExtractedCurriculum
from tutelage.targets.live import calibrate, load_target_maps, save_target_maps
from tutelage.tasks.base import hidden_size, replica_seeds
from tutelage.training import warm_start
from tutelage.training.objective import StageObjective


def prepare_targets(
    objective: StageObjective,
    path: Path,
    batches: Callable[[], Sequence[dict[str, Any]]],
    device: Any,
    *,
    resuming: bool,
    write: bool,
    stored: ExtractedCurriculum | None = None,
    width: int | None = None,
) -> None:
    """Give the objective the target maps of its hidden stages.

    Args:
        objective: its maps are filled in; nothing is done if it has no hidden stage.
        path: where the maps are stored.
        batches: gives the calibration batches, if they are needed.
        device: where the statistics are wanted.
        resuming: read the maps that the run stored, if it did.
        write: store what is calibrated (one process does).
        stored: an extracted curriculum, which brings its maps along.
        width: of the targets; None is the student's.
    """
    teacher, curriculum, student = objective.teacher, objective.curriculum, objective.student
    if not curriculum.hidden_stages:
        return
    width = hidden_size(student) if width is None else width
    replicas = replica_seeds(student)
    if stored is not None:
        maps = stored.target_maps(curriculum, width)
        if write:
            save_target_maps(maps, path)
    elif teacher is None:
        return
    elif resuming and path.exists():
        maps = load_target_maps(path, curriculum, width, len(teacher.blocks), replicas)
    else:
        transplants = warm_start.head_stage(curriculum) is not None
        maps = calibrate(
            teacher,
            curriculum,
            batches(),
            width,
            replicas=replicas,
            center_head=not transplants or warm_start.head_has_bias(student),
            keep_moment=transplants,
            pooled_head=objective.task.name == "sequence_classification",
            head=None if objective.task.whole else OutputHead.of(teacher.model, objective.outputs),
        )
        if write:
            save_target_maps(maps, path)
    objective.maps[:] = [None if target_map is None else target_map.to(device) for target_map in maps]
