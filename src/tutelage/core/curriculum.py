"""Curricula: every method is a list of stages.

Public names: `Stage`, `Curriculum`, `extraction`, `one_shot`, `progressive`, `scratch`, `uniform_layer_map`,
`parse_layer_map`, `METHODS`, `WARM_STARTS`.

Curriculum extraction is arXiv:2503.17494; progressive distillation and the experimental settings are arXiv:2410.05464.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tutelage.core.blocks import HEAD, Place
from tutelage.core.projection import KINDS

METHODS = ("extraction", "one_shot", "progressive", "scratch")
NORMALIZE = ("standardize", "none")
WARM_STARTS = ("none", "head", "embedding", "head+embedding")

LayerMap = Sequence[tuple[Place, Place]]


@dataclass(frozen=True)
class Stage:
    """One part of a curriculum: what the student matches, and for how many optimiser steps."""

    kind: str
    """`hidden` (match a projected hidden state) or `output` (match the teacher's output, and labels)."""
    steps: int
    """Optimiser steps."""
    student_place: Place | None = None
    """Hidden stages: the student's block (1-based) or `head`."""
    teacher_place: Place | None = None
    """Hidden stages: the teacher's block (1-based) or `head`."""
    teacher_checkpoint: str | None = None
    """Output stages of progressive distillation: folder of the teacher checkpoint; None is the finished teacher."""
    label_weight: float = 0.0
    """Output stages: share of label loss; 1 trains on labels alone and needs no teacher."""
    learning_rate: float | None = None
    """Peak learning rate; None takes the run's."""
    continues: bool = False
    """Output stages after the first: go on with the previous stage's optimiser and schedule, so that only the teacher's
    weights change."""

    @property
    def needs_teacher(self) -> bool:
        """Whether a step of this stage runs the teacher."""
        return self.kind == "hidden" or self.label_weight < 1

    @property
    def name(self) -> str:
        """A short name for logs and plots."""
        if self.kind == "hidden":
            return f"hidden {self.student_place}:{self.teacher_place}"
        return "labels" if not self.needs_teacher else f"output {self.teacher_checkpoint or ''}".strip()


@dataclass(frozen=True)
class Curriculum:
    """A method as data: its stages and the settings they share."""

    method: str
    """Name under which results are reported."""
    stages: tuple[Stage, ...]
    """In training order."""
    projection: str = "gaussian"
    """Kind of projection in hidden stages (`tutelage.core.projection.KINDS`)."""
    projection_seed: int = 0
    """Seed of the random projections; stage matrices are drawn from (seed, teacher place)."""
    normalize: str = "standardize"
    """`standardize` the teacher's states before projecting, or `none` as in the paper."""
    warm_start: str = "none"
    """What starts from the teacher's own weights: `none` (the paper), `head`, `embedding`, `head+embedding`."""
    temperature: float = 1.0
    """Softmax temperature of the output loss."""
    top_k: int | None = None
    """Language models: the output loss sees so many of the teacher's outputs, and the rest as one bucket
    (`tutelage.core.topk`); None is all of them."""

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError(f"a curriculum needs at least one stage (method {self.method!r} has none)")
        for number, stage in enumerate(self.stages, 1):
            if stage.kind not in ("hidden", "output"):
                raise ValueError(f"stage {number} is of unknown kind {stage.kind!r}: use 'hidden' or 'output'")
            if stage.kind == "hidden" and (stage.student_place is None or stage.teacher_place is None):
                raise ValueError(f"hidden stage {number} needs both student_place and teacher_place")
            if stage.steps < 1:
                raise ValueError(
                    f"budget too small for the stages: stage {number} ({stage.name}) would get {stage.steps} steps; "
                    "raise max_steps, or lower stage_fraction, stage_steps or num_stages"
                )
            if stage.continues and (number == 1 or {stage.kind, self.stages[number - 2].kind} != {"output"}):
                raise ValueError(f"stage {number} cannot continue the one before it: both must be output stages")
            if not 0 <= stage.label_weight <= 1:
                raise ValueError(f"label_weight is a share from 0 to 1, got {stage.label_weight}")
        _check_choice("projection", self.projection, KINDS)
        _check_choice("normalize", self.normalize, NORMALIZE)
        _check_choice("warm_start", self.warm_start, WARM_STARTS)
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1 output, got {self.top_k}")

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole curriculum."""
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
        steps = self.stages[index].steps
        for stage in self.stages[index + 1 :]:
            if not stage.continues:
                break
            steps += stage.steps
        return steps

    def to_json(self) -> str:
        """Everything needed to build this value again, as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Curriculum:
        """The inverse of `to_json`."""
        fields: dict[str, Any] = json.loads(text)
        stages = tuple(Stage(**stage) for stage in fields.pop("stages"))
        return cls(stages=stages, **fields)


def extraction(
    student_blocks: int,
    teacher_blocks: int,
    steps: int,
    *,
    layer_map: LayerMap | None = None,
    num_stages: int | None = None,
    stage_fraction: float = 0.5,
    stage_steps: int | Sequence[int] | None = None,
    stage_learning_rate: float | None = None,
    label_weight: float = 0.0,
    **settings: Any,
) -> Curriculum:
    """Curriculum extraction (arXiv:2503.17494): projected hidden layers, shallow to deep, then the output.

    Args:
        student_blocks, teacher_blocks: L_S and L_T.
        steps: optimiser steps in all.
        layer_map: pairs (student place, teacher place), both strictly increasing; None takes `uniform_layer_map`.
        num_stages: number of hidden stages of the uniform map.
        stage_fraction: share of `steps` given to the hidden stages together, split evenly.
        stage_steps: steps of every hidden stage (one number) or of each; overrides `stage_fraction`.
        stage_learning_rate: peak learning rate of the hidden stages; None takes the run's.
        label_weight: share of label loss in the output stage.
        settings: `projection`, `projection_seed`, `normalize`, `warm_start`, `temperature`, `top_k` of `Curriculum`.

    Raises:
        ValueError: a layer map that is out of range or not increasing, or a budget too small for the stages.
    """
    if layer_map is not None and num_stages is not None:
        raise ValueError("give layer_map or num_stages, not both")
    if layer_map is not None and len(layer_map) == 0:
        raise ValueError("layer_map is empty: give pairs such as '1:2,head:head', or None for the uniform map")
    pairs = list(layer_map) if layer_map else uniform_layer_map(student_blocks, teacher_blocks, num_stages)
    _check_layer_map(pairs, student_blocks, teacher_blocks)
    if stage_steps is None:
        if not 0 < stage_fraction < 1:
            raise ValueError(f"stage_fraction is a share between 0 and 1, got {stage_fraction}")
        hidden_steps = [round(steps * stage_fraction) // len(pairs)] * len(pairs)
        hidden_steps[-1] += round(steps * stage_fraction) - sum(hidden_steps)
    else:
        hidden_steps = [stage_steps] * len(pairs) if isinstance(stage_steps, int) else list(stage_steps)
        if len(hidden_steps) != len(pairs):
            raise ValueError(f"stage_steps has {len(hidden_steps)} entries for {len(pairs)} hidden stages")
    hidden = [
        Stage("hidden", count, student, teacher, learning_rate=stage_learning_rate)
        for count, (student, teacher) in zip(hidden_steps, pairs, strict=True)
    ]
    output = Stage("output", steps - sum(hidden_steps), label_weight=label_weight)
    return Curriculum("extraction", (*hidden, output), **settings)


def one_shot(steps: int, *, label_weight: float = 0.0, **settings: Any) -> Curriculum:
    """Plain distillation: the finished teacher's output alone."""
    return Curriculum("one_shot", (Stage("output", steps, label_weight=label_weight),), **settings)


def progressive(steps: int, checkpoints: Sequence[str], *, label_weight: float = 0.0, **settings: Any) -> Curriculum:
    """Progressive distillation (arXiv:2410.05464): successive teacher checkpoints, then the finished teacher.

    Args:
        steps: optimiser steps in all, split evenly over the checkpoints and the finished teacher.
        checkpoints: folders of intermediate teacher checkpoints, early to late.
    """
    if not checkpoints:
        raise ValueError(
            "progressive distillation needs the teacher's intermediate checkpoints: pass teacher_checkpoints, "
            "or use method='extraction', which needs the finished teacher alone"
        )
    teachers: list[str | None] = [*checkpoints, None]
    share = steps // len(teachers)
    counts = [share] * (len(teachers) - 1) + [steps - share * (len(teachers) - 1)]
    stages = tuple(
        Stage("output", count, teacher_checkpoint=teacher, label_weight=label_weight)
        for count, teacher in zip(counts, teachers, strict=True)
    )
    return Curriculum("progressive", stages, **settings)


def scratch(steps: int, **settings: Any) -> Curriculum:
    """No teacher: labels alone."""
    return Curriculum("scratch", (Stage("output", steps, label_weight=1.0),), **settings)


def uniform_layer_map(
    student_blocks: int, teacher_blocks: int, num_stages: int | None = None
) -> list[tuple[Place, Place]]:
    """Student block s_i with teacher block round(s_i * L_T / L_S), for `num_stages` evenly spaced s_i (default: all)."""
    if student_blocks > teacher_blocks:
        raise ValueError(
            f"the student has {student_blocks} blocks, the teacher {teacher_blocks}: the uniform layer map needs a "
            "student that is not deeper; give a layer_map such as '1:1,head:head' or a shallower student"
        )
    stages = student_blocks if num_stages is None else num_stages
    if not 1 <= stages <= student_blocks:
        raise ValueError(f"num_stages must be from 1 to the student's {student_blocks} blocks, got {num_stages}")
    students = [round(i * student_blocks / stages) for i in range(1, stages + 1)]
    return [(s, round(s * teacher_blocks / student_blocks)) for s in students]


def parse_layer_map(text: str) -> list[tuple[Place, Place]]:
    """Parse `'1:2,2:4,head:head'` (student:teacher)."""

    def place(word: str) -> Place:
        word = word.strip()
        if word == HEAD:
            return HEAD
        if not word.isdigit():
            raise ValueError(f"layer_map {text!r}: {word!r} is neither a block number nor {HEAD!r}")
        return int(word)

    pairs: list[tuple[Place, Place]] = []
    for pair in text.split(","):
        student, colon, teacher = pair.partition(":")
        if not colon:
            raise ValueError(f"layer_map {text!r}: {pair!r} is not a student:teacher pair such as 1:2")
        pairs.append((place(student), place(teacher)))
    return pairs


def _check_layer_map(pairs: LayerMap, student_blocks: int, teacher_blocks: int) -> None:
    ranks = []
    for student, teacher in pairs:
        for who, place, last in (("student", student, student_blocks), ("teacher", teacher, teacher_blocks)):
            if place != HEAD and not (isinstance(place, int) and 1 <= place <= last):
                raise ValueError(f"layer_map: the {who} has blocks 1 to {last} and {HEAD!r}, not {place!r}")
        ranks.append((_rank(student, student_blocks), _rank(teacher, teacher_blocks)))
    for (s0, t0), (s1, t1) in itertools.pairwise(ranks):
        if s1 <= s0 or t1 <= t0:
            shown = ",".join(f"{s}:{t}" for s, t in pairs)
            raise ValueError(f"layer_map {shown} is not strictly increasing in both student and teacher")


def _rank(place: Place, blocks: int) -> int:
    return blocks + 1 if place == HEAD else int(place)


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}: use one of {', '.join(choices)}")
