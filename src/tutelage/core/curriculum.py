"""Curricula: each distillation method is a list of stages.

Curriculum extraction is arXiv:2503.17494; progressive distillation and the experimental settings are arXiv:2410.05464."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from tutelage.core.blocks import FINAL, Place
from tutelage.core.errors import UserError
from tutelage.core.projection import KINDS
from tutelage.core.records import Record
from tutelage.core.residual import BASES

METHODS = ("extraction", "one_shot", "progressive", "scratch")
NORMALIZE = ("standardize", "none")
WARM_STARTS = ("none", "head", "embedding", "head+embedding")
STUDENT_INITS = ("random", "teacher")
RESIDUAL = "residual"  # the projection by the basis through which the student was initialised
PROJECTIONS = (*KINDS, RESIDUAL)

LayerMap = Sequence[tuple[Place, Place]]


@dataclass(frozen=True)
class Stage(Record, ABC):
    """One part of a curriculum: what the student matches, and for how many optimiser steps."""

    kind: ClassVar[str]  # name of the class in JSON
    continues = False  # whether the stage keeps the optimiser and the schedule of the stage before it
    steps: int  # optimiser steps

    @property
    @abstractmethod
    def name(self) -> str:
        """For logs and plots."""

    @property
    @abstractmethod
    def needs_teacher(self) -> bool:
        """Whether a step of this stage needs targets from the teacher."""

    @property
    def learning_rate(self) -> float | None:
        """Peak learning rate; None uses that of the run."""
        return None

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, **super().to_dict()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Any:
        values, kinds = dict(fields), {stage.kind: stage for stage in (HiddenStage, OutputStage)}
        kind = values.pop("kind")
        if kind not in kinds:
            raise UserError(f"a stage has the unknown kind {kind!r}: expected one of {', '.join(kinds)}")
        return kinds[kind](**values)


@dataclass(frozen=True)
class HiddenStage(Stage):
    """The student matches projected hidden states of the teacher."""

    kind = "hidden"
    needs_teacher = True
    student_place: Place  # the student's block (1-based) or `final`
    teacher_place: Place  # the teacher's block (1-based) or `final`
    learning_rate: float | None = None

    @property
    def name(self) -> str:
        return f"hidden {self.student_place}:{self.teacher_place}"


@dataclass(frozen=True)
class OutputStage(Stage):
    """The student matches the teacher's output, labels, or both."""

    kind = "output"
    teacher_checkpoint: str | None = None  # its folder, for progressive distillation; None is the final teacher
    label_weight: float = 0.0  # fraction of the loss that is label loss; 1 trains on labels alone, without a teacher
    learning_rate: float | None = None
    continues: bool = False  # keep optimiser and schedule of the output stage before: only the teacher changes

    @property
    def name(self) -> str:
        if not self.needs_teacher:
            return "labels"
        return f"output {self.teacher_checkpoint}" if self.teacher_checkpoint else "output"

    @property
    def needs_teacher(self) -> bool:
        return self.label_weight < 1


@dataclass(frozen=True)
class Curriculum(Record):
    """A method as data: its stages and the settings they share."""

    method: str  # name under which results are reported
    stages: tuple[Stage, ...]  # in training order
    projection: str = "gaussian"  # kind of projection in hidden stages: one of `PROJECTIONS`
    projection_seed: int = 0  # the random matrix of a stage is drawn from (seed, teacher place)
    normalize: str = "standardize"  # `standardize` the teacher's states before projecting, or `none` as in the paper
    warm_start: str = "none"  # the teacher's weights that the student starts with: one of `WARM_STARTS`; paper: none
    student_init: str = "random"  # weights that the student starts with: one of `STUDENT_INITS`; paper: random
    residual_basis: str | None = None  # one of `tutelage.core.residual.BASES`; None: identity of equal widths, else pca
    temperature: float = 1.0  # softmax temperature of the output loss
    top_k: int | None = None  # the output loss keeps the k most likely teacher outputs (`core.topk`); None keeps all

    def __post_init__(self) -> None:
        if not self.stages:
            raise UserError(f"a curriculum needs at least one stage (method {self.method!r} has none)")
        for number, stage in enumerate(self.stages, 1):
            _check_stage(number, stage, self.stages[number - 2] if number > 1 else None)
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
        if self.temperature <= 0:
            raise UserError(f"temperature must be positive, got {self.temperature}")
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
    def hidden_stages(self) -> list[HiddenStage]:
        return [stage for stage in self.stages if isinstance(stage, HiddenStage)]

    def places(self, side: str) -> list[Place]:
        """Places of the hidden stages in one of the models, `student` or `teacher`."""
        return [getattr(stage, f"{side}_place") for stage in self.hidden_stages]

    @property
    def transplant_stage(self) -> int | None:
        """Index of the stage after which the output head is transplanted, None without a head transplant; UserError if there
        should be such a stage, but there is none."""
        if "head" not in self.warm_start:
            return None
        for index, stage in enumerate(self.stages):
            if isinstance(stage, HiddenStage) and (stage.student_place, stage.teacher_place) == (FINAL, FINAL):
                return index
        found = f"warm_start={self.warm_start!r} needs a stage that pairs the places before the two output heads"
        raise UserError(f"{found}: end the layer map with final:final, e.g. layer_map='final:final'")


