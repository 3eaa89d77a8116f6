"""The half of `CurriculumTrainer` that keeps a run on disk: checkpoints, and what a resumed run continues from."""

import functools
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerState

from tutelage.core.curriculum import Curriculum
from tutelage.core.errors import UserError
from tutelage.io.files import writing_errors
from tutelage.io.store import sha256_of_file
from tutelage.targets.checkpoints import load_checkpoint
from tutelage.training import checks, records, saving, sharding
from tutelage.training.config import CurriculumConfig
from tutelage.training.meter import Meter
from tutelage.training.objective import StageObjective
from tutelage.training.records import MetricsFile, Progress, last_complete_checkpoint
from tutelage.training.transition import StageTransition


class CheckpointedTrainer(Trainer):
    """A `Trainer` of a stage objective whose checkpoints are whole, and whose log lines continue after a resume."""

    args: CurriculumConfig
    model: Any
    train_dataset: Any
    eval_dataset: Any
    objective: StageObjective
    curriculum: Curriculum
    transition: StageTransition
    meter: Meter
    metrics_file: MetricsFile
    folder: Path  # `args.output_dir`
    task: Any
    ran_out = False  # whether the data had no batch left for the last step

    @property
    def progress(self) -> Progress:
        """Totals of the run so far."""
        return self.meter.progress

    def _sum_over_devices(self, count: torch.Tensor) -> torch.Tensor:
        return self.accelerator.gather(count.to(self.args.device)[None]).sum(0) if self.args.world_size > 1 else count

    def any_device(self, flag: bool) -> bool:
        """Whether a flag is set on one of the devices; every device must call this alike."""
        return bool(self._sum_over_devices(torch.tensor(float(flag))))

    @functools.cached_property
    def _data(self) -> dict[str, str]:
        """What tells the data from others; every row is read once."""
        return checks.data_identity(self.train_dataset, self.eval_dataset)

    def identity(self) -> dict[str, str]:
        """What makes this run the same run when it is resumed."""
        identity = checks.run_identity(self.args, self.objective, self._data, self.data_collator)
        return {**identity, "sharding": "FSDP2" if self.is_fsdp_enabled else "none"}  # checkpoints have different files

    def _finished(self, checkpoint: Path) -> bool:
        """Load a checkpoint of a run that is complete; False, and nothing loaded, for any other."""
        with saving.reading_checkpoint(checkpoint):
            state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if state.global_step < self.curriculum.total_steps:
            return False
        self.state = state
        self._load_from_checkpoint(str(checkpoint))
        self.transition.entered = self.objective.stage_index = len(self.curriculum.stages) - 1
        if self.is_world_process_zero():
            self.metrics_file.restore(checkpoint)
            saving.rotate(checkpoint, self.args.save_total_limit, state.best_model_checkpoint)
        self._total_loss_scalar = self.progress.total_loss + self.progress.loss_sum
        self.log({"train_loss": self._mean_loss()})
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_best_model()
        return True

    def _check_steps(self) -> None:
        """Raise UserError where the run ended before its last step, unless a callback stopped it."""
        made, total = self.state.global_step, self.curriculum.total_steps
        if made < total and (self.ran_out or not self.control.should_training_stop):
            found = f"the run made {made} of its {total} steps, then the training data had no more batches"
            raise UserError(f"{found}: give more rows, or fewer steps (max_steps)")

    def _mean_loss(self) -> float:
        """Mean over all steps of the run, also those before it was resumed."""
        return self._total_loss_scalar / max(1, self.state.global_step)

    def begin_sums(self) -> None:
        """Begin the sums of losses where the checkpoint had them; `Trainer` begins them at zero."""
        self._tr_loss += self.progress.loss_sum
        self._total_loss_scalar, self._globalstep_last_logged = self.progress.total_loss, self.progress.logged_step
        self.meter.restore(first=self.is_world_process_zero())

    def _check_weights(self) -> None:
        if self.any_device(not sharding.are_finite(self.objective.parameters())):
            raise self._diverged("a weight is not finite")

    def _diverged(self, what: str) -> checks.TrainingDiverged:
        stage, last = self.objective.stage, last_complete_checkpoint(self.folder)
        where = f"step {self.state.global_step + 1}, stage {self.objective.stage_index + 1} ({stage.name})"
        kept = f"the last good checkpoint is {last}" if last else "no checkpoint had been saved yet"
        return checks.TrainingDiverged(f"{what} at {where}; {kept}; lower learning_rate, or raise warmup_steps")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As in transformers; refuses weights that are not finite, ends with the file that makes the checkpoint complete, and
        deletes old ones after that."""
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with self.meter.stopped(), writing_errors(folder):
                self._check_weights()
                if self.args.should_save:
                    saving.discard(folder)
                self.accelerator.wait_for_everyone()
                super()._save_checkpoint(model, trial)
                if self.args.should_save:
                    saving.save_learned(self.objective.learned, folder)
                self._note_progress()
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    self.metrics_file.copy_to(folder)
                    saving.complete(folder, self.progress)
                    saving.rotate(folder, limit, self.state.best_model_checkpoint)
                self.accelerator.wait_for_everyone()
        finally:
            self.args.save_total_limit = limit

    def _note_progress(self) -> None:
        """Bring the progress up to date for a checkpoint; every device must call this alike."""
        progress, loss = self.progress, self._sum_over_devices(self._tr_loss)
        progress.loss_sum, progress.parts = float(loss) / self.args.world_size, self.meter.part_sums()
        progress.total_loss, progress.logged_step = self._total_loss_scalar, self._globalstep_last_logged
        progress.statistics = sha256_of_file(self.folder / records.TARGETS_FILE)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write the plain student and its tokenizer; nothing of tutelage, and no pickle, beside it."""
        folder = Path(output_dir or self.folder)
        processor = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        with sharding.whole_parameters(self.model, wanted=self.args.should_save):
            if self.args.should_save:
                with saving.whole_files(folder) as staging:
                    self.task.save(self.model, staging)
                    if processor is not None:
                        processor.save_pretrained(staging)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers, unless the folder has a card already (`tutelage distill` writes a fuller one)."""
        if not (self.folder / "README.md").exists():
            super().create_model_card(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        standard = functools.partial(super()._load_from_checkpoint, resume_from_checkpoint, model)
        with saving.reading_checkpoint(Path(resume_from_checkpoint)):
            saving.load_learned(self.objective.learned, Path(resume_from_checkpoint))
            if not self.is_fsdp_enabled:
                self.task.restore(self.model, Path(resume_from_checkpoint), standard)
            elif not sharding.is_sharded(self.objective):  # Trainer asks again after sharding
                load_checkpoint(self.model, resume_from_checkpoint, what="student")

    def _load_best_model(self) -> None:
        standard, best = super()._load_best_model, Path(str(self.state.best_model_checkpoint))
        saving.check_whole(best)
        standard() if self.is_fsdp_enabled else self.task.restore(self.model, best, standard)
