"""The losses of whole logits against the plain formulas and against the chunked loss."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tutelage.core.heads import OutputHead
from tutelage.core.losses import OutputSettings, logits_loss, logits_metrics, output_loss, output_metrics

N, G, D, V = 17, 3, 6, 5

SETTINGS = [(1.0, 0.0), (2.0, 0.3), (0.7, 1.0), (3.0, 0.0)]


def logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labels_of(*shape: int) -> torch.Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(9))


def plain(student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, t: float, a: float) -> float:
    """Row by row, in Python."""
    total = 0.0
    for mine, theirs, label in zip(student.double(), teacher.double(), labels, strict=True):
        p, q = torch.softmax(theirs / t, 0), torch.softmax(mine / t, 0)
        divergence = sum(float(p[i] * (p[i] / q[i]).log()) for i in range(V))
        total += (1 - a) * t * t * divergence - a * float(torch.softmax(mine, 0)[label].log())
    return total


@pytest.mark.parametrize(("temperature", "label_weight"), SETTINGS)
def test_logits_loss_is_the_formula(temperature: float, label_weight: float) -> None:
    student, teacher, labels = logits(N, V), logits(N, V, seed=1), labels_of(N)
    loss = logits_loss(
        student, teacher, labels, settings=OutputSettings(temperature=temperature, label_weight=label_weight)
    )
    assert loss.item() == pytest.approx(plain(student, teacher, labels, temperature, label_weight), rel=1e-5)


@pytest.mark.parametrize("label_weight", [0.0, 0.3])
def test_mean_squares_of_logits_are_the_formula(label_weight: float) -> None:
    """From whole logits and in chunks; an output that the teacher rules out has no part."""
    torch.manual_seed(0)
    student_head, teacher_head = OutputHead(nn.Linear(D, V)), OutputHead(nn.Linear(D, V))
    teacher_head.linear.bias.data[2] = -torch.inf
    hidden, teacher_hidden, labels = logits(N, D).requires_grad_(), logits(N, D, seed=1), labels_of(N)
    mine, theirs = student_head(hidden), teacher_head(teacher_hidden).detach()
    kept = [0, 1, 3, 4]
    squares = ((mine[:, kept] - theirs[:, kept]) ** 2).sum() / V
    expected = (1 - label_weight) * squares + label_weight * F.cross_entropy(mine, labels, reduction="sum")
    settings = OutputSettings(loss="mse", label_weight=label_weight, chunk_size=4)
    found = (
        logits_loss(mine, theirs, labels, settings),
        output_loss(hidden, student_head, teacher_hidden, teacher_head, labels, settings=settings),
    )
    for loss in found:
        torch.testing.assert_close(loss, expected)
        gradients = [torch.autograd.grad(each, hidden, retain_graph=True)[0] for each in (loss, expected)]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(("temperature", "label_weight"), SETTINGS)
def test_logits_loss_is_output_loss(temperature: float, label_weight: float) -> None:
    torch.manual_seed(0)
    student_head, teacher_head = OutputHead(nn.Linear(D, V)), OutputHead(nn.Linear(D, V))
    hidden, teacher_hidden = logits(N, D).requires_grad_(), logits(N, D, seed=1)
    labels = labels_of(N)
    labels[3] = -100  # has no label loss
    settings = {"temperature": temperature, "label_weight": label_weight}
    inputs = [hidden, *student_head.linear.parameters()]
    mine = logits_loss(
        student_head(hidden), teacher_head(teacher_hidden).detach(), labels, settings=OutputSettings(**settings)
    )
    theirs = output_loss(
        hidden, student_head, teacher_hidden, teacher_head, labels, settings=OutputSettings(chunk_size=4, **settings)
    )
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    for left, right in zip(torch.autograd.grad(mine, inputs), torch.autograd.grad(theirs, inputs), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("temperature", "label_weight"), SETTINGS)
def test_loss_of_replicas_is_the_sum_of_theirs(temperature: float, label_weight: float) -> None:
    settings = {"temperature": temperature, "label_weight": label_weight}
    student, teacher, labels = logits(N, G, V), logits(N, G, V, seed=1), labels_of(N, G)
    whole = logits_loss(student, teacher, labels, settings=OutputSettings(**settings))
    parts = [
        logits_loss(student[:, g], teacher[:, g], labels[:, g], settings=OutputSettings(**settings)) for g in range(G)
    ]
    torch.testing.assert_close(whole, torch.stack(parts).sum())


def test_labels_alone_need_no_teacher_and_a_teacher_alone_no_labels() -> None:
    student, teacher, labels = logits(N, V), logits(N, V, seed=1), labels_of(N)
    cross_entropy = F.cross_entropy(student, labels, reduction="sum")
    torch.testing.assert_close(
        logits_loss(student, labels=labels, settings=OutputSettings(label_weight=1.0)), cross_entropy
    )
    torch.testing.assert_close(logits_loss(student, teacher, None), logits_loss(student, teacher, labels))
    assert logits_loss(student, student).item() == pytest.approx(0.0, abs=1e-5)


def test_loss_is_in_float32_whatever_comes_in() -> None:
    student, teacher, labels = logits(N, V).bfloat16(), logits(N, V, seed=1).bfloat16(), labels_of(N)
    loss = logits_loss(student, teacher, labels, settings=OutputSettings(temperature=2.0, label_weight=0.5))
    assert loss.dtype == torch.float32
    exact = logits_loss(
        student.float(), teacher.float(), labels, settings=OutputSettings(temperature=2.0, label_weight=0.5)
    )
    torch.testing.assert_close(loss, exact)
    assert logits_metrics(student, labels, teacher).dtype == torch.float32


def test_what_is_missing_is_named() -> None:
    student, teacher = logits(N, V), logits(N, V, seed=1)
    with pytest.raises(ValueError, match="a label_weight above 0 needs labels in the batch"):
        logits_loss(student, teacher, settings=OutputSettings(label_weight=0.5))
    with pytest.raises(ValueError, match="a label_weight below 1 needs the teacher's logits"):
        logits_loss(student, None, labels_of(N), settings=OutputSettings(label_weight=0.5))


def test_metrics_are_the_formulas() -> None:
    student, teacher, labels = logits(N, V), logits(N, V, seed=1), labels_of(N)
    columns = logits_metrics(student, labels, teacher).T
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    torch.testing.assert_close(columns[0], F.cross_entropy(student, labels, reduction="none"))
    assert torch.equal(columns[1], (student.argmax(-1) == labels).float())
    torch.testing.assert_close(columns[2], F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1))
    assert torch.equal(columns[3], (student.argmax(-1) == teacher.argmax(-1)).float())
    torch.testing.assert_close(columns[4], F.cross_entropy(teacher, labels, reduction="none"))
    assert torch.equal(columns[5], (teacher.argmax(-1) == labels).float())


def test_metrics_of_replicas_and_without_a_teacher() -> None:
    student, teacher, labels = logits(N, G, V), logits(N, G, V, seed=1), labels_of(N, G)
    whole = logits_metrics(student, labels, teacher)
    assert whole.shape == (N, G, 6)
    for replica in range(G):
        torch.testing.assert_close(
            whole[:, replica], logits_metrics(student[:, replica], labels[:, replica], teacher[:, replica])
        )
    alone = logits_metrics(student, labels)
    torch.testing.assert_close(alone[..., :2], whole[..., :2])
    assert not alone[..., 2:].any()


def test_metrics_are_those_of_output_metrics() -> None:
    torch.manual_seed(0)
    student_head, teacher_head = OutputHead(nn.Linear(D, V)), OutputHead(nn.Linear(D, V))
    hidden, teacher_hidden, labels = logits(N, D), logits(N, D, seed=1), labels_of(N)
    chunked = output_metrics(hidden, student_head, labels, teacher_hidden, teacher_head, chunk_size=4)
    torch.testing.assert_close(logits_metrics(student_head(hidden), labels, teacher_head(teacher_hidden)), chunked)


@pytest.mark.parametrize("by_both", [False, True])
def test_outputs_that_the_teacher_rules_out_contribute_nothing(by_both: bool) -> None:
    student, teacher, labels = logits(N, V), logits(N, V, seed=1), torch.zeros(N, dtype=torch.long)
    teacher[:, 2] = -torch.inf
    if by_both:
        student[:, 2] = -torch.inf
    student.requires_grad_()
    loss = logits_loss(student, teacher, labels)
    (gradient,) = torch.autograd.grad(loss, student)
    kept = [0, 1, 3, 4]
    log_p, log_q = teacher.log_softmax(-1)[:, kept], student.log_softmax(-1)[:, kept]
    expected = (log_p.exp() * (log_p - log_q)).sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, student)[0])
    assert torch.isfinite(logits_metrics(student, labels, teacher)).all()
