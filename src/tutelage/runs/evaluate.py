"""Evaluating a finished model from the outside."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from tutelage.core.errors import UserError, check_range
from tutelage.core.records import Record
from tutelage.runs.inputs import DEFAULT_MLM_PROBABILITY, check_data_numbers, first_rows, sequence_length
from tutelage.targets.live import LiveTargets
from tutelage.targets.source import NoTargets, TargetSource
from tutelage.tasks.base import EvaluationTools, Task
from tutelage.tasks.embedded import DEFAULT_EVAL_TEXT, DEFAULT_TEACHER
from tutelage.tasks.loading import load_config, load_tokenizer
from tutelage.tasks.registry import detect_task, get_task
from tutelage.tasks.text import read_dataset, tokenize
from tutelage.training.checks import check_dataset, check_tokenizers, shared_outputs
from tutelage.training.config import option


@dataclass(frozen=True)
class EvaluateOptions:
    """What is evaluated, on which data. None means not given."""

    model: str | None = option(
        "Model: folder or Hub name (--student is the same option); default: the embedded teacher.", None, "--student"
    )
    dataset: str | None = option(
        "Hub name, `datasets` folder, or text file (--eval_dataset is the same option); default: the embedded one.",
        *(None, "--eval_dataset"),
    )
    teacher: str | None = option("Also compare with this model: folder or Hub name.")
    task: str | None = option("Task of the model; default: found from its class.")
    dataset_split: str | None = option("Split of the dataset.")
    text_column: str = option("Column that holds the text.", "text")
    max_length: int | None = option("Maximum tokens per sequence; default: the model's limit, capped at 256.")
    max_samples: int | None = option("Evaluate on the first N sequences; default: all.")
    batch_size: int = option("Sequences per batch.", 16)
    mlm_probability: float | None = option("Fraction of tokens masked (masked_lm); default: 0.3.")
    blocks: str | None = option("Dotted name of the teacher's list of blocks, where several are found.")
    trust_remote_code: bool = option("Run model code that comes with a checkpoint.", False)

    def __post_init__(self) -> None:
        check_data_numbers(self.max_length, self.max_samples, self.mlm_probability)
        check_range("batch_size", self.batch_size, 1)


@dataclass(frozen=True)
class EvaluationResult(Record):
    """Metrics of a model on a dataset."""

    model: str
    dataset: str
    teacher: str | None
    sequences: int
    metrics: dict[str, float]


def evaluate(options: EvaluateOptions = EvaluateOptions()) -> EvaluationResult:
    """Metrics of a saved model on a dataset (see `evaluate` of its task); UserError for options that cannot work."""
    model = options.model or DEFAULT_TEACHER
    dataset = options.dataset or (DEFAULT_EVAL_TEXT if model == DEFAULT_TEACHER else None)
    if dataset is None:
        raise UserError("no dataset was given: name one, e.g. --dataset held-out.txt")
    trust = options.trust_remote_code
    config = load_config(model, what="model", trust_remote_code=trust)
    task = get_task(options.task) if options.task else detect_task(model, trust)
    tokenizer = load_tokenizer(model, trust_remote_code=trust)
    if tokenizer is None:
        raise UserError(f"model {model!r} has no tokenizer in its folder: save one there")
    if options.teacher is not None:
        check_tokenizers(tokenizer, load_tokenizer(options.teacher, trust_remote_code=trust))
    elif not task.learns_from_labels:
        raise UserError("an embedding model is measured against its teacher: name one with --teacher")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student = task.load(model, what="model", trust_remote_code=trust).to(device)
    source: TargetSource = NoTargets(task)
    if options.teacher is not None:
        teacher = task.load(options.teacher, trust_remote_code=trust).to(device)
        source = LiveTargets(teacher, task, options.blocks)
    rows = _rows(options, dataset, tokenizer, task, config)
    source.outputs = shared_outputs(student, source, tokenizer)
    check_dataset(rows, [student, *source.models], task, "evaluation")
    collator = task.collator(tokenizer, options.mlm_probability or DEFAULT_MLM_PROBABILITY)
    loader = DataLoader(rows, batch_size=options.batch_size, collate_fn=collator)
    batches = ({key: value.to(device) for key, value in batch.items()} for batch in loader)
    metrics = task.evaluate(student, batches, source.output, EvaluationTools(source.outputs))
    return EvaluationResult(model, dataset, options.teacher, len(rows), metrics)


def _rows(options: EvaluateOptions, dataset: str, tokenizer: Any, task: Task, config: Any) -> Any:
    data = read_dataset(dataset, options.dataset_split)
    if isinstance(data, dict):
        held_out = [data[name] for name in ("test", "validation", "eval") if name in data]
        data = (held_out or list(data.values()))[0]
    length = sequence_length(options.max_length, [config], tokenizer, data)
    return first_rows(tokenize(data, tokenizer, task, length, options.text_column), options.max_samples)
