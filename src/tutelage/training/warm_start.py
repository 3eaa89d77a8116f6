"""Starting the student's head and embedding from the teacher's.

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
be. *Without hidden stages* (one-shot, joint, progressive) every head is set then, with the same distance.

Shapes: V outputs, D teacher width, R student width, N calibration positions."""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from tutelage.core.curriculum import Curriculum
from tutelage.core.errors import UserError
from tutelage.core.heads import OutputHead
from tutelage.core.inputs import batch_positions
from tutelage.core.linalg import fastest
from tutelage.core.processes import Group
from tutelage.core.projection import RandomProjection
from tutelage.core.standardize import Standardizer
from tutelage.tasks.base import Batch
from tutelage.training.objective import StageObjective
from tutelage.training.sharding import run_student, write_rows

# Before any training the noise of a student's state is unknown: the decoder is made for half of its target's mean square.
_MAX_GAIN = 2.0
_ROWS = 4096  # of the teacher's head, that are multiplied at a time


@torch.no_grad()
def transplant_head(
    student: OutputHead, standardizer: Standardizer, decoder_RD: torch.Tensor, teacher: OutputHead | None
) -> None:
    """Write the teacher's head, composed with the way back from the student's state, into the student's.

    Rows of the student's head beyond the teacher's outputs (a padded vocabulary) are left alone; `standardizer` is of the
    teacher's states at `final`; no teacher head is the identity (sentence encoders)."""
    scale, mean = standardizer.scale.cpu().double(), standardizer.mean.cpu().double()
    weight = (decoder_RD.cpu().double() * scale).T
    bias, gain, linear = mean, 1.0 / student.scale, student.linear
    if teacher is not None:
        used = slice(0, teacher.outputs)
        weight_VD, back_DR = teacher.linear.weight[used], torch.cat([weight, mean[:, None]], dim=1)
        multiply = partial(fastest, torch.matmul, others_wait=False)
        product = torch.cat([multiply(rows.cpu().double(), back_DR) for rows in weight_VD.split(_ROWS)])
        weight, bias, gain = product[:, :-1], product[:, -1], teacher.scale / student.scale
        if teacher.linear.bias is not None:
            bias = bias + teacher.linear.bias[used].cpu().double()
    rows = slice(0, len(weight))
    write_rows(linear.weight, rows, gain * weight)
    if linear.bias is not None:
        # an output that the teacher rules out has a bias of -inf, which no weight of a student may have
        bias = (gain * bias).to(linear.bias.dtype).clamp_min(torch.finfo(linear.bias.dtype).min)
        write_rows(linear.bias, rows, bias)


@torch.no_grad()
def project_embedding(student: nn.Module, source_VD: torch.Tensor, projection_seed: int) -> None:
    """Start the token embedding as a random projection of the teacher's, scaled to the student's initial deviation."""
    target: torch.Tensor = student.get_input_embeddings().weight  # type: ignore[operator]
    rows = min(len(source_VD), len(target))
    projection = RandomProjection(source_VD.shape[1], target.shape[1], (projection_seed, 0), "gaussian")
    projected = projection(source_VD[:rows].detach().float().cpu())
    target[:rows] = (projected * (target.float().std().cpu() / projected.std())).to(target)


