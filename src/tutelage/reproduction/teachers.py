"""Training the teachers of recipes, past convergence and with checkpoints kept, once for each setting.

Public names: `Teacher`, `Checkpoint`, `TeacherRule`, `TeacherJob`, `TeacherRecord`, `TrainedTeacher`, `trained_teacher`,
`cache_root`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PrinterCallback, TrainerCallback

from tutelage.core.errors import UserError
from tutelage.core.records import Record
from tutelage.io.files import write_atomically
from tutelage.training.config import CurriculumConfig
from tutelage.training.records import evaluation_metrics
from tutelage.training.trainer import CurriculumTrainer

_MANIFEST = "teacher.json"
_FORMAT = 2  # part of the hash: raise it when training code changes what a setting gives, or the manifest changes
_KEPT_METRICS = ("loss", "accuracy", "perplexity")


def cache_root() -> Path:
    """Where trained teachers are kept: $TUTELAGE_CACHE, else ~/.cache/tutelage."""
    return Path(os.environ.get("TUTELAGE_CACHE") or Path.home() / ".cache" / "tutelage")


@dataclass(frozen=True)
class Checkpoint(Record):
    """A checkpoint of a teacher's training."""

    samples: int
    """Examples seen."""
    folder: str
    """Its path."""


@dataclass(frozen=True)
class Teacher:
    """A finished teacher and what is known of it."""

    model: nn.Module
    description: str
    """How it was made, and by what rule its training was stopped."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Its metrics on held-out data."""
    samples: int | None = None
    """Examples that it was trained on, where that is known."""
    converged_at: int | None = None
    """Examples after which it had converged, where its training had such a rule."""
    checkpoints: tuple[Checkpoint, ...] = ()
    """Checkpoints of its training, early to late."""
    transition: int | None = None
    """Index of the checkpoint in the middle of its learning."""


@dataclass(frozen=True)
class TeacherRule:
    """When a teacher has been trained enough.

    It is *converged* when `metric` first reaches `value`; its training then continues to `factor` times the examples that
    this took, since a half-trained teacher flatters one-shot distillation. Without a value it takes all of `max_samples`.
    """

    metric: str
    value: float | None
    factor: float
    max_samples: int
    checkpoint_every: int
    """Examples between the checkpoints kept for progressive distillation, up to convergence."""
    better: str = "higher"

    def reached(self, value: float) -> bool:
        """Whether a value of the metric means convergence."""
        if self.value is None:
            return False
        return value >= self.value if self.better == "higher" else value <= self.value


@dataclass(frozen=True)
class TeacherJob:
    """How a teacher is trained."""

    name: str
    """Name of the recipe."""
    identity: dict[str, Any]
    """Every setting that the teacher depends on, besides `rule` and `arguments`."""
    rule: TeacherRule
    """When to stop."""
    arguments: dict[str, Any]
    """`CurriculumConfig` fields."""
    build: Callable[[], nn.Module]
    """Makes a fresh model."""
    load: Callable[[str], nn.Module]
    """Reads a model from a folder."""
    data: Callable[[int], tuple[Any, Any]]
    """Training data of a number of examples, and evaluation data."""
    collator: Any
    """Makes batches of examples."""

    @property
    def settings(self) -> dict[str, Any]:
        """All that the teacher depends on."""
        rule = dataclasses.asdict(self.rule)
        return {"format": _FORMAT, **self.identity, "rule": rule, "arguments": self.arguments}

    @property
    def folder_name(self) -> str:
        """Folder in the cache: the recipe and a hash of the settings."""
        text = json.dumps(self.settings, sort_keys=True, default=str)
        return f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


@dataclass(frozen=True)
class TeacherRecord(Record):
    """What is known of a teacher."""

    description: str
    """How it was made, and by what rule its training was stopped."""
    metrics: dict[str, float]
    """On held-out data."""
    samples: int | None = None
    """Examples that it was trained on."""
    converged_at: int | None = None
    """Examples after which it had converged; None without such a rule."""


