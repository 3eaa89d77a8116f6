"""Checks made before any compute is spent."""

from __future__ import annotations

import hashlib
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pyarrow import compute
from torch import nn
from transformers import PreTrainedTokenizerBase

from tutelage.core.curriculum import Curriculum
from tutelage.core.errors import UserError
from tutelage.core.inputs import usable_positions
from tutelage.io.claim import Claim, check_same, read_record
from tutelage.io.store import Store
from tutelage.targets.source import TargetSource
from tutelage.training.records import CURRICULUM_FILE, METRICS_FILE, TARGETS_FILE, checkpoints, last_complete_checkpoint


class TrainingDiverged(UserError):
    """The loss or the weights are no longer finite."""


def diverged(what: str, where: str, output_dir: Path) -> TrainingDiverged:
    """The error of a run that has diverged, with the checkpoint to return to."""
    last = last_complete_checkpoint(output_dir)
    kept = f"the last good checkpoint is {last}" if last else "no checkpoint had been saved yet"
    return TrainingDiverged(f"{what} at {where}; {kept}; lower learning_rate, or raise warmup_steps")


def check_tokenizers(student: PreTrainedTokenizerBase | None, teacher: PreTrainedTokenizerBase | None) -> None:
    """Refuse two tokenizers that do not map the same text to the same ids."""
    if student is None or teacher is None:
        return
    mine, theirs = student.get_vocab(), teacher.get_vocab()
    if mine == theirs:
        return
    differing = next((t for t in theirs if mine.get(t) != theirs[t]), None) or next(t for t in mine if t not in theirs)
    raise UserError(
        f"student and teacher have different tokenizers ({len(mine)} and {len(theirs)} entries; {differing!r} is "
        f"{mine.get(differing)} in the student's and {theirs.get(differing)} in the teacher's): distillation compares them "
        "token by token; use the teacher's tokenizer for the student"
    )


def shared_outputs(student: nn.Module, source: TargetSource, tokenizer: PreTrainedTokenizerBase | None) -> int | None:
    """Number of outputs that the student's head shares with the teacher's; None where all are shared.

    Vocabularies padded to different sizes are trimmed, with a warning, to the tokenizer's; anything else is refused.
    """
    theirs = source.output_count
    mine = None if theirs is None else source.task.output_count(student)
    if theirs is None or mine is None or mine == theirs:
        return None
    if not source.task.per_position:
        raise UserError(
            f"the student has {mine} classes, the teacher {theirs}: they must be the same classes; give the student the "
            "teacher's number of labels"
        )
    if tokenizer is None or len(tokenizer) > min(mine, theirs):
        known = (
            "no tokenizer was given to check" if tokenizer is None else f"the tokenizer has {len(tokenizer)} entries"
        )
        raise UserError(
            f"the student has {mine} vocabulary entries, the teacher {theirs}, and {known} that the ids they share mean "
            "the same: pass processing_class, and a student with the teacher's vocabulary"
        )
    warnings.warn(
        f"vocabularies are padded to different sizes (student {mine}, teacher {theirs}): outputs beyond the tokenizer's "
        f"{len(tokenizer)} entries are left out of the loss",
        UserWarning,
        stacklevel=3,
    )
    return len(tokenizer)


def check_dataset(dataset: Any, config: Any, name: str) -> None:
    """Refuse an empty dataset, one without model inputs, and sequences longer than the model's positions."""
    if dataset is None or not hasattr(dataset, "__len__"):
        return
    if len(dataset) == 0:
        raise UserError(f"the {name} dataset is empty: it needs at least one example")
    row = dataset[0]
    if not hasattr(row, "keys") or "input_ids" not in row:
        have = ", ".join(row.keys()) if hasattr(row, "keys") else type(row).__name__
        raise UserError(
            f"the {name} dataset has no column 'input_ids' (it has {have}): tokenise it first, "
            "e.g. with tutelage.tasks.text.tokenize"
        )
    positions = usable_positions(config)
    if positions is None:
        return
    if hasattr(dataset, "longest"):  # a dataset that makes its rows knows
        longest = dataset.longest
    elif hasattr(dataset, "data"):
        lengths = compute.list_value_length(dataset.data.column("input_ids"))
        if dataset._indices is not None:
            lengths = lengths.take(dataset._indices.column(0))
        longest = compute.max(lengths).as_py()
    else:
        longest = max(len(dataset[index]["input_ids"]) for index in range(len(dataset)))
    if longest > positions:
        raise UserError(
            f"the {name} dataset has a sequence of {longest} tokens, the model has {positions} positions: "
            "lower max_length"
        )


