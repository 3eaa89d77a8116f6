"""What a planned student would take from its teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tutelage.core.curriculum import Curriculum
from tutelage.core.records import Record
from tutelage.runs.inputs import RunOptions, load_inputs, with_defaults
from tutelage.tasks.initialization.layout import block_pairs
from tutelage.tasks.initialization.student import basis_kind
from tutelage.training.config import CurriculumConfig
from tutelage.training.feed import StageFeed
from tutelage.training.preparation import Given, prepare

if TYPE_CHECKING:
    from tutelage.runs.plan import ModelPlan


@dataclass(frozen=True)
class StartPlan(Record):
    """The start of a student from its teacher."""

    blocks: tuple[int, ...]  # the teacher's block of each of the student's
    basis: str  # one of `tutelage.core.residual.BASES`
    variance: float | None  # fraction of the states' mean square that the basis keeps; None where it was not measured

    @property
    def words(self) -> str:
        """For the terminal."""
        kept = "; give --dataset to measure what its residual basis keeps"
        if self.basis == "identity":
            kept = ", without a change of coordinates"
        elif self.basis == "random":
            kept = ", through a random residual basis"
        elif self.variance is not None:
            kept = f"; its residual basis keeps {self.variance:.1%} of the mean square of the teacher's states"
        return f"the student starts from blocks {', '.join(map(str, self.blocks))} of the teacher{kept}"


def plan_start(
    curriculum: Curriculum, student: ModelPlan, teacher: ModelPlan, options: RunOptions, args: CurriculumConfig
) -> StartPlan:
    """The start of a student from its teacher; with a dataset the teacher runs over the calibration text, to measure what the
    residual basis keeps."""
    blocks = block_pairs(len(student.blocks), len(teacher.blocks), curriculum.start_pairs)
    basis = basis_kind(curriculum, student.hidden_size, teacher.hidden_size)
    variance = None if options.dataset is None or basis in ("identity", "random") else _variance(options, args)
    return StartPlan(tuple(blocks), basis, variance)


def _variance(options: RunOptions, args: CurriculumConfig) -> float | None:
    inputs = load_inputs(*with_defaults(options, args))
    given = Given(inputs.student, inputs.source, inputs.train_dataset, inputs.eval_dataset, inputs.tokenizer, None)
    prepared = prepare(given, args)
    size, samples = prepared.run.reading.batch_size, prepared.run.calibration_samples
    feed = StageFeed(inputs.source, prepared.train_dataset, inputs.collator, samples, size)
    started = inputs.source.start(inputs.student, feed.calibration)
    return None if started is None else started.variance
