"""Curricula: each distillation method is a list of stages.

Curriculum extraction is arXiv:2503.17494; progressive distillation and the experimental settings are arXiv:2410.05464."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tutelage.core.blocks import FINAL, Place
from tutelage.core.errors import UserError
from tutelage.core.projection import KINDS, LEARNED
from tutelage.core.records import Record
from tutelage.core.residual import BASES
from tutelage.core.stages import HiddenStage, JointStage, LayerMap, OutputStage, Stage, check_stage, fitting_layer_map

METHODS = ("extraction", "joint", "one_shot", "progressive", "scratch")
NORMALIZE = ("standardize", "none")
WARM_STARTS = ("none", "head", "embedding", "head+embedding")
STUDENT_INITS = ("random", "teacher")
RESIDUAL = "residual"  # the projection by the basis through which the student was initialised
PROJECTIONS = (*KINDS, RESIDUAL, LEARNED)
STAGE_TRAINS = ("up_to", "new")
OUTPUT_LOSSES = ("kl", "mse")
OUTPUT_POSITIONS = ("labelled", "all")


@dataclass(frozen=True)
class Curriculum(Record):
    """A method as data: its stages and the settings they share."""

    method: str  # name under which results are reported
    stages: tuple[Stage, ...]  # in training order
    projection: str = "gaussian"  # kind of projection in hidden stages: one of `PROJECTIONS`
    projection_seed: int = 0  # random matrices, and first weights of learned ones, are drawn from (seed, teacher place)
    normalize: str = "standardize"  # `standardize` the teacher's states before projecting, or `none` as in the paper
    warm_start: str = "none"  # the teacher's weights that the student starts with: one of `WARM_STARTS`; paper: none
    student_init: str = "random"  # weights that the student starts with: one of `STUDENT_INITS`; paper: random
    residual_basis: str | None = None  # one of `tutelage.core.residual.BASES`; None: identity of equal widths, else pca
    start_blocks: tuple[int, ...] | None = None  # the teacher's block that each starts from; None: by the hidden stages
    output_loss: str = "kl"  # how logits are compared: one of `OUTPUT_LOSSES`; paper: kl
    output_positions: str = "labelled"  # where masked models' outputs are compared: one of `OUTPUT_POSITIONS`
    temperature: float = 1.0  # softmax temperature of the output loss
    top_k: int | None = None  # the output loss keeps the k most likely teacher outputs (`core.topk`); None keeps all
    stage_trains: str = "up_to"  # hidden stages train all `up_to` their place, or what is `new` since the stage before

    def __post_init__(self) -> None:
        if not self.stages:
            raise UserError(f"a curriculum needs at least one stage (method {self.method!r} has none)")
        for number, stage in enumerate(self.stages, 1):
            check_stage(number, stage, self.stages[number - 2] if number > 1 else None)
        _check_choice("projection", self.projection, PROJECTIONS)
        _check_choice("student_init", self.student_init, STUDENT_INITS)
        if self.residual_basis is not None:
            _check_choice("residual_basis", self.residual_basis, BASES)
        if self.projection == RESIDUAL and self.student_init != "teacher":
            raise UserError(
                "projection='residual' needs a student that was initialised through it: student_init='teacher'"
            )
        _check_choice("normalize", self.normalize, NORMALIZE)
        _check_choice("warm_start", self.warm_start, WARM_STARTS)
        given_first = self.student_init == "teacher" and not self._has_stages
        if (self.projection == RESIDUAL or given_first) and self.warm_start != "none":
            found = (
                f"warm_start={self.warm_start!r} would write over weights that student_init='teacher' gave the student"
            )
            raise UserError(f"{found}: use warm_start='none', or student_init='random'")
        if self.projection == LEARNED and "head" in self.warm_start:
            found = (
                f"warm_start={self.warm_start!r} needs a student that learns a fixed projection of the teacher's state"
            )
            raise UserError(f"{found}, which projection='learned' is not: use warm_start='none', or another projection")
        _check_choice("stage_trains", self.stage_trains, STAGE_TRAINS)
        _check_choice("output_loss", self.output_loss, OUTPUT_LOSSES)
        _check_choice("output_positions", self.output_positions, OUTPUT_POSITIONS)
        outputs = [stage.output for stage in self.stages if stage.output is not None]
        if self.output_positions == "all" and any(stage.label_weight > 0 for stage in outputs):
            found = "output_positions='all' compares outputs at positions without a label, where there is no label loss"
            raise UserError(f"{found}: use label_weight=0, or output_positions='labelled'")
        if self.temperature <= 0:
            raise UserError(f"temperature must be positive, got {self.temperature}")
        if self.output_loss == "mse" and self.temperature != 1:
            found = (
                f"output_loss='mse' compares logits without a softmax, so it has no temperature ({self.temperature:g})"
            )
            raise UserError(f"{found}: leave temperature out, or use output_loss='kl'")
        if self.output_loss == "mse" and self.top_k is not None:
            found = f"output_loss='mse' compares all logits, but top_k={self.top_k} keeps the most likely outputs"
            raise UserError(f"{found}: leave top_k out, or use output_loss='kl'")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k must be at least 1 output, got {self.top_k}")

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> tuple[int, int]:
        """Index of the stage that optimiser step `step` (0-based) belongs to, and the step within that stage."""
        for index, stage in enumerate(self.stages):
            if step < stage.steps:
                return index, step
            step -= stage.steps
        return len(self.stages) - 1, self.stages[-1].steps + step

    def schedule_steps(self, index: int) -> int:
        """Steps of the learning-rate schedule that begins with stage `index`: its own and those that continue it."""
        later = itertools.takewhile(lambda stage: stage.continues, self.stages[index + 1 :])
        return self.stages[index].steps + sum(stage.steps for stage in later)

    @property
    def starts_there(self) -> bool:
        """Whether any weight of the student comes from the teacher."""
        return self.warm_start != "none" or self.student_init == "teacher"

    @property
    def start_pairs(self) -> list[tuple[Place, Place]]:
        """Pairs of blocks, the student's with the teacher's, by which a student starts from its teacher."""
        if self.start_blocks is not None:
            return list(enumerate(self.start_blocks, 1))
        return [(stage.student_place, stage.teacher_place) for stage in self.hidden_stages]

    @property
    def hidden_stages(self) -> list[HiddenStage]:
        """The pairs of places of all stages, in order; a target map belongs to each."""
        return [pair for stage in self.stages for pair in stage.pairs]

    @property
    def pair_numbers(self) -> list[list[int]]:
        """For each stage, where its pairs are in `hidden_stages`."""
        count = itertools.count()
        return [[next(count) for _ in stage.pairs] for stage in self.stages]

    def places(self, side: str) -> list[Place]:
        """Places of the calibrated pairs in one of the models, `student` or `teacher`."""
        return [getattr(pair, f"{side}_place") for pair in self.calibrated_pairs]

    @property
    def _has_stages(self) -> bool:
        return any(isinstance(stage, HiddenStage) for stage in self.stages)

    @property
    def transplants(self) -> bool:
        """Whether the output head starts as the teacher's."""
        return "head" in self.warm_start

    @property
    def calibrated_pairs(self) -> list[HiddenStage]:
        """The pairs of places that have a target map: the `hidden_stages`, and after them the places before the output heads
        where a head is transplanted although no stage matches them."""
        pairs = self.hidden_stages
        first = self.transplants and not self._has_stages
        return [*pairs, HiddenStage(1, FINAL, FINAL)] if first and not any(map(_is_final, pairs)) else pairs

    @property
    def transplant_pair(self) -> int | None:
        """Which of the `calibrated_pairs` a head is transplanted through, None without a head transplant; UserError as in
        `transplant_stage`."""
        if not self.transplants:
            return None
        if (index := self.transplant_stage) is not None:
            return self.pair_numbers[index][0]
        return next(number for number, pair in enumerate(self.calibrated_pairs) if _is_final(pair))

    @property
    def transplant_stage(self) -> int | None:
        """Index of the hidden stage after which the output head is transplanted; None without a head transplant, and without
        hidden stages, where it comes before the first step. UserError for hidden stages that leave `final` out."""
        if not self.transplants or not self._has_stages:
            return None
        for index, stage in enumerate(self.stages):
            if isinstance(stage, HiddenStage) and _is_final(stage):
                return index
        found = f"warm_start={self.warm_start!r} needs a stage that pairs the places before the two output heads"
        raise UserError(f"{found}: end the layer map with final:final, e.g. layer_map='final:final'")


