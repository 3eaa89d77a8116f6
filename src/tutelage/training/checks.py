"""Checks made before any compute is spent."""

import hashlib
import json
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from pyarrow import compute, types
from torch import nn
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase

from tutelage.core.curriculum import Curriculum
from tutelage.core.errors import UserError
from tutelage.core.inputs import IGNORED_LABEL
from tutelage.core.records import sealed, unsealed
from tutelage.io.claim import Claim, check_same, read_record
from tutelage.io.store import Store
from tutelage.targets.identity import data_fingerprint
from tutelage.targets.source import STREAMED, TargetSource
from tutelage.targets.stored_rows import StoredRows
from tutelage.tasks.base import Task
from tutelage.tasks.loading import count_parameters
from tutelage.tasks.text import check_token_ids
from tutelage.training import saving
from tutelage.training.data import Limits, readable_rows
from tutelage.training.objective import StageObjective
from tutelage.training.records import (
    CURRICULUM_FILE,
    IDENTITY_FILE,
    METRICS_FILE,
    TARGETS_FILE,
    checkpoints,
    complete_checkpoints,
)

_log = logging.getLogger(__name__)


class TrainingDiverged(UserError):
    """The loss or the weights are no longer finite."""


def check_tokenizers(student: PreTrainedTokenizerBase | None, teacher: PreTrainedTokenizerBase | None) -> None:
    """Refuse two tokenizers that do not map the same text to the same ids."""
    mine, theirs = (None if tokenizer is None else tokenizer.get_vocab() for tokenizer in (student, teacher))
    if mine is None or theirs is None or mine == theirs:
        return
    differing = next((t for t in theirs if mine.get(t) != theirs[t]), None) or next(t for t in mine if t not in theirs)
    raise UserError(
        f"student and teacher have different tokenizers ({len(mine)} and {len(theirs)} entries; {differing!r} is "
        f"{mine.get(differing)} in the student's and {theirs.get(differing)} in the teacher's): distillation compares them "
        "token by token; use the teacher's tokenizer for the student"
    )


def shared_outputs(student: nn.Module, source: TargetSource, tokenizer: PreTrainedTokenizerBase | None) -> int | None:
    """Number of outputs that the student's head shares with the teacher's; None where all are shared.

    Vocabularies padded to different sizes are trimmed, with a warning, to the tokenizer's; anything else is refused."""
    theirs = source.output_count
    mine = None if theirs is None else source.task.output_count(student)
    if theirs is None or mine is None or mine == theirs:
        return None
    if not source.task.per_position:
        found = f"the student has {mine} classes, the teacher {theirs}: they must be the same classes"
        raise UserError(f"{found}; give the student the teacher's number of labels")
    if tokenizer is None or len(tokenizer) > min(mine, theirs):
        known = (
            "no tokenizer was given to check" if tokenizer is None else f"the tokenizer's {len(tokenizer)} do not say"
        )
        found = f"the student has {mine} vocabulary entries, the teacher {theirs}, and {known}"
        how = "pass processing_class, and a student with the teacher's vocabulary"
        raise UserError(f"{found} that the ids they share mean the same: {how}")
    what = f"vocabularies are padded to different sizes (student {mine}, teacher {theirs})"
    rest = f"outputs beyond the tokenizer's {len(tokenizer)} entries are left out of the loss"
    warnings.warn(f"{what}: {rest}", UserWarning, stacklevel=3)
    return len(tokenizer)


def compare_sizes(student: nn.Module, source: TargetSource) -> None:
    """Say so where a student has more parameters than its teacher."""
    mine = count_parameters(student)
    if source.parameters is not None and mine > source.parameters:
        what = "The student has more parameters (%s) than its teacher (%s): it will be neither smaller nor faster"
        _log.warning(what, f"{mine:,}", f"{source.parameters:,}")


