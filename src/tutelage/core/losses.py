"""The losses of hidden and output stages, and the metrics that belong to them.

The KL divergence between teacher and student is computed in `_divergence` for models with a large output head
(`output_loss`, in chunks of positions), in `tutelage.core.topk.top_k_divergence` if only the largest teacher outputs are
kept, and in `logits_loss` for a few outputs.

Every loss is a *sum* over positions (or sequences): the caller divides by the number of items in the whole optimiser step,
so that gradient accumulation does not change the result.
Shapes: N positions, D student width, E teacher width, R projected width, V outputs."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tutelage.core.errors import UserError
from tutelage.core.heads import OutputHead
from tutelage.core.inputs import IGNORED_LABEL
from tutelage.core.topk import TopK, top_k, top_k_divergence

# Logits held at a time: 2^24 float32 values are 64 MiB per tensor, large enough that the matrix products stay efficient.
CHUNK_LOGITS = 2**24

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


@dataclass(frozen=True)
class OutputSettings:
    """Settings of the output loss."""

    temperature: float = 1.0  # t, used in both softmaxes
    label_weight: float = 0.0  # a, the fraction of the loss that is label loss
    top_k: int | None = None  # teacher outputs that are kept; the rest is one bucket (`core.topk`); None keeps all
    chunk_size: int | None = None  # positions per chunk; None chooses it so that a chunk holds about 2^24 logits
    embedding_loss: str = "cosine"  # sentence encoders: `cosine` or `mse`
    outputs: int | None = None  # number that student and teacher share, if a vocabulary is padded; None for all
    router_coefficient: float = 0.0  # weight of a mixture of experts' load-balancing loss (`core.router`)


@dataclass(frozen=True)
class _OutputSpec:
    head: OutputHead
    teacher_hidden: Tensor | None
    teacher_head: OutputHead | None
    labels: Tensor | None
    settings: OutputSettings
    targets: TopK | None


def output_loss(
    student_hidden_ND: Tensor,
    student_head: OutputHead,
    teacher_hidden_NE: Tensor | None = None,
    teacher_head: OutputHead | None = None,
    labels_N: Tensor | None = None,
    *,
    settings: OutputSettings = OutputSettings(),
    targets: TopK | None = None,
) -> Tensor:
    """Sum over positions of (1 - a) t^2 KL(teacher || student) + a CE(labels), never holding all logits at once.

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
    spec = _OutputSpec(student_head, teacher_hidden_NE, teacher_head, labels_N, settings, targets)
    chunk_size = settings.chunk_size or chunk_positions(student_head)
    return _ChunkedOutputLoss.apply(
        student_hidden_ND, spec, chunk_size, torch.is_grad_enabled(), *student_head.linear.parameters()
    )


def _check_inputs(settings: OutputSettings, labels: Tensor | None, has_teacher: bool, needed: str) -> None:
    if settings.label_weight > 0 and labels is None:
        raise UserError("a label_weight above 0 needs labels in the batch: add labels, or set label_weight to 0")
    if settings.label_weight < 1 and not has_teacher:
        raise UserError(f"a label_weight below 1 needs the teacher's {needed}: pass them, or set label_weight to 1")


