"""The output loss as one operator, and its own backward pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tutelage.core import chunked
from tutelage.core.heads import OutputHead
from tutelage.core.losses import OutputSettings, output_loss
from tutelage.core.topk import top_k

POSITIONS, WIDTH, OUTPUTS, THEIRS = 7, 4, 11, 6


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("targets", ["head", "logits", "largest", "labels"])
def test_the_operator_is_what_the_compiler_takes_it_for(bias: bool, targets: str) -> None:
    """Its schema, its shapes without values, and its gradients through the compiler's own autograd."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    head = [draw(OUTPUTS, WIDTH).requires_grad_()] + ([draw(OUTPUTS).requires_grad_()] if bias else [])
    teacher: list[torch.Tensor] = []
    if targets in ("head", "logits"):
        teacher = [draw(POSITIONS, THEIRS), draw(OUTPUTS, THEIRS), draw(OUTPUTS)]
    elif targets == "largest":
        kept = top_k(draw(POSITIONS, OUTPUTS), 3, 2.0)
        teacher = [kept.ids, kept.log_probs, kept.log_rest]
    labels = torch.randint(0, OUTPUTS, (POSITIONS,), generator=generator)
    numbers = [2.0, 1.0 if targets == "labels" else 0.3, 0.0, 1.0, 0.0, 1.0]
    sizes = [0, 3, int(targets == "largest"), int(targets == "logits")]
    hidden = draw(POSITIONS, WIDTH).requires_grad_()
    torch.library.opcheck(chunked._operator, (hidden, head, teacher, labels, numbers, sizes, None))


def test_a_second_backward_pass_is_refused() -> None:
    head = OutputHead(nn.Linear(WIDTH, OUTPUTS))
    states, labels = torch.randn(POSITIONS, WIDTH, requires_grad=True), torch.randint(0, OUTPUTS, (POSITIONS,))
    loss = output_loss(states, head, labels_N=labels, settings=OutputSettings(label_weight=1.0))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        loss.backward()
