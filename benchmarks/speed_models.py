"""Models, batches and training steps that the benchmarks of speed and memory share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tutelage.core.curriculum import Curriculum, extraction
from tutelage.targets.live import LiveTargets
from tutelage.targets.source import StatisticsFile
from tutelage.tasks.language import CausalCollator
from tutelage.tasks.registry import get_task
from tutelage.training.feed import StageFeed
from tutelage.training.objective import StageObjective
from tutelage.training.transition import StageTransition

LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Sizes:
    """What is measured, and how often."""

    teacher_blocks: int = 12
    student_blocks: int = 6
    teacher_width: int = 256
    student_width: int = 128
    vocabulary: int = 32_000
    batch: int = 8
    length: int = 128
    stage_rounds: int = 20
    one_shot_rounds: int = 10
    trainer_steps: int = 100
    compiled_stages: tuple[int, ...] = (0, 2)
    loss_vocabulary: int = 150_000
    loss_positions: int = 2048
    loss_width: int = 256


QUICK = Sizes(4, 2, 64, 32, 1000, 2, 32, 3, 2, 10, (0,), 20_000, 1024, 64)


def llama(sizes: Sizes, blocks: int, width: int, seed: int) -> LlamaForCausalLM:
    """A Llama with random weights and untied embeddings."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2 * sizes.length,
    )
    return LlamaForCausalLM(config)


def token_rows(sizes: Sizes, count: int) -> list[dict[str, list[int]]]:
    """Blocks of random tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, sizes.vocabulary, (count * sizes.batch, sizes.length), generator=generator).tolist()
    return [{"input_ids": row} for row in ids]


def token_batch(sizes: Sizes) -> dict[str, torch.Tensor]:
    """One batch of random tokens."""
    return CausalCollator()(token_rows(sizes, 1))


def optimizer_of(module: nn.Module) -> torch.optim.Optimizer:
    """transformers' default optimiser, over the parameters that train."""
    return torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=LEARNING_RATE, fused=True)


def step_of(loss: Callable[[], torch.Tensor], optimizer: torch.optim.Optimizer) -> Callable[[], float]:
    """One training step that tells its loss."""

    def step() -> float:
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(value.detach())

    return step


def make_objective(sizes: Sizes, curriculum: Curriculum | None = None) -> tuple[StageObjective, StageTransition]:
    """Objective and transition of a curriculum (the pair's extraction), with views and calibrated, as the trainer does it."""
    student = llama(sizes, sizes.student_blocks, sizes.student_width, seed=1)
    teacher = llama(sizes, sizes.teacher_blocks, sizes.teacher_width, seed=2)
    source = LiveTargets(teacher, get_task("causal_lm"))
    curriculum = curriculum or extraction(sizes.student_blocks, sizes.teacher_blocks, steps=20 * sizes.student_blocks)
    source.attach(curriculum, student)
    objective, batch = StageObjective(student.train(), source), token_batch(sizes)
    transition = StageTransition(objective)
    transition.make_views(one_row(objective, batch))
    source.prepare(StatisticsFile(Path("unused"), read=False, write=False), lambda: [batch], "cpu")
    return objective, transition


def one_row(objective: StageObjective, batch: dict[str, Any]) -> StageFeed:
    """The first row of a batch, as the feed of every stage."""
    row = {name: value[:1] for name, value in batch.items()}
    return StageFeed(objective.source, [row], lambda rows: rows[0], samples=1, batch_size=1)


def enter(objective: StageObjective, transition: StageTransition, index: int, batch: dict[str, Any]) -> None:
    """Put everything in the state of stage `index`."""
    transition.enter(index, True, one_row(objective, batch))
    transition.set_trainable(transition.trainable)
    objective.zero_grad()


def tutelage_step(objective: StageObjective, batch: dict[str, Any], compiles: bool = False) -> Callable[[], float]:
    """What the trainer runs in the current stage."""
    run = torch.compile(objective) if compiles else objective
    return step_of(lambda: run(**batch)["loss"], optimizer_of(objective.student))