def check_output_names(student: nn.Module, source: TargetSource) -> None:
    """Refuse a student whose classes have other names than the teacher's, or the same in a different order."""
    mine = source.task.output_names(getattr(source.task.backbone(student), "config", None))
    theirs = None if mine is None else source.output_names
    for number, (my, their) in enumerate(zip(mine or (), theirs or (), strict=False)):
        if my.casefold() != their.casefold():
            raise UserError(
                f"class {number} is {my!r} in the student and {their!r} in the teacher: distillation compares classes by "
                "number; give the student the teacher's id2label and label2id"
            )


def check_dataset(dataset: Any, models: Sequence[nn.Module], task: Task, name: str) -> int | None:
    """Refuse an empty dataset, rows without model inputs, and tokens or labels that one of the models does not take; returns
    the tokens of the longest row, None where that is not known.

    Of rows that are not in Arrow only some are looked at; `CheckedCollator` looks at the others when they are used."""
    where, rows = f"the {name} dataset", readable_rows(dataset, 1)
    if isinstance(dataset, Mapping) and name == "training":
        raise UserError(f"{where} is a dictionary of several ({', '.join(map(str, dataset))}): pass one of them")
    if not hasattr(rows, "__len__"):
        return None
    if len(rows) == 0:
        raise UserError(f"{where} is empty: it needs at least one example")
    if isinstance(dataset, Mapping):
        for key, part in dataset.items():
            check_dataset(part, models, task, f"{name} ({key})")
        return None
    row = rows[0]
    have = row.keys() if hasattr(row, "keys") else [type(row).__name__]
    if "input_ids" not in have:
        found = f"{where} has no column 'input_ids' (it has {', '.join(have)})"
        raise UserError(f"{found}: tokenise it first, e.g. with tutelage.tasks.text.tokenize")
    if not task.tokenized:
        return None
    known = getattr(dataset, "longest", None)  # of a dataset that makes its rows
    shortest, longest, first, last = 1, known or 1, 0, 0
    limits = Limits.of(models, task)
    for ids, labels, masks in _columns(rows, where) if known is None else ():
        lengths, numbers = compute.list_value_length(ids), compute.min_max(compute.list_flatten(ids)).as_py()
        shortest, longest = min(shortest, compute.min(lengths).as_py()), max(longest, compute.max(lengths).as_py())
        first, last = min(first, numbers["min"] or 0), max(last, numbers["max"] or 0)
        if labels is not None and limits.classes is not None:
            _check_labels(labels, lengths, limits, task, where)
        if masks is not None:
            _check_mask(masks, lengths, where)
    if shortest < 1:
        raise UserError(f"{where} has a row without tokens: drop it")
    limits.check_tokens(where, longest, first, last)
    return longest if known or isinstance(rows, Dataset) else None


