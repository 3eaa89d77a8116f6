"""Losses against their few-line formulas, their gradients, and what is held in memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tutelage.core import losses
from tutelage.core.heads import OutputHead
from tutelage.core.losses import embedding_loss, hidden_loss, output_loss, output_metrics

N, D, E, V = 7, 5, 6, 11


@dataclass
class Case:
    """Student and teacher states with their heads, and labels of which some are left out."""

    hidden: torch.Tensor
    head: OutputHead
    teacher_hidden: torch.Tensor
    teacher_head: OutputHead
    labels: torch.Tensor

    def loss(self, **settings: Any) -> torch.Tensor:
        return output_loss(self.hidden, self.head, self.teacher_hidden, self.teacher_head, self.labels, **settings)

    @property
    def leaves(self) -> list[torch.Tensor]:
        return [self.hidden, *self.head.parameters]


def make_case(rows: int = N, outputs: int = V, width: int = D, bias: bool = True, **head: Any) -> Case:
    torch.manual_seed(0)
    student, teacher = nn.Linear(width, outputs, bias=bias), nn.Linear(E, outputs)
    labels = torch.randint(0, head.get("outputs") or outputs, (rows,))
    labels[1::4] = -100
    return Case(
        2 * torch.randn(rows, width).requires_grad_(),
        OutputHead(student, **head),
        2 * torch.randn(rows, E),
        OutputHead(teacher, outputs=head.get("outputs")),
        labels,
    )


def leaf_case(rows: int = N, outputs: int = V, width: int = D, **head: Any) -> Case:
    case = make_case(rows, outputs, width, **head)
    case.hidden = case.hidden.detach().requires_grad_()
    return case


def as_double(head: OutputHead) -> OutputHead:
    linear = nn.Linear(head.linear.in_features, head.linear.out_features, head.linear.bias is not None)
    linear.load_state_dict(head.linear.state_dict())
    return replace(head, linear=linear.double())


def plain(logits: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, t: float, a: float) -> torch.Tensor:
    """The formula: (1 - a) t^2 KL(teacher || student) + a CE, summed."""
    p = torch.softmax(teacher / t, -1)
    divergence = (p * (torch.log_softmax(teacher / t, -1) - torch.log_softmax(logits / t, -1))).sum()
    return (1 - a) * t**2 * divergence + a * F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")


def reference(case: Case, t: float, a: float, dtype: torch.dtype) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Value and gradients of the plain formula in `dtype`, as float32."""
    head, teacher_head = case.head, case.teacher_head
    if dtype == torch.float64:
        head, teacher_head = as_double(head), as_double(teacher_head)
    hidden = case.hidden.detach().to(dtype).requires_grad_()
    value = plain(head(hidden), teacher_head(case.teacher_hidden.to(dtype)).detach(), case.labels, t, a)
    gradients = torch.autograd.grad(value, [hidden, *head.parameters])
    return value.detach().float(), [gradient.float() for gradient in gradients]


HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "soft-capped": {"softcap": 1.5},
    "scaled": {"scale": 0.5, "softcap": 3.0},
    "trimmed": {"outputs": 8},
    "all at once": {"outputs": 8, "softcap": 1.5, "scale": 2.0, "bias": False},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("t", "a"), [(1.0, 0.0), (2.5, 0.0), (1.0, 0.3), (0.5, 0.7), (1.0, 1.0), (3.0, 1.0)])
@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100, None])
def test_value_and_gradients(head: str, t: float, a: float, chunk_size: int | None, dtype: torch.dtype) -> None:
    case = leaf_case(**HEADS[head])
    value, expected = reference(case, t, a, dtype)
    loss = case.loss(temperature=t, label_weight=a, chunk_size=chunk_size)
    assert loss.dtype == torch.float32 and loss.shape == ()
    torch.testing.assert_close(loss.detach(), value)
    torch.testing.assert_close(list(torch.autograd.grad(loss, case.leaves)), expected)


