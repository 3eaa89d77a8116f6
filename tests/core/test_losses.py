"""Losses against the plain formulas."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tutelage import embedding_loss, hidden_loss, output_loss
from tutelage.core import chunked
from tutelage.core.heads import LinearHead, OutputHead
from tutelage.core.losses import OutputSettings, output_metrics

pytestmark = pytest.mark.usefixtures("blocks")

N, D, E, V = 23, 6, 9, 31


def pieces(softcap: float | None = None) -> tuple[torch.Tensor, OutputHead, torch.Tensor, OutputHead, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = nn.Linear(D, V), nn.Linear(E, V, bias=False)
    for linear in (student, teacher):
        for parameter in linear.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
    hidden = torch.randn(N, D, generator=generator, requires_grad=True)
    labels = torch.randint(V, (N,), generator=generator)
    heads = OutputHead(student, softcap), OutputHead(teacher, softcap, scale=0.5)
    return hidden, heads[0], torch.randn(N, E, generator=generator), heads[1], labels


def plain(
    logits: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, temperature: float, label_weight: float
) -> torch.Tensor:
    log_q, log_p = (logits / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
    divergence = temperature**2 * (log_p.exp() * (log_p - log_q)).sum()
    return (1 - label_weight) * divergence + label_weight * F.cross_entropy(logits, labels, reduction="sum")


@pytest.mark.parametrize("chunk_size", [None, 1, 5, 23, 100])
@pytest.mark.parametrize(("temperature", "label_weight"), [(1.0, 0.0), (2.0, 0.3), (0.7, 1.0)])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_output_loss_is_exact(
    chunk_size: int | None, temperature: float, label_weight: float, softcap: float | None
) -> None:
    hidden, head, teacher_hidden, teacher_head, labels = pieces(softcap)
    inputs = [hidden, *head.linear.parameters()]
    settings = {"temperature": temperature, "label_weight": label_weight}
    mine = output_loss(
        hidden, head, teacher_hidden, teacher_head, labels, settings=OutputSettings(chunk_size=chunk_size, **settings)
    )
    theirs = plain(head(hidden), teacher_head(teacher_hidden).detach(), labels, **settings)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-4)
    for left, right in zip(torch.autograd.grad(3 * mine, inputs), torch.autograd.grad(3 * theirs, inputs), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-4)
    with torch.no_grad():
        again = output_loss(
            hidden,
            head,
            teacher_hidden,
            teacher_head,
            labels,
            settings=OutputSettings(chunk_size=chunk_size, **settings),
        )
    torch.testing.assert_close(again, mine.detach())


@pytest.mark.parametrize("chunk_size", [None, 5])
@pytest.mark.parametrize("label_weight", [0.0, 0.3])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_mean_squares_of_logits_are_exact(chunk_size: int | None, label_weight: float, softcap: float | None) -> None:
    hidden, head, teacher_hidden, teacher_head, labels = pieces(softcap)
    inputs = [hidden, *head.linear.parameters()]
    settings = OutputSettings(loss="mse", label_weight=label_weight, chunk_size=chunk_size)
    mine = output_loss(hidden, head, teacher_hidden, teacher_head, labels, settings=settings)
    logits, theirs = head(hidden), teacher_head(teacher_hidden).detach()
    squares = ((logits - theirs) ** 2).mean(-1).sum()
    plain_loss = (1 - label_weight) * squares + label_weight * F.cross_entropy(logits, labels, reduction="sum")
    torch.testing.assert_close(mine, plain_loss, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        torch.autograd.grad(3 * mine, inputs), torch.autograd.grad(3 * plain_loss, inputs), rtol=1e-5, atol=1e-4
    )


def test_only_a_chunk_of_logits_exists_at_a_time() -> None:
    hidden, head, teacher_hidden, teacher_head, labels = pieces()
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    with Largest():
        output_loss(
            hidden, head, teacher_hidden, teacher_head, labels, settings=OutputSettings(chunk_size=4)
        ).backward()
    assert 4 * V <= largest < N * V


def test_tied_head_gets_both_gradients() -> None:
    _hidden, head, teacher_hidden, teacher_head, labels = pieces()
    table = nn.Parameter(torch.randn(V, D))
    head.linear.weight = table
    ids = torch.arange(N) % V

    def total(loss_of_state: str) -> torch.Tensor:
        state = table[ids]
        if loss_of_state == "mine":
            return output_loss(state, head, teacher_hidden, teacher_head, labels)
        return plain(head(state), teacher_head(teacher_hidden).detach(), labels, 1.0, 0.0)

    (mine,), (theirs,) = (torch.autograd.grad(total(kind), [table]) for kind in ("mine", "plain"))
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-4)


def test_outputs_beyond_the_shared_vocabulary_get_no_gradient() -> None:
    hidden, head, teacher_hidden, teacher_head, _labels = pieces()
    trimmed = OutputHead(head.linear, outputs=20), OutputHead(teacher_head.linear, outputs=20)
    output_loss(hidden, trimmed[0], teacher_hidden, trimmed[1]).backward()
    gradient = head.linear.weight.grad
    assert gradient is not None
    assert gradient[:20].abs().min() > 0
    assert torch.equal(gradient[20:], torch.zeros(V - 20, D))


def test_autocast_loss_stays_float32() -> None:
    hidden, head, teacher_hidden, teacher_head, labels = pieces()
    with torch.autocast("cpu", torch.bfloat16):
        loss = output_loss(
            hidden, head, teacher_hidden, teacher_head, labels, settings=OutputSettings(label_weight=0.5)
        )
    loss.backward()
    assert loss.dtype == torch.float32
    assert hidden.grad is not None
    exact = plain(head(hidden), teacher_head(teacher_hidden), labels, 1.0, 0.5)
    assert loss.item() == pytest.approx(exact.item(), rel=0.05)


def test_missing_ingredients_are_refused() -> None:
    hidden, head, teacher_hidden, teacher_head, _ = pieces()
    with pytest.raises(ValueError, match="needs labels in the batch"):
        output_loss(hidden, head, teacher_hidden, teacher_head, settings=OutputSettings(label_weight=0.5))
    for missing in ((None, None), (teacher_hidden, None), (None, teacher_head)):
        with pytest.raises(ValueError, match="needs the teacher's hidden states"):
            output_loss(hidden, head, *missing)
    with pytest.raises(ValueError, match="unknown embedding_loss 'l1'"):
        embedding_loss(hidden, hidden, "l1")


def test_hidden_loss_counts_kept_positions_only() -> None:
    student, target = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 4)
    keep = torch.tensor([[True, False, True], [True, True, False]])
    loss = hidden_loss(student, target, keep)
    expected = ((student - target) ** 2).mean(-1)[keep].sum()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert student.grad is not None
    assert torch.equal(student.grad[~keep], torch.zeros(2, 4))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_left_out_states_that_are_not_finite_do_not_matter(value: float) -> None:
    student, target = torch.ones(3, 4), torch.zeros(3, 4)
    student[1, 2] = target[2, 0] = value
    student.requires_grad_()
    loss = hidden_loss(student, target, torch.tensor([True, False, False]))
    loss.backward()
    assert loss.item() == 1.0
    assert student.grad is not None
    assert torch.equal(student.grad, torch.tensor([[0.5] * 4, [0.0] * 4, [0.0] * 4]))


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_output_metrics(chunk_size: int | None) -> None:
    hidden, head, teacher_hidden, teacher_head, labels = pieces()
    values = output_metrics(hidden, head, labels, teacher_hidden, teacher_head, chunk_size)
    logits, teacher = head(hidden).detach(), teacher_head(teacher_hidden).detach()
    log_q, log_p = logits.log_softmax(-1), teacher.log_softmax(-1)
    expected = torch.stack(
        [
            F.cross_entropy(logits, labels, reduction="none"),
            (logits.argmax(-1) == labels).float(),
            (log_p.exp() * (log_p - log_q)).sum(-1),
            (logits.argmax(-1) == teacher.argmax(-1)).float(),
            F.cross_entropy(teacher, labels, reduction="none"),
            (teacher.argmax(-1) == labels).float(),
        ],
        dim=-1,
    )
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(output_metrics(hidden, head, labels)[:, 2:], torch.zeros(N, 4))


def test_embedding_loss() -> None:
    a, b = torch.randn(3, 5), torch.randn(3, 5)
    torch.testing.assert_close(embedding_loss(a, b), (1 - F.cosine_similarity(a, b)).sum())
    torch.testing.assert_close(embedding_loss(a, b, "mse"), ((a - b) ** 2).mean(-1).sum())
    for kind in ("cosine", "mse"):
        half = embedding_loss(a.bfloat16(), b.bfloat16(), kind)
        torch.testing.assert_close(
            half, embedding_loss(a.bfloat16().float(), b.bfloat16().float(), kind), rtol=0, atol=0
        )


@pytest.mark.parametrize("label_weight", [0.3, 1.0])
@pytest.mark.parametrize("chunk_size", [5, None])
def test_positions_without_a_label_have_no_label_loss(label_weight: float, chunk_size: int | None) -> None:
    hidden, head, teacher_hidden, teacher_head, labels = pieces()
    labels[::3] = -100
    inputs = [hidden, *head.linear.parameters()]
    mine = output_loss(
        hidden,
        head,
        teacher_hidden,
        teacher_head,
        labels,
        settings=OutputSettings(label_weight=label_weight, chunk_size=chunk_size),
    )
    theirs = plain(head(hidden), teacher_head(teacher_hidden).detach(), labels, 1.0, label_weight)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=0)
    for left, right in zip(torch.autograd.grad(mine, inputs), torch.autograd.grad(theirs, inputs), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


def test_two_micro_batches_give_the_gradient_of_one_batch() -> None:
    hidden, head, teacher_hidden, teacher_head, labels = pieces()
    inputs = [hidden, *head.linear.parameters()]
    whole = (
        output_loss(hidden, head, teacher_hidden, teacher_head, labels, settings=OutputSettings(label_weight=0.5)) / N
    )
    expected = torch.autograd.grad(whole, inputs)
    for rows in (slice(0, 9), slice(9, N)):
        part = (
            output_loss(
                hidden[rows],
                head,
                teacher_hidden[rows],
                teacher_head,
                labels[rows],
                settings=OutputSettings(label_weight=0.5),
            )
            / N
        )
        part.backward()
    for tensor, gradient in zip(inputs, expected, strict=True):
        torch.testing.assert_close(tensor.grad, gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("frozen", ["state", "head"])
def test_what_is_frozen_gets_no_gradient(frozen: str) -> None:
    hidden, head, teacher_hidden, teacher_head, labels = pieces()
    inputs = [hidden, *head.linear.parameters()]
    expected = torch.autograd.grad(output_loss(hidden, head, teacher_hidden, teacher_head, labels), inputs)
    for tensor in inputs[:1] if frozen == "state" else inputs[1:]:
        tensor.requires_grad_(False)
    output_loss(hidden, head, teacher_hidden, teacher_head, labels).backward()
    for tensor, gradient in zip(inputs, expected, strict=True):
        if tensor.requires_grad:
            torch.testing.assert_close(tensor.grad, gradient, rtol=0, atol=0)
        else:
            assert tensor.grad is None


def test_no_backward_pass_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head, teacher_hidden, teacher_head, labels = pieces()
    monkeypatch.setattr(torch.autograd, "grad", lambda *_: pytest.fail("a gradient was taken"))
    with torch.no_grad():
        output_loss(hidden, head, teacher_hidden, teacher_head, labels, settings=OutputSettings(label_weight=0.5))


def test_no_positions() -> None:
    hidden, head, teacher_hidden, teacher_head, labels = pieces()
    loss = output_loss(
        hidden[:0], head, teacher_hidden[:0], teacher_head, labels[:0], settings=OutputSettings(label_weight=0.5)
    )
    loss.backward()
    assert loss.item() == 0
    assert all(torch.equal(parameter.grad, torch.zeros_like(parameter)) for parameter in head.linear.parameters())
    assert output_metrics(hidden[:0], head, labels[:0]).shape == (0, 6)


@pytest.mark.parametrize("chunk_size", [5, None])
def test_autocast_gradients_are_those_of_the_formula_under_autocast(chunk_size: int | None) -> None:
    hidden, head, teacher_hidden, teacher_head, labels = pieces()
    inputs = [hidden, *head.linear.parameters()]
    with torch.autocast("cpu", torch.bfloat16):
        mine = output_loss(
            hidden,
            head,
            teacher_hidden,
            teacher_head,
            labels,
            settings=OutputSettings(label_weight=0.5, chunk_size=chunk_size),
        )
    expected = [torch.zeros_like(tensor) for tensor in inputs]
    for start in range(0, N, chunk_size or N):  # by chunks, each of which rounds its gradient to bfloat16
        rows = slice(start, start + (chunk_size or N))
        with torch.autocast("cpu", torch.bfloat16):
            logits, teacher = head(hidden[rows]), teacher_head(teacher_hidden[rows]).detach()
        assert logits.dtype == torch.bfloat16
        part = plain(logits.float(), teacher.float(), labels[rows], 1.0, 0.5)
        for total, gradient in zip(expected, torch.autograd.grad(part, inputs), strict=True):
            total += gradient
    for left, right in zip(torch.autograd.grad(mine, inputs), expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


def test_the_default_chunk_holds_the_budget_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head, teacher_hidden, teacher_head, labels = pieces()
    rows, call = [], LinearHead.__call__

    def spy(self: LinearHead, states: torch.Tensor) -> torch.Tensor:
        rows.append(len(states))
        return call(self, states)

    assert chunked.CHUNK_LOGITS == 2**24
    monkeypatch.setattr(chunked, "CHUNK_LOGITS", 8 * V + 1)
    monkeypatch.setattr(LinearHead, "__call__", spy)
    output_loss(hidden, head, teacher_hidden, teacher_head)
    assert rows == [8, 8, 8, 8, 7, 7]
    output_metrics(hidden, head, labels)
    assert rows[6:] == [8, 8, 7]


@pytest.mark.parametrize("by_both", [False, True])
@pytest.mark.parametrize("top_k", [None, 5, V])
def test_outputs_that_the_teacher_rules_out_contribute_nothing(top_k: int | None, by_both: bool) -> None:
    """A masked vocabulary has logits of -inf: probability zero, not NaN."""
    hidden, head, _, _, labels = pieces()
    if by_both:
        with torch.no_grad():
            head.linear.bias[3:10] = -torch.inf
    ruled_out = nn.Linear(E, V)
    with torch.no_grad():
        ruled_out.bias[3:20] = -torch.inf
    teacher_head, teacher_hidden = OutputHead(ruled_out), torch.randn(N, E)
    loss = output_loss(hidden, head, teacher_hidden, teacher_head, labels, settings=OutputSettings(top_k=top_k))
    gradients = torch.autograd.grad(loss, [hidden, *head.linear.parameters()])
    assert torch.isfinite(loss) and all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
    if top_k != 5:
        log_p = teacher_head(teacher_hidden).detach().log_softmax(-1)[:, [*range(3), *range(20, V)]]
        log_q = head(hidden).log_softmax(-1)[:, [*range(3), *range(20, V)]]
        expected = (log_p.exp() * (log_p - log_q)).sum()
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
        for left, right in zip(
            gradients, torch.autograd.grad(expected, [hidden, *head.linear.parameters()]), strict=True
        ):
            torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-4)
    metrics = output_metrics(hidden.detach(), head, torch.zeros_like(labels), teacher_hidden, teacher_head)
    assert torch.isfinite(metrics).all()


def test_head_gradients_are_summed_in_float32() -> None:
    """Of a model in bfloat16: one rounding at the end, not one for each chunk."""
    hidden, head, teacher_hidden, teacher_head, _ = pieces()
    hidden, teacher_hidden = (tensor.detach().repeat(40, 1).bfloat16() for tensor in (hidden, teacher_hidden))
    student = nn.Linear(D, V).bfloat16()
    student.load_state_dict(head.linear.state_dict())
    heads = OutputHead(student), OutputHead(teacher_head.linear.bfloat16())
    gradients = []
    for chunk_size in (len(hidden), 2):
        loss = output_loss(hidden, heads[0], teacher_hidden, heads[1], settings=OutputSettings(chunk_size=chunk_size))
        gradients.append(torch.autograd.grad(loss, student.weight)[0].float())
    assert gradients[0].dtype == torch.float32
    error = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    assert error < 0.003


@pytest.mark.parametrize("autocast", [True, False])
def test_many_chunks_in_bfloat16_are_as_exact_as_one(autocast: bool) -> None:
    """Under autocast, and of a model in bfloat16, against the gradient of a model in float32."""
    hidden, head, teacher_hidden, teacher_head, _ = pieces()
    hidden, teacher_hidden = (torch.randn(512, D).bfloat16(), torch.randn(512, E).bfloat16())

    def gradient(dtype: torch.dtype, chunk_size: int | None) -> torch.Tensor:
        heads = [OutputHead(copy.deepcopy(old.linear).to(dtype)) for old in (head, teacher_head)]
        states, settings = (hidden.to(dtype), teacher_hidden.to(dtype)), OutputSettings(chunk_size=chunk_size)
        loss = output_loss(states[0], heads[0], states[1], heads[1], settings=settings)
        return torch.autograd.grad(loss, heads[0].linear.weight)[0].float()

    exact = gradient(torch.float32, None)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        kind = torch.float32 if autocast else torch.bfloat16
        one, many = ((gradient(kind, size) - exact).norm() / exact.norm() for size in (512, 2))
    assert many < 1.2 * one < 0.012


def test_a_frozen_head_in_float16_runs_under_autocast() -> None:
    """The base of an adapter."""
    hidden, head, teacher_hidden, teacher_head, _ = pieces()
    exact = torch.autograd.grad(output_loss(hidden, head, teacher_hidden, teacher_head), hidden)[0]
    frozen = OutputHead(head.linear.half().requires_grad_(False))
    with torch.autocast("cpu", torch.float16):
        loss = output_loss(hidden.half(), frozen, teacher_hidden, teacher_head)
    (found,) = torch.autograd.grad(loss, hidden)
    assert (found - exact).norm() < 0.01 * exact.norm()


def test_float16_keeps_small_gradients() -> None:
    """A logit's gradient below 6e-8, float16's smallest number, is not lost before a gradient scaler multiplies it."""
    hidden, head, teacher_hidden, _, labels = pieces()
    labels, teacher = labels.masked_fill(labels == 4, 0), nn.Linear(E, V, bias=False)
    gradients = []
    for half in (False, True):
        with torch.no_grad():
            head.linear.bias[4] = -25.0  # a probability below 6e-8
        with torch.autocast("cpu", torch.float16, enabled=half):
            loss = output_loss(
                hidden, head, teacher_hidden, OutputHead(teacher), labels, settings=OutputSettings(label_weight=1.0)
            )
        gradients.append(torch.autograd.grad(65536 * loss, head.linear.bias)[0])
    assert 0 < gradients[0][4] < 65536 * 6e-8 * N
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=0)
