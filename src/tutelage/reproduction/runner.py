"""Making the runs of a comparison, with equal budgets, and their curves.

A finished run is a folder that contains run.json, so a comparison that was stopped resumes with the missing runs. A run.json
that is damaged, or of a different run, is made again.
A run depends only on its settings and seeds, so the number of processes changes only the seconds."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import math
import shutil
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from tutelage.core.curriculum import Curriculum
from tutelage.core.errors import UserError, check_range
from tutelage.core.records import Record
from tutelage.core.stages import HiddenStage, OutputStage
from tutelage.io.files import writing_errors
from tutelage.reproduction.recipe import Recipe
from tutelage.reproduction.results import CurvePoint, RunRecord
from tutelage.reproduction.run_builder import RunBuilder
from tutelage.reproduction.sealed import read_sealed, write_sealed
from tutelage.reproduction.statistics import rounded
from tutelage.reproduction.stopping import FINE_FILE, StopAtTarget
from tutelage.reproduction.teachers import Teacher
from tutelage.reproduction.variants import Candidate, Variant, plain_variant
from tutelage.reproduction.workers import Workers
from tutelage.training.checks import TrainingDiverged
from tutelage.training.records import METRICS_FILE, MetricsFile, evaluation_metrics
from tutelage.training.saving import AUTO, find_checkpoint

_RUN_FILE = "run.json"
_PILOT_STEPS = {"flops": 4, "seconds": 24}  # per stage: FLOPs do not vary, seconds do
_CALIBRATION = "calibration"
_DIGITS = 7  # of the numbers of a curve: a comparison has ten thousands of them

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _RunFile(Record):
    """Contents of run.json."""

    run: str  # which run it is: a digest of all that the run depends on
    records: tuple[RunRecord, ...]  # one for each seed


@dataclass(frozen=True)
class _StepCosts(Record):
    """Contents of a pilot's file."""

    costs: dict[str, float]  # of one step of each stage, and of calibration

    def __post_init__(self) -> None:
        for name, cost in self.costs.items():
            check_range(name, cost, 0)


@dataclass(frozen=True)
class PlannedRun:
    """A run to be made; it has several seeds where the recipe trains them side by side in one model."""

    variant: Variant
    candidate: Candidate
    seeds: tuple[int, ...]
    folder: Path
    limit: float | None = None  # samples after which the run is stopped
    tuning: bool = False  # whether it is evaluated on the held-out data for tuning


