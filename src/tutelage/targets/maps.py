"""Target maps: from a teacher's states to a student's targets.
Shapes: B batch, T positions, D teacher width, R projected width, N calibration positions."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tutelage.core.blocks import FINAL, Place
from tutelage.core.curriculum import RESIDUAL, Curriculum
from tutelage.core.heads import OutputHead
from tutelage.core.inputs import position_mask
from tutelage.core.learned import LearnedMap
from tutelage.core.linalg import whole_float32
from tutelage.core.moments import Moments, check_count, shrunk_moment
from tutelage.core.processes import Group
from tutelage.core.projection import (
    DATA_KINDS,
    LEARNED,
    RANDOM_KINDS,
    DataProjection,
    Projection,
    RandomProjection,
    StackedProjection,
    spectral_projection,
)
from tutelage.core.stages import HiddenStage
from tutelage.core.standardize import Standardizer, check_finite, sink_threshold, state_norms
from tutelage.io.files import replacing
from tutelage.tasks.base import Batch
from tutelage.tasks.initialization.student import Initialized


@dataclass(frozen=True)
class TargetMap:
    """From a teacher state to a student target: standardise, then project, unless the student learns a map to it."""

    standardizer: Standardizer
    projection: Projection | None  # None keeps the teacher's width: the student has a learned map
    moment: torch.Tensor | None = None  # (D, D): shrunk second moment of the standardised states, for a head transplant
    unit: float = 1.0  # what the student's states are divided by before they are compared: that of the targets

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Targets, (..., D) -> (..., R), float32."""
        standardized = self.standardizer(hidden)
        return standardized if self.projection is None else self.projection(standardized)

    def to(self, device: torch.device | str) -> TargetMap:
        return replace(self, standardizer=self.standardizer.to(device))


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
    started: Initialized | None = None  # what the student was initialised with
    # the teacher's states of all hidden stages for a batch; needed where `started` is
    states_of_all: Callable[[Mapping[str, Any]], list[torch.Tensor]] = lambda batch: []


StatesOf = Callable[[HiddenStage, Mapping[str, Any]], torch.Tensor]
Maps = list[TargetMap]  # one for each of `Curriculum.calibrated_pairs`
Seeds = Sequence[int] | None  # of the networks in a replicated student; None for an ordinary one


def calibrate(
    states_of: StatesOf,
    curriculum: Curriculum,
    batches: Sequence[Batch],
    teacher_blocks: int,
    calibration: Calibration,
    group: Group = Group(),  # noqa: B008 (frozen)
) -> Maps:
    """Build each hidden stage's target map from passes over calibration batches (model inputs on the teacher's device).

    `states_of` gives the teacher's states of a hidden stage, (B, T, D) or pooled (B, D). Each process of `group` runs it on
    its part of the same `batches`, and all get the same maps. One batch and its states are held at a time; with attention
    sinks to be found, the teacher runs twice over each batch."""
    run = _Calibrator(states_of, curriculum, batches, teacher_blocks, calibration, group)
    if curriculum.projection == RESIDUAL:
        return run.residual_maps()
    return [run.target_map(pair) for pair in curriculum.calibrated_pairs]


