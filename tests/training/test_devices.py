"""Counts and losses stay on the device of their batch; `meta` stands in for a GPU, and for devices without float64."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, GPT2LMHeadModel

import tutelage
from tutelage import CurriculumTrainer, get_task
from tutelage.core.curriculum import Curriculum
from tutelage.core.stages import HiddenStage, OutputStage
from tutelage.targets.live import LiveTargets
from tutelage.tasks.base import EvaluationTools
from tutelage.training.costs import StageCost, measure_stage
from tutelage.training.meter import Meter
from tutelage.training.objective import StageObjective
from tutelage.training.records import Progress

HIDDEN, FINAL, OUTPUT = HiddenStage(1, 1, 2), HiddenStage(1, "final", "final"), OutputStage(1)


def token_batch(device: str, mask: bool = False, labels: str | None = "tokens") -> dict[str, torch.Tensor]:
    ids = torch.ones((2, 6), dtype=torch.long, device=device)
    batch = {"input_ids": ids} | ({"attention_mask": torch.ones_like(ids)} if mask else {})
    return batch | ({} if labels is None else {"labels": ids if labels == "tokens" else ids[:, 0]})


def test_padded_batches_are_counted_beside_unpadded_ones() -> None:
    summed: list[torch.Tensor] = []

    def total(count: torch.Tensor) -> torch.Tensor:
        summed.append(count)
        return torch.tensor(0)

    meter, cost = Meter(Progress(), 1, total), StageCost(1.0, 2.0, frozenset())
    for mask in (True, False):
        meter.count(token_batch("meta", mask), cost)
    meter.settle()
    assert [count.device.type for count in summed] == ["meta"]
    assert (meter.progress.samples, meter.progress.student_flops, meter.progress.teacher_flops) == (4, 24.0, 48.0)


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("stage", [HIDDEN, FINAL, OUTPUT])
@pytest.mark.parametrize(
    ("name", "labels"),
    [("causal_lm", "tokens"), ("causal_lm", None), ("masked_lm", "tokens"), ("sequence_classification", "class")],
)
def test_items_are_counted_on_the_device_of_the_batch(name: str, labels: str | None, stage: Any, mask: bool) -> None:
    task = get_task(name)
    on_gpu, on_cpu = (task.count_items(stage, token_batch(device, mask, labels)) for device in ("meta", "cpu"))
    assert on_gpu.device.type == "meta"
    assert (on_gpu.shape, on_gpu.dtype) == (on_cpu.shape, on_cpu.dtype)


@pytest.mark.parametrize("stage", [HIDDEN, OUTPUT])
def test_examples_of_plain_networks_are_counted_on_the_device_of_the_batch(stage: Any) -> None:
    batch = {"x": torch.ones((3, 4), device="meta"), "labels": torch.ones(3, dtype=torch.long, device="meta")}
    assert get_task("classification").count_items(stage, batch).device.type == "meta"
    assert int(get_task("classification").count_items(stage, {"x": torch.ones(3, 4)})) == 3


def test_items_of_a_step_are_counted_wherever_its_batches_are(make_trainer: Callable[..., CurriculumTrainer]) -> None:
    trainer = make_trainer()
    batches = [token_batch("meta", mask=True), token_batch("meta"), token_batch("cpu", mask=True)]
    count = trainer._get_num_items_in_batch(batches, torch.device("meta"))
    assert count is not None
    assert count.device.type == "meta"
    trainer.transition.costs[0] = StageCost(1.0, 2.0, frozenset())
    assert trainer.floating_point_ops(batches[0]) == 36


class NoFloat64(TorchDispatchMode):
    """Refuses float64 off the CPU, as Apple's GPUs do."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.dtype == torch.float64 and value.device.type != "cpu":
                raise TypeError(f"{func} gives float64 on {value.device}")
        return result


@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"temperature": 2.0}])
def test_no_stage_needs_float64_or_a_tensor_on_the_cpu(settings: dict[str, Any]) -> None:
    with torch.device("meta"):
        student, teacher = (
            GPT2LMHeadModel(GPT2Config(n_layer=layers, n_embd=width, n_head=2, attn_implementation="eager"))
            for layers, width in ((2, 16), (4, 24))
        )
    source = LiveTargets(teacher)
    stages = (HIDDEN, FINAL, OUTPUT, OutputStage(1, label_weight=0.5))
    source.attach(Curriculum("extraction", stages, **settings), student)
    source.draw_maps()
    source.maps = [target_map.to("meta") for target_map in source.maps]
    objective = StageObjective(student, source)
    with NoFloat64():
        for index in range(len(stages)):
            batch = token_batch("meta", mask=True)  # without a mask transformers looks at values
            assert measure_stage(objective, index, batch).student_flops > 0
            objective.stage_index = index
            loss = objective(**batch, num_items=objective.count_items(batch))["loss"]
            assert loss.device.type == "meta"
            loss.backward()
        measured = source.task.measure(student, batch, source.output(batch), EvaluationTools())
    assert measured.device.type == "meta"
    assert {parameter.grad.device.type for parameter in student.parameters() if parameter.grad is not None} == {"meta"}


# Functions whose tensors are on the CPU where float64 begins.
ON_THE_CPU = {
    "shrunk_moment": "gets moments, which are on the CPU, and statistics made of them",
    "decoder": "draws and decomposes on the CPU",
    "planted_teacher": "a teacher of parities is made on the CPU",
    "summarize": "gets what `Task.evaluate` has moved to the CPU",
}


def test_float64_is_taken_on_the_cpu() -> None:
    """`.double()` on a tensor that may be on a device fails on Apple's GPUs: `.cpu().double()` does not."""
    root, found = Path(tutelage.__file__).parent, []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if not name.startswith("reproduction/"):
            found += [f"{name}:{line}" for line in doubles(ast.parse(path.read_text(encoding="utf-8")))]
    assert not found, f"take .cpu() before .double(): {found}"


def test_float64_on_a_device_is_found() -> None:
    source = "a.double()\na.cpu().double()\ndef summarize(parts):\n    parts.double()\ndef f(a):\n    a.sum().double()"
    assert list(doubles(ast.parse(source))) == [1, 6]


def doubles(tree: ast.AST) -> Iterator[int]:
    """Lines with a `.double()` that does not follow a `.cpu()`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef) and node.name in ON_THE_CPU:
            continue
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "double":
            before = node.func.value
            moved = (
                isinstance(before, ast.Call) and isinstance(before.func, ast.Attribute) and before.func.attr == "cpu"
            )
            if not moved:
                yield node.lineno
        yield from doubles(node)
