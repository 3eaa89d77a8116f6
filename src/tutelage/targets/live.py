"""Where targets come from: a live, frozen teacher.

Public names: `LiveTeacher`, `TargetMap`, `calibrate`, `save_target_maps`, `load_target_maps`.

Shapes: B batch, T positions, D teacher width, R projected width, N calibration positions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from tutelage.core.blocks import FINAL, Place, find_blocks, forward_to
from tutelage.core.curriculum import Curriculum, HiddenStage
from tutelage.core.errors import UserError
from tutelage.core.heads import OutputHead
from tutelage.core.inputs import last_token, model_inputs, output_tensor, position_mask
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
from tutelage.tasks.loading import load_config


class LiveTeacher:
    """A frozen teacher in memory.

    Args:
        model: the whole model; its parameters are frozen and it is put into evaluation mode.
        backbone: the part that hidden stages run in (an embedding model's encoder); None for the model itself.
        container: dotted name of the list of blocks, where `find_blocks` finds several.
    """

    def __init__(self, model: nn.Module, backbone: nn.Module | None = None, container: str | None = None):
        self.model = model.eval().requires_grad_(False)
        self.backbone = backbone if backbone is not None else model
        self.blocks = find_blocks(self.backbone, container)

    @torch.inference_mode()
    def hidden(self, place: Place, batch: Mapping[str, Any]) -> torch.Tensor:
        """Hidden state at `place`, (B, T, D) or pooled (B, D); nothing deeper is run."""
        hidden = forward_to(self.backbone, place, blocks=self.blocks, **model_inputs(self.backbone, batch))
        return hidden.to(batch["input_ids"].device) if "input_ids" in batch else hidden  # a teacher may span devices

    @torch.inference_mode()
    def output(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """The whole model's output: an embedding model's pooled embedding, (B, E), or logits, (..., V)."""
        output = output_tensor(self.model(**model_inputs(self.model, batch)))
        return output.to(batch["input_ids"].device) if "input_ids" in batch else output

    def load_checkpoint(self, folder: str) -> None:
        """Take the weights of another checkpoint of the same architecture (safetensors)."""
        check_checkpoint(self.model, folder)
        for subfolder, part, prefix in _stored_parts(self.model):
            state: dict[str, torch.Tensor] = {}
            for file in sorted((Path(folder) / subfolder).glob("model*.safetensors")):
                state.update(load_file(file))
            part.load_state_dict({name.removeprefix(prefix): value for name, value in state.items()}, strict=False)


def check_checkpoint(model: nn.Module, folder: str) -> None:
    """Raise UserError unless `folder` holds safetensors of `model`'s architecture; reads headers only."""
    if hasattr(model, "config") and (Path(folder) / "config.json").is_file():
        config = load_config(folder, what="teacher checkpoint")
        for field in ("model_type", "num_attention_heads", "num_key_value_heads"):  # the shapes do not show these
            theirs, ours = getattr(config, field, None), getattr(model.config, field, None)
            if theirs != ours:
                raise UserError(
                    f"checkpoint {folder!r} is of another architecture than the teacher: its {field} is {theirs}, "
                    f"the teacher's {ours}"
                )
    for subfolder, part, prefix in _stored_parts(model):
        shapes = _stored_shapes(Path(folder) / subfolder, prefix)
        if difference := _difference(part, shapes):
            raise UserError(f"checkpoint {folder!r} is of another architecture than the teacher: {difference}")


def _stored_parts(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Folder below a checkpoint's, module stored there, and prefix of the names in the file."""
    return model.stored_parts() if hasattr(model, "stored_parts") else [("", model, "")]  # type: ignore[operator]


def _stored_shapes(folder: Path, prefix: str) -> dict[str, list[int]]:
    files = sorted(folder.glob("model*.safetensors")) if folder.is_dir() else []
    if not files:
        raise UserError(f"teacher checkpoint {str(folder)!r} is not a folder with model.safetensors in it")
    shapes: dict[str, list[int]] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as handle:
                names = handle.keys()
                shapes.update({n.removeprefix(prefix): list(handle.get_slice(n).get_shape()) for n in names})
        except SafetensorError as error:
            raise UserError(f"teacher checkpoint {str(file)!r} is not a safetensors file: {error}") from error
    return shapes


def _difference(model: nn.Module, shapes: Mapping[str, list[int]]) -> str | None:
    """How stored tensors differ from the model's, in words; None where they do not."""
    state = model.state_dict()
    for name, value in state.items():
        if name not in shapes and not _is_tied(model, name):
            return f"it lacks {name}"
        if name in shapes and shapes[name] != list(value.shape):
            return f"{name} has shape {shapes[name]} there and {list(value.shape)} in the teacher"
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    for name in shapes:
        if name not in state and not any(re.search(pattern, name) for pattern in ignored):
            return f"the teacher lacks its {name}"
    return None


def _is_tied(model: nn.Module, name: str) -> bool:
    """Whether entry `name` shares its storage with another one, and so need not be stored."""
    state = model.state_dict()
    return any(other != name and value.data_ptr() == state[name].data_ptr() for other, value in state.items())


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


def calibrate(
    teacher: LiveTeacher,
    curriculum: Curriculum,
    batches: Sequence[Mapping[str, Any]],
    student_width: int,
    *,
    replicas: Sequence[int] | None = None,
    center_head: bool = True,
    keep_moment: bool = False,
    pooled_head: bool = False,
    head: OutputHead | None = None,
) -> list[TargetMap | None]:
    """Build each hidden stage's target map from a small pass over calibration batches.

    Args:
        teacher: the teacher.
        curriculum: its hidden stages say which places.
        batches: model inputs on the teacher's device.
        student_width: R.
        replicas: seeds of the networks in a replicated student, whose states are (B, G, R): each has a projection of its
            own.
        center_head: subtract the mean at `final`; False where the student's output head has no bias to carry it, so that
            the transplanted head needs none.
        keep_moment: give the map at `final` its second moment.
        pooled_head: the student learns the state of the last token alone at `final`.
        head: the teacher's output head; None where the output is the state itself (embedding models).

    Returns:
        One map for each stage, None for output stages.
    """
    maps: list[TargetMap | None] = []
    for stage in curriculum.stages:
        if not isinstance(stage, HiddenStage):
            maps.append(None)
            continue
        needs_moment = keep_moment and stage.teacher_place == FINAL
        needs_data = curriculum.projection not in RANDOM_KINDS
        if curriculum.normalize == "none" and not needs_moment and not needs_data:
            width = teacher.hidden(stage.teacher_place, batches[0]).shape[-1]
            standardizer, moment = Standardizer.identity(width), None
        else:
            states = _states(teacher, stage.teacher_place, batches, pooled_head and stage.teacher_place == FINAL)
            standardizer = (
                Standardizer.identity(states.shape[-1])
                if curriculum.normalize == "none"
                else Standardizer.fit(states, center=center_head or stage.teacher_place != FINAL)
            )
            moment = _second_moment(states, standardizer) if needs_moment or needs_data else None
        projection = _projection(curriculum, stage, standardizer, moment, student_width, replicas, teacher, head)
        maps.append(TargetMap(standardizer, projection, moment if needs_moment else None))
    return maps


def _states(
    teacher: LiveTeacher, place: Place, batches: Iterable[Mapping[str, Any]], pooled: bool = False
) -> torch.Tensor:
    """States of all non-padding calibration positions (of each sequence's last one, if pooled) on the CPU, (N, D)."""
    parts = []
    for batch in batches:
        hidden = teacher.hidden(place, batch)
        hidden = last_token(hidden, batch) if pooled else hidden
        parts.append(hidden[position_mask(batch, hidden)].float().cpu())
    return torch.cat(parts)


def _second_moment(states_ND: torch.Tensor, standardizer: Standardizer) -> torch.Tensor:
    kept = standardizer(states_ND[standardizer.keep(states_ND)]).double()
    return (kept.T @ kept / len(kept)).float()  # as it is stored, so that a resumed run has the same one


def _projection(
    curriculum: Curriculum,
    stage: HiddenStage,
    standardizer: Standardizer,
    moment: torch.Tensor | None,
    width: int,
    replicas: Sequence[int] | None,
    teacher: LiveTeacher,
    head: OutputHead | None,
) -> Projection:
    if curriculum.projection in RANDOM_KINDS:
        blocks = len(teacher.blocks)
        return random_projection(curriculum, stage.teacher_place, len(standardizer.mean), width, blocks, replicas)
    assert moment is not None
    # The outputs see a block's state only through the blocks above it, so there `logits` is the principal directions too;
    # an embedding model's output *is* its pooled state, with no head to look through.
    if curriculum.projection == "pca" or stage.teacher_place != FINAL or head is None:
        return pca_projection(moment, width)
    return logits_projection(moment, _logit_gram(head, standardizer), width)


def random_projection(
    curriculum: Curriculum,
    place: Place,
    in_features: int,
    out_features: int,
    teacher_blocks: int,
    replicas: Sequence[int] | None = None,
) -> Projection:
    """The random projection of the stage at teacher `place`: seeded by (projection_seed, place), `final` being L_T + 1.

    Each replica's is seeded by (projection_seed, place, replica seed).
    """
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
    path: Path,
    curriculum: Curriculum,
    student_width: int,
    teacher_blocks: int,
    replicas: Sequence[int] | None = None,
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
            width = len(standardizer.mean)
            projection = random_projection(
                curriculum, stage.teacher_place, width, student_width, teacher_blocks, replicas
            )
        maps.append(TargetMap(standardizer, projection, tensors.get(f"{index}.moment")))
    return maps
