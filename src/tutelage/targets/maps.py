"""Target maps: from a teacher's states to a student's targets.
Shapes: B batch, T positions, D teacher width, R projected width, N calibration positions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tutelage.core.blocks import FINAL, Place
from tutelage.core.curriculum import Curriculum, HiddenStage
from tutelage.core.heads import OutputHead
from tutelage.core.inputs import position_mask
from tutelage.core.projection import (
    RANDOM_KINDS,
    DataProjection,
    Projection,
    RandomProjection,
    StackedProjection,
    spectral_projection,
)
from tutelage.core.standardize import Standardizer
from tutelage.io.files import replacing
from tutelage.tasks.base import Batch


@dataclass(frozen=True)
class TargetMap:
    """From a teacher state to a student target: standardise, then project."""

    standardizer: Standardizer
    projection: Projection
    moment: torch.Tensor | None = None  # (D, D): second moment of the standardised states, for a head transplant

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Targets, (..., D) -> (..., R), float32."""
        return self.projection(self.standardizer(hidden))

    @property
    def is_calibrated(self) -> bool:
        """Whether it has statistics of the teacher's states."""
        return (
            not self.standardizer.is_identity or self.moment is not None or isinstance(self.projection, DataProjection)
        )

    def to(self, device: torch.device | str) -> TargetMap:
        return TargetMap(self.standardizer.to(device), self.projection, self.moment)


Widths = int | Mapping[Place, int]  # R of the targets: of all of them, or by the student's place


def width_at(widths: Widths, place: Place) -> int:
    """The width at a place."""
    return widths if isinstance(widths, int) else widths[place]


@dataclass(frozen=True)
class Calibration:
    """How target maps are made for a student."""

    width: Widths
    replicas: Sequence[int] | None = None  # seeds of the networks in a replicated student: each has its own projection
    center_final: bool = True  # subtract the mean at `final`; False where the student's head has no bias to carry it
    keep_moment: bool = False  # give the map at `final` its second moment
    head: OutputHead | None = None  # the teacher's; None where the output is the state itself (sentence encoders)


StatesOf = Callable[[HiddenStage, Mapping[str, Any]], torch.Tensor]
Maps = list[TargetMap | None]  # one for each stage, None for output stages
Seeds = Sequence[int] | None  # of the networks in a replicated student; None for an ordinary one


def calibrate(
    states_of: StatesOf, curriculum: Curriculum, batches: Sequence[Batch], teacher_blocks: int, calibration: Calibration
) -> Maps:
    """Build each hidden stage's target map from a small pass over calibration batches (model inputs on the teacher's device).

    `states_of` gives the teacher's states of a hidden stage, (B, T, D) or pooled (B, D)."""
    maps: Maps = []
    for stage in curriculum.stages:
        if not isinstance(stage, HiddenStage):
            maps.append(None)
            continue
        at_final = stage.teacher_place == FINAL
        needs_moment = calibration.keep_moment and at_final
        needs_data = curriculum.projection not in RANDOM_KINDS
        moment = None
        if curriculum.normalize == "none" and not needs_moment and not needs_data:
            standardizer = Standardizer.identity(states_of(stage, batches[0]).shape[-1])
        else:
            pairs = ((batch, states_of(stage, batch)) for batch in batches)  # all positions without padding, on the CPU
            states = torch.cat([hidden[position_mask(batch, hidden)].float().cpu() for batch, hidden in pairs])
            if curriculum.normalize == "none":
                standardizer = Standardizer.identity(states.shape[-1])
            else:
                standardizer = Standardizer.fit(states, center=calibration.center_final or not at_final)
            moment = None
            if needs_moment or needs_data:
                kept = standardizer(states[standardizer.keep(states)]).double()
                moment = (kept.T @ kept / len(kept)).float()  # as it is stored, so that a resumed run has the same one
        if needs_data:
            assert moment is not None
            projection = _data_projection(curriculum.projection, stage, standardizer, moment, calibration)
        else:
            widths = (len(standardizer.mean), width_at(calibration.width, stage.student_place))
            projection = random_projection(curriculum, stage, widths, teacher_blocks, calibration.replicas)
        maps.append(TargetMap(standardizer, projection, moment if needs_moment else None))
    return maps


