"""The output loss in chunks of positions, never holding all logits at once.

The gradient of a chunk's logits is known in closed form, so the forward pass already computes the gradients of hidden states
and head while it holds them: the backward pass recomputes nothing, and nothing of size N x V is kept.

`torch.compile` sees the loss as one operator, `tutelage::output_loss`, whatever the number of positions.
Shapes: N positions, D student width, E teacher width, V outputs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tutelage.core.heads import LinearHead, OutputHead
from tutelage.core.inputs import IGNORED_LABEL
from tutelage.core.topk import TopK, top_k, top_k_divergence

# Logits held at a time: 2^24 float32 values are 64 MiB per tensor, large enough that the matrix products stay efficient.
CHUNK_LOGITS = 2**24
# Logits of a chunk that are compared at a time on the CPU: a few float32 tensors of this size stay in its cache, and need no
# fresh memory each time.
BLOCK_LOGITS = 2**18


@dataclass(frozen=True)
class OutputSettings:
    """Settings of the output loss."""

    temperature: float = 1.0  # t, used in both softmaxes
    label_weight: float = 0.0  # a, the fraction of the loss that is label loss
    loss: str = "kl"  # against the teacher: `kl`, or `mse` of the logits, which has no temperature
    top_k: int | None = None  # teacher outputs that are kept; the rest is one bucket (`core.topk`); None keeps all
    chunk_size: int | None = None  # positions per chunk; None chooses it so that a chunk holds about 2^24 logits
    embedding_loss: str = "cosine"  # sentence encoders: `cosine` or `mse`
    outputs: int | None = None  # number that student and teacher share, if a vocabulary is padded; None for all
    router_coefficient: float = 0.0  # weight of a mixture of experts' load-balancing loss (`core.router`)


@dataclass(frozen=True)
class OutputSpec:
    """What the student's outputs are compared with."""

    teacher_hidden: Tensor | None  # (N, E), the input of `teacher_head`
    teacher_head: OutputHead | LinearHead | None
    targets: TopK | None  # the teacher's largest outputs, in place of its states and head
    labels: Tensor | None  # (N,)
    settings: OutputSettings  # with `chunk_size` filled in


def chunk_positions(head: OutputHead) -> int:
    """Positions whose logits are held at a time."""
    return max(1, CHUNK_LOGITS // head.linear.out_features)


def chunked_loss(hidden_ND: Tensor, head: OutputHead, spec: OutputSpec) -> Tensor:
    """The loss summed over positions; differentiable for hidden states and head."""
    low, parameters = _autocast_dtype(hidden_ND.device), [*head.linear.parameters()]
    if torch.compiler.is_compiling():
        teacher, plain = spec.teacher_head, head.plain()
        theirs = teacher.plain() if isinstance(teacher, OutputHead) else teacher
        if plain is not None and (theirs is None) == (teacher is None):
            return _operator_loss(hidden_ND, plain, spec, theirs, low)
    return _ChunkedLoss.apply(hidden_ND, head, spec, low, torch.is_grad_enabled(), *parameters)


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    kind = device.type
    active = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if active else None


def _autocast(device: torch.device, low: torch.dtype | None) -> Any:
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, low, enabled=low is not None)


# ---- One chunk after another ----