def _columns(dataset: Any, where: str) -> Iterator[tuple[Any, Any, Any]]:
    """Token ids, labels and attention masks (None without such a column) as Arrow arrays, some rows at a time; of rows that
    are not in Arrow, or made from it as they are read, which may be slow, 64 spread evenly."""
    columns = ("input_ids", "labels", "attention_mask")
    if not isinstance(dataset, Dataset) or dataset.format["type"] == "custom":
        rows = [dataset[index] for index in range(0, len(dataset), -(-len(dataset) // 64))]
        names = [name for name in columns if name in rows[0]]
        dataset = Dataset.from_list([{name: torch.as_tensor(row[name]).tolist() for name in names} for row in rows])
    check_token_ids(dataset, where)
    for table in dataset.with_format("arrow").iter(10_000):
        ids = table["input_ids"].combine_chunks()
        if ids.null_count or compute.list_flatten(ids).null_count:
            raise UserError(f"{where} has input_ids without a value: drop these rows")
        given = (table[name].combine_chunks() if name in table.column_names else None for name in columns[1:])
        yield ids, *given


def _check_labels(labels: Any, lengths: Any, limits: Limits, task: Task, where: str) -> None:
    """Refuse labels that are no classes, or not one per token, or per row, as the task has them."""
    per_token, expected = hasattr(labels, "values"), "a whole number per row"
    if task.per_position:
        expected = "a list of whole numbers per row, one per token"
    if per_token and not compute.list_value_length(labels).equals(lengths):
        what = "rows with more or fewer labels than tokens"
        raise UserError(f"{where} has {what}: give one label per token, {IGNORED_LABEL} for none")
    values = compute.list_flatten(labels) if per_token else labels
    of_text = "label" in task.columns
    if not types.is_integer(values.type) or (task.per_position and not per_token) or (of_text and per_token):
        raise UserError(f"{where} has labels of the type {labels.type}: expected {expected}")
    numbers = values.cast("int64").fill_null(IGNORED_LABEL).to_numpy(zero_copy_only=False)
    limits.check_labels(where, torch.tensor(numbers))
    if values.null_count:
        raise UserError(f"{where} has labels without a value: give {IGNORED_LABEL} for none")


def _check_mask(masks: Any, lengths: Any, where: str) -> None:
    """Refuse attention masks of other lengths than the rows, or with other values than 0 and 1."""
    if not hasattr(masks, "values") or not compute.list_value_length(masks).equals(lengths):
        raise UserError(f"{where} has attention masks without one number per token: correct them or drop the column")
    values = compute.list_flatten(masks)
    numbers = types.is_integer(values.type) or types.is_floating(values.type) or types.is_boolean(values.type)
    if not numbers or values.null_count or not np.isin(values.to_numpy(zero_copy_only=False), (0, 1)).all():
        raise UserError(f"{where} has attention masks with other values than 0 and 1: correct them or drop the column")


def check_output(curriculum: Curriculum, task: Task) -> None:
    """Refuse settings of the output loss that a task does not have."""
    if curriculum.top_k is not None and not task.splits_head:
        raise UserError(f"top_k is for an output head over many outputs, but this task is {task.name}: leave top_k out")
    if curriculum.output_loss != "kl" and task.embeds:
        found = f"output_loss={curriculum.output_loss!r} is for logits, but this task is {task.name}"
        raise UserError(f"{found}: leave output_loss out; embedding_loss says how embeddings are compared")
    if curriculum.output_positions != "labelled" and (task.causal or not task.per_position):
        found = f"output_positions={curriculum.output_positions!r} is for masked language models, where labels are few"
        raise UserError(f"{found}, but this task is {task.name}: leave output_positions out")


def check_recomputing(student: nn.Module, asked: bool) -> None:
    """Refuse gradient checkpointing for a student that has none."""
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    if asked and not any(hasattr(student, name) for name in names):
        found = f"gradient_checkpointing cannot work: {type(student).__name__} has no {names[1]}"
        raise UserError(f"{found}; leave it out, or use a model of transformers")


def check_best_metric(name: str | None, metrics: Mapping[str, float]) -> None:
    """Refuse to choose the best model by a metric that evaluations do not have."""
    if name is not None and f"eval_{name.removeprefix('eval_')}" not in metrics:
        known = ", ".join(key.removeprefix("eval_") for key in metrics if key.startswith("eval_"))
        raise UserError(f"metric_for_best_model {name!r} is not a metric of the evaluation: use one of {known}")


def check_output_dir(output_dir: Path, resuming: bool, overwrite: bool) -> None:
    """Refuse a folder that contains a different run, or a model that no run made."""
    where = f"output_dir {str(output_dir)!r}"
    if re.match(r"[a-z][\w+.-]+:/", str(output_dir)):
        raise UserError(f"{where} is a URL: a student is written to a folder on this machine")
    existing = next(folder for folder in (output_dir, *output_dir.absolute().parents) if os.path.exists(folder))
    if not existing.is_dir():
        place = "a file" if existing == output_dir else f"inside a file, {str(existing)!r}"
        raise UserError(f"{where} is {place}: choose a folder")
    if not os.access(existing, os.W_OK):
        raise UserError(f"{where} cannot be written: choose a folder that you may write to")
    ours = (output_dir / CURRICULUM_FILE).exists() or bool(complete_checkpoints(output_dir))
    foreign = (next(output_dir.glob(name), None) for name in ("*.safetensors", "checkpoint-*", METRICS_FILE))
    if not ours and (path := next(filter(None, foreign), None)) is not None:
        found = f"contains {path.name}, which was not made by a run of tutelage (there is no {CURRICULUM_FILE})"
        raise UserError(f"{where} {found}: choose a different folder")
    if ours and not resuming and not overwrite:
        how = "resume the run with --resume auto, or replace it with --overwrite_output_dir true"
        raise UserError(f"{where} already contains a run. Choose a different folder, {how}")


def check_not_read(output_dir: str | None, *sources: str | None) -> None:
    """Refuse a folder that a run reads from, or that contains a checkpoint that it reads: it would be overwritten."""
    own = Path(output_dir or ".").resolve()
    for path in (Path(source).resolve() for source in sources if source is not None):
        if path == own or (path.parent == own and path.name.startswith("checkpoint-")):
            raise UserError(f"the run would overwrite {str(path)!r}, which it reads: choose a different output_dir")


def enter_output_dir(
    output_dir: Path, asked: str | bool | None, curriculum: Curriculum, identity: dict[str, str], overwrite: bool
) -> Path | None:
    """Make `output_dir` this run's; returns the checkpoint that the run continues from, None where it starts.

    `asked` is `resume_from_checkpoint`. Raises UserError for the folder of a different run, and errors of `find_checkpoint`."""
    choice = saving.resume_choice(asked)
    if choice == saving.AUTO and overwrite:
        raise UserError(
            "resume_from_checkpoint=auto continues a run, overwrite_output_dir replaces it: give one of the two"
        )
    checkpoint = saving.find_checkpoint(choice, output_dir)
    # a run of ours that was killed before its first checkpoint starts again
    again = choice == saving.AUTO and checkpoint is None and check_same_folder(output_dir, curriculum, identity)
    claim_output_dir(output_dir, curriculum, identity, checkpoint is not None, overwrite or again)
    saving.remove_leftovers(output_dir)
    return checkpoint


def claim_output_dir(
    output_dir: Path, curriculum: Curriculum, identity: dict[str, str], resuming: bool, overwrite: bool
) -> None:
    """Make `output_dir` this run's: refuse the folder of a different run, and a resume with a different curriculum."""
    store, whose = Store(output_dir), Claim(CURRICULUM_FILE, curriculum.to_dict(), "a run")
    if store.exists(CURRICULUM_FILE) and resuming:
        check_same(store, whose, read_record(store, CURRICULUM_FILE))
        return
    check_output_dir(output_dir, resuming, overwrite)
    if overwrite:
        for stale in ("result.json", TARGETS_FILE, METRICS_FILE, "loss.png", "README.md", "model*.safetensors*"):
            for file in output_dir.glob(stale):
                file.unlink()
        for folder in checkpoints(output_dir):
            saving.discard(folder)
    store.write(IDENTITY_FILE, json.dumps(sealed(identity), indent=1) + "\n")
    store.write(CURRICULUM_FILE, curriculum.to_json() + "\n")


def check_same_folder(output_dir: Path, curriculum: Curriculum, identity: dict[str, str]) -> bool:
    """Whether `output_dir` contains a run; UserError where it is a different one than this."""
    store = Store(output_dir)
    if not store.exists(CURRICULUM_FILE):
        return False
    check_same(store, Claim(CURRICULUM_FILE, curriculum.to_dict(), "a run"), read_record(store, CURRICULUM_FILE))
    where = f"{str(output_dir / IDENTITY_FILE)!r}, which says what the run was made from"
    how = "start the run again with overwrite_output_dir in place of resume"
    if not store.exists(IDENTITY_FILE):
        raise UserError(f"found no {where}: {how}")
    try:
        was = unsealed(read_record(store, IDENTITY_FILE))
    except UserError as error:
        raise UserError(f"cannot read {where} ({error}): {how}") from error
    check_same_run(was, identity, f"the run in {str(output_dir)!r}")
    return True


# Settings that change the student; those of the method are in the curriculum. Some are not in every transformers.
SETTINGS = (
    *("data_seed", "train_sampling_strategy", "length_column_name", "ignore_data_skip", "dataloader_drop_last"),
    *("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio", "weight_decay", "max_grad_norm"),
    *("optim", "optim_args", "optim_target_modules", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("bf16", "fp16", "tf32", "student_dtype", "full_determinism", "neftune_noise_alpha", "use_liger_kernel"),
    *("auto_find_batch_size", "remove_unused_columns", "calibration_samples", "embedding_loss", "blocks"),
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
)


def data_identity(train: Any, evaluation: Any) -> dict[str, str]:
    """What tells the data of a run from others: every row of a `datasets.Dataset`, three rows of another dataset with a
    length."""
    several = evaluation if isinstance(evaluation, dict) else {"": evaluation}
    held_out = {f"evaluation data {name}".strip(): rows for name, rows in several.items()}
    return {name: _rows_identity(rows) for name, rows in {"data": train, **held_out}.items() if rows is not None}


def _rows_identity(dataset: Any) -> str:
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        return STREAMED
    if isinstance(dataset, Dataset):
        return data_fingerprint(dataset)[:16]
    if isinstance(dataset, StoredRows):  # the extraction is in the identity; rows may be far away
        return str(len(dataset))
    rows = [dataset[index] for index in sorted({0, len(dataset) // 2, len(dataset) - 1})]
    values = [[torch.as_tensor(row[name]).tolist() for name in ("input_ids", "labels") if name in row] for row in rows]
    return _digest(f"{len(dataset)} {values}")


def _digest(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def run_identity(args: Any, objective: StageObjective, data: Mapping[str, str], collator: Any) -> dict[str, str]:
    """What makes a run the same run when it is resumed: curriculum, targets, data, the student's shape and every setting that
    changes the student. `data` is its `data_identity`."""
    collator = getattr(collator, "collator", collator)  # inside a `CheckedCollator`
    fields = getattr(collator, "__dict__", {}).items()
    collating = sorted((name, value) for name, value in fields if isinstance(value, bool | int | float | str))
    config = getattr(objective.student, "config", None)
    heads = [getattr(config, name, None) for name in ("model_type", "num_attention_heads", "num_key_value_heads")]
    shapes = [(name, tuple(parameter.shape)) for name, parameter in objective.student.named_parameters()]
    identity = {
        "curriculum": _digest(objective.curriculum.to_json()),
        "student": _digest(f"{heads} {shapes}"),
        "learning rate": str(args.learning_rate),
        # dropout and masks are drawn for each micro-batch, so that 4 x 2 examples are not 8 x 1
        "batch size": f"{args.per_device_train_batch_size} x {args.gradient_accumulation_steps}",
        "number of processes": str(args.world_size),
        "seed": str(args.seed),
        "dropout": "disabled" if args.disable_dropout else "the model's",
        "data collator": f"{type(collator).__name__} {_digest(str(collating))}",
        **{name: str(getattr(args, name, None)) for name in SETTINGS},
        "accelerator_config": str(args.accelerator_config.to_dict()),
        **objective.source.identity(),
        **data,
    }
    if args.load_best_model_at_end:  # evaluations choose the student
        identity["evaluations"] = f"{args.eval_strategy} {args.eval_steps}"
    return identity


def check_fills_a_batch(dataset: Any, args: Any) -> None:
    """Refuse training rows that are fewer than a batch, where incomplete batches are dropped."""
    size, processes = args.per_device_train_batch_size, args.world_size
    if args.dataloader_drop_last and hasattr(dataset, "__len__") and len(dataset) < size * processes:
        batch = f"{size} examples" if processes == 1 else f"{size} examples on each of {processes} devices"
        found = f"the training dataset has {len(dataset)} rows, fewer than a batch of {batch}"
        raise UserError(f"{found}, and dataloader_drop_last leaves out incomplete batches: no step would be made")


def check_same_run(was: Mapping[str, str], now: Mapping[str, str], which: str) -> None:
    """Refuse to resume `which` run, or checkpoint of one, with different settings."""
    different = [name for name in {**was, **now} if was.get(name) != now.get(name)]
    if different:
        what = f"{which} was created with a different {' and '.join(different)}"
        raise UserError(f"{what}. Resume with the original settings, or start a new run in a different output_dir")