def test_gradients_pass_gradcheck_like_differences() -> None:
    case = leaf_case()
    (gradient,) = torch.autograd.grad(case.loss(temperature=2.0, label_weight=0.4, chunk_size=2), [case.hidden])
    head, teacher = as_double(case.head), as_double(case.teacher_head)(case.teacher_hidden.double())
    direction = torch.randn(N, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    at = [
        plain(head(case.hidden.double() + step * direction), teacher, case.labels, 2.0, 0.4) for step in (1e-5, -1e-5)
    ]
    slope = ((at[0] - at[1]) / 2e-5).detach().float()
    torch.testing.assert_close((gradient * direction.float()).sum(), slope)


def test_gradients_follow_what_the_loss_is_multiplied_by() -> None:
    case = leaf_case()
    _, expected = reference(case, 1.0, 0.5, torch.float64)
    (0.25 * case.loss(label_weight=0.5, chunk_size=3)).backward()
    torch.testing.assert_close([leaf.grad for leaf in case.leaves], [0.25 * gradient for gradient in expected])


def test_two_losses_accumulate() -> None:
    case = leaf_case()
    _, expected = reference(case, 1.0, 0.5, torch.float64)
    for rows in (slice(0, 3), slice(3, N)):
        part = Case(case.hidden[rows], case.head, case.teacher_hidden[rows], case.teacher_head, case.labels[rows])
        part.loss(label_weight=0.5).backward()
    torch.testing.assert_close([leaf.grad for leaf in case.leaves], expected)


@pytest.mark.parametrize("frozen", ["hidden", "head", "bias"])
def test_only_what_needs_a_gradient_gets_one(frozen: str) -> None:
    case = leaf_case()
    _, expected = reference(case, 1.0, 0.5, torch.float64)
    off = {"hidden": [case.hidden], "head": case.head.parameters, "bias": case.head.parameters[1:]}[frozen]
    for leaf in off:
        leaf.requires_grad_(False)
    case.loss(label_weight=0.5, chunk_size=2).backward()
    for leaf, gradient in zip(case.leaves, expected, strict=True):
        if leaf.requires_grad:
            torch.testing.assert_close(leaf.grad, gradient)
        else:
            assert leaf.grad is None


def test_teacher_gets_no_gradient() -> None:
    case = leaf_case()
    case.teacher_hidden.requires_grad_()
    case.loss(label_weight=0.5).backward()
    assert case.teacher_hidden.grad is None
    assert all(parameter.grad is None for parameter in case.teacher_head.parameters)


def test_left_out_labels_get_no_label_gradient() -> None:
    case = leaf_case()
    (gradient,) = torch.autograd.grad(case.loss(label_weight=1.0), [case.hidden])
    assert torch.equal(gradient.abs().sum(-1) == 0, case.labels == -100)


def test_the_teachers_own_logits_are_the_minimum() -> None:
    case = leaf_case()
    loss = output_loss(case.teacher_hidden.requires_grad_(), case.teacher_head, case.teacher_hidden, case.teacher_head)
    torch.testing.assert_close(loss.detach(), torch.zeros(()))
    (gradient,) = torch.autograd.grad(loss, [case.teacher_hidden])
    torch.testing.assert_close(gradient, torch.zeros(N, E))


def test_labels_alone_need_no_teacher() -> None:
    case = leaf_case()
    loss = output_loss(case.hidden, case.head, labels_N=case.labels, label_weight=1.0, temperature=3.0)
    torch.testing.assert_close(loss, case.loss(label_weight=1.0), rtol=0, atol=0)


def test_no_positions() -> None:
    case = leaf_case(rows=0)
    loss = case.loss(label_weight=0.5)
    assert float(loss.detach()) == 0.0
    loss.backward()
    assert [float(leaf.grad.abs().sum()) for leaf in case.leaves] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("chunk_size", [2, None])
def test_tied_weight(chunk_size: int | None) -> None:
    def tied() -> tuple[nn.Embedding, OutputHead, torch.Tensor]:
        torch.manual_seed(0)
        embedding, linear = nn.Embedding(V, D), nn.Linear(D, V, bias=False)
        linear.weight = embedding.weight
        return embedding, OutputHead(linear), torch.randint(0, V, (N,))

    case = make_case()
    embedding, head, ids = tied()
    loss = output_loss(
        torch.tanh(embedding(ids)),
        head,
        case.teacher_hidden,
        case.teacher_head,
        case.labels,
        label_weight=0.5,
        chunk_size=chunk_size,
    )
    loss.backward()
    other, other_head, _ = tied()
    teacher = case.teacher_head(case.teacher_hidden).detach()
    plain(other_head(torch.tanh(other(ids))), teacher, case.labels, 1.0, 0.5).backward()
    torch.testing.assert_close(embedding.weight.grad, other.weight.grad)


def test_outputs_not_in_use_get_no_gradient() -> None:
    case = leaf_case(outputs=V)
    case.head, case.teacher_head = replace(case.head, outputs=8), replace(case.teacher_head, outputs=8)
    case.labels.clamp_(max=7)
    case.loss(label_weight=0.5, chunk_size=3).backward()
    weight, bias = case.head.parameters
    assert weight.grad is not None and bias.grad is not None and weight.grad.shape == (V, D)
    assert bool((weight.grad[:8] != 0).all()) and bool((weight.grad[8:] == 0).all())
    assert bool((bias.grad[:8] != 0).all()) and bool((bias.grad[8:] == 0).all())


@pytest.mark.parametrize("chunk_size", [3, None])
def test_autocast(chunk_size: int | None) -> None:
    case = leaf_case()
    total, expected = torch.zeros(()), [torch.zeros_like(leaf) for leaf in case.leaves]
    with torch.autocast("cpu", torch.bfloat16):
        loss = case.loss(temperature=2.0, label_weight=0.5, chunk_size=chunk_size)
    # the formula on the same chunks (each rounds its gradients to bfloat16), softmax and sums in float32
    for start in range(0, N, chunk_size or N):
        rows = slice(start, start + (chunk_size or N))
        with torch.autocast("cpu", torch.bfloat16):
            logits = case.head(case.hidden[rows])
            teacher = case.teacher_head(case.teacher_hidden[rows]).detach()
        assert logits.dtype == torch.bfloat16
        value = plain(logits.float(), teacher.float(), case.labels[rows], 2.0, 0.5)
        total += value.detach()
        for gradient, part in zip(expected, torch.autograd.grad(value, case.leaves), strict=True):
            gradient += part
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.detach(), total)
    torch.testing.assert_close(list(torch.autograd.grad(loss, case.leaves)), expected)


