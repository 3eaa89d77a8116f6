"""A compiled run equals a plain one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tutelage import CurriculumTrainer


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("ragged", [False, True])
def test_compiled_equals_plain(make_trainer: Callable[..., CurriculumTrainer], ragged: bool, accumulation: int) -> None:
    """The loss is divided by the items of the whole step, also behind the compiler's wrapper."""
    settings: dict[str, Any] = {
        "ragged": ragged,
        "gradient_accumulation_steps": accumulation,
        "per_device_train_batch_size": 4,
        "layer_map": "1:2,final:final",
        "stage_steps": [2, 2],
        "max_steps": 6,
    }
    plain = make_trainer(output="plain", **settings)
    compiled = make_trainer(output="compiled", torch_compile=True, torch_compile_backend="eager", **settings)
    losses = []
    for trainer in (plain, compiled):
        trainer.train()
        losses.append([record["loss"] for record in trainer.state.log_history if "loss" in record])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for name, parameter in plain.model.named_parameters():
        torch.testing.assert_close(compiled.model.state_dict()[name], parameter.data, rtol=1e-4, atol=1e-5)
