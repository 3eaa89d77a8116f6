"""Where a student's targets come from: one interface.

The objective, the trainer, evaluation and extraction use a source without knowing which one it is. R is the projected width."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, final

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from tutelage.core.curriculum import Curriculum
from tutelage.core.errors import UserError
from tutelage.core.heads import OutputHead
from tutelage.core.learned import LearnedMap
from tutelage.core.stages import HiddenStage, LayerMap, Stage
from tutelage.targets.maps import TargetMap, identity_of
from tutelage.tasks.base import Batch, OutputTarget, Task
from tutelage.tasks.initialization.student import Initialized

Batches = Callable[[], Sequence[Batch]]
Device = torch.device | str
HiddenTarget = tuple[torch.Tensor, torch.Tensor]  # targets, (..., R), and which positions count, (...)


@dataclass(frozen=True)
class Reading:
    """Which device reads which examples of an optimiser step."""

    step_examples: int  # G, the examples of an optimiser step over all devices and micro-batches
    batch_size: int  # examples of a device's micro-batch
    devices: int = 1  # devices that take micro-batches in turn
    seed: int = 0  # of the order


def epoch_order(count: int, seed: int, epoch: int, sequential: bool = False) -> np.ndarray:
    """The order in which the trainer's sampler reads `count` examples in an epoch."""
    if sequential:
        return np.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed + epoch)).numpy()


@dataclass(frozen=True)
class FixedSettings:
    """Settings of a run that its source decides."""

    where: str = ""  # the source, for messages
    values: dict[str, Any] = field(default_factory=dict)  # `CurriculumConfig` fields that must have these values
    layer_map: LayerMap | None = None  # pairs of places where nothing is given; None leaves the choice to the run
    hidden_steps: dict[Any, int] = field(default_factory=dict)  # steps of the hidden stages by teacher place
    output_steps: int | None = None  # steps of the output stages; None leaves the budget to the run
    warm_start: str | None = None  # the `warm_start` that the source was made for
    stage_trains: str | None = None  # the `stage_trains` that the source was made for
    step_examples: int | None = None  # examples of an optimiser step that the source was made for
    rows: int | None = None  # training examples; None where the run brings its own


STREAMED = "a stream"  # what the identity of a run says of data whose rows may come in another order the next time


@dataclass(frozen=True)
class StatisticsFile:
    path: Path  # where the statistics of the target maps are kept
    read: bool  # read them if they are there, instead of making them
    write: bool  # write them; one process does
    shared: bool = False  # all processes of the run make them together, and the first one reads
    checkpoint: str | None = None  # that the run is resumed from: the statistics may be beside it
    run: Mapping[str, str] = field(default_factory=dict)  # identity of the run: the statistics of others are not read

    @property
    def places(self) -> list[Path]:
        """Where the statistics may be."""
        beside = [] if self.checkpoint is None else [Path(self.checkpoint).parent / self.path.name]
        return [self.path, *(path for path in beside if path.resolve() != self.path.resolve())]

    def found(self) -> Path | None:
        """Where they are; None where they are to be made."""
        there = (path for path in self.places if self.read and path.exists())
        return next((path for path in there if not self.run or identity_of(path) == self.run), None)