@dataclass(frozen=True)
class Runner:
    """Makes the runs of one comparison."""

    recipe: Recipe
    teacher: Teacher
    root: Path  # folder of the comparison
    match: str  # the cost that is equal for all variants, one of `results.COSTS`
    workers: Workers | None = None  # make the runs; None makes them in this process, one at a time
    timed: bool = True  # whether the seconds of its runs are compared, which runs at the same time distort
    lock: Any = field(default_factory=threading.Lock)  # held while the cost of a step is measured

    @functools.cached_property
    def builder(self) -> RunBuilder:
        return RunBuilder(self.recipe, self.teacher, self.root, self.timed)

    def curriculum(self, variant: Variant, candidate: Candidate) -> Curriculum:
        """Of a length that makes the budgets equal."""
        match = variant.match or self.match
        if match == "samples" or variant.method in ("one_shot", "progressive"):
            return self.builder.curriculum(variant, candidate, self.builder.steps(variant.budget_fraction))
        with self.lock:
            return _at_equal_cost(self.builder, variant, candidate, match)

    def runs(
        self,
        variant: Variant,
        candidate: Candidate,
        seeds: Sequence[int],
        what: str = "runs",
        limit: float | None = None,
    ) -> Iterator[list[RunRecord]]:
        """Records of the runs of some seeds, as they are finished; seeds that are in one model come together."""
        tuning = what == "tuning"
        groups = [tuple(seeds)] if self.recipe.replicated else [(seed,) for seed in seeds]
        planned = [
            PlannedRun(variant, candidate, group, self.builder.folder(variant, candidate, group, what), limit, tuning)
            for group in groups
        ]
        self.curriculum(variant, candidate)  # measures the cost of a step once for all runs, if they need it
        if self.workers is None:
            yield from map(self.run, planned)
            return
        started = []
        for run in planned:
            make = functools.partial(_run_in_worker, self.recipe, self.root, self.match, run)
            kept = self.kept(run)
            started.append(kept or self.workers.submit(make, f"run {run.folder.relative_to(self.root)}"))
        yield from (made if isinstance(made, list) else made.result() for made in started)

    def run(self, planned: PlannedRun) -> list[RunRecord]:
        """One record per seed; read back if the run was made before."""
        return self.kept(planned) or self.make(planned)

    def kept(self, planned: PlannedRun) -> list[RunRecord] | None:
        """The records of a run that was made before; None where it was not, or its file cannot be used, which is said."""
        file = planned.folder / _RUN_FILE
        if not file.exists():
            return None
        try:
            found = read_sealed(file, _RunFile)
        except UserError as error:
            _log.warning("%s: the run is made again", error)
            return None
        if found.run != self.identity(planned) or [record.seed for record in found.records] != list(planned.seeds):
            _log.warning("%s is of a different run: the run is made again", file)
            return None
        _remove_checkpoints(planned.folder)
        return list(found.records)

    def _of_seeds(self, planned: PlannedRun) -> Curriculum:
        """The curriculum of a run, with random matrices of its own unless the variant gives their seed."""
        curriculum, variant = self.curriculum(planned.variant, planned.candidate), planned.variant
        draws = (curriculum.hidden_stages or curriculum.starts_there) and not self.builder.students_have_seeds
        if not draws or "projection_seed" in variant.overrides:
            return curriculum
        return dataclasses.replace(curriculum, projection_seed=planned.seeds[0] % 2**32)

    def identity(self, planned: PlannedRun) -> str:
        """A digest of all that a run depends on."""
        place = planned.folder.relative_to(self.root).as_posix()
        curriculum = portable(self._of_seeds(planned))
        usual = {part.name: part.default for part in dataclasses.fields(curriculum)}
        # a field that a later version adds must not make all runs anew
        chosen = {name: value for name, value in curriculum.to_dict().items() if value != usual[name]}
        text = json.dumps([place, self.recipe.all_settings(), chosen], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def make(self, planned: PlannedRun) -> list[RunRecord]:
        """Train, and write what came out; from the run's last checkpoint if there is one."""
        diverged = None
        try:
            self.train(planned)
        except TrainingDiverged as error:  # tells something about the learning rate, and must not end the comparison
            diverged = str(error)
        metrics = [*MetricsFile(planned.folder / METRICS_FILE).read(), *MetricsFile(planned.folder / FINE_FILE).read()]
        curves = _curves(metrics, planned.seeds, self.recipe.replicated)
        records = tuple(RunRecord(seed, tuple(curve), diverged) for seed, curve in curves.items())
        write_sealed(planned.folder / _RUN_FILE, _RunFile(self.identity(planned), records))
        _remove_checkpoints(planned.folder)  # not before the results are on disk
        return list(records)

    def train(self, planned: PlannedRun, callbacks: Sequence[TrainerCallback] = ()) -> None:
        """Train, from the folder's last checkpoint if there is one that can be used."""
        try:
            resume = find_checkpoint(AUTO, planned.folder)
        except UserError as error:
            _log.warning("%s: the run is made again", error)
            resume = None
        args = self.builder.arguments(planned.variant, planned.candidate, planned.folder, planned.seeds[0])
        args.overwrite_output_dir = args.eval_on_start = resume is None  # a checkpoint was evaluated when it was made
        curriculum = self._of_seeds(planned)
        if resume is None:
            (planned.folder / FINE_FILE).unlink(missing_ok=True)
        stop = StopAtTarget(self.recipe, planned.seeds, planned.limit)
        callbacks = [*callbacks, stop]
        stop.trainer = trainer = self.builder.trainer(args, planned.seeds, curriculum, callbacks, planned.tuning)
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)


def _remove_checkpoints(folder: Path) -> None:
    """Remove the checkpoints of a finished run."""
    with writing_errors(folder):
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)


def portable(curriculum: Curriculum) -> Curriculum:
    """A curriculum for the record: checkpoints by name, wherever this machine keeps them."""
    stages = list(curriculum.stages)
    for index, stage in enumerate(stages):
        if isinstance(stage, OutputStage) and stage.teacher_checkpoint is not None:
            stages[index] = dataclasses.replace(stage, teacher_checkpoint=Path(stage.teacher_checkpoint).name)
    return dataclasses.replace(curriculum, stages=tuple(stages))


def _at_equal_cost(builder: RunBuilder, variant: Variant, candidate: Candidate, match: str) -> Curriculum:
    """The curriculum of a variant that costs as much as its fraction of the budget costs one-shot.

    The variant is not progressive, whose stages follow the teacher's training; `match` is `flops` or `seconds`."""
    steps = builder.steps(variant.budget_fraction)
    made = builder.curriculum(variant, candidate, steps)
    plain = Candidate(candidate.learning_rate)  # its settings are those of another method
    reference = _step_costs(builder, plain_variant("one_shot"), plain, match)["output"]
    cost = _step_costs(builder, variant, candidate, match)
    *first, last = made.stages
    *before, step = (cost[stage.name if isinstance(stage, HiddenStage) else "output"] for stage in made.stages)
    spent = cost[_CALIBRATION] + sum(each * stage.steps for each, stage in zip(before, first, strict=True))
    left = max(1, round((reference * steps - spent) / step))
    return dataclasses.replace(made, stages=(*first, dataclasses.replace(last, steps=left)))


