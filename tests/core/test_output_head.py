"""The output head as a function: what is applied after the product, and which models have one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tutelage.core.heads import OutputHead


class Headed(nn.Module):
    """A module with a head and a config; a language model where it names its output embeddings."""

    def __init__(self, head: nn.Module, language_model: bool = True, **config: float):
        super().__init__()
        self.lm_head = head
        self.config = SimpleNamespace(**config)
        self.language_model = language_model

    def get_output_embeddings(self) -> nn.Module | None:
        return self.lm_head if self.language_model else None


@pytest.fixture
def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(6, 10)


@pytest.fixture
def hidden() -> torch.Tensor:
    return torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(1))


def test_scale_and_soft_cap_follow_the_config(linear: nn.Linear, hidden: torch.Tensor) -> None:
    model = Headed(linear, logit_scale=3.0, logits_scaling=2.0, final_logit_softcapping=0.5)
    expected = 0.5 * torch.tanh(linear(hidden) * 1.5 / 0.5)
    torch.testing.assert_close(OutputHead.of(model)(hidden), expected)


def test_classifier_ignores_what_a_language_model_does_to_its_logits(linear: nn.Linear, hidden: torch.Tensor) -> None:
    model = Headed(linear, language_model=False, logit_scale=3.0, final_logit_softcapping=0.5)
    torch.testing.assert_close(OutputHead.of(model)(hidden), linear(hidden))


@pytest.mark.parametrize("bias", [True, False])
def test_outputs_in_use(hidden: torch.Tensor, bias: bool) -> None:
    linear = nn.Linear(6, 10, bias=bias)
    head = OutputHead.of(Headed(linear), outputs=7)
    assert [id(parameter) for parameter in head.linear.parameters()] == [
        id(parameter) for parameter in linear.parameters()
    ]
    torch.testing.assert_close(head(hidden), linear(hidden)[..., :7])


def test_subclass_of_linear_runs_its_own_forward(hidden: torch.Tensor) -> None:
    class Quantised(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    linear = Quantised(6, 10)
    expected = 2 * (hidden @ linear.weight.T + linear.bias)
    torch.testing.assert_close(OutputHead(linear, outputs=7)(hidden), expected[..., :7])


def test_no_head() -> None:
    with pytest.raises(ValueError, match=r"ReLU has no linear output head \(found: none\).*classification head"):
        OutputHead.of(nn.ReLU())


def test_head_that_is_not_linear() -> None:
    with pytest.raises(ValueError, match=r"Headed has no linear output head \(found: lm_head, a Bilinear\)"):
        OutputHead.of(Headed(nn.Bilinear(2, 2, 2)))