def test_autocast_after_a_forward_without_gradients() -> None:
    case = leaf_case()
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            before = case.loss()
        after = case.loss()
        after.backward()
    torch.testing.assert_close(before, after.detach(), rtol=0, atol=0)
    assert all(leaf.grad is not None for leaf in case.leaves)


def test_states_and_head_in_bfloat16() -> None:
    case = leaf_case()
    case.hidden = case.hidden.detach().bfloat16().requires_grad_()
    case.head.linear.bfloat16()
    loss = case.loss(chunk_size=3)
    value = plain(case.head(case.hidden).float(), case.teacher_head(case.teacher_hidden), case.labels, 1.0, 0.0)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, value)
    loss.backward()
    assert {leaf.grad.dtype for leaf in case.leaves} == {torch.bfloat16}


@pytest.mark.parametrize("a", [0.0, 0.4, 1.0])
def test_without_gradients_the_value_is_the_same(a: float) -> None:
    case = leaf_case()
    loss = case.loss(label_weight=a, temperature=2.0, chunk_size=2)
    with torch.no_grad():
        silent = case.loss(label_weight=a, temperature=2.0, chunk_size=2)
    assert loss.requires_grad and not silent.requires_grad
    torch.testing.assert_close(silent, loss.detach(), rtol=0, atol=0)


class LargestTensor(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.numel = max(
            [self.numel, *(leaf.numel() for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor))]
        )
        return output


@pytest.mark.parametrize("a", [0.0, 0.4, 1.0])
def test_never_holds_all_logits(a: float) -> None:
    case = leaf_case(rows=64, outputs=50, width=2)
    with LargestTensor() as largest:
        case.loss(label_weight=a, temperature=2.0, chunk_size=8).backward()
    assert largest.numel == 8 * 50
    with LargestTensor() as largest:  # the plain formula does, so this would be seen
        teacher = case.teacher_head(case.teacher_hidden).detach()
        plain(case.head(case.hidden), teacher, case.labels, 2.0, a).backward()
    assert largest.numel == 64 * 50


@pytest.mark.parametrize(("budget", "rows"), [(8 * 50, [8] * 8), (8 * 50 + 49, [8] * 8), (3, [1] * 64), (2**24, [64])])
def test_default_chunk_holds_the_budget_of_logits(
    monkeypatch: pytest.MonkeyPatch, budget: int, rows: list[int]
) -> None:
    assert losses.CHUNK_LOGITS == 2**24
    monkeypatch.setattr(losses, "CHUNK_LOGITS", budget)
    case, seen = leaf_case(rows=64, outputs=50, width=2), []
    call = OutputHead.__call__

    def spy(head: OutputHead, hidden: torch.Tensor) -> torch.Tensor:
        seen.append((head is case.head, len(hidden)))
        return call(head, hidden)

    monkeypatch.setattr(OutputHead, "__call__", spy)
    case.loss()
    assert [count for ours, count in seen if ours] == [count for ours, count in seen if not ours] == rows
    seen.clear()
    output_metrics(case.hidden, case.head, case.labels, case.teacher_hidden, case.teacher_head)
    assert [count for ours, count in seen if ours] == [count for ours, count in seen if not ours] == rows


