"""The stages that a curriculum is a list of, and the layer maps that say where hidden stages are."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from tutelage.core.blocks import FINAL, Place
from tutelage.core.errors import UserError
from tutelage.core.records import Record

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

    @property
    def pairs(self) -> tuple["HiddenStage", ...]:
        """The pairs of places whose hidden states this stage matches, each as a hidden stage."""
        return ()

    @property
    def output(self) -> "OutputStage | None":
        """What this stage does with the output, as an output stage; None where no output head runs."""
        return None

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, **super().to_dict()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Any:
        if cls is not Stage or not isinstance(fields, Mapping):
            return super().from_dict(fields)
        kinds: dict[Any, type[Stage]] = {stage.kind: stage for stage in (HiddenStage, OutputStage, JointStage)}
        kind = fields.get("kind")
        if not isinstance(kind, str) or kind not in kinds:
            raise UserError(f"a stage has the unknown kind {kind!r}: expected one of {', '.join(kinds)}")
        return kinds[kind].from_dict({name: value for name, value in fields.items() if name != "kind"})


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

    @property
    def pairs(self) -> tuple["HiddenStage", ...]:
        return (self,)


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

    @property
    def output(self) -> "OutputStage":
        return self


@dataclass(frozen=True)
class JointStage(Stage):
    """The student matches hidden states of the teacher at several places and its output, all in one step.

    The loss is that of the output stage plus `hidden_weight` times the mean of the losses of the hidden stages."""

    kind = "joint"
    needs_teacher = True
    layer_map: LayerMap  # pairs (student place, teacher place), both strictly increasing
    hidden_weight: float = 1.0  # weight of the mean hidden loss; the output loss has weight 1
    label_weight: float = 0.0  # fraction of the output loss that is label loss
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer_map", tuple(map(tuple, self.layer_map)))

    @property
    def name(self) -> str:
        return f"joint {_shown(self.layer_map)}"

    @property
    def pairs(self) -> tuple[HiddenStage, ...]:
        return tuple(HiddenStage(self.steps, *places) for places in self.layer_map)

    @property
    def output(self) -> OutputStage:
        return OutputStage(self.steps, label_weight=self.label_weight)


def check_stage(number: int, stage: Stage, before: Stage | None) -> None:
    """Raise UserError for stage `number` of a curriculum, or where it cannot come after the stage `before`."""
    if stage.steps < 1:
        found = f"budget too small for the stages: stage {number} ({stage.name}) would get {stage.steps} steps"
        raise UserError(f"{found}; raise max_steps, or lower stage_fraction, stage_steps or num_stages")
    if stage.continues and not isinstance(before, OutputStage):
        raise UserError(f"stage {number} cannot continue the stage before it: both must be output stages")
    if stage.output is not None and not 0 <= stage.output.label_weight <= 1:
        raise UserError(f"label_weight must be a fraction from 0 to 1, got {stage.output.label_weight}")
    if isinstance(stage, JointStage):
        _check_increasing(stage.layer_map)
        if stage.hidden_weight < 0:
            raise UserError(f"hidden_weight must not be negative, got {stage.hidden_weight}")


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


def choose_blocks(choice: str | Sequence[int], student_blocks: int, teacher_blocks: int) -> tuple[int, ...]:
    """The teacher's block that each of the student's is made from.

    Args:
        choice: `uniform` (those of the uniform layer map); `ends` (a third are the teacher's first blocks, the others its last
            ones; the middle is left out, as in arXiv:2403.17887); or the numbers themselves, such as '1,2,11,12'."""
    if choice == "uniform":
        return tuple(int(theirs) for _, theirs in uniform_layer_map(student_blocks, teacher_blocks))
    if choice == "ends":
        uniform_layer_map(student_blocks, teacher_blocks)  # refuses a student that is deeper
        first = 0 if student_blocks == 1 else max(1, student_blocks // 3)
        return (*range(1, first + 1), *range(teacher_blocks - student_blocks + first + 1, teacher_blocks + 1))
    words = (
        [word.strip() for word in choice.split(",")] if isinstance(choice, str) else [str(block) for block in choice]
    )
    blocks = tuple(int(word) for word in words if word.isdigit() and 1 <= int(word) <= teacher_blocks)
    if len(words) != student_blocks or len(blocks) != len(words):
        found = f"start_blocks={','.join(words)!r} does not name {student_blocks} blocks of the teacher, 1 to {teacher_blocks}"
        raise UserError(f"{found}, one for each of the student's: give their numbers, or use uniform or ends")
    return blocks


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


def fitting_layer_map(given: LayerMap | int | None, student_blocks: int, teacher_blocks: int) -> LayerMap:
    """The pairs given, or the uniform map; UserError for places that the models do not have."""
    pairs = given
    if pairs is None or isinstance(pairs, int):
        pairs = uniform_layer_map(student_blocks, teacher_blocks, pairs)
    check_places(pairs, student_blocks, teacher_blocks)
    _check_increasing(pairs)
    return pairs


def check_places(pairs: LayerMap, student_blocks: int, teacher_blocks: int) -> None:
    """UserError for places that the models do not have."""
    for pair in pairs:
        for who, place, last in zip(("student", "teacher"), pair, (student_blocks, teacher_blocks), strict=True):
            if place != FINAL and not (isinstance(place, int) and 1 <= place <= last):
                raise UserError(f"layer_map: the {who} has blocks 1 to {last} and {FINAL!r}, not {place!r}")


def _check_increasing(pairs: LayerMap) -> None:
    if not pairs:
        raise UserError("layer_map is empty: give pairs such as '1:2,final:final', or None for the uniform map")
    ranks = [[float("inf") if place == FINAL else int(place) for place in pair] for pair in pairs]
    if any(s1 <= s0 or t1 <= t0 for (s0, t0), (s1, t1) in itertools.pairwise(ranks)):
        raise UserError(f"layer_map {_shown(pairs)} is not strictly increasing in both student and teacher")


def _shown(pairs: LayerMap) -> str:
    return ",".join(f"{student}:{teacher}" for student, teacher in pairs)