def require_unused_search(args: Any, curriculum: Curriculum) -> None:
    """Let DDP look for unused parameters where a stage leaves some: those above its block."""
    if args.world_size == 1 or not curriculum.hidden_stages:
        return
    if args.ddp_find_unused_parameters is False:
        raise UserError(
            "ddp_find_unused_parameters=False cannot work: a hidden stage leaves the parameters above it unused"
        )
    args.ddp_find_unused_parameters = True


def check_best_metric(name: str | None, metrics: Mapping[str, float]) -> None:
    """Refuse to choose the best model by a metric that evaluations do not have."""
    if name is not None and f"eval_{name.removeprefix('eval_')}" not in metrics:
        known = ", ".join(key.removeprefix("eval_") for key in metrics if key.startswith("eval_"))
        raise UserError(f"metric_for_best_model {name!r} is not a metric of the evaluation: use one of {known}")


def check_output_dir(output_dir: Path, resuming: bool, overwrite: bool) -> None:
    """Refuse a folder that contains a different run, or a model that no run made."""
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"output_dir {str(output_dir)!r} is a file: choose a folder")
    existing = next(folder for folder in (output_dir, *output_dir.absolute().parents) if folder.exists())
    if not existing.is_dir():
        raise UserError(f"output_dir {str(output_dir)!r} is inside a file, {str(existing)!r}: choose a folder")
    if not os.access(existing, os.W_OK):
        raise UserError(f"output_dir {str(output_dir)!r} cannot be written: choose a folder that you may write to")
    ours = (output_dir / CURRICULUM_FILE).exists()
    if not ours and any(output_dir.glob("*.safetensors")):
        raise UserError(
            f"output_dir {str(output_dir)!r} contains a model that was not made by a run of tutelage: choose a different folder"
        )
    if ours and not resuming and not overwrite:
        raise UserError(
            f"output_dir {str(output_dir)!r} already contains a run. Choose a different folder, resume the run with "
            "--resume_from_checkpoint true, or replace it with --overwrite_output_dir true"
        )


def claim_output_dir(output_dir: Path, curriculum: Curriculum, resuming: bool, overwrite: bool) -> None:
    """Make `output_dir` this run's: refuse the folder of a different run, and a resume with a different curriculum."""
    store, whose = Store(output_dir), Claim(CURRICULUM_FILE, curriculum.to_dict(), "a run")
    if store.exists(CURRICULUM_FILE) and resuming:
        check_same(store, whose, read_record(store, CURRICULUM_FILE))
        return
    check_output_dir(output_dir, resuming, overwrite)
    if overwrite:
        stale = [TARGETS_FILE, METRICS_FILE, "result.json", "loss.png", "README.md"]
        for file in [*(output_dir / name for name in stale), *output_dir.glob("model*.safetensors*")]:
            file.unlink(missing_ok=True)
        for folder in checkpoints(output_dir):
            shutil.rmtree(folder)
    store.write(CURRICULUM_FILE, curriculum.to_json() + "\n")


def run_identity(args: Any, curriculum: Curriculum, source: TargetSource, dataset: Any) -> dict[str, str]:
    """What makes a run the same run when it is resumed: curriculum, targets, data, rate and batch."""
    identity = {
        "curriculum": _digest(curriculum.to_json()),
        "learning rate": str(args.learning_rate),
        "batch size": str(args.step_examples(args.world_size)),
        "seed": str(args.seed),
        **source.identity(),
    }
    if dataset is not None and hasattr(dataset, "__len__"):
        rows = [dataset[index] for index in sorted({0, len(dataset) // 2, len(dataset) - 1})]
        identity["data"] = _digest(f"{len(dataset)} {[torch.as_tensor(r['input_ids']).tolist() for r in rows]}")
    return identity


def _digest(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def check_same_run(was: dict[str, str], now: dict[str, str], checkpoint: str) -> None:
    """Refuse to resume a run from the checkpoint of a different run."""
    different = [name for name in was if was[name] != now.get(name)]
    if different:
        raise UserError(
            f"checkpoint {checkpoint!r} was created with a different {' and '.join(different)}. Resume with the original "
            "settings, or start a new run in a different output_dir"
        )
