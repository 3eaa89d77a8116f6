"""What a plan says about student and teacher, against the models themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

from tests.conftest import make_tokenizer
from tutelage import CurriculumConfig, RunOptions, plan
from tutelage.runs.plan import describe_plan
from tutelage.tasks.registry import get_task
from tutelage.tasks.students import student_config

LENGTH = 16


def forward_flops(model: torch.nn.Module) -> float:
    """Counted by torch on the real model, with its output at every token."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros((1, LENGTH), dtype=torch.long))
    return counter.get_total_flops() / LENGTH


@pytest.mark.parametrize(("kind", "task"), [("causal", "causal_lm"), ("mlm", "masked_lm"), ("embedding", "embedding")])
def test_sizes_and_speed_are_those_of_the_models(kind: str, task: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(f"{kind}_teacher")
    preset = "layers=2,hidden_size=24,intermediate_size=40"
    args = CurriculumConfig(teacher_model_name_or_path=str(folder), max_steps=8, use_cpu=True)
    planned = plan(RunOptions(student=preset, max_length=LENGTH), args)
    teacher = get_task(task).load(str(folder))
    backbone = get_task(task).backbone(teacher)
    student = get_task(task).build(student_config(preset, backbone.config), get_task(task).teacher_shape(teacher))
    assert planned.teacher.forward_flops_per_token == forward_flops(teacher)
    assert planned.student.forward_flops_per_token == forward_flops(student)
    assert (planned.teacher.heads, planned.teacher.neurons) == (4, 64)
    heads = 4 if kind == "causal" else 3  # whole groups of query heads
    assert (planned.student.heads, planned.student.neurons) == (heads, 40)
    stored = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    assert planned.teacher.megabytes == pytest.approx(stored / 1e6, rel=0.1)  # the file has a header too
    speed = forward_flops(teacher) / forward_flops(student)
    assert (
        f"2 of 4 blocks, {heads} of 4 heads, {'2 of 2 key/value heads, ' * (kind == 'causal')}40 of 64 neurons; "
        in (described := describe_plan(planned))
    )
    assert f"predicted speed {speed:.1f}x" in described


def test_neurons_are_shown_where_the_configuration_leaves_them_open(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=102, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    args = CurriculumConfig(teacher_model_name_or_path=str(tmp_path), max_steps=8, use_cpu=True)
    planned = plan(RunOptions(student="layers=1,intermediate_size=48", max_length=LENGTH), args)
    assert "student of teacher: 1 of 2 blocks, 4 of 4 heads, 48 of 128 neurons; " in describe_plan(planned)


@pytest.mark.parametrize("method", ["extraction", "joint"])
def test_learned_maps_are_part_of_a_plan(causal_teacher: Path, method: str) -> None:
    """Their products are the student's; the teacher's states are not projected."""
    found = []
    for projection in ("gaussian", "learned"):
        args = CurriculumConfig(
            teacher_model_name_or_path=str(causal_teacher),
            **{"method": method, "projection": projection, "student_init": "random", "num_stages": 1},
            **{"max_steps": 8, "use_cpu": True},
        )
        found.append(plan(RunOptions(student="layers=2,hidden_size=24", max_length=LENGTH), args))
    fixed, learned = (planned.stages[0] for planned in found)
    assert learned.student_flops_per_token - fixed.student_flops_per_token == 3 * 2 * 24 * 32
    assert fixed.teacher_flops_per_token - learned.teacher_flops_per_token == 2 * 24 * 32