def _check_stage(number: int, stage: Stage, before: Stage | None) -> None:
    if stage.steps < 1:
        found = f"budget too small for the stages: stage {number} ({stage.name}) would get {stage.steps} steps"
        raise UserError(f"{found}; raise max_steps, or lower stage_fraction, stage_steps or num_stages")
    if stage.continues and not isinstance(before, OutputStage):
        raise UserError(f"stage {number} cannot continue the stage before it: both must be output stages")
    if isinstance(stage, OutputStage) and not 0 <= stage.label_weight <= 1:
        raise UserError(f"label_weight must be a fraction from 0 to 1, got {stage.label_weight}")


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
        settings: `projection`, `projection_seed`, `normalize`, `warm_start`, `temperature`, `top_k` of `Curriculum`."""
    pairs = layer_map
    if pairs is None or isinstance(pairs, int):
        pairs = uniform_layer_map(student_blocks, teacher_blocks, pairs)
    _check_layer_map(pairs, student_blocks, teacher_blocks)
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


def uniform_layer_map(student_blocks: int, teacher_blocks: int, num_stages: int | None = None) -> LayerMap:
    """Student block s_i with teacher block round(s_i * L_T / L_S), for `num_stages` evenly spaced s_i (default: all)."""
    if student_blocks > teacher_blocks:
        raise UserError(
            f"the student has {student_blocks} blocks, the teacher {teacher_blocks}: the uniform layer map needs a "
            "student that is not deeper. Give a layer_map such as '1:1,final:final', or a shallower student"
        )
    stages = student_blocks if num_stages is None else num_stages
    if not 1 <= stages <= student_blocks:
        raise UserError(f"num_stages must be from 1 to the student's {student_blocks} blocks, got {num_stages}")
    students = [round(i * student_blocks / stages) for i in range(1, stages + 1)]
    return [(s, round(s * teacher_blocks / student_blocks)) for s in students]


def parse_layer_map(text: str) -> list[tuple[Place, Place]]:
    """Parse `'1:2,2:4,final:final'` (student:teacher)."""

    def place(word: str) -> Place:
        word = word.strip()
        if word == "head":
            raise UserError(f"layer_map {text!r}: the place before the output head is called {FINAL!r}, not 'head'")
        if word != FINAL and not word.isdigit():
            raise UserError(f"layer_map {text!r}: {word!r} is neither a block number nor {FINAL!r}")
        return FINAL if word == FINAL else int(word)

    pairs: list[tuple[Place, Place]] = []
    for pair in text.split(","):
        student, colon, teacher = pair.partition(":")
        if not colon:
            raise UserError(f"layer_map {text!r}: {pair!r} is not a student:teacher pair such as 1:2")
        pairs.append((place(student), place(teacher)))
    return pairs


def _check_layer_map(pairs: LayerMap, student_blocks: int, teacher_blocks: int) -> None:
    if not pairs:
        raise UserError("layer_map is empty: give pairs such as '1:2,final:final', or None for the uniform map")
    for pair in pairs:
        for who, place, last in zip(("student", "teacher"), pair, (student_blocks, teacher_blocks), strict=True):
            if place != FINAL and not (isinstance(place, int) and 1 <= place <= last):
                raise UserError(f"layer_map: the {who} has blocks 1 to {last} and {FINAL!r}, not {place!r}")
    ranks = [[float("inf") if place == FINAL else int(place) for place in pair] for pair in pairs]
    if any(s1 <= s0 or t1 <= t0 for (s0, t0), (s1, t1) in itertools.pairwise(ranks)):
        shown = ",".join(f"{s}:{t}" for s, t in pairs)
        raise UserError(f"layer_map {shown} is not strictly increasing in both student and teacher")


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if (name, value) == ("projection", "head"):
        raise UserError("the projection 'head' is called 'logits': it keeps what the logits depend on")
    if value not in choices:
        raise UserError(f"unknown {name} {value!r}: use one of {', '.join(choices)}")
