"""The losses of hidden and output stages, and the metrics that belong to them.

The KL divergence between teacher and student is computed in `tutelage.core.chunked` for models with a large output head
(`output_loss`, in chunks of positions), in `tutelage.core.topk.top_k_divergence` if only the largest teacher outputs are
kept, and in `logits_loss` for a few outputs.

Every loss is a *sum* over positions (or sequences): the caller divides by the number of items in the whole optimiser step,
so that gradient accumulation does not change the result.
Shapes: N positions, D student width, E teacher width, R projected width, V outputs."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tutelage.core.chunked import OutputSettings, OutputSpec, chunk_positions, chunked_loss
from tutelage.core.errors import UserError
from tutelage.core.heads import OutputHead
from tutelage.core.topk import TopK

# columns of `output_metrics`
METRIC_COLUMNS = ("loss", "accuracy", "kl", "agreement", "teacher_loss", "teacher_accuracy")


def hidden_loss(student: Tensor, target: Tensor, keep: Tensor) -> Tensor:
    """Squared distance between student states and projected teacher states, per dimension, summed over kept positions.

    `student` and `target` are (..., R), `keep` is (...), False for padding and attention sinks. This is the stage loss of
    arXiv:2503.17494 divided by the width R. The minimiser is the same, and values, learning rates and gradient clipping are
    comparable between widths."""
    # masked before squaring: a masked state that is not finite would put NaN into the gradient (0 * inf)
    difference = torch.where(keep[..., None], student.float() - target, 0.0)
    return difference.square().mean(-1).sum()


def output_loss(
    student_hidden_ND: Tensor,
    student_head: OutputHead,
    teacher_hidden_NE: Tensor | None = None,
    teacher_head: OutputHead | None = None,
    labels_N: Tensor | None = None,
    *,
    settings: OutputSettings = OutputSettings(),  # noqa: B008 (frozen)
    targets: TopK | None = None,
) -> Tensor:
    """Sum over positions of (1 - a) t^2 KL(teacher || student) + a CE(labels), never holding all logits at once; with the loss
    `mse` the mean over outputs of squared differences of logits in place of the KL (Ba and Caruana, arXiv:1312.6184).

    The gradient of a chunk's logits is known in closed form, so the forward pass already computes the gradients of hidden
    states and head while it holds them: the backward pass recomputes nothing, and nothing of size N x V is kept. Softmax and
    loss are in float32 for every autocast dtype.

    Args:
        student_hidden_ND: input of the student's head.
        teacher_hidden_NE, teacher_head: the same for the teacher; None with label_weight 1.
        labels_N: target ids, needed if label_weight > 0; positions with the label -100 have no label loss.
        targets: the teacher's largest outputs at this temperature, instead of its hidden states and head."""
    has_teacher = targets is not None or (teacher_hidden_NE is not None and teacher_head is not None)
    _check_inputs(settings, labels_N, has_teacher, "hidden states and head")
    settings = replace(settings, chunk_size=settings.chunk_size or chunk_positions(student_head))
    spec = OutputSpec(teacher_hidden_NE, teacher_head, targets, labels_N, settings)
    return chunked_loss(student_hidden_ND, student_head, spec)


def _check_inputs(settings: OutputSettings, labels: Tensor | None, has_teacher: bool, needed: str) -> None:
    if settings.label_weight > 0 and labels is None:
        raise UserError("a label_weight above 0 needs labels in the batch: add labels, or set label_weight to 0")
    if settings.label_weight < 1 and not has_teacher:
        raise UserError(f"a label_weight below 1 needs the teacher's {needed}: pass them, or set label_weight to 1")


@torch.no_grad()
def output_metrics(
    student_hidden_ND: Tensor,
    student_head: OutputHead,
    labels_N: Tensor,
    teacher_hidden_NE: Tensor | None = None,
    teacher_head: OutputHead | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Metrics per position, (N, 6), with the columns `METRIC_COLUMNS`: label loss (nats), top-1 correct,
    KL(teacher || student) (nats), top-1 agreement, and the teacher's label loss and top-1 correct. Without a teacher the last
    four are zero."""
    chunk_size = chunk_size or chunk_positions(student_head)
    parts = []
    for start in range(0, len(student_hidden_ND), chunk_size):
        rows = slice(start, start + chunk_size)
        teacher = None
        if teacher_hidden_NE is not None and teacher_head is not None:
            teacher = teacher_head(teacher_hidden_NE[rows])
        parts.append(logits_metrics(student_head(student_hidden_ND[rows]), labels_N[rows], teacher))
    return torch.cat(parts) if parts else student_hidden_ND.new_zeros((0, 6))


def logits_loss(
    student: Tensor,
    teacher: Tensor | None = None,
    labels: Tensor | None = None,
    settings: OutputSettings = OutputSettings(),  # noqa: B008 (frozen)
) -> Tensor:
    """The loss of `output_loss` from logits (..., V) and labels (...), for models with few outputs."""
    weight, t = settings.label_weight, settings.temperature
    _check_inputs(settings, labels, teacher is not None, "logits")
    loss = torch.zeros((), device=student.device)
    if teacher is not None and weight < 1 and settings.loss == "mse":
        difference = torch.where(teacher > -torch.inf, student.float() - teacher.float(), 0.0)
        loss = loss + (1 - weight) * difference.square().mean(-1).sum()
    elif teacher is not None and weight < 1:
        log_q = torch.log_softmax(student.float() / t, dim=-1)
        log_p = torch.log_softmax(teacher.float() / t, dim=-1)
        loss = loss + (1 - weight) * t**2 * _kl(log_p, log_q).sum()
    if labels is not None and weight > 0:
        loss = loss + weight * F.cross_entropy(student.float().flatten(0, -2), labels.flatten(), reduction="sum")
    return loss


def logits_metrics(student: Tensor, labels: Tensor, teacher: Tensor | None = None) -> Tensor:
    """The columns of `output_metrics` from logits (..., V) and labels (...), (..., 6)."""
    log_q = torch.log_softmax(student.float(), dim=-1)
    log_p = torch.zeros_like(log_q) if teacher is None else torch.log_softmax(teacher.float(), dim=-1)

    def against_labels(log_probabilities: Tensor) -> list[Tensor]:
        loss = -log_probabilities.gather(-1, labels[..., None])[..., 0]
        return [loss, (log_probabilities.argmax(-1) == labels).float()]

    loss, correct = against_labels(log_q)
    if teacher is None:
        return torch.stack([loss, correct, *[torch.zeros_like(loss)] * 4], dim=-1)
    divergence = _kl(log_p, log_q)
    agreement = (log_p.argmax(-1) == log_q.argmax(-1)).float()
    return torch.stack([loss, correct, divergence, agreement, *against_labels(log_p)], dim=-1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) over the last dimension; outputs of probability zero contribute zero, and get no gradient."""
    possible = log_p > -torch.inf
    difference = torch.where(possible, log_p, 0.0) - torch.where(possible, log_q, 0.0)
    return (log_p.exp() * difference).sum(-1)


def embedding_loss(student_BE: Tensor, teacher_BE: Tensor, kind: str = "cosine") -> Tensor:
    """Distance between pooled embeddings, summed over sequences: `cosine` (1 - cos) or `mse` (mean over dimensions)."""
    if kind == "cosine":
        return (1 - F.cosine_similarity(student_BE.float(), teacher_BE.float(), dim=-1)).sum()
    if kind == "mse":
        return (student_BE.float() - teacher_BE.float()).square().mean(-1).sum()
    raise UserError(f"unknown embedding_loss {kind!r}: use 'cosine' or 'mse'")