@dataclass(frozen=True)
class _Calibrator:
    """The arguments of `calibrate`."""

    states_of: StatesOf
    curriculum: Curriculum
    batches: Sequence[Batch]
    teacher_blocks: int
    calibration: Calibration
    group: Group

    def target_map(self, stage: HiddenStage) -> TargetMap:
        keeps_moment = self.calibration.keep_moment and stage.teacher_place == FINAL
        full = keeps_moment or self.curriculum.projection in DATA_KINDS
        if self.curriculum.normalize == "none" and not full:
            width = self.group.first(lambda: self.states_of(stage, self.batches[0]).shape[-1])
            standardizer = Standardizer.identity(width)
            return TargetMap(standardizer, self._projection(stage, standardizer, None))
        sink_norm = math.inf if self.curriculum.normalize == "none" else self._sink_norm(stage)
        halves = self._halves(stage, sink_norm, full)

        def make() -> TargetMap:
            total = halves[0] + halves[1]
            if self.curriculum.normalize == "none":
                standardizer = Standardizer.identity(len(total.mean))
            else:
                center = self.calibration.center_final or stage.teacher_place != FINAL
                standardizer = Standardizer.of(total, sink_norm, center)
            moment = None
            if full:
                check_count(total.count, len(total.mean), f"stage {stage.name}")
                # as it is stored, so that a resumed run has the same one
                moment = shrunk_moment(halves, standardizer.mean, standardizer.scale).float()
            projection = self._projection(stage, standardizer, moment)
            return TargetMap(standardizer, projection, moment if keeps_moment else None)

        return self.group.first(make)

    def residual_maps(self) -> Maps:
        """Q^T h, in the scale that the initialised student's states have, but for one number per pair of places: the root mean
        square. Norm and mean square of every position are kept, so that the teacher runs once for all."""
        started, stages = self.calibration.started, self.curriculum.hidden_stages
        assert started is not None, "initialise the student first"
        projections = [DataProjection(started.matrix(stage.teacher_place), RESIDUAL) for stage in stages]
        found: list[list[torch.Tensor]] = [[] for _ in stages]  # norms and mean squares, (2, N)
        for _, batch in self.group.mine(self.batches):
            for index, hidden in enumerate(self.calibration.states_of_all(batch)):
                states = hidden[position_mask(batch, hidden)].float()
                with whole_float32(states.device):
                    both = state_norms(states), projections[index](states).square().mean(-1)
                found[index].append(torch.stack(both).cpu())

        def make(index: int, parts: list[list[torch.Tensor]]) -> TargetMap:
            norms, squares = torch.cat([part for each in parts for part in each], dim=1)
            sink_norm, width = sink_threshold(norms), projections[index].in_features
            unit = float(squares[norms <= sink_norm].mean().sqrt()) or 1.0
            standardizer = Standardizer(torch.zeros(width), torch.full((width,), unit), sink_norm)
            return TargetMap(standardizer, projections[index], unit=unit)

        return [make(index, self.group.gather(parts)) for index, parts in enumerate(found)]

    def _states(self, stage: HiddenStage) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Index, states and non-padding positions of this process's batches."""
        for index, batch in self.group.mine(self.batches):
            hidden = self.states_of(stage, batch)
            yield index, hidden, position_mask(batch, hidden)

    def _sink_norm(self, stage: HiddenStage) -> float:
        mine = [state_norms(hidden[mask]).cpu() for _, hidden, mask in self._states(stage)]
        return sink_threshold(
            torch.cat([torch.zeros(0), *(norms for each in self.group.gather(mine) for norms in each)])
        )

    def _halves(self, stage: HiddenStage, sink_norm: float, full: bool) -> tuple[Moments, Moments]:
        """Moments of every other example, and of the rest."""
        halves = Moments(full), Moments(full)
        for index, hidden, mask in self._states(stage):
            keep = mask & (state_norms(hidden) <= sink_norm) if sink_norm < math.inf else mask
            for half, moments in enumerate(halves):
                examples = slice((index * len(hidden) + half) % 2, None, 2)
                moments.add(hidden[examples][keep[examples]])
        found = halves[0].over(self.group), halves[1].over(self.group)
        for moments in found:
            check_finite(moments.mean)
        return found

    def _projection(
        self, stage: HiddenStage, standardizer: Standardizer, moment: torch.Tensor | None
    ) -> Projection | None:
        kind, head = self.curriculum.projection, self.calibration.head
        if kind == LEARNED:
            return None
        width = width_at(self.calibration.width, stage.student_place)
        if kind in RANDOM_KINDS:
            widths = (len(standardizer.mean), width)
            return random_projection(self.curriculum, stage, widths, self.teacher_blocks, self.calibration.replicas)
        assert moment is not None
        # The outputs see a block's state only through the blocks above it, so there `logits` is the principal directions
        # too; an embedding model's output *is* its pooled state, with no head to look through.
        if kind == "pca" or stage.teacher_place != FINAL or head is None:
            return spectral_projection(moment, width)
        return spectral_projection(moment, width, head.gram(standardizer.scale))