def _data_projection(
    kind: str, stage: HiddenStage, standardizer: Standardizer, moment: torch.Tensor, calibration: Calibration
) -> Projection:
    # The outputs see a block's state only through the blocks above it, so there `logits` is the principal directions too;
    # an embedding model's output *is* its pooled state, with no head to look through.
    width = width_at(calibration.width, stage.student_place)
    if kind == "pca" or stage.teacher_place != FINAL or calibration.head is None:
        return spectral_projection(moment, width)
    return spectral_projection(moment, width, _logit_gram(calibration.head, standardizer))


def random_projection(
    curriculum: Curriculum, stage: HiddenStage, widths: tuple[int, int], teacher_blocks: int, replicas: Seeds = None
) -> Projection:
    """The random projection of a stage: seeded by (projection_seed, teacher place), `final` being L_T + 1.

    Each replica's is seeded by (projection_seed, place, replica seed). `widths` are those of the teacher and of the target."""
    place = teacher_blocks + 1 if stage.teacher_place == FINAL else int(stage.teacher_place)
    seed, kind = (curriculum.projection_seed, place), curriculum.projection
    if replicas is None:
        return RandomProjection(*widths, seed, kind)
    return StackedProjection([RandomProjection(*widths, (*seed, own), kind) for own in replicas])


def _logit_gram(head: OutputHead, standardizer: Standardizer) -> torch.Tensor:
    """W^T W of the head's weight, centred over the outputs, in standardised coordinates, (D, D)."""
    weight = head.linear.weight[: head.outputs].double().cpu()
    weight = (weight - weight.mean(0)) * standardizer.scale.double().cpu()
    return weight.T @ weight


def save_target_maps(maps: Sequence[TargetMap | None], path: Path) -> None:
    """Store statistics, data-aware projections and second moments; random projections are drawn again from their seed."""
    tensors: dict[str, torch.Tensor] = {}
    for index, target_map in enumerate(maps):
        if target_map is None:
            continue
        standardizer = target_map.standardizer
        tensors |= {f"{index}.mean": standardizer.mean.cpu(), f"{index}.scale": standardizer.scale.cpu()}
        tensors[f"{index}.sink_norm"] = torch.tensor(standardizer.sink_norm, dtype=torch.float64)
        if isinstance(target_map.projection, DataProjection):
            tensors[f"{index}.projection"] = target_map.projection.matrix()
        if target_map.moment is not None:
            tensors[f"{index}.moment"] = target_map.moment
    with replacing(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)


def load_target_maps(
    path: Path, curriculum: Curriculum, widths: Widths, teacher_blocks: int, replicas: Seeds = None
) -> Maps:
    """The inverse of `save_target_maps`."""
    tensors = load_file(path)
    maps: Maps = []
    for index, stage in enumerate(curriculum.stages):
        if not isinstance(stage, HiddenStage):
            maps.append(None)
            continue
        mean, scale, sink_norm = (tensors[f"{index}.{name}"] for name in ("mean", "scale", "sink_norm"))
        width = width_at(widths, stage.student_place)
        standardizer = Standardizer(mean, scale, float(sink_norm), is_identity=curriculum.normalize == "none")
        projection: Projection
        if (stored := tensors.get(f"{index}.projection")) is not None:
            projection = DataProjection(stored[:, :width], curriculum.projection)
        else:
            projection = random_projection(curriculum, stage, (len(mean), width), teacher_blocks, replicas)
        maps.append(TargetMap(standardizer, projection, tensors.get(f"{index}.moment")))
    return maps
