"""A student that is started from its teacher while half precision is allowed: only the teacher's own forward rounds.

Shapes: N positions, D teacher width, R student width, H heads, S values of a head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.tasks.family_models import inputs, make
from tutelage.core.curriculum import joint
from tutelage.targets.live import LiveTargets
from tutelage.targets.source import StatisticsFile
from tutelage.tasks.initialization.calibration import Uses, observe_modules
from tutelage.tasks.initialization.convert import BasisChoice, Initialized, initialize
from tutelage.tasks.initialization.families import QUERIES
from tutelage.tasks.initialization.layout import Layout

HALVES = [torch.bfloat16, torch.float16]
BATCHES = [inputs("llama", seed=seed) for seed in range(4)]
MASKS = [batch["attention_mask"].bool() for batch in BATCHES]


def models(width: int = 24) -> tuple[nn.Module, nn.Module]:
    """Student and teacher; one of the teacher's dimensions is far from zero, as those of pretrained models are: its square is
    more than float16 can hold."""
    sizes = {"tie_word_embeddings": False}
    student = make("llama", "ForCausalLM", 1, hidden_size=width, **sizes).float()
    teacher = make("llama", "ForCausalLM", **sizes).float()
    with torch.no_grad():
        teacher.get_parameter("model.embed_tokens.weight")[:, 3] += 300
    return student, teacher


def started(student: nn.Module, teacher: nn.Module, half: torch.dtype) -> Initialized:
    with torch.autocast("cpu", half):
        return initialize(Layout.of(student, teacher), BATCHES, BasisChoice("pca"))


@pytest.mark.parametrize("half", HALVES)
def test_the_gain_of_a_norm_is_fitted_in_whole_float32(half: torch.dtype) -> None:
    student, teacher = models()
    given: list[torch.Tensor] = []
    norm = teacher.get_submodule("model.layers.1.input_layernorm")
    norm.register_forward_hook(lambda module, args, output: given.append(args[0]))
    basis_DR = started(student, teacher, half).basis_DR.double()
    hidden_ND = torch.cat([hidden[mask] for hidden, mask in zip(given, 2 * MASKS, strict=True)]).double()

    def normalised(states: torch.Tensor) -> torch.Tensor:
        return states * (states.square().mean(-1, keepdim=True) + 1e-6).rsqrt()

    mine_NR, target_NR = normalised(hidden_ND @ basis_DR), normalised(hidden_ND) @ basis_DR
    expected_R = ((mine_NR * target_NR).sum() / mine_NR.square().sum()).expand(24)
    found_R = student.get_parameter("model.layers.1.input_layernorm.weight").double()
    torch.testing.assert_close(found_R, expected_R, rtol=1e-5, atol=0)


@pytest.mark.parametrize("half", HALVES)
def test_the_use_of_heads_is_measured_in_whole_float32(half: torch.dtype) -> None:
    layout, given = Layout.of(*models()), list[torch.Tensor]()
    mapped = layout.teacher.get_submodule("model.layers.1.self_attn.o_proj")
    with torch.no_grad():
        layout.teacher.get_parameter("model.layers.1.self_attn.v_proj.weight").mul_(100)
    mapped.register_forward_hook(lambda module, args, output: given.append(args[0]))
    uses = Uses(layout, torch.eye(32))
    with torch.autocast("cpu", half):
        observe_modules(layout, BATCHES, uses.hooks())
    heads_NHS = (
        torch.cat([values[mask] for values, mask in zip(given, MASKS, strict=True)]).double().unflatten(-1, (4, 8))
    )
    weight_DHS = mapped.get_parameter("weight").detach().double().unflatten(-1, (4, 8))
    expected_H = torch.einsum("nhs,dhs->nhd", heads_NHS, weight_DHS).square().sum(-1).mean(0)
    found_H = uses.of(QUERIES, 2)
    assert found_H is not None
    torch.testing.assert_close(found_H, expected_H, rtol=1e-5, atol=0)


@pytest.mark.parametrize("half", HALVES)
def test_a_square_rotation_that_is_started_in_half_precision_changes_no_output(half: torch.dtype) -> None:
    student, teacher = models(32)
    started(student, teacher, half)
    with torch.no_grad():
        logits, expected = (model.eval()(**BATCHES[0]).logits for model in (student, teacher))
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5 * float(expected.std()))


@pytest.mark.parametrize("half", HALVES)
def test_the_unit_of_residual_targets_is_measured_in_whole_float32(half: torch.dtype) -> None:
    student, teacher = models()
    source, units = LiveTargets(teacher), []
    curriculum: Any = joint(2, 2, 1, projection="residual", student_init="teacher")
    for each in (None, half):
        source.attach(curriculum, student)
        source.start(student, lambda: BATCHES)
        with torch.autocast("cpu", each, enabled=each is not None):
            source.prepare(StatisticsFile(Path("unused"), read=False, write=False), lambda: BATCHES, "cpu")
        units.append([target_map.unit for target_map in source.maps])
    assert units[1] == pytest.approx(units[0], rel=1e-3)
