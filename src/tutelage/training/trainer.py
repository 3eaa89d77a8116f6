"""`CurriculumTrainer`: a `transformers.Trainer` that trains the student through the stages of a curriculum.

One `train()` covers all stages: one data order, one progress bar, one step count, checkpoints anywhere. At a stage's start
the trainable set, the optimiser and the schedule are made anew."""

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from tutelage.core.curriculum import Curriculum
from tutelage.core.errors import UserError, as_user_error
from tutelage.core.inputs import PACKED, batch_positions
from tutelage.core.interrupts import interrupts
from tutelage.core.processes import Group
from tutelage.io.files import writing_errors
from tutelage.targets.source import StatisticsFile
from tutelage.tasks.base import EvaluationTools
from tutelage.training import checks, packing, records, saving, sharding
from tutelage.training.checkpointing import CheckpointedTrainer
from tutelage.training.compilation import whole_graphs
from tutelage.training.config import CurriculumConfig
from tutelage.training.continuation import Continuation
from tutelage.training.data import checked, readable_rows
from tutelage.training.feed import StageFeed
from tutelage.training.meter import Meter
from tutelage.training.objective import StageObjective
from tutelage.training.preparation import Given, Teacher, prepare
from tutelage.training.records import MetricsFile, Progress
from tutelage.training.transition import StageTransition