def random_projection(
    curriculum: Curriculum, stage: HiddenStage, widths: tuple[int, int], teacher_blocks: int, replicas: Seeds = None
) -> Projection:
    """The random projection of a stage: seeded by (projection_seed, teacher place), `final` being L_T + 1; gaussian where the
    curriculum has another kind.

    Each replica's is seeded by (projection_seed, place, replica seed). `widths` are those of the teacher and of the target."""
    place = teacher_blocks + 1 if stage.teacher_place == FINAL else int(stage.teacher_place)
    seed, kind = (curriculum.projection_seed, place), curriculum.projection
    kind = kind if kind in RANDOM_KINDS else "gaussian"
    if replicas is None:
        return RandomProjection(*widths, seed, kind)
    return StackedProjection([RandomProjection(*widths, (*seed, own), kind) for own in replicas])


def learned_map(
    curriculum: Curriculum, stage: HiddenStage, widths: tuple[int, int], teacher_blocks: int, replicas: Seeds = None
) -> LearnedMap:
    """The learned map of a stage before training: as `random_projection`, from the student's width to the teacher's, which
    `widths` are."""
    return LearnedMap(random_projection(curriculum, stage, widths, teacher_blocks, replicas))


def save_target_maps(maps: Sequence[TargetMap], path: Path, run: Mapping[str, str] | None = None) -> None:
    """Store statistics, data-aware projections and second moments; random projections are drawn again from their seed.

    `run` is the identity of the run that they belong to."""
    tensors: dict[str, torch.Tensor] = {}
    for index, target_map in enumerate(maps):
        standardizer = target_map.standardizer
        tensors |= {f"{index}.mean": standardizer.mean.cpu(), f"{index}.scale": standardizer.scale.cpu()}
        tensors[f"{index}.sink_norm"] = torch.tensor(standardizer.sink_norm, dtype=torch.float64)
        if isinstance(target_map.projection, DataProjection):
            tensors[f"{index}.projection"] = target_map.projection.matrix().clone()  # some share it
        if target_map.moment is not None:
            tensors[f"{index}.moment"] = target_map.moment
        if target_map.unit != 1:
            tensors[f"{index}.unit"] = torch.tensor(target_map.unit, dtype=torch.float64)
    with replacing(path) as temporary:
        metadata = {"run": json.dumps(run, sort_keys=True)} if run else None
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)


def identity_of(path: Path) -> dict[str, str]:
    """The identity of the run that stored statistics belong to; empty where they do not say."""
    with safe_open(path, "pt") as handle:
        identity: dict[str, str] = json.loads((handle.metadata() or {}).get("run", "{}"))
    return identity


def load_target_maps(
    path: Path, curriculum: Curriculum, widths: Widths, teacher_blocks: int, replicas: Seeds = None
) -> Maps:
    """The inverse of `save_target_maps`."""
    tensors = load_file(path)
    maps: Maps = []
    for index, stage in enumerate(curriculum.calibrated_pairs):
        mean, scale, sink_norm = (tensors[f"{index}.{name}"] for name in ("mean", "scale", "sink_norm"))
        width = width_at(widths, stage.student_place)
        identity = curriculum.normalize == "none" and curriculum.projection != RESIDUAL  # which is in its own unit
        standardizer = Standardizer(mean, scale, float(sink_norm), is_identity=identity)
        projection: Projection | None = None
        if (stored := tensors.get(f"{index}.projection")) is not None:
            projection = DataProjection(stored[:, :width], curriculum.projection)
        elif curriculum.projection != LEARNED:
            projection = random_projection(curriculum, stage, (len(mean), width), teacher_blocks, replicas)
        unit = float(tensors.get(f"{index}.unit", 1.0))
        maps.append(TargetMap(standardizer, projection, tensors.get(f"{index}.moment"), unit))
    return maps
