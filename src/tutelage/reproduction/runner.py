"""Making the runs of a comparison: tuning, equal budgets, curves.

Public names: `Runner`, `StopAtTarget`, `MATCHES`.

A finished run is a folder with run.json in it, so a comparison that was stopped goes on where it was.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
import math
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, TrainerCallback

from tutelage.core.blocks import find_blocks
from tutelage.core.curriculum import Curriculum, HiddenStage, OutputStage
from tutelage.io.files import write_atomically
from tutelage.reproduction.recipe import Recipe
from tutelage.reproduction.statistics import median_interval, reached_at
from tutelage.reproduction.teachers import Teacher
from tutelage.reproduction.variants import Candidate, Variant, build_curriculum, candidates, parse_variant
from tutelage.targets.live import LiveTeacher
from tutelage.tasks.base import backbone, hidden_size
from tutelage.training import checks, warm_start
from tutelage.training.config import CurriculumConfig
from tutelage.training.records import METRICS_FILE, MetricsFile, evaluation_metrics, last_complete_checkpoint
from tutelage.training.trainer import CurriculumTrainer, TrainingDiverged

_RUN_FILE = "run.json"
MATCHES = ("samples", "flops", "seconds")


@dataclass
class Runner:
    """Makes runs of one comparison."""

    system: Recipe
    teacher: Teacher
    root: Path
    match: str
    submit: Callable[..., Future[list[dict[str, Any]]]] | None = None
    """Starts `run` elsewhere (`Workers.submit`); None makes runs here, one by one."""
    lock: Any = field(default_factory=threading.Lock)

    def groups(self, seeds: Sequence[int]) -> list[list[int]]:
        """Seeds that run together: all where they are replicated, else one by one."""
        return [list(seeds)] if self.system.replicated else [[seed] for seed in seeds]

    def folder(self, variant: Variant, candidate: Candidate, seeds: Sequence[int], what: str = "runs") -> Path:
        """Folder of a run."""
        name = re.sub(r"[^a-z0-9_.=-]+", "-", variant.name.lower())[:60]
        digest = hashlib.sha256(variant.name.encode()).hexdigest()[:6]
        seed = "-".join(map(str, seeds))
        return self.root / what / f"{name}-{digest}" / f"{candidate.label.replace(' ', '-')}-seed-{seed}"

    def tune(self, variant: Variant, log: Any) -> tuple[Candidate | None, dict[str, Any]]:
        """The best candidate on the tuning seeds (None where all diverge), and what each one scored.

        Progressive distillation tries every schedule at every rate where a run ends at the target, since losers end soon;
        else every rate on the first schedule, and the other schedules at the best rate.
        """
        tried = candidates(variant, self.system.learning_rates)
        if len(tried) == 1:
            return tried[0], {}
        share = self.system.tuning_share
        tuned = dataclasses.replace(variant, budget_share=variant.budget_share * share)
        grid: dict[str, Any] = {}
        best: tuple[tuple[float, float], Candidate] | None = None
        best_rate = tried[0].learning_rate
        for candidate in tried:
            other_schedule = candidate.schedule != tried[0].schedule and not self.system.stop_at_target
            if best is not None and other_schedule and candidate.learning_rate != best_rate:
                continue
            limit = None
            if best is not None and self.system.stop_at_target:
                # One that can no longer win need not go on. The median of an even number of seeds is the mean of the middle
                # two, so a slow one loses for certain only at twice the best.
                limit = best[0][0] * (1 if len(self.system.tuning_seeds) % 2 else 2)
            log(f"{variant.name}: tuning {candidate.label}, seeds {', '.join(map(str, self.system.tuning_seeds))}")
            made = self.runs(tuned, candidate, self.system.tuning_seeds, "tuning", limit)
            score, shown = self._score([record for records in made for record in records])
            grid[candidate.label] = shown
            if best is None or score < best[0]:
                best = (score, candidate)
                if candidate.schedule == tried[0].schedule:
                    best_rate = candidate.learning_rate
        assert best is not None
        return None if all(cell.get("diverged") for cell in grid.values()) else best[1], grid

    def _score(self, runs: list[dict[str, Any]]) -> tuple[tuple[float, float], dict[str, Any]]:
        """Lower is better: samples to the target (median), then the final metric."""
        system, metric = self.system, self.system.metric
        sign = -1.0 if system.better == "higher" else 1.0
        unit = "samples to target" if system.stop_at_target else f"final {metric}"
        if any("diverged" in run for run in runs):
            return (float("inf"), float("inf")), {"score": None, "unit": unit, "diverged": True}
        finals = sorted(run["final"][metric] for run in runs)
        final = finals[len(finals) // 2]
        if not system.stop_at_target:
            return (sign * final, 0.0), {"score": final, "unit": unit}
        target = system.target
        assert target is not None
        points = [reached_at(run["curve"], metric, lambda value: system.reached(value, target)) for run in runs]
        median, _ = median_interval([None if point is None else point["samples"] for point in points])
        shown = {"score": median, "unit": unit, f"final_{metric}": final}
        if median is None:
            shown["stopped_after"] = runs[0]["curve"][-1]["samples"]
        return (float("inf") if median is None else median, sign * final), shown

    def arguments(self, variant: Variant, candidate: Candidate, folder: Path, seed: int) -> CurriculumConfig:
        """Settings of a run."""
        system = self.system
        evaluate_every = max(1, system.eval_every // system.batch_size)
        fields = {
            "output_dir": str(folder),
            "method": variant.method,
            "task": system.task,
            "learning_rate": candidate.learning_rate,
            "seed": seed,
            "data_seed": seed,
            "per_device_train_batch_size": system.batch_size,
            "eval_strategy": "steps",
            "eval_steps": evaluate_every,
            "eval_on_start": True,
            "save_strategy": "steps",
            "save_steps": 20 * evaluate_every,
            "save_total_limit": 1,
            "logging_steps": evaluate_every,
            "disable_tqdm": True,
            "report_to": "none",
            "train_sampling_strategy": "sequential",
            **system.arguments(),
            **system.method_arguments(variant.method),
            **{key: value for key, value in variant.overrides.items() if key != "schedule"},
        }
        if "layer_map" in variant.overrides:  # a map of one's own takes the place of the recipe's uniform one
            fields.pop("num_stages", None)
        if "num_stages" in variant.overrides:
            fields.pop("layer_map", None)
        return CurriculumConfig(**fields)

    def check(self, variant: Variant) -> None:
        """Raise UserError where a variant has no curriculum on this system, before anything is run."""
        student, teacher = self.system.make_student(self.system.seeds[:1]), self.teacher.model
        live = LiveTeacher(teacher, backbone(teacher))
        for candidate in candidates(variant, self.system.learning_rates):
            made = self.curriculum(variant, candidate, steps=self._budget_steps)
            checks.check_widths(made, hidden_size(student), hidden_size(teacher))
            warm_start.check(made, student, live)

    @functools.cached_property
    def _blocks(self) -> tuple[int, int]:
        """Numbers of blocks of student and teacher."""
        student = self.system.make_student(self.system.seeds[:1])
        return len(find_blocks(backbone(student))), len(find_blocks(backbone(self.teacher.model)))

    @property
    def _budget_steps(self) -> int:
        return max(1, self.system.budget_samples // self.system.batch_size)

    def curriculum(self, variant: Variant, candidate: Candidate, steps: int | None = None) -> Curriculum:
        """Curriculum of a run: `steps`, or its share of the budget, equal in what `match` says."""
        system, batch = self.system, self.system.batch_size
        args = self.arguments(variant, candidate, self.root, 0)
        whole = steps or max(1, int(system.budget_samples * variant.budget_share) // batch)
        made = build_curriculum(
            args, candidate, self._blocks, self.teacher, whole, batch, min(1.0, whole / self._budget_steps)
        )
        if steps is not None or self.match == "samples" or variant.method in ("one_shot", "progressive"):
            return made
        return self._equalise(variant, candidate, made, whole)

    def _equalise(self, variant: Variant, candidate: Candidate, made: Curriculum, steps: int) -> Curriculum:
        """Lengthen (or shorten) the last stage until the cost is that of `steps` one-shot steps."""
        reference = self._step_cost(parse_variant("one_shot"), candidate)["output"]
        cost = self._step_cost(variant, candidate)
        kinds = [stage.name if isinstance(stage, HiddenStage) else "output" for stage in made.stages]
        spent = cost["calibration"]
        spent += sum(cost[kind] * stage.steps for kind, stage in zip(kinds[:-1], made.stages[:-1], strict=True))
        last = max(1, round((reference * steps - spent) / cost[kinds[-1]]))
        stages = (*made.stages[:-1], dataclasses.replace(made.stages[-1], steps=last))
        return dataclasses.replace(made, stages=stages)

    def _step_cost(self, variant: Variant, candidate: Candidate) -> dict[str, float]:
        """Cost of a step of each stage (and of `calibration`), in what `match` says, from a few steps of each.

        Kept in the comparison's folder: seconds are other ones when it goes on, and its runs must keep their lengths.
        """
        name = self.folder(variant, candidate, [0]).parent.name
        file = self.root / "pilot" / f"{name}.json"
        if file.exists():
            return json.loads(file.read_text(encoding="utf-8"))
        steps = 4 if self.match == "flops" else 24
        made = self.curriculum(variant, candidate, steps=self._budget_steps)
        short = dataclasses.replace(
            made, stages=tuple(dataclasses.replace(stage, steps=steps) for stage in made.stages)
        )
        folder = self.root / "pilot" / name
        seeds = self.system.seeds if self.system.replicated else self.system.seeds[:1]
        args = self.arguments(variant, candidate, folder, seeds[0])
        args.logging_steps, args.eval_on_start, args.overwrite_output_dir = 1, False, True
        args.eval_strategy, args.save_strategy = "no", "no"
        trainer = self._trainer(args, seeds, short, [])
        trainer.train()
        costs: dict[str, list[float]] = {}
        previous = first = 0.0
        for record in MetricsFile(folder / METRICS_FILE).read():
            if "loss" not in record:
                continue
            stage = record["stage_name"] if record["stage_name"].startswith("hidden") else "output"
            costs.setdefault(stage, []).append(record[self.match] - previous)
            previous = record[self.match]
            first = first or previous
        found = {stage: sorted(values[1:])[len(values[1:]) // 2] for stage, values in costs.items()}
        found["calibration"] = first - next(iter(found.values())) if self.match == "flops" else 0.0
        shutil.rmtree(folder)
        write_atomically(file, json.dumps(found))
        return found

    def _trainer(
        self, args: CurriculumConfig, seeds: Sequence[int], curriculum: Curriculum, callbacks: list[TrainerCallback]
    ) -> CurriculumTrainer:
        system = self.system
        # progressive distillation changes the teacher's weights; a run that ends early must not leave them changed
        teacher = self.teacher.model
        if any(isinstance(stage, OutputStage) and stage.teacher_checkpoint for stage in curriculum.stages):
            teacher = copy.deepcopy(teacher)
        count = curriculum.total_steps * system.batch_size
        needs_teacher = any(stage.needs_teacher for stage in curriculum.stages)
        trainer = CurriculumTrainer(
            model=system.make_student(seeds),
            teacher_model=teacher if needs_teacher else None,
            args=args,
            train_dataset=system.train_data(seeds, count),
            eval_dataset=system.eval_data(seeds),
            processing_class=system.tokenizer,
            data_collator=system.collator,
            curriculum=curriculum,
            callbacks=callbacks,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def train(
        self,
        variant: Variant,
        candidate: Candidate,
        seeds: Sequence[int],
        folder: Path,
        callbacks: list[TrainerCallback],
    ) -> CurriculumTrainer:
        """Train, going on from the folder's last checkpoint if there is one."""
        args = self.arguments(variant, candidate, folder, seeds[0])
        resume = last_complete_checkpoint(folder)
        args.overwrite_output_dir = args.eval_on_start = resume is None  # a checkpoint was evaluated when it was made
        trainer = self._trainer(args, seeds, self.curriculum(variant, candidate), callbacks)
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        return trainer

    def runs(
        self,
        variant: Variant,
        candidate: Candidate,
        seeds: Sequence[int],
        what: str = "runs",
        limit: float | None = None,
    ) -> Iterator[list[dict[str, Any]]]:
        """Records of the runs of some seeds, group by group as they are made; side by side where there are workers."""
        planned = [(group, self.folder(variant, candidate, group, what)) for group in self.groups(seeds)]
        if self.submit is None:
            yield from (self.run(variant, candidate, group, folder, limit) for group, folder in planned)
            return
        with self.lock:
            self.curriculum(variant, candidate)  # makes the pilot that all its runs share, if they need one
        started = [self.submit(self, variant, candidate, group, folder, limit) for group, folder in planned]
        yield from (future.result() for future in started)

    def run(
        self,
        variant: Variant,
        candidate: Candidate,
        seeds: Sequence[int],
        folder: Path,
        limit: float | None = None,
    ) -> list[dict[str, Any]]:
        """One record for each seed; read back if the run was made before.

        Args:
            limit: samples after which the run is stopped.
        """
        file = folder / _RUN_FILE
        if file.exists():
            return json.loads(file.read_text(encoding="utf-8"))
        try:
            self.train(variant, candidate, seeds, folder, [StopAtTarget(self.system, seeds, limit)])
            diverged = {}
        except TrainingDiverged as error:  # says something of the rate, and must not end the comparison
            diverged = {"diverged": str(error)}
        curves = _curves(MetricsFile(folder / METRICS_FILE).read(), seeds, self.system.replicated)
        records = [
            {
                "seed": seed,
                "seconds": curve[-1]["seconds"],
                "final": {key: value for key, value in curve[-1].items() if key not in MATCHES},
                "curve": curve,
                **diverged,
            }
            for seed, curve in curves.items()
        ]
        write_atomically(file, json.dumps(records))
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        return records


