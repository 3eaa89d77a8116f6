"""Training the teachers of recipes, past convergence and with checkpoints kept, once for each setting."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock, Timeout
from torch import nn
from transformers import PrinterCallback, TrainerCallback

from tutelage.core.errors import UserError, as_user_error, check_finite, check_range
from tutelage.core.records import Record
from tutelage.io.files import writing_errors
from tutelage.io.store import sha256_of_file
from tutelage.reproduction.sealed import read_sealed, write_sealed
from tutelage.reproduction.statistics import as_good
from tutelage.training.checks import TrainingDiverged
from tutelage.training.config import CurriculumConfig
from tutelage.training.records import evaluation_metrics
from tutelage.training.trainer import CurriculumTrainer

if TYPE_CHECKING:
    from tutelage.reproduction.recipe import PaperRecipe

_MANIFEST = "teacher.json"
_FORMAT = 3  # part of the hash: raise it when training code changes what a setting gives, or the manifest changes

_log = logging.getLogger(__name__)


class TeacherNotFinished(UserError):
    """A teacher that was not trained enough when its samples ended."""


@dataclass(frozen=True)
class Checkpoint(Record):
    """A checkpoint of a teacher's training."""

    samples: int  # examples seen
    folder: str


@dataclass(frozen=True)
class Teacher:
    """A finished teacher and what is known of it, as in `TeacherRecord` and `TrainedTeacher`."""

    model: nn.Module
    description: str
    metrics: dict[str, float] = field(default_factory=dict)
    samples: int | None = None
    converged_at: int | None = None
    last_change: float | None = None
    checkpoints: tuple[Checkpoint, ...] = ()  # checkpoints of its training, early to late
    transition: int | None = None

    @property
    def record(self) -> TeacherRecord:
        """What is known of it, for the record of a comparison."""
        return TeacherRecord(**_known(self))


@dataclass(frozen=True)
class TeacherRule:
    """When a teacher has been trained enough.

    It is *converged* when `metric` first reaches `value`; its training then continues to `factor` times the examples that
    this took, since a half-trained teacher flatters one-shot distillation. Without a value it takes all of `max_samples`, and
    over the last fifth of them the metric must change by less than `plateau`."""

    metric: str
    value: float | None
    factor: float
    max_samples: int
    checkpoint_every: int  # examples between the checkpoints kept for progressive distillation, up to convergence
    better: str = "higher"
    plateau: float | None = None


@dataclass(frozen=True)
class TeacherRecord(Record):
    """What is known of a teacher."""

    description: str  # how it was made, and by what rule its training was stopped
    metrics: dict[str, float]  # on held-out data
    samples: int | None = None  # examples that it was trained on
    converged_at: int | None = None  # examples after which it had converged; None without such a rule
    last_change: float | None = None  # change of the rule's metric over the last fifth of the training

    def __post_init__(self) -> None:
        check_finite(last_change=self.last_change, **self.metrics)
        check_range("samples", self.samples, 0)
        check_range("converged_at", self.converged_at, 0)


def _known(teacher: Teacher | TeacherRecord) -> dict[str, Any]:
    return {part.name: getattr(teacher, part.name) for part in dataclasses.fields(TeacherRecord)}


@dataclass(frozen=True, kw_only=True)
class TrainedTeacher(TeacherRecord):
    """The record of a finished training (`teacher.json`)."""

    transition: int  # index of the checkpoint whose metric is nearest to halfway between the first and the last
    curve: tuple[tuple[int, float], ...]  # examples seen, and the rule's metric
    checkpoints: tuple[Checkpoint, ...]  # folders are relative to that of the record
    settings: dict[str, Any]  # all that the teacher depends on
    files: dict[str, str]  # SHA-256 of every file of the teacher and its checkpoints, by its name below the folder

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("transition", self.transition, 0, max(0, len(self.checkpoints) - 1))
        for samples, value in self.curve:
            check_range("curve", samples, 0)
            check_finite(curve=value)
        for checkpoint in self.checkpoints:
            if checkpoint.folder != f"at-{checkpoint.samples}":
                raise UserError(f"checkpoints has the folder {checkpoint.folder!r}, not 'at-{checkpoint.samples}'")


