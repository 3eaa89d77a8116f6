"""Checks made before any compute is spent.

Public names: `check_tokenizers`, `shared_outputs`, `check_outputs`, `check_dataset`, `check_widths`, `check_output_dir`,
`claim_output_dir`, `require_unused_search`, `run_identity`, `check_same_run`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from pyarrow import compute
from torch import nn
from transformers import PreTrainedTokenizerBase

from tutelage.core.curriculum import Curriculum
from tutelage.core.errors import UserError
from tutelage.core.heads import OutputHead
from tutelage.core.inputs import usable_positions
from tutelage.io.files import write_atomically
from tutelage.tasks.base import Task
from tutelage.training.records import (
    CURRICULUM_FILE,
    METRICS_FILE,
    TARGETS_FILE,
    checkpoints,
)


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


def shared_outputs(
    student: nn.Module, theirs: int, task: Task, tokenizer: PreTrainedTokenizerBase | None
) -> int | None:
    """Number of outputs that the student's head shares with the teacher's, which has `theirs`; None where all are.

    Vocabularies padded to different sizes are trimmed, with a warning, to the tokenizer's; anything else is refused.
    """
    if task.whole:
        return None
    mine = OutputHead.of(student).linear.out_features
    if mine == theirs:
        return None
    if not task.per_position:
        raise UserError(f"the student has {mine} classes, the teacher {theirs}: they must be the same classes")
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


def check_outputs(model: nn.Module, task: Task) -> None:
    """Refuse classifiers whose outputs are not one class of several: a softmax over them means nothing."""
    config = getattr(model, "config", None)
    if task.name != "sequence_classification" or config is None:
        return
    if config.num_labels < 2 or config.problem_type in ("regression", "multi_label_classification"):
        raise UserError(
            f"{type(model).__name__} has {config.num_labels} output(s) and problem_type {config.problem_type!r}: only "
            "classification into one of two or more classes can be distilled"
        )


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


def check_widths(curriculum: Curriculum, student: int, teacher: int) -> None:
    """Refuse a projection that cannot map the teacher's width to the student's."""
    kind, hidden = curriculum.projection, bool(curriculum.hidden_stages)
    if hidden and student > teacher and kind not in ("gaussian", "rademacher"):
        raise UserError(
            f"projection={kind!r} cannot widen {teacher} to {student}: use projection='gaussian' or a narrower student"
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


def check_output_dir(output_dir: Path, resuming: bool, overwrite: bool) -> None:
    """Refuse a folder that holds another run, or a model that is no run's."""
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"output_dir {str(output_dir)!r} is a file: choose a folder")
    ours = (output_dir / CURRICULUM_FILE).exists()
    if not ours and any(output_dir.glob("*.safetensors")):
        raise UserError(
            f"output_dir {str(output_dir)!r} holds a model that is not from a run of tutelage: choose another folder"
        )
    if ours and not resuming and not overwrite:
        raise UserError(
            f"output_dir {str(output_dir)!r} holds another run: choose another folder, go on with it by "
            "--resume_from_checkpoint true, or replace it with --overwrite_output_dir true"
        )


def claim_output_dir(output_dir: Path, curriculum: Curriculum, resuming: bool, overwrite: bool) -> None:
    """Make `output_dir` this run's: refuse another run's folder, and a resume under another curriculum."""
    record = output_dir / CURRICULUM_FILE
    if record.exists() and resuming:
        if json.loads(record.read_text(encoding="utf-8")) != json.loads(curriculum.to_json()):
            raise UserError(
                f"{output_dir} was trained with another curriculum (see {record}): resume with the settings it began with, "
                "or choose another output_dir"
            )
        return
    check_output_dir(output_dir, resuming, overwrite)
    output_dir.mkdir(parents=True, exist_ok=True)
    if overwrite:
        stale = [TARGETS_FILE, METRICS_FILE, "result.json", "loss.png", "README.md"]
        for file in [*(output_dir / name for name in stale), *output_dir.glob("model*.safetensors*")]:
            file.unlink(missing_ok=True)
        for folder in checkpoints(output_dir):
            shutil.rmtree(folder)
    write_atomically(record, curriculum.to_json() + "\n")


def run_identity(args: Any, curriculum: Curriculum, teacher: Any, dataset: Any) -> dict[str, str]:
    """What makes a run the same run when it is resumed: curriculum, teacher, data, rate and batch."""
    identity = {
        "curriculum": _digest(curriculum.to_json().encode()),
        "learning rate": str(args.learning_rate),
        "batch size": str(args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size),
        "seed": str(args.seed),
    }
    if teacher is not None:
        digest = hashlib.sha256()
        for name, parameter in teacher.model.named_parameters():
            digest.update(f"{name} {tuple(parameter.shape)}".encode())
            if parameter.device.type != "meta":  # offloaded
                digest.update(str(parameter.detach().flatten()[:16].float().tolist()).encode())
        identity["teacher"] = digest.hexdigest()[:16]
    if dataset is not None and hasattr(dataset, "__len__"):
        rows = [dataset[index] for index in sorted({0, len(dataset) // 2, len(dataset) - 1})]
        identity["data"] = _digest(
            f"{len(dataset)} {[torch.as_tensor(r['input_ids']).tolist() for r in rows]}".encode()
        )
    return identity


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def check_same_run(was: dict[str, str], now: dict[str, str], checkpoint: str) -> None:
    """Refuse to resume a run from another run's checkpoint."""
    different = [name for name in was if was[name] != now.get(name)]
    if different:
        raise UserError(
            f"checkpoint {checkpoint!r} is of a run with another {' and '.join(different)}: resume with what it began with, "
            "or start a new run in another output_dir"
        )