@dataclass(frozen=True, kw_only=True)
class TrainedTeacher(TeacherRecord):
    """The record of a finished training (`teacher.json`)."""

    transition: int
    """Index of the checkpoint whose metric is nearest to halfway between the first and the last."""
    curve: tuple[tuple[int, float], ...]
    """Examples seen, and the rule's metric."""
    checkpoints: tuple[Checkpoint, ...]
    """Folders are relative to that of the record."""
    settings: dict[str, Any]
    """All that the teacher depends on."""


def trained_teacher(job: TeacherJob, root: Path | None = None) -> Teacher:
    """The teacher of a job: the cached one of the same settings, else trained now from labels alone.

    Args:
        job: how it is trained.
        root: folder of the cache; default: `cache_root()`.

    Raises:
        UserError: it has not converged within the rule's budget.
    """
    folder = (root or cache_root()) / "teachers" / job.folder_name
    manifest = folder / _MANIFEST
    if not manifest.exists():
        if folder.exists():
            shutil.rmtree(folder)  # an unfinished one
        _train(folder, job)
    known = TrainedTeacher.from_json(manifest.read_text(encoding="utf-8"))
    return Teacher(
        model=job.load(str(folder / "final")),
        description=known.description,
        metrics=known.metrics,
        samples=known.samples,
        converged_at=known.converged_at,
        checkpoints=tuple(Checkpoint(part.samples, str(folder / part.folder)) for part in known.checkpoints),
        transition=known.transition,
    )


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
        if self.converged_at is None and rule.reached(value):
            self.converged_at = samples
        converged = self.converged_at
        if samples and (converged is None or samples <= converged):
            name = f"at-{samples}"
            kwargs["model"].save_pretrained(self.folder / name)
            self.checkpoints.append(Checkpoint(samples, name))
        if converged is not None and samples >= rule.factor * converged:
            control.should_training_stop = True

    @property
    def transition(self) -> int:
        """Index of the checkpoint whose metric is nearest to halfway between the first and the last."""
        at = dict(self.curve)
        values = [at[checkpoint.samples] for checkpoint in self.checkpoints]
        if not values:
            return 0
        middle = (values[0] + values[-1]) / 2
        return min(range(len(values)), key=lambda index: abs(values[index] - middle))

    def description(self, samples: int) -> str:
        """How long the training was, and by what rule."""
        rule = self.rule
        if self.converged_at is None:
            return f"trained from labels for {samples:,} examples"
        times = samples / self.converged_at
        ending = "" if times >= rule.factor else f", where its budget ended ({rule.factor:g} times were asked for)"
        return (
            f"trained from labels for {times:.3g} times the {self.converged_at:,} examples after which it first reached "
            f"{rule.metric} {rule.value}{ending}"
        )


def _train(folder: Path, job: TeacherJob) -> None:
    """Train a teacher, save it as `final`, and write its record last."""
    folder.mkdir(parents=True)
    rule, batch = job.rule, job.arguments["per_device_train_batch_size"]
    every = max(1, rule.checkpoint_every // batch)
    args = CurriculumConfig(
        output_dir=str(folder / "training"),
        method="scratch",
        max_steps=rule.max_samples // batch,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="no",
        disable_tqdm=True,
        report_to="none",
        logging_steps=every,
        **job.arguments,
    )
    train, held_out = job.data(rule.max_samples)
    watch = _Watch(rule, batch, folder)
    trainer = CurriculumTrainer(job.build(), None, args, train, held_out, data_collator=job.collator, callbacks=[watch])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    if rule.value is not None and watch.converged_at is None:
        raise UserError(
            f"the teacher did not reach {rule.metric} {rule.value} within {rule.max_samples:,} samples (it is at "
            f"{watch.curve[-1][1]:.4f}): raise teacher_max_samples, or choose a different teacher_learning_rate"
        )
    trainer.save_model(str(folder / "final"))
    samples = trainer.state.global_step * batch
    metrics = evaluation_metrics(trainer.evaluate())
    record = TrainedTeacher(
        description=watch.description(samples),
        samples=samples,
        converged_at=watch.converged_at,
        transition=watch.transition,
        metrics={key: value for key, value in metrics.items() if key in (rule.metric, *_KEPT_METRICS)},
        curve=tuple(watch.curve),
        checkpoints=tuple(watch.checkpoints),
        settings=job.settings,
    )
    write_atomically(folder / _MANIFEST, record.to_json())