def teacher_settings(recipe: PaperRecipe) -> dict[str, Any]:
    """All that a recipe's teacher depends on, as JSON values."""
    rule = {name: value for name, value in vars(recipe.teacher_rule()).items() if (name, value) != ("plateau", None)}
    whole = {"format": _FORMAT, **recipe.teacher_identity(), "rule": rule, "arguments": recipe.teacher_arguments()}
    return typing.cast(dict[str, Any], json.loads(json.dumps(whole, default=str)))


def trained_teacher(recipe: PaperRecipe) -> Teacher:
    """The teacher of a recipe: that of the same settings in $TUTELAGE_CACHE (~/.cache/tutelage), else trained now from labels.

    Only one process trains it, and any other one waits. A teacher with a file that is not as it was written is trained again.

    Raises TeacherNotFinished: it has not converged within the rule's budget; UserError: the cache cannot be written."""
    cache = Path(os.environ.get("TUTELAGE_CACHE") or Path.home() / ".cache" / "tutelage")
    settings = teacher_settings(recipe)
    text = json.dumps(settings, sort_keys=True)
    folder = cache / "teachers" / f"{recipe.name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    if not (folder / _MANIFEST).exists() or _damage(folder, settings):
        with _alone(folder):
            if not folder.exists():  # no other process has trained it meanwhile
                _train_beside(folder, recipe)
            elif damage := _damage(folder, settings):
                _log.warning("%s: the teacher is trained again", damage)
                _train_beside(folder, recipe)
    known = read_sealed(folder / _MANIFEST, TrainedTeacher)
    checkpoints = tuple(Checkpoint(part.samples, str(folder / part.folder)) for part in known.checkpoints)
    model = recipe.load_teacher(str(folder / "final"))
    return Teacher(model, **_known(known), checkpoints=checkpoints, transition=known.transition)


def _damage(folder: Path, settings: dict[str, Any]) -> str:
    """What is not as it was when the teacher was finished; empty where all is."""
    try:
        known = read_sealed(folder / _MANIFEST, TrainedTeacher)
    except UserError as error:
        return str(error)
    if known.settings != settings:
        return f"{str(folder / _MANIFEST)!r} belongs to a teacher with different settings"
    found = _checksums(folder)
    different = [name for name, checksum in known.files.items() if found.get(name) != checksum]
    return f"{str(folder / different[0])!r} is missing or was changed after it was written" if different else ""


