"""What a student that is started from its teacher is told by the calibration text."""

from __future__ import annotations

import pytest
import torch

from tests.tasks.family_models import inputs, make
from tutelage.tasks.initialization.calibration import Uses, observe_modules
from tutelage.tasks.initialization.families import POOLED
from tutelage.tasks.initialization.layout import Layout


@pytest.mark.parametrize("length", [12, 32])
def test_uses_of_a_pooled_head_are_counted_per_text_whatever_its_length(length: int) -> None:
    """A pooled state is (B, 32), which the mask (B, T) of 32 positions does not describe."""
    models = [make("bert", "ForSequenceClassification", seed, max_position_embeddings=40) for seed in (0, 1)]
    batch = inputs("bert", length=length)
    uses = Uses(Layout.of(*models), torch.eye(32))
    observe_modules(uses.layout, [batch], uses.hooks())
    teacher = models[1]
    with torch.no_grad():
        pooled_BD = teacher.get_submodule("bert")(**batch).pooler_output
        expected_D = pooled_BD.square().mean(0) * teacher.get_parameter("classifier.weight").square().sum(0)
    found_D = uses.of(POOLED, None)
    assert found_D is not None
    torch.testing.assert_close(found_D, expected_D, rtol=1e-5, atol=0)