class CurriculumTrainer(CheckpointedTrainer):
    """Trains `model` from `teacher_model` by any `Curriculum`.

    Args:
        model: the student: a model, or a folder or Hub name.
        teacher_model: the teacher: a model, a folder or Hub name, or a `TargetSource`; None takes
            `args.teacher_model_name_or_path`, or the extracted curriculum in `args.curriculum_dir`.
        args: the settings.
        train_dataset, eval_dataset, processing_class, data_collator, compute_metrics, callbacks, optimizers,
            preprocess_logits_for_metrics: as in `transformers.Trainer`. Datasets hold `input_ids` (classifiers: and `labels`).
        curriculum: stages of your own; None builds them from `args`.

    Raises UserError for anything that cannot work, before any compute is spent."""

    def __init__(
        self,
        model: nn.Module | str,
        teacher_model: Teacher = None,
        args: CurriculumConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        data_collator: Any = None,
        compute_metrics: Callable[..., dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        curriculum: Curriculum | None = None,
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    ):
        args = CurriculumConfig() if args is None else args
        if args.n_gpu > 1:
            warnings.warn(f"using 1 of {args.n_gpu} GPUs: `accelerate launch -m tutelage ...` uses all", stacklevel=2)
        if optimizers != (None, None):
            raise UserError("each stage makes its own optimiser: choose it with args.optim, not with optimizers=")
        given = Given(model, teacher_model, train_dataset, eval_dataset, processing_class, curriculum)
        prepared = prepare(given, args)
        self.objective, self.source = prepared.objective, prepared.objective.source
        run, self.task, self.curriculum = prepared.run, self.source.task, prepared.run.curriculum
        self.transition = StageTransition(self.objective)
        resolved = run.arguments(args)
        stages, learned = self.curriculum.stages, self.objective.learned
        unused = any(stage.output is None for stage in stages) or (bool(learned) and len(stages) > 1)
        if args.world_size > 1 and unused:
            if args.ddp_find_unused_parameters is False:
                raise UserError("ddp_find_unused_parameters=False cannot work: hidden stages leave parameters unused")
            resolved.ddp_find_unused_parameters = True
        self.meter = Meter(Progress(), args.world_size, self._sum_over_devices)
        self.folder = Path(args.output_dir or ".")
        self.metrics_file = MetricsFile(self.folder / records.METRICS_FILE)
        self.compares_with_teacher = args.eval_with_teacher or not self.task.learns_from_labels
        self._resumed_stage: int | None = None
        if data_collator is None and prepared.tokenizer is not None and self.task.tokenized:
            data_collator = self.task.collator(prepared.tokenizer)
        with writing_errors(self.folder), as_user_error("transformers refuses the arguments", ValueError, ImportError):
            own: Any = {"callbacks": callbacks, "preprocess_logits_for_metrics": preprocess_logits_for_metrics}
            own |= {"compute_metrics": compute_metrics, "processing_class": prepared.tokenizer}
            own |= {"train_dataset": prepared.train_dataset, "eval_dataset": prepared.eval_dataset}
            super().__init__(student := self.objective.student, resolved, data_collator, **own)
        self.data_collator = checked(self.data_collator, [student, *self.source.models], self.task)
        self.check_packing = packing.PackingCheck([student, *self.source.models], self.task)
        samples, size = run.calibration_samples, run.reading.batch_size
        self.feed = StageFeed(self.source, readable_rows(self.train_dataset, samples), self._collate, samples, size)
        self.model_accepts_loss_kwargs = True  # losses are divided by the items of the whole optimiser step
        self.accelerator.gradient_accumulation_steps = 1  # transformers 5.3 has accelerate divide them once more
        if sharding.configure(self.accelerator, self.objective, bool(args.fsdp)):
            self.model.to(args.device)  # it is sharded when training begins
        self.source.to(args.device)
        learned.to(args.device)
        checks.check_fills_a_batch(self.train_dataset, self.args)
        self.add_callback(Continuation(self))

    # ---- Stages ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Run the whole curriculum, or resume it; see `transformers.Trainer.train`. `resume_from_checkpoint="auto"` starts the
        run, or continues what is in `output_dir`."""
        identity = self.identity()
        where: Any = (self.folder, resume_from_checkpoint, self.curriculum, identity, self.args.overwrite_output_dir)
        checkpoint = Group.of_all(self.args.device).first(lambda: checks.enter_output_dir(*where))
        progress, self._resumed_stage = Progress(identity=identity), None
        if checkpoint is not None:
            progress = saving.read_progress(checkpoint)
            checks.check_same_run(progress.identity, identity, f"checkpoint {str(checkpoint)!r}")
            self._resumed_stage = progress.stage
            self.args.eval_on_start = False  # it was evaluated when it was made
        self.meter = Meter(progress, self.args.world_size, self._sum_over_devices)
        self.transition.entered = None
        if checkpoint is not None and self._finished(checkpoint):
            return TrainOutput(self.state.global_step, self._mean_loss(), {})
        try:
            with interrupts.finishing():
                output = super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)
        finally:
            self.transition.set_trainable(self.transition.all)
        self._check_steps()
        self._check_weights()
        return TrainOutput(output.global_step, self._mean_loss(), output.metrics)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        """Let `Trainer` prepare the stage objective in the student's place, for the stage that the run is in."""
        resuming = resume_from_checkpoint is not None
        if resuming and self.is_world_process_zero():
            self.metrics_file.restore(Path(resume_from_checkpoint))
        if resuming and self.is_fsdp_enabled:
            self._load_from_checkpoint(resume_from_checkpoint)
        self.meter.start()
        writes = self.is_world_process_zero()
        path, run = self.folder / records.TARGETS_FILE, self.progress.identity
        file = StatisticsFile(path, resuming, writes, shared=True, checkpoint=resume_from_checkpoint, run=run)
        saving.check_statistics(file, self.progress.statistics)
        with self.accelerator.autocast():
            self.transition.prepare(file, self.feed, self.args.device, fresh=not resuming)
            if self.is_fsdp_enabled or self.curriculum.stage_trains == "new":  # while it is whole; finds empty stages
                self.transition.measure_all(self.feed)
        self._move_to_stage(self.state.global_step)
        student = self.model
        # every parameter must be trainable while DDP looks at it; a stage's frozen set is applied after
        self.transition.set_trainable(self.transition.all)
        self.model = self.model_wrapped = self.objective
        try:
            prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        finally:
            self.model = student
        self.transition.set_trainable(self.transition.trainable)
        self.callback_handler.model = student
        return prepared

    def _collate(self, rows: Any) -> dict[str, Any]:
        return self._prepare_inputs(self._get_collator_with_removed_columns(self.data_collator)(rows))

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return self.check_packing(super()._prepare_inputs(inputs))

    def _move_to_stage(self, step: int) -> None:
        """Enter the stage of optimiser step `step`."""
        index, local = self.curriculum.stage_at(step)
        fresh = local == 0 and self._resumed_stage != index
        with torch.random.fork_rng(devices=[]), self.accelerator.autocast():
            self.transition.enter(index, fresh, self.feed)
            student_flops, teacher_flops = self.transition.setup_flops(self.feed, begins=step == 0)
        self.progress.student_flops += student_flops
        self.progress.teacher_flops += teacher_flops
        if fresh and self.args.world_size > 1 and (self.curriculum.starts_there or self.is_fsdp_enabled):
            sharding.broadcast(self.objective)  # each process fitted its own, to the last bit
        self._resumed_stage = None
        self.progress.stage = index

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """Enter the stage of the coming optimiser step, then fetch its micro-batches."""
        index, _ = self.curriculum.stage_at(self.state.global_step)
        if index != self.transition.entered:
            self._move_to_stage(self.state.global_step)
            self.transition.set_trainable(self.transition.trainable)
            if not self.objective.stage.continues:
                self._renew_optimizer()
        try:
            batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        except ValueError as error:
            if "end of all iterable data" not in str(error):
                raise
            batches, items = [], None  # accelerate's words for a stream that gave nothing at all
        self.ran_out = not batches
        return batches, items

    def _renew_optimizer(self) -> None:
        self.optimizer = self.lr_scheduler = None
        self.accelerator._optimizers.clear()
        self.optimizer = self.accelerator.prepare_optimizer(self.create_optimizer(self.objective))
        self.create_scheduler(self.curriculum.total_steps)
        self.callback_handler.optimizer, self.callback_handler.lr_scheduler = self.optimizer, self.lr_scheduler

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """The optimiser of the current stage, over its trainable set, at its learning rate."""
        run_rate, stage = self.args.learning_rate, self.objective.stage
        trainable = {name for name, p in self.objective.student.named_parameters() if p.requires_grad}
        self.args.learning_rate = stage.learning_rate if stage.learning_rate is not None else run_rate
        self.transition.set_trainable(self.transition.trainable)
        try:
            with as_user_error("the optimiser cannot be made", ImportError, ValueError, TypeError):
                return super().create_optimizer(model)
        finally:
            self.args.learning_rate = run_rate
            self.transition.set_trainable(trainable)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Warm-up and decay of the current stage, over its own steps and those of the stages that continue it."""
        index = self.objective.stage_index
        while self.curriculum.stages[index].continues:  # resumed in one of them
            index -= 1
        with as_user_error("lr_scheduler_type cannot be used with these lr_scheduler_kwargs", ValueError, TypeError):
            return super().create_scheduler(self.curriculum.schedule_steps(index), optimizer)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Restore the optimiser, unless the checkpoint ends a stage and the next one begins with a new one."""
        index, local = self.curriculum.stage_at(self.state.global_step)
        if local > 0 or self.curriculum.stages[index].continues:
            if checkpoint is not None and not (Path(checkpoint) / "scheduler.pt").is_file():
                found = f"checkpoint {checkpoint!r} has no state of the optimiser (it was saved with save_only_model)"
                raise UserError(f"{found}: the run cannot be resumed from it; start it again")
            model, self.model = self.model, self.objective.student  # FSDP names parameters as in the student
            super()._load_optimizer_and_scheduler(checkpoint)
            self.model = model

    # ---- Steps ----

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor | None:
        """Items of the whole optimiser step, over micro-batches and devices, that the stage's loss is a mean over."""
        if not batch_samples:
            return None
        count = sum(self.objective.count_items(batch).to(device) for batch in batch_samples)
        return self._sum_over_devices(torch.as_tensor(count)).clamp_min(1)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Loss of the current stage; for a bare student (evaluation), its own loss."""
        if not isinstance(self.accelerator.unwrap_model(model, keep_torch_compile=False), StageObjective):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with self.accelerator.autocast() if self.is_fsdp_enabled else nullcontext():  # DDP's forward has its own
            outputs = model(num_items=num_items_in_batch, **inputs)
        self.meter.add_parts(outputs)
        # DDP averages gradients over devices, the sum is already divided by the items of all
        loss = outputs["loss"] * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """One micro-step; stops the run where the loss is not finite."""
        with whole_graphs(self.accelerator, self.objective):
            loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise self._diverged(f"the loss is {loss.item()}")
        self.meter.count(inputs, self.transition.costs[self.objective.stage_index])
        return loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Measured FLOPs of a micro-step, teacher included, for `total_flos`."""
        cost = self.transition.costs.get(self.objective.stage_index)
        return 0 if cost is None else int(cost.flops * batch_positions(inputs))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """As in transformers; rows that are in the order of the steps already are not shuffled."""
        in_order = self.source.in_step_order
        return SequentialSampler(self.train_dataset) if in_order else super()._get_train_sampler(train_dataset)

    def _get_collator_with_removed_columns(self, data_collator: Any, *args: Any, **kwargs: Any) -> Any:
        return self.source.collate_with(super()._get_collator_with_removed_columns(data_collator, *args, **kwargs))

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the labels, the columns that student or teacher takes, and what tells the sequences of packed rows apart."""
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            columns: Any = self._signature_columns
            columns += [name for name in ("labels", *self.source.columns, *PACKED) if name not in columns]

    # ---- Logs, checkpoints, evaluation ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in transformers; also appends to metrics.jsonl."""
        progress = self.meter.settle()
        logs |= self.meter.parts(self.state.global_step) if "loss" in logs else {}
        logs |= {"train_loss": self._mean_loss()} if "train_loss" in logs else {}
        super().log(logs, start_time)
        if self.is_world_process_zero() and self.transition.entered is not None:
            stage = {"stage": self.objective.stage_index + 1, "stage_name": self.objective.stage.name}
            where = {"method": self.curriculum.method, **stage, "step": self.state.global_step}
            found = {key: value for key, value in logs.items() if key not in ("epoch", "total_flos")}
            self.metrics_file.append({**where, **progress.totals(), **found})

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in transformers; its time does not count as training, and a collator that draws masks draws the same each time."""
        with self.meter.stopped(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.args.seed)
            metrics = super().evaluate(*args, **kwargs)
        if self.is_in_train and kwargs.get("metric_key_prefix", "eval") == "eval":
            checks.check_best_metric(self.args.metric_for_best_model, metrics)
        return metrics

    def evaluation_loop(self, dataloader: Any, description: str, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Metrics of `Task.evaluate`, and the user's `compute_metrics` over the student's predictions if given."""
        output = EvalLoopOutput(None, None, {}, 0)  # type: ignore[arg-type]
        if self.compute_metrics is not None or description == "Prediction":
            sharding.check_predicts(self.objective, self.is_fsdp_enabled)
            standard = functools.partial(super().evaluation_loop, dataloader, description, *args, **kwargs)
            output = sharding.run_student(self.objective, standard)
        if description == "Prediction":
            return output
        self.callback_handler.eval_dataloader = dataloader
        examples: list[int] = []

        def on_step() -> None:
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)

        def gather(rows: torch.Tensor) -> torch.Tensor:
            examples.append(len(rows := self.accelerator.gather_for_metrics(rows)))
            return rows

        tools = EvaluationTools(self.source.outputs, self.args.logits_chunk_size, gather, on_step)
        with self.accelerator.autocast(), self.source.finished() if self.compares_with_teacher else nullcontext():
            batches = (self._prepare_inputs(batch) for batch in dataloader)
            targets = self.source.output if self.compares_with_teacher else lambda batch: None
            metrics = sharding.run_student(self.objective, self.task.evaluate, self.model, batches, targets, tools)
        assert output.metrics is not None
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics.update({f"{prefix}_{name}": value for name, value in metrics.items()})
        return EvalLoopOutput(output.predictions, output.label_ids, output.metrics, sum(examples))
