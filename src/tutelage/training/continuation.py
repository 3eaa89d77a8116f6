"""Where a run begins and ends in the middle: after a resume, and at a signal."""

import signal
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from tutelage.core.interrupts import Interrupted, interrupts

if TYPE_CHECKING:
    from tutelage.training.trainer import CurriculumTrainer


class Continuation(TrainerCallback):
    """Restores what a log line is made from; at a signal, saves when the step is done and ends the run."""

    def __init__(self, trainer: "CurriculumTrainer"):
        self.trainer = trainer
        self.ends = False  # whether a signal ends the run with this step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """`Trainer` has just set its sums to zero."""
        self.ends = False
        self.trainer.begin_sums()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a checkpoint where one of the processes was told to end."""
        if interrupts.active and self.trainer.any_device(interrupts.received is not None):
            self.ends = control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the run before anything more is written that the resumed run would write again."""
        if self.ends:
            where = self.trainer.folder / f"checkpoint-{state.global_step}"
            done = f"after step {state.global_step} of {state.max_steps}, saved in {str(where)!r}"
            raise Interrupted(interrupts.received or signal.SIGTERM, done)
