"""Starting the student's head and embedding from the teacher's.

Public names: `transplant_head`, `project_embedding`, `apply_before_training`, `apply_before_output`.

After a hidden stage that pairs `final` with `final`, the student's final state is about z = P^T (h - mean) / scale. With D
the linear map back from z to the standardised state (least squares over the calibration text; the pseudo-inverse of P
where the standardised states are white), the teacher's logits W h + b are about W (scale * D^T z + mean) + b, so the
student's head may start as W diag(scale) D^T with bias W mean + b. This is ours, beyond arXiv:2503.17494.

*What the student has not learnt* must not be magnified: the inverse of a square gaussian matrix multiplies the mean square of
noise by a thousand. The distance between the student's states and their targets is measured over the calibration text, and D
gets a ridge where that distance would otherwise come out larger than the state itself. A student state equal to its target
has none, and a full-width transplant is then exact.

*A student head without a bias*: the head stage's targets are not centred (mean = 0, scale = root mean square), so no bias is
needed. *Tied embeddings*: the shared matrix is set before the first stage, where the distance is unknown and taken as
half of the target, and kept fixed until the output stage, so that the blocks learn to read the embedding that the head will
be.

Shapes: V outputs, D teacher width, R student width, N calibration positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from tutelage.core.blocks import FINAL
from tutelage.core.curriculum import Curriculum, HiddenStage
from tutelage.core.errors import UserError
from tutelage.core.heads import OutputHead
from tutelage.core.projection import RandomProjection
from tutelage.core.standardize import Standardizer
from tutelage.targets.live import LiveTeacher, TargetMap
from tutelage.tasks.base import backbone, replica_seeds
from tutelage.tasks.embedding import EmbeddingModel
from tutelage.training.objective import StageObjective

# Before any training the noise of a student's state is unknown: half of its target's mean square is what the decoder is
# made for, so that what comes back is at most as noisy as the state is large.
_MAX_GAIN = 2.0


@torch.no_grad()
def transplant_head(
    student_linear: nn.Linear,
    standardizer: Standardizer,
    decoder_RD: torch.Tensor,
    weight_VD: torch.Tensor | None,
    bias_V: torch.Tensor | None,
    gain: float = 1.0,
) -> None:
    """Write the teacher's head, composed with the way back from the student's state, into the student's.

    Args:
        student_linear: the student's head; rows beyond V (a padded vocabulary) are left alone.
        standardizer: of the teacher's states at `final`.
        decoder_RD: from the student's state to the teacher's standardised one.
        weight_VD, bias_V: the teacher's head; None is the identity (embedding models).
        gain: teacher logit scale over student logit scale.
    """
    scale, mean = standardizer.scale.double().cpu(), standardizer.mean.double().cpu()
    back_DR = (decoder_RD.double().cpu() * scale).T
    weight = back_DR if weight_VD is None else weight_VD.double().cpu() @ back_DR
    bias = mean if weight_VD is None else weight_VD.double().cpu() @ mean
    if bias_V is not None:
        bias = bias + bias_V.double().cpu()
    rows = slice(0, len(weight))
    student_linear.weight[rows] = (gain * weight).to(student_linear.weight)
    if student_linear.bias is not None:
        student_linear.bias[rows] = (gain * bias).to(student_linear.bias)


@torch.no_grad()
def project_embedding(student: nn.Module, teacher: nn.Module, curriculum: Curriculum) -> None:
    """Start the token embedding as a random projection of the teacher's, scaled to the student's initial deviation."""
    source: torch.Tensor = teacher.get_input_embeddings().weight  # type: ignore[operator]
    target: torch.Tensor = student.get_input_embeddings().weight  # type: ignore[operator]
    rows = min(len(source), len(target))
    projection = RandomProjection(source.shape[1], target.shape[1], (curriculum.projection_seed, 0), "gaussian")
    projected = projection(source[:rows].detach().float().cpu())
    target[:rows] = (projected * (target.float().std().cpu() / projected.std())).to(target)


def head_stage(curriculum: Curriculum) -> int | None:
    """Index of the stage that pairs the two `final` places, if the curriculum transplants the head after one."""
    if "head" not in curriculum.warm_start:
        return None
    for index, stage in enumerate(curriculum.stages):
        if isinstance(stage, HiddenStage) and stage.student_place == FINAL and stage.teacher_place == FINAL:
            return index
    raise UserError(
        f"warm_start={curriculum.warm_start!r} needs a stage that pairs the places before the two output heads: "
        "end the layer map with final:final, e.g. layer_map='final:final'"
    )


def check(
    curriculum: Curriculum, student: nn.Module, teacher: LiveTeacher | None, stored_head: OutputHead | None = None
) -> None:
    """Raise UserError where the curriculum's warm start cannot be made."""
    if head_stage(curriculum) is not None and (teacher is not None or stored_head is not None):
        if replica_seeds(student) is not None:
            raise UserError(f"warm_start={curriculum.warm_start!r} cannot be made for replicated students: use 'none'")
        if not isinstance(student, EmbeddingModel):
            source = stored_head if teacher is None else OutputHead.of(teacher.model)
            assert source is not None
            _check_soft_caps(source, OutputHead.of(student))
        elif student.head is None:
            raise UserError(
                f"warm_start={curriculum.warm_start!r} needs a student with a linear head on its embedding: "
                "give a student without weights, it gets one, or warm_start='none'"
            )
    if "embedding" in curriculum.warm_start and not hasattr(backbone(student), "get_input_embeddings"):
        raise UserError(f"warm_start={curriculum.warm_start!r} needs a model with token embeddings")