def check(objective: StageObjective) -> None:
    """Raise UserError where the curriculum's warm start cannot be made."""
    curriculum, task, student = objective.curriculum, objective.task, objective.student
    given = f"warm_start={curriculum.warm_start!r}"
    if curriculum.transplant_pair is not None:
        if task.replica_seeds(student) is not None:
            raise UserError(f"{given} cannot be made for replicated students: use 'none'")
        target, source = task.output_head(student), objective.source.output_head()
        if target is None:
            how = "give a student without weights, it gets one, or warm_start='none'"
            raise UserError(f"{given} needs a student with a linear head on its embedding: {how}")
        if source is not None and source.softcap != target.softcap:
            found = f"the teacher soft-caps its logits at {source.softcap}, the student at {target.softcap}"
            how = "set final_logit_softcapping in the student or warm_start='none'"
            raise UserError(f"{found}: a head transplant needs both alike; {how}")
    if "embedding" in curriculum.warm_start and not hasattr(task.backbone(student), "get_input_embeddings"):
        raise UserError(f"{given} needs a model with token embeddings: use 'head' or 'none'")
    if "embedding" in curriculum.warm_start and is_tied(student):
        found = (
            f"{given}: the student's embedding is its output head too (tied), so it is not projected from the teacher's"
        )
        if curriculum.transplant_pair is None:
            raise UserError(f"{found}; use 'head' or 'none', or set tie_word_embeddings=false in the student")
        warnings.warn(f"{found}; the transplanted head is used for both", UserWarning, stacklevel=2)


def keeps_embedding_fixed(curriculum: Curriculum, student: nn.Module) -> bool:
    """Whether hidden stages leave the embedding alone, since it is the transplanted head too."""
    return curriculum.transplants and is_tied(student)


def is_tied(student: Any) -> bool:
    """Whether the student's output head and input embedding share one matrix."""
    head = student.get_output_embeddings() if hasattr(student, "get_input_embeddings") else None
    return head is not None and head.weight is student.get_input_embeddings().weight


def apply_before_training(objective: StageObjective) -> None:
    """What must be in place before the first stage: a projected embedding; and the head of a student that is tied, or that has
    no hidden stage."""
    curriculum, student = objective.curriculum, objective.student
    if "embedding" in curriculum.warm_start and not is_tied(student):
        backbone = objective.task.backbone(student)
        project_embedding(backbone, objective.source.embedding(), curriculum.projection_seed)
    if curriculum.transplants and (curriculum.transplant_stage is None or is_tied(student)):
        _transplant(objective, _MAX_GAIN)


@torch.no_grad()
def apply_before_output(objective: StageObjective, batches: Callable[[], Sequence[Batch]]) -> tuple[int, int] | None:
    """The head transplant, when the first output stage begins; `batches` gives the calibration batches.

    Returns the stage whose states were compared over these batches, and the number of positions that ran for it in all
    processes (padding included); None where there is nothing to do."""
    index = objective.curriculum.transplant_stage
    if index is None or is_tied(objective.student):
        return None
    group, student = group_of(objective), objective.student
    was_training, found = student.training, batches()
    student.eval()
    sums = torch.zeros(3, dtype=torch.float64)  # squared distance, squared size, positions
    for start in range(0, len(found), group.size):  # as many forwards in each process: those of a sharded student meet
        mine = start + group.rank
        batch = found[min(mine, len(found) - 1)]
        states, targets, keep = run_student(objective, objective.hidden_states, index, batch)
        states, targets = states[keep].float(), targets[keep].float()
        counts = [float((states - targets).square().sum()), float(targets.square().sum())]
        counts = counts if mine < len(found) else [0.0, 0.0]
        sums += torch.tensor([*counts, batch_positions(batch)], dtype=sums.dtype)
    student.train(was_training)
    distance, size, positions = group.sum(sums).tolist()
    _transplant(objective, size / distance if distance > 0 else None)
    return index, int(positions)


def _transplant(objective: StageObjective, max_gain: float | None) -> None:
    """Compose the teacher's head with the way back, whose noise stays below `max_gain` (`Projection.decoder`)."""
    source, number = objective.source, objective.curriculum.transplant_pair
    assert number is not None
    target_map = source.maps[number]
    projection, moment = target_map.projection, target_map.moment
    assert projection is not None and moment is not None, "the final stage was calibrated without its moment"
    decoder = group_of(objective).first(lambda: projection.decoder(moment, max_gain))
    target = objective.task.output_head(objective.student, source.outputs)
    assert target is not None
    transplant_head(target, target_map.standardizer, decoder, source.output_head())


def group_of(objective: StageObjective) -> Group:
    """All processes that train the student."""
    return Group.of_all(next(objective.student.parameters()).device)
