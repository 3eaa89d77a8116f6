"""The top-k divergence against the full one, which it is a lower bound of."""

from __future__ import annotations

import pyarrow as pa
import pytest
import torch
from torch import nn

from tutelage.core.heads import OutputHead
from tutelage.core.losses import OutputSettings, output_loss
from tutelage.core.topk import TopK, top_k, top_k_divergence
from tutelage.targets.rows import LOG_PROBS, LOG_REST, TOP_IDS, RowFormat, decode_outputs, encode_outputs

pytestmark = pytest.mark.usefixtures("blocks")


def logits(rows: int = 6, outputs: int = 40, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(rows, outputs, generator=torch.Generator().manual_seed(seed))


def full(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum()


@pytest.mark.parametrize("k", [1, 5, 39, 40, 100])
def test_kept_and_left_out_mass_is_one(k: int) -> None:
    kept = top_k(logits(), k)
    assert kept.ids.shape == (6, min(k, 40))
    mass = kept.log_probs.exp().sum(-1) + kept.log_rest.exp()
    torch.testing.assert_close(mass, torch.ones(6))
    assert torch.equal(kept.ids[:, 0], logits().argmax(-1))


@pytest.mark.parametrize("k", [40, 100])
def test_with_all_outputs_it_is_the_full_divergence(k: int) -> None:
    teacher, student = logits(), logits(seed=1)
    loss, gradient = top_k_divergence(student.log_softmax(-1), top_k(teacher, k))
    torch.testing.assert_close(loss, full(teacher, student))
    torch.testing.assert_close(gradient, student.softmax(-1) - teacher.softmax(-1))


@pytest.mark.parametrize("k", [1, 4, 20])
def test_it_is_too_small_by_the_divergence_within_the_rest(k: int) -> None:
    teacher, student = logits(), logits(seed=1)
    kept = top_k(teacher, k)
    loss, _ = top_k_divergence(student.log_softmax(-1), kept)
    left = torch.ones_like(teacher).scatter(-1, kept.ids, 0.0).bool()
    within = [full(t[m][None], s[m][None]) for t, s, m in zip(teacher, student, left, strict=True)]
    bias = sum(rest * part for rest, part in zip(kept.log_rest.exp(), within, strict=True))
    torch.testing.assert_close(loss + bias, full(teacher, student))
    assert bias > 0


def test_its_gradient_is_that_of_its_value() -> None:
    kept = top_k(logits().double().float(), 7)
    student = logits(seed=1).requires_grad_()

    def value(z: torch.Tensor) -> torch.Tensor:
        log_q = z.log_softmax(-1)
        inside = log_q.gather(-1, kept.ids)
        outside = (1 - inside.exp().sum(-1)).log()
        p, rest = kept.log_probs.exp(), kept.log_rest.exp()
        return (p * (p.log() - inside)).sum() + (rest * (rest.log() - outside)).sum()

    (expected,) = torch.autograd.grad(value(student), student)
    loss, gradient = top_k_divergence(student.detach().log_softmax(-1), kept)
    torch.testing.assert_close(loss, value(student.detach()))
    torch.testing.assert_close(gradient, expected)


def test_rounded_probabilities_are_normalised() -> None:
    teacher = logits()
    kept = top_k(teacher, 5)
    rounded = TopK(kept.ids, kept.log_probs + 0.01, kept.log_rest + 0.01)
    exact, _ = top_k_divergence(logits(seed=1).log_softmax(-1), kept)
    loss, gradient = top_k_divergence(logits(seed=1).log_softmax(-1), rounded)
    torch.testing.assert_close(loss, exact)
    assert gradient is not None and gradient.sum(-1).abs().max() < 1e-5


def test_a_certain_teacher_and_a_certain_student_are_finite() -> None:
    teacher = torch.tensor([[1000.0, 0.0, 0.0, -1000.0]])
    for student in (torch.tensor([[0.0, 0.0, 1000.0, 0.0]]), teacher.clone()):
        loss, gradient = top_k_divergence(student.log_softmax(-1), top_k(teacher, 2))
        assert torch.isfinite(loss) and gradient is not None and torch.isfinite(gradient).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("label_weight", [0.0, 0.3])
def test_kept_outputs_and_the_head_they_come_from_give_the_same_loss(temperature: float, label_weight: float) -> None:
    torch.manual_seed(0)
    student_head, teacher_head = OutputHead(nn.Linear(8, 40)), OutputHead(nn.Linear(12, 40))
    state, hidden = torch.randn(9, 8, requires_grad=True), torch.randn(9, 12)
    labels = torch.randint(40, (9,))
    settings = {"temperature": temperature, "label_weight": label_weight, "chunk_size": 4}
    live = output_loss(state, student_head, hidden, teacher_head, labels, settings=OutputSettings(top_k=6, **settings))
    (live_gradient,) = torch.autograd.grad(live, state)
    with torch.no_grad():
        parts = [top_k(teacher_head(hidden[rows]), 6, temperature) for rows in (slice(0, 4), slice(4, 8), slice(8, 9))]
    kept = TopK(
        *(torch.cat(columns) for columns in zip(*((p.ids, p.log_probs, p.log_rest) for p in parts), strict=True))
    )
    stored = output_loss(state, student_head, labels_N=labels, targets=kept, settings=OutputSettings(**settings))
    (stored_gradient,) = torch.autograd.grad(stored, state)
    assert torch.equal(live, stored) and torch.equal(live_gradient, stored_gradient)
    complete = output_loss(state, student_head, hidden, teacher_head, labels, settings=OutputSettings(**settings))
    assert live < complete
    torch.testing.assert_close(
        output_loss(state, student_head, hidden, teacher_head, labels, settings=OutputSettings(top_k=40, **settings)),
        complete,
    )


@pytest.mark.parametrize("ruled_out", [-torch.inf, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("dtype", [None, "float16", "float32"])
def test_outputs_that_both_rule_out_contribute_nothing(ruled_out: float, dtype: str | None) -> None:
    """From memory and from disk: more outputs are kept than the teacher allows."""
    teacher, student = logits(), logits(seed=1)
    teacher[:, 5:], student[:, 10:] = ruled_out, ruled_out
    kept = top_k(teacher, 20)
    if dtype is not None:
        form = RowFormat(dtype, 40, "none", False, "top_k")
        table = pa.table(encode_outputs(kept, [1] * 6, form))
        columns = decode_outputs(table, 20)
        kept = TopK(columns[TOP_IDS], columns[LOG_PROBS], columns[LOG_REST])
    loss, gradient = top_k_divergence(student.log_softmax(-1), kept)
    log_p, log_q = teacher.log_softmax(-1)[:, :5], student.log_softmax(-1)[:, :5]
    tolerance = {"rtol": 2e-3, "atol": 1e-3} if dtype == "float16" else {}
    torch.testing.assert_close(loss, (log_p.exp() * (log_p - log_q)).sum(), **tolerance)
    torch.testing.assert_close(gradient, student.softmax(-1) - teacher.softmax(-1), **tolerance)