def extraction(
    student_blocks: int,
    teacher_blocks: int,
    steps: int,
    *,
    layer_map: LayerMap | int | None = None,
    stage_steps: float | int | Sequence[int] = 0.5,
    stage_learning_rate: float | None = None,
    label_weight: float = 0.0,
    **settings: Any,
) -> Curriculum:
    """Curriculum extraction (arXiv:2503.17494): projected hidden layers, shallow to deep, then the output.

    Args:
        steps: optimiser steps of all stages; UserError if they are too few.
        layer_map: pairs (student place, teacher place), both strictly increasing; or the number of hidden stages of the
            uniform map; None gives one hidden stage per student block.
        stage_steps: steps of every hidden stage (a whole number) or of each (a list); a number below 1 is the fraction of
            `steps` that the hidden stages get together, split evenly.
        stage_learning_rate: peak learning rate of the hidden stages; None uses that of the run.
        label_weight: fraction of label loss in the output stage.
        settings: `projection`, `projection_seed`, `normalize`, `warm_start`, `student_init`, `residual_basis`, `start_blocks`,
            `output_loss`, `output_positions`, `temperature`, `top_k`, `stage_trains` of `Curriculum`."""
    pairs = fitting_layer_map(layer_map, student_blocks, teacher_blocks)
    counts = _hidden_steps(stage_steps, len(pairs), steps)
    hidden = [HiddenStage(count, *places, stage_learning_rate) for count, places in zip(counts, pairs, strict=True)]
    output = OutputStage(steps - sum(counts), label_weight=label_weight)
    return Curriculum("extraction", (*hidden, output), **settings)


