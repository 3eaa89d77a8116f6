"""Target maps: from a teacher's states to a student's targets.

Shapes: B batch, T positions, D teacher width, R projected width, N calibration positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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
    logits_projection,
    pca_projection,
)
from tutelage.core.standardize import Standardizer
from tutelage.io.files import replacing


@dataclass(frozen=True)
class TargetMap:
    """From a teacher state to a student target: standardise, then project."""

    standardizer: Standardizer
    projection: Projection
    moment: torch.Tensor | None = None
    """(D, D): second moment of the standardised states, where a head transplant needs the way back from the targets."""

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Targets, (..., D) -> (..., R), float32."""
        return self.projection(self.standardizer(hidden))

    def to(self, device: torch.device | str) -> TargetMap:
        """The same map with its statistics on `device`."""
        return TargetMap(self.standardizer.to(device), self.projection, self.moment)


@dataclass(frozen=True)
class Calibration:
    """How target maps are made for a student."""

    width: int  # R, of the targets
    replicas: Sequence[int] | None = None
    """Seeds of the networks in a replicated student, whose states are (B, G, R): each has a projection of its own."""
    center_final: bool = True
    """Subtract the mean at `final`; False where the student's output head has no bias to carry it, so that the transplanted
    head needs none."""
    keep_moment: bool = False  # give the map at `final` its second moment
    head: OutputHead | None = None
    """The teacher's output head; None where the output is the state itself (sentence encoders)."""


StatesOf = Callable[[HiddenStage, Mapping[str, Any]], torch.Tensor]


def calibrate(
    states_of: StatesOf,
    curriculum: Curriculum,
    batches: Sequence[Mapping[str, Any]],
    teacher_blocks: int,
    calibration: Calibration,
) -> list[TargetMap | None]:
    """Build each hidden stage's target map from a small pass over calibration batches.

    Args:
        states_of: the teacher's states of a hidden stage, (B, T, D) or pooled (B, D).
        curriculum: its hidden stages say which places.
        batches: model inputs on the teacher's device.
        teacher_blocks: L_T.
        calibration: what the student needs.

    Returns:
        One map for each stage, None for output stages.
    """
    maps: list[TargetMap | None] = []
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
            states = _states(states_of, stage, batches)
            if curriculum.normalize == "none":
                standardizer = Standardizer.identity(states.shape[-1])
            else:
                standardizer = Standardizer.fit(states, center=calibration.center_final or not at_final)
            moment = _second_moment(states, standardizer) if needs_moment or needs_data else None
        if needs_data:
            assert moment is not None
            projection = _data_projection(curriculum.projection, stage, standardizer, moment, calibration)
        else:
            widths = (len(standardizer.mean), calibration.width)
            projection = random_projection(
                curriculum, stage.teacher_place, widths, teacher_blocks, calibration.replicas
            )
        maps.append(TargetMap(standardizer, projection, moment if needs_moment else None))
    return maps


def _states(states_of: StatesOf, stage: HiddenStage, batches: Iterable[Mapping[str, Any]]) -> torch.Tensor:
    """States of all calibration positions without padding, on the CPU, (N, D)."""
    parts = []
    for batch in batches:
        hidden = states_of(stage, batch)
        parts.append(hidden[position_mask(batch, hidden)].float().cpu())
    return torch.cat(parts)


def _second_moment(states_ND: torch.Tensor, standardizer: Standardizer) -> torch.Tensor:
    kept = standardizer(states_ND[standardizer.keep(states_ND)]).double()
    return (kept.T @ kept / len(kept)).float()  # as it is stored, so that a resumed run has the same one


def _data_projection(
    kind: str, stage: HiddenStage, standardizer: Standardizer, moment: torch.Tensor, calibration: Calibration
) -> Projection:
    # The outputs see a block's state only through the blocks above it, so there `logits` is the principal directions too;
    # an embedding model's output *is* its pooled state, with no head to look through.
    if kind == "pca" or stage.teacher_place != FINAL or calibration.head is None:
        return pca_projection(moment, calibration.width)
    return logits_projection(moment, _logit_gram(calibration.head, standardizer), calibration.width)


def random_projection(
    curriculum: Curriculum,
    place: Place,
    widths: tuple[int, int],
    teacher_blocks: int,
    replicas: Sequence[int] | None = None,
) -> Projection:
    """The random projection of the stage at teacher `place`: seeded by (projection_seed, place), `final` being L_T + 1.

    Each replica's is seeded by (projection_seed, place, replica seed). `widths` are those of the teacher and of the target.
    """
    in_features, out_features = widths
    number = teacher_blocks + 1 if place == FINAL else int(place)
    seed = (curriculum.projection_seed, number)
    if replicas is None:
        return RandomProjection(in_features, out_features, seed, curriculum.projection)
    parts = [RandomProjection(in_features, out_features, (*seed, own), curriculum.projection) for own in replicas]
    return StackedProjection(parts)


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
        tensors[f"{index}.mean"] = target_map.standardizer.mean.cpu()
        tensors[f"{index}.scale"] = target_map.standardizer.scale.cpu()
        tensors[f"{index}.sink_norm"] = torch.tensor(target_map.standardizer.sink_norm, dtype=torch.float64)
        if isinstance(target_map.projection, DataProjection):
            tensors[f"{index}.projection"] = target_map.projection.matrix()
        if target_map.moment is not None:
            tensors[f"{index}.moment"] = target_map.moment
    with replacing(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)


def load_target_maps(
    path: Path, curriculum: Curriculum, student_width: int, teacher_blocks: int, replicas: Sequence[int] | None = None
) -> list[TargetMap | None]:
    """The inverse of `save_target_maps`."""
    tensors = load_file(path)
    maps: list[TargetMap | None] = []
    for index, stage in enumerate(curriculum.stages):
        if not isinstance(stage, HiddenStage):
            maps.append(None)
            continue
        standardizer = Standardizer(
            tensors[f"{index}.mean"],
            tensors[f"{index}.scale"],
            float(tensors[f"{index}.sink_norm"]),
            is_identity=curriculum.normalize == "none",
        )
        stored = tensors.get(f"{index}.projection")
        projection: Projection
        if stored is not None:
            projection = DataProjection(stored[:, :student_width], curriculum.projection)
        else:
            widths = (len(standardizer.mean), student_width)
            projection = random_projection(curriculum, stage.teacher_place, widths, teacher_blocks, replicas)
        maps.append(TargetMap(standardizer, projection, tensors.get(f"{index}.moment")))
    return maps
