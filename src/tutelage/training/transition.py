"""Changing from one stage to the next: teacher weights, warm start, and the parameters that train."""

import dataclasses
from collections.abc import Collection
from typing import Any

import torch

from tutelage.core.blocks import FINAL
from tutelage.core.errors import UserError
from tutelage.core.inputs import batch_positions
from tutelage.core.stages import HiddenStage, OutputStage
from tutelage.targets.source import StatisticsFile
from tutelage.tasks.students import WEIGHTS
from tutelage.training import warm_start
from tutelage.training.costs import StageCost, measure_stage, measure_states
from tutelage.training.feed import StageFeed
from tutelage.training.objective import StageObjective


class StageTransition:
    """Puts objective, student and teacher in the state that a stage needs.

    The parameters of the student that require gradients when this is made are those that may train."""

    def __init__(self, objective: StageObjective):
        self.objective = objective
        self.all = frozenset(name for name, p in objective.student.named_parameters() if p.requires_grad)
        self.trainable: frozenset[str] = self.all  # parameters that train in the current stage
        self.costs: dict[int, StageCost] = {}  # measured cost of the stages entered so far, by index
        self.full_costs: dict[int, StageCost] = {}  # the same where everything that the stage reaches trains
        self.started = False  # whether this training gave the student its first weights
        self.entered: int | None = None  # index of the current stage; None before training
        # the stage from which a head was transplanted on entering the current one, and the positions compared for it
        self.transplanted: tuple[int, int] | None = None

    def enter(self, index: int, fresh: bool, feed: StageFeed) -> None:
        """Make stage `index` the current one; `fresh` is at its first step, where a warm start applies (not on resuming)."""
        objective, stages = self.objective, self.objective.curriculum.stages
        self.transplanted = None
        if fresh:
            if index == 0:
                warm_start.apply_before_training(objective)
            elif stages[index].output is not None and stages[index - 1].output is None:
                self.transplanted = warm_start.apply_before_output(objective, feed.calibration)
        stage = stages[index]
        objective.source.use_checkpoint(stage.teacher_checkpoint if isinstance(stage, OutputStage) else None)
        objective.stage_index = index
        self.set_trainable(self.all)
        self.measure(index, feed)
        self.trainable = self._parameters(index)
        self.entered = index

    def make_views(self, feed: StageFeed) -> None:
        """Let student and teacher run without hooks in every stage, where the models allow it."""
        objective = self.objective
        objective.student.train()
        for index, stage in enumerate(objective.curriculum.stages):
            # masks are drawn for this batch: those of the training must not depend on the number of stages
            with torch.random.fork_rng(devices=[]):
                batch = feed.example(index)
            place = stage.student_place if isinstance(stage, HiddenStage) else FINAL
            objective.task.make_view(objective.student, place, batch, objective.blocks)
            objective.source.make_view(index, batch)

    def prepare(self, file: StatisticsFile, feed: StageFeed, device: Any, fresh: bool) -> None:
        """Views, the student's first weights (in a `fresh` run; they are given once), and the target maps."""
        self.objective.source.use_checkpoint(None)  # an earlier training may have left one in the teacher's place
        self.make_views(feed)
        self.started = fresh and self.objective.source.started is None
        if self.started:
            self.objective.source.start(self.objective.student, feed.calibration)
        self.objective.student.__dict__[WEIGHTS] = "own"  # for whoever trains it next
        self.objective.source.prepare(file, feed.calibration, device)

    def measure(self, index: int, feed: StageFeed) -> StageCost:
        """Cost and reach of a stage, measured once, while `all` train; UserError where none would train in it."""
        if index not in self.costs:
            self.objective.student.train()
            batch, before = feed.example(index), self._stage_before(index)
            self.full_costs[index] = self.costs[index] = measure_stage(self.objective, index, batch)
            if before is not None:
                self.measure(before, feed)
                self.set_trainable(self._parameters(index))
                cost = measure_stage(self.objective, index, batch)
                self.costs[index] = dataclasses.replace(cost, reached=self.full_costs[index].reached)
                self.set_trainable(self.all)
        return self.costs[index]

    def measure_all(self, feed: StageFeed) -> list[StageCost]:
        """Cost and reach of every stage; errors as in `measure`."""
        return [self.measure(index, feed) for index in range(len(self.objective.curriculum.stages))]

    def setup_flops(self, feed: StageFeed, begins: bool) -> tuple[float, float]:
        """FLOPs of student and teacher before the first step of the current stage: the passes that initialise the student and
        calibrate, where training `begins`, and the pass that compares states and targets before a head is transplanted."""
        student = teacher = 0.0
        if begins:
            stages = range(len(self.objective.curriculum.stages))
            teacher += self._start_flops(feed) + sum(self._calibration_flops(index, feed) for index in stages)
            teacher += self._transplant_flops(feed)
        if self.transplanted is not None:
            index, positions = self.transplanted
            self.measure(index, feed)
            cost = self.full_costs[index]
            teacher += cost.teacher_flops * positions
            student += cost.student_flops * positions / 3  # a forward alone: the backward is two thirds
        return student, teacher

    def _start_flops(self, feed: StageFeed) -> float:
        """FLOPs of the teacher in the passes that initialised the student, which every process makes."""
        source = self.objective.source
        if not self.started or source.started is None:
            return 0.0
        depths = [HiddenStage(1, 1, blocks) for blocks in source.started.passes]
        positions = sum(map(batch_positions, feed.calibration())) * warm_start.group_of(self.objective).size
        return positions * sum(measure_states(source, depth, feed.example(0)) for depth in depths)

    def _calibration_flops(self, index: int, feed: StageFeed) -> float:
        """FLOPs of the teacher in the calibration of a stage."""
        source, total = self.objective.source, 0.0
        stage = source.stage(index)
        for number, pair in zip(source.pair_numbers[index], stage.pairs, strict=True):
            if (positions := source.calibrated.get(number, 0)) == 0:
                continue
            if stage.output is None:  # a step of the stage runs the teacher as far as its calibration did
                total += self.measure(index, feed).teacher_flops * positions
            else:
                total += measure_states(source, pair, feed.example(index)) * positions
        return total

    def _transplant_flops(self, feed: StageFeed) -> float:
        """FLOPs of the teacher in the calibration for a head transplant that no stage comes before."""
        source, curriculum = self.objective.source, self.objective.curriculum
        numbered = list(enumerate(curriculum.calibrated_pairs))[len(curriculum.hidden_stages) :]
        found = ((pair, source.calibrated.get(number, 0)) for number, pair in numbered)
        return sum(measure_states(source, pair, feed.example(0)) * count for pair, count in found if count)

    def set_trainable(self, names: Collection[str]) -> None:
        """Let exactly `names` require gradients."""
        for name, parameter in self.objective.student.named_parameters():
            parameter.requires_grad_(name in names)

    def _parameters(self, index: int) -> frozenset[str]:
        """Parameters that train in a stage: those it reaches, less a tied head that must not move, and less those that the
        hidden stage before it reaches too where each trains what is new.

        Inside the blocks the block number decides: a part that one example leaves out (an expert) may serve another."""
        objective = self.objective
        student, stage, blocks = objective.student, objective.curriculum.stages[index], objective.blocks
        backbone = objective.task.backbone(student)
        prefix = next((f"{name}." for name, module in student.named_modules() if module is backbone and name), "")
        before, depth = self._stage_before(index), self._depth(index)
        start, earlier = (0, frozenset()) if before is None else (self._depth(before), self.costs[before].reached)
        frozen: set[str] = set()
        if isinstance(stage, HiddenStage) and warm_start.keeps_embedding_fixed(objective.curriculum, student):
            embedding = student.get_input_embeddings().weight  # type: ignore[operator]
            frozen = {name for name, parameter in student.named_parameters() if parameter is embedding}

        def reached(name: str) -> bool:
            for number, block in enumerate(blocks.names, 1):
                if name.startswith(f"{prefix}{block}."):
                    return start < number <= depth
            return name in self.costs[index].reached - earlier

        names = frozenset(name for name in self.all if reached(name) and name not in frozen)
        if before is not None and not names:
            found = (
                f"stage {index + 1} ({stage.name}) would train nothing: the stage before it trains all that it reaches"
            )
            raise UserError(f"{found}. Leave this stage out of layer_map, or use stage_trains='up_to'")
        return names

    def _stage_before(self, index: int) -> int | None:
        """The hidden stage before this one, whose parameters do not train in it; None where there is none."""
        curriculum = self.objective.curriculum
        if curriculum.stage_trains == "up_to" or not isinstance(curriculum.stages[index], HiddenStage):
            return None
        hidden = (number for number in reversed(range(index)) if isinstance(curriculum.stages[number], HiddenStage))
        return next(hidden, None)

    def _depth(self, index: int) -> int:
        """Blocks of the student that a stage runs."""
        place = getattr(self.objective.curriculum.stages[index], "student_place", FINAL)
        return place if isinstance(place, int) else len(self.objective.blocks)