def _hidden_steps(stage_steps: float | int | Sequence[int], stages: int, steps: int) -> list[int]:
    if isinstance(stage_steps, Sequence):
        if len(stage_steps) != stages:
            raise UserError(
                f"stage_steps has {len(stage_steps)} entries for {stages} hidden stages: give one per stage"
            )
        return list(stage_steps)
    if isinstance(stage_steps, int):
        return [stage_steps] * stages
    if not 0 < stage_steps < 1:
        raise UserError(f"stage_fraction must be a fraction between 0 and 1, got {stage_steps}")
    counts = [round(steps * stage_steps) // stages] * stages
    counts[-1] += round(steps * stage_steps) - sum(counts)
    return counts


def joint(
    student_blocks: int,
    teacher_blocks: int,
    steps: int,
    *,
    layer_map: LayerMap | int | None = None,
    hidden_weight: float = 3.0,
    label_weight: float = 0.0,
    **settings: Any,
) -> Curriculum:
    """Projected hidden layers and the output together, from the first step to the last.

    Args:
        layer_map, settings: as in `extraction`; a head transplant (`warm_start`) comes before the first step.
        hidden_weight: weight of the mean of the hidden losses; the output loss has weight 1.
        label_weight: fraction of label loss in the output loss."""
    pairs = fitting_layer_map(layer_map, student_blocks, teacher_blocks)
    stage = JointStage(steps, pairs, hidden_weight=hidden_weight, label_weight=label_weight)
    return Curriculum("joint", (stage,), **settings)


def one_shot(steps: int, *, label_weight: float = 0.0, **settings: Any) -> Curriculum:
    """Plain distillation on the output of the final teacher."""
    return Curriculum("one_shot", (OutputStage(steps, label_weight=label_weight),), **settings)


def progressive(steps: int, checkpoints: Sequence[str], *, label_weight: float = 0.0, **settings: Any) -> Curriculum:
    """Progressive distillation (arXiv:2410.05464): the teacher's intermediate checkpoints (folders, early to late), then the
    final teacher; `steps` are the optimiser steps of all, split evenly. One optimiser and one schedule go through all of it."""
    if not checkpoints:
        found = "progressive distillation needs the teacher's intermediate checkpoints: pass teacher_checkpoints"
        raise UserError(f"{found}, or use method='extraction', which needs only the final teacher")
    teachers: list[str | None] = [*checkpoints, None]
    each = steps // len(teachers)
    counts = [each] * len(checkpoints) + [steps - each * len(checkpoints)]
    stages = [
        OutputStage(*pair, label_weight=label_weight, continues=index > 0)
        for index, pair in enumerate(zip(counts, teachers, strict=True))
    ]
    return Curriculum("progressive", tuple(stages), **settings)


def scratch(steps: int, **settings: Any) -> Curriculum:
    """Training on labels alone, without a teacher."""
    return Curriculum("scratch", (OutputStage(steps, label_weight=1.0),), **settings)


def _is_final(pair: HiddenStage) -> bool:
    return (pair.student_place, pair.teacher_place) == (FINAL, FINAL)


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if (name, value) == ("projection", "head"):
        raise UserError("the projection 'head' is called 'logits': it keeps what the logits depend on")
    if value not in choices:
        raise UserError(f"unknown {name} {value!r}: use one of {', '.join(choices)}")
