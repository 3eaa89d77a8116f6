"""A student that is sharded over two processes (FSDP2) ends with the parameters that one process gives it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard

from tests.launch import launch
from tests.training.conftest import llama, token_rows
from tutelage.core.curriculum import Curriculum, HiddenStage, OutputStage
from tutelage.targets.live import LiveTargets
from tutelage.targets.source import StatisticsFile
from tutelage.tasks.language import CausalCollator
from tutelage.training.feed import StageFeed
from tutelage.training.objective import StageObjective
from tutelage.training.sharding import whole_parameters
from tutelage.training.transition import StageTransition

STAGES = (
    HiddenStage(steps=2, student_place=1, teacher_place=2),  # block 2 and the head are frozen
    HiddenStage(steps=2, student_place="final", teacher_place="final"),
    OutputStage(steps=3),  # begins with a transplanted head
)
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def curriculum() -> Curriculum:
    return Curriculum("extraction", STAGES, warm_start="head")


def train(folder: Path, first: int, last: int, tied: bool) -> None:
    """Steps `first` to `last` of a curriculum, from the files of step `first` to those of step `last`."""
    rank, processes = 0, 1
    if torch.distributed.is_torchelastic_launched() or "RANK" in __import__("os").environ:
        torch.distributed.init_process_group("gloo")
        rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    student, collate, rows = llama(2, 16, seed=2, tie_word_embeddings=tied), CausalCollator(), token_rows(ragged=True)
    source = LiveTargets(llama(4, 24, seed=1))
    source.attach(curriculum(), student)
    if first:
        student.load_state_dict(torch.load(folder / f"student-{first}.pt"))
    objective = StageObjective(student, source)
    transition = StageTransition(objective)
    feed = StageFeed(source, rows, collate, samples=8, batch_size=4)
    transition.make_views(feed)
    source.prepare(StatisticsFile(folder / "statistics.safetensors", bool(first), rank == 0), feed.calibration, "cpu")
    for index in range(len(STAGES)):
        transition.measure(index, feed)
    index, local = curriculum().stage_at(first)
    transition.enter(index, local == 0, feed)
    transition.set_trainable(transition.all)
    if processes > 1:
        for block in range(1, 3):
            fully_shard(objective.blocks.module(student, block))
        fully_shard(objective)
    optimizer: Any = None
    for step in range(first, last):
        index, local = curriculum().stage_at(step)
        if index != transition.entered:
            transition.enter(index, True, feed)
        if local == 0 or optimizer is None:
            transition.set_trainable(transition.trainable)
            optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=1e-2, eps=1e-3)
            if local > 0:
                state = torch.load(folder / f"optimizer-{first}.pt")
                set_optimizer_state_dict(student, optimizer, state, options=WHOLE)
        batch = collate([rows[index] for index in range(4 * step, 4 * step + 4)])
        items = objective.count_items(batch)
        mine = {name: value[rank::processes] for name, value in batch.items()}
        (objective(num_items=items, **mine)["loss"] * processes).backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    state = get_optimizer_state_dict(student, optimizer, options=WHOLE)
    whole = get_model_state_dict(student, options=WHOLE)
    with whole_parameters(student):
        if rank == 0:
            student.save_pretrained(folder)
            torch.save(whole, folder / f"student-{last}.pt")
            torch.save(state, folder / f"optimizer-{last}.pt")
    if processes > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def trained(folder: Path, processes: int, *, tied: bool = False, stop: int | None = None) -> dict[str, torch.Tensor]:
    folder.mkdir()
    steps = [0, 7] if stop is None else [0, stop, 7]
    for first, last in zip(steps[:-1], steps[1:], strict=True):
        launch(processes, train, folder, first, last, tied)
    return load_file(folder / "model.safetensors")


def test_a(tmp_path: Path) -> None:
    one, two = trained(tmp_path / "one", 1), trained(tmp_path / "two", 2)
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