def _check_soft_caps(source: OutputHead, target: OutputHead) -> None:
    if source.softcap != target.softcap:
        raise UserError(
            f"the teacher soft-caps its logits at {source.softcap}, the student at {target.softcap}: a head transplant "
            "needs both alike; set final_logit_softcapping in the student or warm_start='none'"
        )


def keeps_embedding_fixed(curriculum: Curriculum, student: nn.Module) -> bool:
    """Whether hidden stages leave the embedding alone, since it is the transplanted head too."""
    return head_stage(curriculum) is not None and is_tied(student)


def is_tied(student: Any) -> bool:
    """Whether the student's output head and input embedding share one matrix."""
    if isinstance(student, EmbeddingModel) or not hasattr(student, "get_input_embeddings"):
        return False
    embedding, head = student.get_input_embeddings(), student.get_output_embeddings()
    return head is not None and head.weight is embedding.weight


def head_has_bias(student: nn.Module) -> bool:
    """Whether the student's output head has a bias."""
    if isinstance(student, EmbeddingModel):
        return student.head is not None and student.head.bias is not None
    return OutputHead.of(student).linear.bias is not None


def apply_before_training(objective: StageObjective) -> None:
    """What must be in place before the first stage: a projected embedding, and the head of a tied student."""
    curriculum, student, teacher = objective.curriculum, objective.student, objective.teacher
    if "embedding" in curriculum.warm_start and not is_tied(student):
        assert teacher is not None
        project_embedding(backbone(student), teacher.backbone, curriculum)
    if keeps_embedding_fixed(curriculum, student):
        _transplant(objective, _MAX_GAIN)


@torch.no_grad()
def apply_before_output(objective: StageObjective, batches: Callable[[], Sequence[dict[str, Any]]]) -> None:
    """The head transplant, when the first output stage begins.

    Args:
        objective: student, teacher, maps.
        batches: gives the calibration batches.
    """
    index = head_stage(objective.curriculum)
    if index is None or is_tied(objective.student):
        return
    student, was_training = objective.student, objective.student.training
    student.eval()
    distance = size = 0.0
    for batch in batches():
        states, targets, keep = objective.hidden_states(index, batch)
        states, targets = states[keep].double(), targets[keep].double()
        distance += float((states - targets).square().sum())
        size += float(targets.square().sum())
    student.train(was_training)
    _transplant(objective, size / distance if distance > 0 else None)


def _head_map(objective: StageObjective) -> TargetMap:
    index = head_stage(objective.curriculum)
    assert index is not None
    target_map = objective.maps[index]
    assert target_map is not None
    return target_map


def embedding_head(objective: StageObjective) -> nn.Linear | None:
    """The linear map that an embedding teacher puts on its pooled state, if it has one."""
    if objective.teacher is None:
        return None if objective.teacher_head is None else objective.teacher_head.linear
    assert isinstance(objective.teacher.model, EmbeddingModel)
    return objective.teacher.model.head


def _transplant(objective: StageObjective, max_gain: float | None) -> None:
    """Compose the teacher's head with the way back, whose noise stays below `max_gain` (`Projection.decoder`)."""
    student, outputs, target_map = objective.student, objective.outputs, _head_map(objective)
    assert target_map.moment is not None, "the head stage was calibrated without its second moment"
    way_back = (target_map.standardizer, target_map.projection.decoder(target_map.moment, max_gain))
    if isinstance(student, EmbeddingModel):
        assert student.head is not None
        head = embedding_head(objective)
        weight, bias = (None, None) if head is None else (head.weight, head.bias)
        transplant_head(student.head, *way_back, weight, bias)
        return
    source, target = objective.teacher_head, OutputHead.of(student, outputs)
    assert source is not None
    linear = source.linear
    used_bias = None if linear.bias is None else linear.bias[:outputs]
    transplant_head(target.linear, *way_back, linear.weight[:outputs], used_bias, source.scale / target.scale)
