"""Training the teachers of recipes, past convergence and with checkpoints kept, once for each setting.

Public names: `trained_teacher`, `cache_root`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PrinterCallback, TrainerCallback

from tutelage.core.errors import UserError
from tutelage.io.files import write_atomically
from tutelage.reproduction.comparison_setting import Teacher
from tutelage.training.config import CurriculumConfig
from tutelage.training.records import evaluation_metrics
from tutelage.training.trainer import CurriculumTrainer

_MANIFEST = "teacher.json"
_FORMAT = 1  # part of the hash: raise it when training code changes what a setting gives


def cache_root() -> Path:
    """Where trained teachers are kept: $TUTELAGE_CACHE, else ~/.cache/tutelage."""
    return Path(os.environ.get("TUTELAGE_CACHE") or Path.home() / ".cache" / "tutelage")


@dataclass(frozen=True)
class TeacherRule:
    """When a teacher has been trained enough.

    It is *converged* when `metric` first reaches `value`; it is then trained on to `factor` times the examples that took,
    since a half-trained teacher flatters one-shot distillation. Without a value it takes all of `max_samples`.
    """

    metric: str
    value: float | None
    factor: float
    max_samples: int
    checkpoint_every: int
    """Examples between the checkpoints kept for progressive distillation, up to convergence and once more at the end."""
    better: str = "higher"

    def reached(self, value: float) -> bool:
        """Whether a value of the metric means convergence."""
        if self.value is None:
            return False
        return value >= self.value if self.better == "higher" else value <= self.value


class _Watch(TrainerCallback):
    """Evaluates, keeps checkpoints, and stops by the rule."""

    def __init__(self, rule: TeacherRule, batch_size: int, folder: Path, known: dict[str, Any]):
        self.rule, self.batch_size, self.folder, self.known = rule, batch_size, folder, known

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        metrics = kwargs["metrics"]
        samples, rule = state.global_step * self.batch_size, self.rule
        value = metrics[f"eval_{rule.metric}"]
        self.known["curve"].append({"samples": samples, rule.metric: value})
        if self.known["converged_at"] is None and rule.reached(value):
            self.known["converged_at"] = samples
        converged = self.known["converged_at"]
        if samples and (converged is None or samples <= converged):
            name = f"at-{samples}"
            kwargs["model"].save_pretrained(self.folder / name)
            self.known["checkpoints"].append([samples, name])
        if converged is not None and samples >= rule.factor * converged:
            control.should_training_stop = True


def trained_teacher(
    name: str,
    identity: dict[str, Any],
    build: Callable[[], nn.Module],
    load: Callable[[str], nn.Module],
    rule: TeacherRule,
    arguments: dict[str, Any],
    data: Callable[[int], tuple[Any, Any]],
    collator: Any,
    root: Path | None = None,
) -> Teacher:
    """The teacher of a recipe: the cached one of the same settings, else trained now from labels alone.

    Args:
        name: of the recipe.
        identity: every setting that the teacher depends on; its hash names the folder.
        build: a fresh model.
        load: reads a model back from a folder.
        rule: when to stop.
        arguments: `CurriculumConfig` fields.
        data: training data of so many examples, and evaluation data.
        root: folder of the cache; None is `cache_root()`.

    Raises:
        UserError: not converged within the rule's budget.
    """
    whole = {"format": _FORMAT, **identity, "rule": dataclasses.asdict(rule), "arguments": arguments}
    key = hashlib.sha256(json.dumps(whole, sort_keys=True, default=str).encode()).hexdigest()[:16]
    folder = (root or cache_root()) / "teachers" / f"{name}-{key}"
    manifest = folder / _MANIFEST
    if not manifest.exists():
        if folder.exists():
            shutil.rmtree(folder)  # an unfinished one
        _train(folder, whole, build, rule, arguments, data, collator)
    known = json.loads(manifest.read_text(encoding="utf-8"))
    checkpoints = tuple((samples, str(folder / part)) for samples, part in known["checkpoints"])
    return Teacher(load(str(folder / "final")), known["metrics"], checkpoints)


def _train(
    folder: Path,
    identity: dict[str, Any],
    build: Callable[[], nn.Module],
    rule: TeacherRule,
    arguments: dict[str, Any],
    data: Callable[[int], tuple[Any, Any]],
    collator: Any,
) -> None:
    folder.mkdir(parents=True)
    known: dict[str, Any] = {"converged_at": None, "curve": [], "checkpoints": []}
    batch = arguments["per_device_train_batch_size"]
    steps = rule.max_samples // batch
    args = CurriculumConfig(
        output_dir=str(folder / "training"),
        method="scratch",
        max_steps=steps,
        eval_strategy="steps",
        eval_steps=max(1, rule.checkpoint_every // batch),
        save_strategy="no",
        disable_tqdm=True,
        report_to="none",
        logging_steps=max(1, rule.checkpoint_every // batch),
        **arguments,
    )
    train, held_out = data(rule.max_samples)
    trainer = CurriculumTrainer(
        build(),
        None,
        args,
        train,
        held_out,
        data_collator=collator,
        callbacks=[_Watch(rule, batch, folder, known)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    if rule.value is not None and known["converged_at"] is None:
        raise UserError(
            f"the teacher did not reach {rule.metric} {rule.value} within {rule.max_samples:,} samples (it is at "
            f"{known['curve'][-1][rule.metric]:.4f}): raise teacher_max_samples, or choose another teacher learning rate"
        )
    trainer.save_model(str(folder / "final"))
    samples = trainer.state.global_step * batch
    until = f"{samples:,} examples"
    if rule.value is not None:
        times = samples / known["converged_at"]
        until = (
            f"{times:.3g} times the {known['converged_at']:,} examples after which it first reached {rule.metric} "
            f"{rule.value}"
        )
        if times < rule.factor:
            until += f", where its budget ended ({rule.factor:g} times were asked for)"
    final = evaluation_metrics(trainer.evaluate())
    known["metrics"] = {
        "description": f"trained from labels for {until}",
        "samples": samples,
        "converged_at": known["converged_at"],
        **{key: value for key, value in final.items() if key in (rule.metric, "loss", "accuracy", "perplexity")},
    }
    known["metrics"]["transition"] = _transition(known, rule.metric)
    write_atomically(folder / _MANIFEST, json.dumps({"identity": identity, **known}, indent=2, default=str))


def _transition(known: dict[str, Any], metric: str) -> int:
    """Index of the checkpoint whose metric is nearest to halfway between the first and the last."""
    at = {point["samples"]: point[metric] for point in known["curve"]}
    values = [at[samples] for samples, _ in known["checkpoints"]]
    if not values:
        return 0
    middle = (values[0] + values[-1]) / 2
    return min(range(len(values)), key=lambda index: abs(values[index] - middle))