def test_output_loss_errors() -> None:
    case = leaf_case()
    with pytest.raises(ValueError, match="a label_weight above 0 needs labels in the batch"):
        output_loss(case.hidden, case.head, case.teacher_hidden, case.teacher_head, label_weight=0.1)
    for missing in ((None, case.teacher_head), (case.teacher_hidden, None)):
        with pytest.raises(ValueError, match="a label_weight below 1 needs the teacher's hidden states and head"):
            output_loss(case.hidden, case.head, *missing, labels_N=case.labels, label_weight=0.9)


@pytest.mark.parametrize("chunk_size", [1, 5, None])
@pytest.mark.parametrize("head", ["plain", "soft-capped", "trimmed"])
def test_output_metrics(chunk_size: int | None, head: str) -> None:
    case = make_case(rows=40, **HEADS[head])
    student, teacher = case.head(case.hidden).detach(), case.teacher_head(case.teacher_hidden).detach()
    p = torch.softmax(teacher, -1)
    expected = torch.stack(
        [
            F.cross_entropy(student, case.labels, reduction="none"),
            (student.argmax(-1) == case.labels).float(),
            (p * (torch.log_softmax(teacher, -1) - torch.log_softmax(student, -1))).sum(-1),
            (student.argmax(-1) == teacher.argmax(-1)).float(),
            F.cross_entropy(teacher, case.labels, reduction="none"),
            (teacher.argmax(-1) == case.labels).float(),
        ],
        dim=-1,
    )
    assert all(0 < float(expected[:, column].mean()) < 1 for column in (1, 3, 5))
    metrics = output_metrics(case.hidden, case.head, case.labels, case.teacher_hidden, case.teacher_head, chunk_size)
    assert not metrics.requires_grad
    torch.testing.assert_close(metrics, expected)
    alone = output_metrics(case.hidden, case.head, case.labels, chunk_size=chunk_size)
    torch.testing.assert_close(alone[:, :2], expected[:, :2])
    assert torch.equal(alone[:, 2:], torch.zeros(40, 4))


def test_output_metrics_of_no_positions() -> None:
    case = make_case(rows=0)
    assert output_metrics(case.hidden, case.head, case.labels).shape == (0, 6)


def test_embedding_loss() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8)
    cosines = [float(s @ t / (s.norm() * t.norm())) for s, t in zip(student.detach(), teacher, strict=True)]
    torch.testing.assert_close(embedding_loss(student, teacher).detach(), torch.tensor(4 - sum(cosines)))
    torch.testing.assert_close(
        embedding_loss(student, teacher, "mse"),
        sum((s - t).square().sum() / 8 for s, t in zip(student, teacher, strict=True)),
    )
    assert embedding_loss(student.bfloat16(), teacher.bfloat16()).dtype == torch.float32
    assert embedding_loss(student.bfloat16(), teacher.bfloat16(), "mse").dtype == torch.float32
    torch.testing.assert_close(embedding_loss(student, 3 * student).detach(), torch.zeros(()))
    with pytest.raises(ValueError, match="unknown embedding_loss 'l1': use 'cosine' or 'mse'"):
        embedding_loss(student, teacher, "l1")


def test_hidden_loss() -> None:
    torch.manual_seed(0)
    student, target = torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 3, 8)
    keep = torch.tensor([[True, False, True], [True, True, False]])
    loss = hidden_loss(student, target, keep)
    expected = (student - target)[keep].square().sum() / 8
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, [student])
    torch.testing.assert_close(gradient, torch.where(keep[..., None], 2 * (student - target) / 8, 0.0).detach())
    assert float(hidden_loss(student, target, torch.zeros_like(keep)).detach()) == 0.0


def test_hidden_loss_is_in_float32() -> None:
    torch.manual_seed(0)
    student, target = torch.randn(5, 8).bfloat16(), torch.randn(5, 8)
    loss = hidden_loss(student, target, torch.ones(5, dtype=torch.bool))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, (student.float() - target).square().sum() / 8)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_left_out_states_that_are_not_finite_do_not_matter(value: float) -> None:
    student, target = torch.ones(2, 4), torch.zeros(2, 4)
    student[1, 2] = target[1, 0] = value
    student.requires_grad_()
    loss = hidden_loss(student, target, torch.tensor([True, False]))
    loss.backward()
    assert float(loss.detach()) == 1.0
    assert torch.equal(student.grad, torch.tensor([[0.5] * 4, [0.0] * 4]))
