"""The output head as a function: what is applied after the product, and which models have one."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    EsmConfig,
    EsmForMaskedLM,
    FalconH1Config,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedConfig,
    RecurrentGemmaConfig,
)

from tutelage.core.blocks import FINAL
from tutelage.core.errors import UserError
from tutelage.core.forward import forward_to
from tutelage.core.heads import OutputHead
from tutelage.core.probe import probe_ids
from tutelage.tasks.registry import detect_task
from tutelage.training.self_check import run_probe

pytestmark = pytest.mark.usefixtures("blocks")


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


MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
SMALL = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SMALL),
        Gemma2Config(**SMALL, num_key_value_heads=1, head_dim=8),
        CohereConfig(**SMALL),
        GraniteConfig(**SMALL, logits_scaling=8.0),
        RecurrentGemmaConfig(**SMALL, lru_width=16, num_key_value_heads=1, logits_soft_cap=30.0),
        FalconH1Config(**SMALL, **MAMBA, num_key_value_heads=2, lm_head_multiplier=0.04),
    ],
    ids=lambda config: config.model_type,
)
def test_the_head_gives_the_models_own_logits(config: PreTrainedConfig) -> None:
    """With states so large that a soft cap shows."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.arange(2, 14)[None]
    head = OutputHead.of(model)
    state = forward_to(model, FINAL, input_ids=ids, use_cache=False)
    with torch.no_grad():
        head.linear.weight *= 100 / head(state).abs().max()
        expected = model(input_ids=ids, use_cache=False).logits
        state = forward_to(model, FINAL, input_ids=ids, use_cache=False)
        torch.testing.assert_close(OutputHead.of(model)(state), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", [LlamaForCausalLM, LlamaForSequenceClassification])
@pytest.mark.parametrize(
    "change", [torch.square, lambda x: x + torch.arange(x.shape[-1]) / 48, lambda x: 1.015 * x, lambda x: x + 0.01]
)
def test_logits_that_nothing_explains_are_refused(
    kind: type[Any], change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    class Changed(kind):
        def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
            output = super().forward(input_ids, **kwargs)
            output.logits = change(output.logits)
            return output

    torch.manual_seed(0)
    model = Changed(LlamaConfig(**SMALL, num_labels=3, pad_token_id=0))
    with pytest.raises(UserError, match=r"Changed: changes .* that no setting of its configuration explains"):
        run_probe("teacher", model, detect_task(kind(model.config)))


def test_a_bias_that_is_added_after_the_head_is_refused() -> None:
    model = EsmForMaskedLM(EsmConfig(**SMALL, pad_token_id=1, mask_token_id=47, max_position_embeddings=32))
    nn.init.normal_(model.lm_head.bias)
    with pytest.raises(UserError, match="no setting of its configuration explains"):
        OutputHead.of(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [0.02, 1.0])
@pytest.mark.parametrize("config_class", [LlamaConfig, Gemma2Config, CohereConfig, GraniteConfig])
def test_rounding_in_half_precision_is_no_change(config_class: Any, size: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = config_class(**SMALL, num_key_value_heads=2, head_dim=8, initializer_range=size)
    OutputHead.of(AutoModelForCausalLM.from_config(config).to(dtype))


def test_token_ids_that_a_configuration_names_in_any_form_are_avoided() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL, eos_token_id=[2, 5]))
    model.config.image_token_id, model.config.audio_token_id = {"first": 7}, [[3], 4]
    assert probe_ids(model)[0, :5].tolist() == [3, 6, 7, 8, 9]


def test_measuring_draws_nothing() -> None:
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=48, n_embd=16, n_layer=2, n_head=2)).train()
    state = torch.get_rng_state()
    OutputHead.of(model)
    assert torch.equal(torch.get_rng_state(), state) and model.training