class TargetSource:
    """Gives the targets of every stage of a curriculum.

    `attach` comes first: it checks that source, curriculum and student fit together. `prepare` then makes the target maps."""

    blocks: int | None = None  # L_T, the teacher's blocks; None without a teacher
    parameters: int | None = None  # parameters of a teacher in memory
    method: str | None = None  # by which students are trained where none is given; None leaves the choice to the run
    models: tuple[nn.Module, ...] = ()  # the teacher, where it is in memory
    can_start: ClassVar[bool] = False  # whether `start` gives a student its first weights
    start_blocks: str = "uniform"  # default of the setting
    in_step_order: ClassVar[bool] = False  # whether training rows are in the order of the steps: not to be shuffled
    tokenizer: PreTrainedTokenizerBase | None = None  # tokenizer that comes with the targets

    def __init__(self, task: Task):
        self.task = task
        self.curriculum: Curriculum | None = None
        self.maps: list[TargetMap] = []  # one for each of `Curriculum.calibrated_pairs`
        self.pair_numbers: list[list[int]] = []  # `Curriculum.pair_numbers`
        self.outputs: int | None = None
        # positions that the teacher ran to make the maps, padding included, by map
        self.calibrated: dict[int, int] = {}
        self.started: Initialized | None = None  # what the student was initialised with

    def fixed_settings(self, student_blocks: int) -> FixedSettings:
        """The settings that the source decides, for a student with `student_blocks` blocks."""
        return FixedSettings()

    def attach(self, curriculum: Curriculum, student: nn.Module, outputs: int | None = None) -> None:
        """Serve `student` with the stages of `curriculum`, or raise UserError if the source cannot; `outputs` is the number
        of outputs that student and teacher share, None for all."""
        self.curriculum, self.outputs = curriculum, outputs
        self.maps, self.pair_numbers, self.started = [], curriculum.pair_numbers, None

    def stage(self, index: int) -> Stage:
        assert self.curriculum is not None, "attach a curriculum first"
        return self.curriculum.stages[index]

    @property
    def output_count(self) -> int | None:
        """Outputs of the teacher's head; None where there is none to share."""
        return None

    @property
    def output_names(self) -> tuple[str, ...] | None:
        """Names of these outputs, where they have names (`Task.output_names`)."""
        return None

    def identity(self) -> dict[str, str]:
        """What tells this source from others, for a run that is resumed."""
        return {}

    def hidden(self, index: int, batch: Batch) -> HiddenTarget:
        """Targets of hidden stage `index`, (..., R), and which positions count, (...)."""
        raise AssertionError("this source has no hidden states")

    def joint(self, index: int, batch: Batch) -> tuple[list[HiddenTarget], OutputTarget | None]:
        """What `hidden` gives for each pair of joint stage `index`, and the teacher's output."""
        raise AssertionError("this source has no hidden states")

    def stage_states(self, stage: HiddenStage, batch: Batch) -> torch.Tensor:
        """The teacher's states that a hidden stage is made from, (..., D)."""
        raise AssertionError("this source has no teacher")

    def output(self, batch: Batch) -> OutputTarget | None:
        """The teacher's output; None where there is none for this batch."""
        return None

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Inside, every target is computed, though a memory may have it: for counting what it costs."""
        yield

    def output_head(self) -> OutputHead | None:
        """The teacher's output head, over the shared outputs; None where the output is the state itself."""
        return None

    def embedding(self) -> torch.Tensor:
        """The teacher's token embedding, (V, D)."""
        raise AssertionError("this source has no token embedding")

    def stored_start(self, student: str) -> bool:
        """Whether the folder `student` holds the first weights that this source gives a student."""
        return False

    def check_start(
        self,
        student: nn.Module,
        basis: str | None = None,
        layer_map: LayerMap | str | None = None,
        start_blocks: str | None = None,
    ) -> None:
        """Raise UserError for a student that cannot start from this source's teacher, with a `residual_basis`, a layer map and
        `start_blocks` as a run's settings give them."""

    def start(self, student: nn.Module, batches: Batches) -> Initialized | None:
        """Give a student its first weights, where the curriculum starts it from the teacher; `batches` as in `prepare`."""
        return None

    def prepare(self, file: StatisticsFile, batches: Batches, device: Device, width: int | None = None) -> None:
        """Make the target maps of the calibrated pairs, on `device`; `file` keeps their statistics, `batches` gives the
        calibration batches if they are needed, the same every time; `width` is that of the targets (None: the student's)."""

    def learned_maps(self) -> list[LearnedMap]:
        """New maps from the student's states to the widths of the targets, one for each of `Curriculum.hidden_stages`; empty
        where the targets have the student's width."""
        return []

    def make_view(self, index: int, batch: Batch) -> None:
        """Let stage `index` run the teacher without hooks, where the model allows it."""

    def use_checkpoint(self, folder: str | None) -> None:
        """Progressive distillation: give the outputs of this checkpoint; None is the finished teacher."""

    @contextmanager
    def finished(self) -> Iterator[None]:
        """The finished teacher in place, whatever checkpoint a stage learns from."""
        yield

    def to(self, device: torch.device | str) -> None:
        """Move what is in memory to `device`."""

    def training_rows(self, dataset: Any, reading: Reading) -> Any:
        """The rows that the run trains on."""
        return dataset

    def evaluation_rows(self, dataset: Any) -> Any:
        """The rows that the run is evaluated on."""
        return dataset

    def calibration_rows(self, dataset: Any, count: int, size: int) -> list[Any]:
        """The first `count` training rows in lists of `size`."""
        count = min(count, len(dataset))
        fetch = getattr(dataset, "__getitems__", None)
        rows = fetch(list(range(count))) if fetch is not None else [dataset[i] for i in range(count)]
        return [rows[start : start + size] for start in range(0, count, size)]

    def example_rows(self, dataset: Any, index: int) -> Any:
        """One training row of stage `index`."""
        return [dataset[0]]

    def collate_with(self, collator: Callable[[Any], Batch]) -> Callable[[Any], Batch]:
        """`collator`, made to take the rows of this source."""
        return collator

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the rows that must be kept for the teacher."""
        return ()


@final
class NoTargets(TargetSource):
    """No teacher: labels alone."""

    def attach(self, curriculum: Curriculum, student: nn.Module, outputs: int | None = None) -> None:
        if any(stage.needs_teacher for stage in curriculum.stages):
            raise UserError("this curriculum has stages that need a teacher: pass teacher_model")
        if not self.task.learns_from_labels:
            found = f"task {self.task.name!r} has no labels to learn from, so method 'scratch' needs a different task"
            raise UserError(f"{found}: pass a teacher and choose a method that uses it")
        if curriculum.student_init == "teacher":
            raise UserError("student_init='teacher' needs a teacher: pass one, or use student_init='random'")
        if curriculum.warm_start != "none":
            raise UserError(f"warm_start={curriculum.warm_start!r} needs a teacher: pass one, or use warm_start='none'")
        super().attach(curriculum, student, outputs)