class _Product:
    """The student's head, run over chunks, and the gradients through it."""

    def __init__(self, head: OutputHead | LinearHead, low: torch.dtype | None, device: torch.device):
        # Under float16 the head runs in float32: the gradient of a logit is often below float16's smallest number, and the
        # factor of a gradient scaler comes too late for it.
        self.low = None if low == torch.float16 else low
        self.head, self.device = head, device
        plain = head.plain() if isinstance(head, OutputHead) else head
        self.plain = plain if plain is None or self.low is None else plain.to(self.low)

    def logits(self, chunk_ND: Tensor, with_grad: bool) -> Tensor:
        if self.plain is not None:
            self.chunk = chunk_ND.detach().to(self.plain.weight.dtype)
            return self.plain(self.chunk)
        assert isinstance(self.head, OutputHead)
        with torch.set_grad_enabled(with_grad), _autocast(self.device, self.low):
            self.chunk = chunk_ND.detach().requires_grad_(with_grad)
            self.graph = self.head(self.chunk)
        return self.graph.detach()

    def gradient_like(self, logits_NV: Tensor) -> Tensor:
        """Where the gradient of the logits goes: into their own place, where nothing reads them afterwards."""
        return logits_NV if self.plain is not None and self.plain.softcap is None else torch.empty_like(logits_NV)

    def gradients(self, logits_NV: Tensor, logit_grad_NV: Tensor, wanted: Sequence[bool]) -> list[Tensor | None]:
        """Of the chunk's states and of the head's parameters, those that are `wanted`."""
        if self.plain is not None:
            return self.plain.gradients(self.chunk, logits_NV, logit_grad_NV, wanted)
        assert isinstance(self.head, OutputHead)
        tensors = [self.chunk, *self.head.linear.parameters()]
        sources = [tensor for tensor, want in zip(tensors, wanted, strict=True) if want]
        found = iter(torch.autograd.grad(self.graph, sources, logit_grad_NV.to(self.graph.dtype)))
        return [next(found) if want else None for want in wanted]


def _add_gradients(
    grads: Sequence[Tensor | None],
    hidden_ND: Tensor,
    head: OutputHead | LinearHead,
    spec: OutputSpec,
    low: torch.dtype | None,
) -> Tensor:
    """The loss; adds the gradients of the hidden states and of the head's parameters to `grads`, where they are not None.

    `low` is the dtype of autocast, None without."""
    wanted = [grad is not None for grad in grads]
    device, teacher, size = hidden_ND.device, spec.teacher_head, spec.settings.chunk_size
    if isinstance(teacher, OutputHead):
        teacher = teacher.plain() or teacher
    if isinstance(teacher, LinearHead):  # cast once, not for each chunk
        teacher = teacher if low is None else teacher.to(low)
    spec = replace(spec, teacher_head=teacher)
    total = torch.zeros((), dtype=torch.float32, device=device)
    assert size is not None
    with torch.no_grad(), _autocast(device, None):
        product = _Product(head, low, device)
        for rows in (slice(start, start + size) for start in range(0, len(hidden_ND), size)):
            logits, theirs = product.logits(hidden_ND[rows], any(wanted)), _teacher_logits(spec, rows, low, device)
            place = product.gradient_like(logits) if any(wanted) else None
            loss, logit_grad = _loss_and_logit_grad(logits, theirs, spec, rows.start, place)
            total += loss
            del theirs, place
            parts = [] if logit_grad is None else product.gradients(logits, logit_grad, wanted)
            for index, part in enumerate(parts):
                grad = grads[index]
                if grad is None or part is None:
                    continue
                if index == 0:
                    grad[rows] = part
                else:
                    grad[: len(part)] += part
            del logits, logit_grad, parts
    return total


def _teacher_logits(spec: OutputSpec, rows: slice, low: torch.dtype | None, device: torch.device) -> Tensor | None:
    """The teacher's logits of a chunk, in the precision of its head; None where they are not needed."""
    if spec.settings.label_weight == 1 or spec.targets is not None:
        return None
    assert spec.teacher_hidden is not None and spec.teacher_head is not None
    states = spec.teacher_hidden[rows]
    if isinstance(spec.teacher_head, LinearHead):
        states = states.to(spec.teacher_head.weight.dtype)
    with _autocast(states.device, low):
        return spec.teacher_head(states).to(device)


