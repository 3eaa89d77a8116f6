"""Starting the student's head and embedding from the teacher's.

Public names: `transplant_head`, `project_embedding`, `apply_before_training`, `apply_before_output`.

After a hidden stage that pairs `head` with `head`, the student's final state is about z = P^T (h - mean) / scale. With D
the linear map back from z to the standardised state (least squares over the calibration text; the pseudo-inverse of P
where the standardised states are white), the teacher's logits W h + b are about W (scale * D^T z + mean) + b, so the
student's head may start as W diag(scale) D^T with bias W mean + b. This is ours, beyond arXiv:2503.17494.

*A student head without a bias*: the head stage's targets are not centred (mean = 0, scale = root mean square), so no bias is
needed and a full-width transplant is still exact. *Tied embeddings*: the shared matrix is set before the first stage and
kept fixed until the output stage, so that the blocks learn to read the embedding that the head will be.

Shapes: V outputs, D teacher width, R student width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tutelage.core.blocks import HEAD
from tutelage.core.curriculum import Curriculum
from tutelage.core.heads import OutputHead
from tutelage.core.projection import RandomProjection
from tutelage.tasks.embedding import EmbeddingModel
from tutelage.tasks.kinds import replica_seeds, trunk
from tutelage.teacher.targets import LiveTeacher, TargetMap


@torch.no_grad()
def transplant_head(
    student_linear: nn.Linear,
    target_map: TargetMap,
    weight_VD: torch.Tensor | None,
    bias_V: torch.Tensor | None,
    gain: float = 1.0,
) -> None:
    """Write the teacher's head, composed with the way back from the targets, into the student's.

    Args:
        student_linear: the student's head; rows beyond V (a padded vocabulary) are left alone.
        target_map: the `head` stage's map, with its decoder.
        weight_VD, bias_V: the teacher's head; None is the identity (embedding models).
        gain: teacher logit scale over student logit scale.
    """
    assert target_map.decoder is not None, "the head stage was calibrated without a decoder"
    standardizer, decoder_RD = target_map.standardizer, target_map.decoder.double()
    back_DR = (decoder_RD * standardizer.scale.double().cpu()).T
    mean_D = standardizer.mean.double().cpu()
    weight = back_DR if weight_VD is None else weight_VD.double().cpu() @ back_DR
    bias = mean_D if weight_VD is None else weight_VD.double().cpu() @ mean_D
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
    """Index of the stage that pairs the two `head` places, if the curriculum transplants the head after one."""
    if "head" not in curriculum.warm_start:
        return None
    for index, stage in enumerate(curriculum.stages):
        if stage.kind == "hidden" and stage.student_place == HEAD and stage.teacher_place == HEAD:
            return index
    raise ValueError(
        f"warm_start={curriculum.warm_start!r} needs a stage that pairs the places before the two output heads: "
        "end the layer map with head:head, e.g. layer_map='head:head'"
    )


def check(curriculum: Curriculum, student: nn.Module, teacher: LiveTeacher | None) -> None:
    """Raise ValueError where the curriculum's warm start cannot be made."""
    if head_stage(curriculum) is not None and teacher is not None:
        if replica_seeds(student) is not None:
            raise ValueError(f"warm_start={curriculum.warm_start!r} cannot be made for replicated students: use 'none'")
        if not isinstance(student, EmbeddingModel):
            _check_soft_caps(OutputHead.of(teacher.model), OutputHead.of(student))
        elif student.head is None:
            raise ValueError(
                f"warm_start={curriculum.warm_start!r} needs a student with a linear head on its embedding: "
                "give a student without weights, it gets one, or warm_start='none'"
            )
    if "embedding" in curriculum.warm_start and not hasattr(trunk(student), "get_input_embeddings"):
        raise ValueError(f"warm_start={curriculum.warm_start!r} needs a model with token embeddings")


def _check_soft_caps(source: OutputHead, target: OutputHead) -> None:
    if source.softcap != target.softcap:
        raise ValueError(
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


def apply_before_training(
    student: nn.Module,
    teacher: LiveTeacher,
    curriculum: Curriculum,
    maps: list[TargetMap | None],
    outputs: int | None,
) -> None:
    """What must be in place before the first stage: a projected embedding, and the head of a tied student."""
    if "embedding" in curriculum.warm_start and not is_tied(student):
        project_embedding(trunk(student), teacher.trunk, curriculum)
    if keeps_embedding_fixed(curriculum, student):
        _transplant(student, teacher, curriculum, maps, outputs)


def apply_before_output(
    student: nn.Module,
    teacher: LiveTeacher,
    curriculum: Curriculum,
    maps: list[TargetMap | None],
    outputs: int | None,
) -> None:
    """The head transplant, when the first output stage begins."""
    if head_stage(curriculum) is not None and not is_tied(student):
        _transplant(student, teacher, curriculum, maps, outputs)


def _transplant(
    student: nn.Module,
    teacher: LiveTeacher,
    curriculum: Curriculum,
    maps: list[TargetMap | None],
    outputs: int | None,
) -> None:
    index = head_stage(curriculum)
    assert index is not None
    target_map = maps[index]
    assert target_map is not None
    if isinstance(student, EmbeddingModel):
        assert isinstance(teacher.model, EmbeddingModel) and student.head is not None
        head = teacher.model.head
        weight, bias = (None, None) if head is None else (head.weight, head.bias)
        transplant_head(student.head, target_map, weight, bias)
        return
    source, target = OutputHead.of(teacher.model, outputs), OutputHead.of(student, outputs)
    _check_soft_caps(source, target)
    weight, bias = source.linear.weight[:outputs], source.linear.bias
    transplant_head(
        target.linear,
        target_map,
        weight,
        None if bias is None else bias[:outputs],
        source.scale / target.scale,
    )
