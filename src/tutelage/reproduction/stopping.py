"""Ending a run at its target, and finding where exactly it got there."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from tutelage.reproduction.recipe import Recipe
from tutelage.tasks.base import EvaluationTools
from tutelage.training.records import METRICS_FILE, MetricsFile
from tutelage.training.trainer import CurriculumTrainer

FINE_FILE = "fine.jsonl"


class StopAtTarget(TrainerCallback):
    """Ends a run when all seeds have reached the target, or at a limit; evaluates at the end.

    With `fine_eval_every` the student's weights are kept at every so many examples, until the next evaluation. If that finds
    the target reached, these are evaluated too, so that the result is that of evaluations every `fine_eval_every` examples
    around the transition. They are written to `FINE_FILE`."""

    def __init__(self, recipe: Recipe, seeds: Sequence[int], limit: float | None):
        self.recipe, self.limit, self.seeds = recipe, limit, seeds
        self.waiting = set(range(len(seeds)))
        self.trainer: CurriculumTrainer | None = None  # whose run this is
        self._kept: list[tuple[dict[str, float], dict[str, torch.Tensor]]] = []  # costs and weights

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.waiting = set(range(len(self.seeds)))
        for record in MetricsFile(Path(args.output_dir) / METRICS_FILE).read():  # of a run that is resumed
            self.waiting -= self._reached(record)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = True
        every, trainer = self.recipe.fine_eval_every, self.trainer
        if every is None or trainer is None or not self.recipe.stop_at_target or not self.waiting:
            return
        if state.global_step % max(1, every // self.recipe.batch_size) == 0:
            weights = {name: value.clone() for name, value in trainer.objective.student.state_dict().items()}
            self._kept.append((trainer.meter.settle().totals(), weights))

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.recipe.stop_at_target or self.recipe.target is None:
            return
        if arrived := self._reached(kwargs["metrics"]) & self.waiting:
            self._look_closer(Path(args.output_dir), set(arrived), state.global_step * self.recipe.batch_size)
        self._kept.clear()
        self.waiting -= arrived
        samples = state.global_step * self.recipe.batch_size
        if not self.waiting or (self.limit is not None and samples >= self.limit):
            control.should_training_stop = True

    def _reached(self, metrics: dict[str, Any]) -> set[int]:
        """The places of the seeds that have reached the target."""
        recipe, target, name = self.recipe, self.recipe.target, f"eval_{self.recipe.metric}"
        if target is None:
            return set()
        names = {index: f"{name}_{index}" if recipe.replicated else name for index in range(len(self.seeds))}
        return {index for index, name in names.items() if name in metrics and recipe.reached(metrics[name], target)}

    def _look_closer(self, folder: Path, arrived: set[int], samples: int) -> None:
        """Evaluate the weights that were kept before `samples`, until all that have `arrived` are found."""
        trainer, found = self.trainer, []
        kept = [(costs, weights) for costs, weights in self._kept if costs["samples"] < samples]
        if trainer is None or not kept:
            return
        student, batches = trainer.objective.student, trainer.get_eval_dataloader()
        now = {name: value.clone() for name, value in student.state_dict().items()}
        with trainer.meter.stopped(), torch.random.fork_rng(devices=[]):
            for costs, weights in kept:
                student.load_state_dict(weights)
                metrics = trainer.task.evaluate(student, batches, lambda batch: None, EvaluationTools())
                step = int(costs["samples"]) // self.recipe.batch_size
                found.append({"step": step, **costs, **{f"eval_{name}": value for name, value in metrics.items()}})
                arrived -= self._reached(found[-1])
                if not arrived:
                    break
            student.load_state_dict(now)
        for record in found:
            MetricsFile(folder / FINE_FILE).append(record)