def chunk_positions(head: OutputHead) -> int:
    """Positions whose logits are held at a time."""
    return max(1, CHUNK_LOGITS // head.linear.out_features)


class _ChunkedOutputLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, spec: _OutputSpec, chunk_size: int, with_grad: bool, *parameters: Tensor
    ) -> Tensor:
        inputs = [hidden, *parameters]
        wanted = [with_grad and tensor.requires_grad for tensor in inputs]
        # the head's gradients are sums over chunks, and float16 is too narrow: both are kept in float32
        half = _is_half(hidden) and all(parameter.dtype == torch.float32 for parameter in parameters)
        kept = [torch.float32 if half else hidden.dtype, *[torch.float32] * len(parameters)]
        grads = [
            torch.zeros_like(t, dtype=d) if want else None for t, d, want in zip(inputs, kept, wanted, strict=True)
        ]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), chunk_size):
            rows = slice(start, start + chunk_size)
            with (
                torch.set_grad_enabled(any(wanted)),
                torch.autocast(hidden.device.type, enabled=False) if half else nullcontext(),
            ):
                chunk = hidden[rows].detach().to(kept[0]).requires_grad_(wanted[0])
                logits = spec.head(chunk)
            loss, logit_grad = _loss_and_logit_grad(logits.detach(), spec, rows, any(wanted))
            total += loss
            if not any(wanted):
                continue
            sources = [t for t, want in zip([chunk, *parameters], wanted, strict=True) if want]
            pushed = iter(torch.autograd.grad(logits, sources, logit_grad.to(logits.dtype)))
            if grads[0] is not None:
                grads[0][rows] = next(pushed)
            for grad in grads[1:]:
                if grad is not None:
                    grad += next(pushed)
            del logits, logit_grad
        ctx.grads, ctx.dtypes = grads, [tensor.dtype for tensor in inputs]
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        # The stored gradients belong to this call alone, so they are scaled in place.
        grads = [
            None if grad is None else grad.mul_(grad_outputs[0]).to(dtype)
            for grad, dtype in zip(ctx.grads, ctx.dtypes, strict=True)
        ]
        del ctx.grads
        return grads[0], None, None, None, *grads[1:]


def _is_half(hidden: Tensor) -> bool:
    """Whether the head would run in float16, where the gradient of a logit is often below the smallest number; the factor
    of a gradient scaler comes too late for it."""
    kind = hidden.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16


def _loss_and_logit_grad(logits: Tensor, spec: _OutputSpec, rows: slice, with_grad: bool) -> tuple[Tensor, Tensor]:
    """Loss summed over a chunk, and its gradient with respect to the logits (empty if not wanted)."""
    loss = torch.zeros((), dtype=torch.float32, device=logits.device)
    gradient = logits.new_empty(0)
    weight, t = spec.settings.label_weight, spec.settings.temperature
    if weight < 1:
        log_q = torch.log_softmax(logits.float() / t if t != 1 else logits.float(), dim=-1)
        divergence, found = _divergence(log_q, spec, rows, with_grad)
        loss += (1 - weight) * t * t * divergence
        if found is not None:
            gradient = found.mul_((1 - weight) * t)
    if weight > 0:
        assert spec.labels is not None
        labels = spec.labels[rows]
        log_q = torch.log_softmax(logits.float(), dim=-1)
        loss += weight * F.nll_loss(log_q, labels, reduction="sum")
        if with_grad:
            label_gradient = log_q.exp_().mul_(weight)
            label_gradient[torch.arange(len(labels), device=labels.device), labels.clamp_min(0)] -= weight
            label_gradient.masked_fill_((labels == IGNORED_LABEL)[:, None], 0.0)
            gradient = label_gradient if weight == 1 else gradient.add_(label_gradient)
    return loss, gradient


def _divergence(log_q: Tensor, spec: _OutputSpec, rows: slice, with_grad: bool) -> tuple[Tensor, Tensor | None]:
    """KL(teacher || student) at the temperature of the loss, and its gradient with respect to the student's scaled logits."""
    if spec.targets is not None:
        return top_k_divergence(log_q, spec.targets[rows], with_grad)
    assert spec.teacher_hidden is not None and spec.teacher_head is not None
    t = spec.settings.temperature
    teacher_logits = spec.teacher_head(spec.teacher_hidden[rows]).to(log_q.device).float()
    if spec.settings.top_k is not None:
        return top_k_divergence(log_q, top_k(teacher_logits, spec.settings.top_k, t), with_grad)
    log_p = torch.log_softmax(teacher_logits / t if t != 1 else teacher_logits, dim=-1)
    del teacher_logits
    p = log_p.exp()
    # an output of probability zero (a masked entry of the vocabulary) contributes zero, where -inf would give NaN
    divergence = (p * log_p.sub_(log_q)).masked_fill_(p == 0, 0.0).sum()
    return divergence, log_q.exp_().sub_(p) if with_grad else None


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
    settings: OutputSettings = OutputSettings(),
) -> Tensor:
    """The loss of `output_loss` from logits (..., V) and labels (...), for models with few outputs."""
    weight, t = settings.label_weight, settings.temperature
    _check_inputs(settings, labels, teacher is not None, "logits")
    loss = torch.zeros((), device=student.device)
    if teacher is not None and weight < 1:
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