def _loss_and_logit_grad(
    logits: Tensor, theirs: Tensor | None, spec: OutputSpec, first: int, gradient: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Loss summed over a chunk that begins at position `first`, and its gradient with respect to the logits (None if not
    wanted), for which `gradient` is the place; it may be `logits`."""
    count, with_grad = len(logits), gradient is not None
    # on the CPU, what is done to the logits one by one is done in the cache
    size = max(1, BLOCK_LOGITS // logits.shape[-1]) if logits.device.type == "cpu" else count
    if size >= count:
        return _block_loss(logits, theirs, spec, slice(first, first + count), with_grad)
    total = torch.zeros((), dtype=torch.float32, device=logits.device)
    for start in range(0, count, size):
        rows = slice(start, min(start + size, count))
        within = slice(first + start, first + rows.stop)
        loss, found = _block_loss(logits[rows], None if theirs is None else theirs[rows], spec, within, with_grad)
        total += loss
        if gradient is not None and found is not None:
            gradient[rows] = found
    return total, gradient


def _block_loss(
    logits: Tensor, theirs: Tensor | None, spec: OutputSpec, rows: slice, with_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Loss summed over a few positions, and its gradient with respect to the logits (None if not wanted)."""
    loss, gradient = torch.zeros((), dtype=torch.float32, device=logits.device), None
    weight, t = spec.settings.label_weight, spec.settings.temperature
    if weight < 1 and spec.settings.loss == "mse":
        assert theirs is not None
        squares, gradient = _mean_squares(logits, theirs, with_grad)
        loss += (1 - weight) * squares
        if gradient is not None and weight > 0:
            gradient.mul_(1 - weight)
    elif weight < 1:
        log_q = torch.log_softmax(logits.float() / t if t != 1 else logits.float(), dim=-1)
        divergence, gradient = _divergence(log_q, theirs, spec, rows, with_grad)
        loss += (1 - weight) * t * t * divergence
        if gradient is not None and (1 - weight) * t != 1:
            gradient.mul_((1 - weight) * t)
    if weight > 0:
        assert spec.labels is not None
        labels = spec.labels[rows]
        log_q = torch.log_softmax(logits.float(), dim=-1)
        loss += weight * F.nll_loss(log_q, labels, reduction="sum")
        if with_grad:
            label_gradient = log_q.exp_().mul_(weight)
            label_gradient[torch.arange(len(labels), device=labels.device), labels.clamp_min(0)] -= weight
            label_gradient.masked_fill_((labels == IGNORED_LABEL)[:, None], 0.0)
            gradient = label_gradient if gradient is None else gradient.add_(label_gradient)
    return loss, gradient


def _mean_squares(logits: Tensor, theirs: Tensor, with_grad: bool) -> tuple[Tensor, Tensor | None]:
    """Squared differences of logits, a mean over outputs and a sum over positions, and the gradient of the student's logits. An
    output that the teacher rules out (a logit of -inf) has no part in it."""
    difference, outputs = logits.float() - theirs.float(), logits.shape[-1]
    difference.masked_fill_(theirs == -torch.inf, 0.0)
    return difference.square().sum() / outputs, difference.mul_(2 / outputs) if with_grad else None


def _divergence(
    log_q: Tensor, theirs: Tensor | None, spec: OutputSpec, rows: slice, with_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """KL(teacher || student) at the temperature of the loss, and its gradient with respect to the student's scaled logits."""
    if spec.targets is not None:
        return top_k_divergence(log_q, spec.targets[rows], with_grad)
    assert theirs is not None
    t, teacher_logits = spec.settings.temperature, theirs.float()
    if spec.settings.top_k is not None:
        return top_k_divergence(log_q, top_k(teacher_logits, spec.settings.top_k, t), with_grad)
    log_p = torch.log_softmax(teacher_logits / t if t != 1 else teacher_logits, dim=-1)
    del teacher_logits
    p = log_p.exp()
    # an output of probability zero (a masked entry of the vocabulary) contributes zero, where -inf would give NaN
    divergence = (p * log_p.sub_(log_q)).masked_fill_(p == 0, 0.0).sum()
    return divergence, log_q.exp_().sub_(p) if with_grad else None


def _empty_gradients(tensors: Sequence[Tensor], wanted: Sequence[bool], low: torch.dtype | None) -> list[Tensor | None]:
    """Zeros for the gradients of the hidden states and of the head's parameters. Those of parameters are sums over chunks, and
    float16 is too narrow: both are kept in float32."""
    kept = [torch.float32 if low == torch.float16 else tensors[0].dtype, *[torch.float32] * (len(tensors) - 1)]
    return [
        torch.zeros_like(tensor, dtype=dtype) if want else None
        for tensor, dtype, want in zip(tensors, kept, wanted, strict=True)
    ]


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: OutputHead,
        spec: OutputSpec,
        low: torch.dtype | None,
        with_grad: bool,
        *parameters: Tensor,
    ) -> Tensor:
        inputs = [hidden, *parameters]
        grads = _empty_gradients(inputs, [with_grad and tensor.requires_grad for tensor in inputs], low)
        ctx.grads, ctx.dtypes = grads, [tensor.dtype for tensor in inputs]
        return _add_gradients(grads, hidden, head, spec, low)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        if not hasattr(ctx, "grads"):
            raise RuntimeError(
                "Trying to backward through the graph a second time: the output loss keeps no gradients for it"
            )
        # The stored gradients belong to this call alone, so they are scaled in place.
        grads = [
            None if grad is None else grad.mul_(grad_outputs[0]).to(dtype)
            for grad, dtype in zip(ctx.grads, ctx.dtypes, strict=True)
        ]
        del ctx.grads
        return grads[0], None, None, None, None, *grads[1:]


# ---- As one operator, for torch.compile ----


def _operator_loss(
    hidden_ND: Tensor, head: LinearHead, spec: OutputSpec, teacher: LinearHead | None, low: torch.dtype | None
) -> Tensor:
    theirs: list[Tensor] = []  # the teacher's largest outputs, or its states and head
    if spec.targets is not None:
        theirs = [spec.targets.ids, spec.targets.log_probs, spec.targets.log_rest]
    elif teacher is not None and spec.teacher_hidden is not None:
        theirs = [spec.teacher_hidden, *teacher.tensors]
    settings, other = spec.settings, teacher or head
    numbers = [settings.temperature, settings.label_weight]
    numbers += [head.softcap or 0.0, head.scale, other.softcap or 0.0, other.scale]
    sizes = [settings.top_k or 0, settings.chunk_size or 0, int(spec.targets is not None), int(settings.loss == "mse")]
    return _operator(hidden_ND, head.tensors, theirs, spec.labels, numbers, sizes, low)[0]


@torch.library.custom_op(
    "tutelage::output_loss",
    mutates_args=(),
    schema="(Tensor hidden, Tensor[] head, Tensor[] teacher, Tensor? labels, float[] numbers, int[] sizes, ScalarType? low)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
def _operator(
    hidden: Tensor,
    head: list[Tensor],
    teacher: list[Tensor],
    labels: Tensor | None,
    numbers: list[float],
    sizes: list[int],
    low: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, and the gradients of hidden states, weight and bias (empty for a head without one)."""
    temperature, label_weight, softcap, scale, their_softcap, their_scale = numbers
    settings = OutputSettings(temperature, label_weight, "mse" if sizes[3] else "kl", sizes[0] or None, sizes[1])
    spec = OutputSpec(None, None, None, labels, settings)
    if sizes[2]:
        spec = replace(spec, targets=TopK(*teacher))
    elif teacher:
        theirs = LinearHead.of(teacher[1:], their_softcap or None, their_scale)
        spec = replace(spec, teacher_hidden=teacher[0], teacher_head=theirs)
    mine = [hidden, *head]
    grads = _empty_gradients(mine, [True] * len(mine), low)
    total = _add_gradients(grads, hidden, LinearHead.of(head, softcap or None, scale), spec, low)
    return _four(total, grads)


@_operator.register_fake
def _shapes(
    hidden: Tensor, head: list[Tensor], teacher: Any, labels: Any, numbers: Any, sizes: Any, low: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mine = [hidden, *head]
    return _four(hidden.new_empty((), dtype=torch.float32), _empty_gradients(mine, [True] * len(mine), low))


def _four(total: Tensor, grads: Sequence[Tensor | None]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the operator returns: the loss, and the gradients of hidden states, weight and bias (empty without one)."""
    found = [grad for grad in grads if grad is not None]
    return total, found[0], found[1], found[2] if len(found) > 2 else found[0].new_empty(0)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    hidden, head, teacher = inputs[:3]
    ctx.save_for_backward(*output[1:])
    ctx.dtypes, ctx.fixed = [tensor.dtype for tensor in (hidden, *head)], [None] * len(teacher)


def _backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
    found = [(kept * grad).to(dtype) for kept, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=False)]
    return found[0], found[1:], ctx.fixed, None, None, None, None


_operator.register_autograd(_backward, setup_context=_keep)
