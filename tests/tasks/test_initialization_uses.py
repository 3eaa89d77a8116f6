"""What a student that is started from its teacher is told by the calibration text."""

from __future__ import annotations

import pytest
import torch

from tests.tasks.family_models import inputs, make
from tutelage.core.heads import OutputHead
from tutelage.tasks.initialization.calibration import Uses, observe_modules, state_moments
from tutelage.tasks.initialization.convert import BasisChoice, initialize
from tutelage.tasks.initialization.families import POOLED
from tutelage.tasks.initialization.layout import Layout
from tutelage.tasks.initialization.student import _gram


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


def test_attention_sinks_are_found_from_all_batches_so_far() -> None:
    """The first batch has the smallest states, so that by itself it would leave out all others."""
    teacher = make("llama")
    embeddings_VD = teacher.get_parameter("embed_tokens.weight")
    with torch.no_grad():
        embeddings_VD[:10] *= 0.01
    rows = {0: 3, 10: 9, 20: 9}
    batches = [{"input_ids": torch.arange(start, start + 10)[None].repeat(rows[start], 1)} for start in rows]
    found_DD = state_moments(Layout.of(make("llama", seed=1), teacher), batches, [0])[0]
    unit_VD = torch.nn.functional.normalize(embeddings_VD[:30].detach(), dim=-1) * 32**0.5
    counts_V = torch.tensor(list(rows.values())).repeat_interleave(10)
    torch.testing.assert_close(found_DD, unit_VD.T * counts_V @ unit_VD / counts_V.sum(), rtol=0, atol=1e-5)


def test_a_basis_from_few_positions_gets_a_warning() -> None:
    student, teacher = make("llama", hidden_size=24), make("llama")
    message = r"32-dimensional states for the residual basis .* comes from 48 positions, but needs 128"
    with pytest.warns(UserWarning, match=message):
        initialize(Layout.of(student, teacher), [inputs("llama", count=2, length=12)], BasisChoice("pca"))


def test_the_logits_basis_weighs_directions_by_the_centred_output_head() -> None:
    teacher, student = make("llama", "ForCausalLM"), make("llama", "ForCausalLM", 1, hidden_size=24)
    weight_VD, gain_D = (teacher.get_parameter(name).detach() for name in ("lm_head.weight", "model.norm.weight"))
    read_VD = (weight_VD - weight_VD.mean(0)) * gain_D
    head = OutputHead.of(teacher)
    assert head is not None
    found_DD = _gram(Layout.of(student, teacher), head)
    torch.testing.assert_close(found_DD, read_VD.T @ read_VD, rtol=1e-4, atol=1e-4)
