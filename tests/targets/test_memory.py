"""States of the teacher that are kept on disk by their batch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import llama_config
from tests.targets.test_live import batch
from tutelage.core.blocks import FINAL
from tutelage.core.curriculum import Curriculum, extraction, joint, one_shot
from tutelage.targets.live import LiveTargets
from tutelage.targets.memory import OUTPUT, StateMemory
from tutelage.targets.source import StatisticsFile
from tutelage.training.costs import measure_stage
from tutelage.training.objective import StageObjective

CURRICULA = {
    "extraction": extraction(2, 4, 10, layer_map=[(1, 2), (FINAL, FINAL)], stage_steps=2),
    "joint": joint(2, 4, 10, layer_map=[(1, 2), (2, 4)]),
    "one_shot": one_shot(10),
    # its calibration reads the states of all places at once
    "residual": extraction(
        2, 4, 10, layer_map=[(1, 2), (2, 4)], stage_steps=2, projection="residual", student_init="teacher"
    ),
}


def attached(folder: Path, curriculum: Curriculum, memory: StateMemory | None) -> LiveTargets:
    """A source whose targets are ready."""
    source = LiveTargets(AutoModelForCausalLM.from_pretrained(folder), memory=memory)
    student = AutoModelForCausalLM.from_config(llama_config(num_hidden_layers=2))
    source.attach(curriculum, student)
    source.start(student, lambda: [batch(seed=1)])
    source.prepare(StatisticsFile(folder / "none", read=False, write=False), lambda: [batch(seed=1)], "cpu")
    return source


def targets(source: LiveTargets, curriculum: Curriculum, rows: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """All tensors that the stages of a curriculum compare with."""
    found: list[Any] = []
    for index, stage in enumerate(curriculum.stages):
        if stage.output is None:
            found += source.hidden(index, rows)
        elif stage.pairs:
            hidden, output = source.joint(index, rows)
            found += [tensor for pair in hidden for tensor in pair] + [output.state]
        else:
            found.append(source.output(rows).state)
    return found


@pytest.mark.parametrize("method", CURRICULA)
def test_remembered_targets_are_those_of_the_teacher_which_runs_once(
    method: str, causal_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    curriculum, memory = CURRICULA[method], StateMemory(tmp_path)
    live, keeping = (attached(causal_teacher, curriculum, each) for each in (None, memory))
    expected = targets(live, curriculum, batch())
    assert all(map(torch.equal, targets(keeping, curriculum, batch()), expected))
    monkeypatch.setattr(type(keeping.model), "forward", None)  # another forward of the teacher would fail
    monkeypatch.setattr(type(keeping.backbone), "forward", None)
    assert all(map(torch.equal, targets(keeping, curriculum, batch()), expected))
    with pytest.raises(TypeError):
        targets(keeping, curriculum, batch(seed=5))  # a batch that was not seen


def test_a_batch_is_known_by_its_tokens_and_its_mask_and_not_by_its_labels(tmp_path: Path) -> None:
    memory, runs = StateMemory(tmp_path), []

    def recall(rows: dict[str, torch.Tensor], name: str = "1") -> None:
        memory.recall(name, rows, lambda: runs.append(name) or torch.zeros(1))  # type: ignore[func-returns-value]

    rows = batch()
    for _ in range(2):
        recall(rows)
        recall({**rows, "labels": rows["input_ids"]})
    assert len(runs) == 1
    recall(rows, "2")
    recall({**rows, "attention_mask": torch.ones_like(rows["attention_mask"])})
    recall({**rows, "input_ids": rows["input_ids"] + 1})
    assert len(runs) == 4


def test_a_state_that_was_not_written_whole_is_computed_again(tmp_path: Path) -> None:
    memory, state = StateMemory(tmp_path), torch.arange(6.0)
    memory.recall("1", batch(), lambda: state)
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-5])
    assert torch.equal(memory.recall("1", batch(), lambda: state + 1), state + 1)
    assert torch.equal(memory.recall("1", batch(), lambda: state), state + 1)


def test_states_that_were_kept_calibrate_a_second_run(causal_teacher: Path, tmp_path: Path) -> None:
    curriculum, memory = CURRICULA["residual"], StateMemory(tmp_path)
    first, second = (attached(causal_teacher, curriculum, memory) for _ in range(2))
    for mine, other in zip(targets(first, curriculum, batch()), targets(second, curriculum, batch()), strict=True):
        assert torch.equal(mine, other)


def test_nothing_is_kept_where_the_disk_is_nearly_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, state, usage = StateMemory(tmp_path / "m"), torch.arange(6.0), shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=2**30))
    for extra in (0, 1):  # computed each time
        assert torch.equal(memory.recall("1", batch(), lambda more=extra: state + more), state + extra)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_checkpoint_of_the_teacher_has_states_of_its_own(causal_teacher: Path, tmp_path: Path) -> None:
    source = attached(causal_teacher, CURRICULA["one_shot"], StateMemory(tmp_path / "memory"))
    before = source.output(batch()).state
    changed = AutoModelForCausalLM.from_pretrained(causal_teacher)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(1.5)
    changed.save_pretrained(tmp_path / "at-640")
    source.use_checkpoint(str(tmp_path / "at-640"))
    assert not torch.allclose(source.output(batch()).state, before)
    source.use_checkpoint(None)
    assert torch.equal(source.output(batch()).state, before)


@pytest.mark.parametrize("method", CURRICULA)
def test_flops_are_counted_as_if_the_teacher_ran(method: str, causal_teacher: Path, tmp_path: Path) -> None:
    curriculum, costs = CURRICULA[method], []
    for memory in (None, StateMemory(tmp_path), StateMemory(tmp_path)):  # none, one that is empty, one that has all
        source = attached(causal_teacher, curriculum, memory)
        objective = StageObjective(AutoModelForCausalLM.from_config(llama_config(num_hidden_layers=2)), source)
        rows = {**batch(), "labels": batch()["input_ids"]}
        costs.append([measure_stage(objective, index, rows) for index in range(len(curriculum.stages))])
        targets(source, curriculum, rows)
        assert source.memory is memory  # it is back in its place
    assert costs[0] == costs[1] == costs[2]
    assert all(cost.teacher_flops > 0 for cost in costs[0])


def test_a_memory_may_keep_outputs_alone(causal_teacher: Path, tmp_path: Path) -> None:
    memory, curriculum = StateMemory(tmp_path, (OUTPUT,)), CURRICULA["extraction"]
    live, keeping = (attached(causal_teacher, curriculum, each) for each in (None, memory))
    for _ in range(2):
        assert all(map(torch.equal, targets(keeping, curriculum, batch()), targets(live, curriculum, batch())))
    assert [folder.name for folder in (tmp_path / "finished").iterdir()] == [OUTPUT]
    both = CURRICULA["joint"]  # hidden states and output come from one forward
    live, keeping = (
        attached(causal_teacher, both, each) for each in (None, StateMemory(tmp_path / "joint", (OUTPUT,)))
    )
    for _ in range(2):
        assert all(map(torch.equal, targets(keeping, both, batch()), targets(live, both, batch())))