def _step_costs(builder: RunBuilder, variant: Variant, candidate: Candidate, match: str) -> dict[str, float]:
    """Cost of one step of each stage, and of calibration, measured on a few steps of each.

    It is stored in the comparison's folder: when the comparison is resumed, the seconds would be different, and its runs
    must keep their lengths."""
    # a step costs the same at every budget, and with most of what recipes search, but not with other stages or with every
    # value that a variant asks for
    varies = {*variant.search, "num_stages", "layer_map"}
    own = {name: value for name, value in candidate.settings.items() if name in varies}
    alike = dataclasses.replace(variant, budget_fraction=1.0, overrides={**variant.overrides, **own})
    folder = builder.root / "pilot" / f"{builder.folder(alike, candidate, [0]).parent.name}-{match}"
    file = folder.with_name(f"{folder.name}.json")
    if file.exists():
        try:
            return read_sealed(file, _StepCosts).costs
        except UserError as error:
            if match == "seconds":  # a second measurement differs, and the runs would have different lengths
                raise UserError(f"{error}. Choose a different --output_dir, or delete {str(builder.root)!r}") from error
            _log.warning("%s: the cost of a step is measured again", error)
    steps = _PILOT_STEPS[match]
    made = builder.curriculum(variant, candidate, builder.steps(variant.budget_fraction))
    short = dataclasses.replace(made, stages=tuple(dataclasses.replace(stage, steps=steps) for stage in made.stages))
    seeds = builder.recipe.seeds if builder.recipe.replicated else builder.recipe.seeds[:1]
    args = builder.arguments(variant, candidate, folder, seeds[0])
    args.logging_steps, args.eval_on_start, args.overwrite_output_dir = 1, False, True
    args.eval_strategy, args.save_strategy = "no", "no"
    builder.trainer(args, seeds, short).train()
    found = _measured(folder, match)
    with writing_errors(folder):
        shutil.rmtree(folder)
    write_sealed(file, _StepCosts(found))
    return found


def _measured(folder: Path, match: str) -> dict[str, float]:
    """Median cost of a step by stage, from a run's metrics."""
    costs: dict[str, list[float]] = {}
    previous = 0.0
    for record in MetricsFile(folder / METRICS_FILE).read():
        if "loss" not in record:
            continue
        stage = record["stage_name"] if record["stage_name"].startswith("hidden") else "output"
        costs.setdefault(stage, []).append(record[match] - previous)
        previous = record[match]
    found = {stage: sorted(values[1:])[len(values[1:]) // 2] for stage, values in costs.items()}
    # the first step of a stage also pays for calibration, or for the transplant before it; where it does not, it may be the
    # cheaper one, as batches are not equally long
    extra = max(0.0, sum(values[0] - found[stage] for stage, values in costs.items()))
    found[_CALIBRATION] = extra if match == "flops" else 0.0
    return found


def _curves(records: Sequence[dict[str, Any]], seeds: Sequence[int], replicated: bool) -> dict[int, list[CurvePoint]]:
    """Evaluations of each seed; the cost of a model that contains several seeds is divided among them."""
    seeds_per_model = len(seeds) if replicated else 1
    curves: dict[int, list[CurvePoint]] = {seed: [] for seed in seeds}
    # finer evaluations come after the others, and twice where a run was resumed
    by_samples = {record["samples"]: record for record in filter(evaluation_metrics, records)}
    for record in (by_samples[samples] for samples in sorted(by_samples)):
        values = evaluation_metrics(record)
        for index, seed in enumerate(seeds):
            ending = f"_{index}" if replicated else ""
            own = {key.removesuffix(ending): value for key, value in values.items() if key.endswith(ending)}
            # JSON has no numbers for the values of a run that diverges
            finite = {key: rounded(value, _DIGITS) for key, value in own.items() if math.isfinite(value)}
            flops, seconds = (rounded(record[cost] / seeds_per_model, _DIGITS) for cost in ("flops", "seconds"))
            curves[seed].append(CurvePoint(record["samples"], flops, seconds, finite))
    return curves


_kept: dict[tuple[Path, str], Runner] = {}  # of the present comparison, by its folder and match


def _run_in_worker(recipe: Recipe, root: Path, match: str, planned: PlannedRun) -> list[RunRecord]:
    if (root, match) not in _kept:
        _kept.clear()
        _kept[root, match] = Runner(recipe, recipe.make_teacher(root), root, match, timed=False)
    return _kept[root, match].make(planned)