class StopAtTarget(TrainerCallback):
    """Ends a run when all seeds have reached the target, or at a limit; evaluates at the end."""

    def __init__(self, system: Recipe, seeds: Sequence[int], limit: float | None):
        self.system, self.seeds, self.limit = system, seeds, limit
        self.waiting = set(range(len(seeds)))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for record in MetricsFile(Path(args.output_dir) / METRICS_FILE).read():  # of a run that goes on
            self._note(record)

    def _note(self, metrics: dict[str, Any]) -> None:
        """Take the seeds that have reached the target off the list."""
        system, target = self.system, self.system.target
        for index in list(self.waiting):
            name = f"eval_{system.metric}_{index}" if system.replicated else f"eval_{system.metric}"
            if target is not None and name in metrics and system.reached(metrics[name], target):
                self.waiting.discard(index)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.system.stop_at_target or self.system.target is None:
            return
        self._note(kwargs["metrics"])
        samples = state.global_step * self.system.batch_size
        if not self.waiting or (self.limit is not None and samples >= self.limit):
            control.should_training_stop = True


def _curves(
    records: Sequence[dict[str, Any]], seeds: Sequence[int], replicated: bool
) -> dict[int, list[dict[str, Any]]]:
    """Evaluation points of each seed; the cost of a replicated run is divided among its replicas."""
    share = len(seeds) if replicated else 1
    curves: dict[int, list[dict[str, Any]]] = {seed: [] for seed in seeds}
    for record in records:
        values = evaluation_metrics(record)
        if not values:
            continue
        for index, seed in enumerate(seeds):
            own = values
            if replicated:
                ending = f"_{index}"
                own = {key.removesuffix(ending): value for key, value in values.items() if key.endswith(ending)}
            cost = {"samples": record["samples"], **{key: record[key] / share for key in ("flops", "seconds")}}
            # what is not finite (of a run that diverges) is no number in JSON
            curves[seed].append({**cost, **{key: value for key, value in own.items() if math.isfinite(value)}})
    return curves