def _checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a teacher and of its checkpoints."""
    checksums = {}
    with as_user_error(f"cannot read {str(folder)!r}", OSError):
        for part in ("final", "at-*"):
            for file in filter(Path.is_file, folder.glob(f"{part}/**/*")):
                checksums[file.relative_to(folder).as_posix()] = sha256_of_file(file)
    return checksums


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let no other process train this teacher meanwhile; wait for the one that does."""
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    with writing_errors(str(lock.lock_file)):
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            _log.warning("waiting for another process, which is training the same teacher (%s)", folder)
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _train_beside(folder: Path, recipe: PaperRecipe) -> None:
    """Train a teacher in a folder of its own, which gets its name when all is written; the caller is `_alone`."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    with writing_errors(unfinished):
        if unfinished.exists():
            shutil.rmtree(unfinished)  # of a process that was killed
        unfinished.mkdir()
    _train(unfinished, recipe)
    with writing_errors(folder):
        if folder.exists():
            shutil.rmtree(folder)
        unfinished.rename(folder)


class _Watch(TrainerCallback):
    """Evaluates, keeps checkpoints, and stops by the rule."""

    def __init__(self, rule: TeacherRule, batch_size: int, folder: Path):
        self.rule, self.batch_size, self.folder = rule, batch_size, folder
        self.converged_at: int | None = None
        self.curve: list[tuple[int, float]] = []
        self.checkpoints: list[Checkpoint] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        samples, rule = state.global_step * self.batch_size, self.rule
        value = kwargs["metrics"][f"eval_{rule.metric}"]
        self.curve.append((samples, value))
        if self.converged_at is None and rule.value is not None and as_good(value, rule.value, rule.better):
            self.converged_at = samples
        converged = self.converged_at
        if samples and (converged is None or samples <= converged):
            name = f"at-{samples}"
            with writing_errors(self.folder / name):
                kwargs["model"].save_pretrained(self.folder / name)
            self.checkpoints.append(Checkpoint(samples, name))
        if converged is not None and samples >= rule.factor * converged:
            control.should_training_stop = True

    @property
    def transition(self) -> int:
        values = [dict(self.curve)[checkpoint.samples] for checkpoint in self.checkpoints]
        if not values:
            return 0
        middle = (values[0] + values[-1]) / 2
        return min(range(len(values)), key=lambda index: abs(values[index] - middle))

    def last_change(self) -> float:
        """Change of the metric from four fifths of the training to its end."""
        times, values = zip(*self.curve, strict=True)
        return values[-1] - float(np.interp(0.8 * times[-1], times, values))

    def description(self, samples: int) -> str:
        rule = self.rule
        if self.converged_at is None:
            return f"trained from labels for {samples:,} examples"
        times = samples / self.converged_at
        ending = "" if times >= rule.factor else f", where its budget ended ({rule.factor:g} times were asked for)"
        return (
            f"trained from labels for {times:.3g} times the {self.converged_at:,} examples after which it first reached "
            f"{rule.metric} {rule.value}{ending}"
        )


def _lowered(rate: float, asked: float) -> str:
    return "" if rate == asked else f", at learning rate {rate:g}, since training diverged at {2 * rate:g}"


def _train(folder: Path, recipe: PaperRecipe) -> None:
    """Train by the rule, and write all; at half of the learning rate, or a quarter, where training diverges."""
    asked = recipe.teacher_learning_rate
    for rate in (asked, asked / 2):
        try:
            _train_at(rate, folder, recipe)
            return
        except TrainingDiverged as error:
            _log.warning("the teacher is trained again at half of its learning rate: %s", error)
            shutil.rmtree(folder)
            folder.mkdir()
    _train_at(asked / 4, folder, recipe)


def _train_at(rate: float, folder: Path, recipe: PaperRecipe) -> None:
    rule, batch = recipe.teacher_rule(), recipe.teacher_batch_size
    every = max(1, rule.checkpoint_every // batch)
    settings: dict[str, Any] = {
        **{"output_dir": str(folder / "training"), "method": "scratch", "max_steps": rule.max_samples // batch},
        **{"eval_strategy": "steps", "eval_steps": every, "save_strategy": "no"},
        **{"disable_tqdm": True, "report_to": "none", "logging_steps": every},
    }
    args = CurriculumConfig(**{**settings, **recipe.teacher_arguments(), "learning_rate": rate})
    data, watch = recipe.teacher_data(rule.max_samples), _Watch(rule, batch, folder)
    model, collator = recipe.new_teacher(), recipe.collator
    trainer = CurriculumTrainer(model, None, args, *data, data_collator=collator, callbacks=[watch])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    if rule.value is not None and watch.converged_at is None:
        raise TeacherNotFinished(
            f"the teacher did not reach {rule.metric} {rule.value} within {rule.max_samples:,} samples (it is at "
            f"{watch.curve[-1][1]:.4f}): raise teacher_max_samples, or choose a different teacher_learning_rate"
        )
    last_change = watch.last_change()
    if rule.plateau is not None and abs(last_change) >= rule.plateau:
        raise TeacherNotFinished(
            f"the teacher's {rule.metric} still changed by {last_change:.4f} over the last fifth of its training, not by less "
            f"than {rule.plateau}: raise teacher_samples"
        )
    with writing_errors(folder / "final"):
        trainer.save_model(str(folder / "final"))
    samples = trainer.state.global_step * batch
    metrics, kept = evaluation_metrics(trainer.evaluate()), (rule.metric, "loss", "accuracy", "perplexity")
    record = TrainedTeacher(
        description=watch.description(samples) + _lowered(rate, recipe.teacher_learning_rate),
        samples=samples,
        converged_at=watch.converged_at,
        last_change=last_change,
        transition=watch.transition,
        metrics={key: value for key, value in metrics.items() if key in kept},
        curve=tuple(watch.curve),
        checkpoints=tuple(watch.checkpoints),
        settings=teacher_settings(recipe),
        files=_checksums(folder),
    )
    write_sealed(folder / _MANIFEST, record)
