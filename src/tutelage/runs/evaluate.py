"""Evaluating a finished model from the outside."""

from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from tutelage.core.errors import LARGEST, UserError, check_range, check_texts
from tutelage.core.records import Record
from tutelage.runs.environment import quiet_unless_terminal
from tutelage.runs.inputs import DEFAULT_MLM_PROBABILITY, check_data_numbers, first_rows, sequence_length
from tutelage.runs.sentences import (
    compared,
    distinct_texts,
    encode,
    held_out_part,
    read_tests,
    run_tests,
    sentence_rows,
)
from tutelage.runs.speed import SPEED_ROWS, measure_speed, model_size
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
    pairs: str | None = option("Sentence encoders: rated pairs (columns sentence1, sentence2, score).")
    retrieval: str | None = option("Sentence encoders: queries and answers (columns query, document).")
    measure_speed: bool = option("Also measure sequences per second on one CPU thread.", False)
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
        check_texts(self)
        check_data_numbers(self.max_length, self.max_samples, self.mlm_probability)
        check_range("batch_size", self.batch_size, 1, LARGEST)
        for name, needed in (("blocks", "teacher"), ("dataset_split", "dataset")):
            if getattr(self, name) is not None and getattr(self, needed) is None:
                raise UserError(
                    f"{name} is of the {needed}, but no {needed} was given: give --{needed}, or leave {name} out"
                )


@dataclass(frozen=True)
class EvaluationResult(Record):
    """Metrics of a model on a dataset, on tests of sentence encoders, or on both."""

    model: str
    dataset: str | None
    teacher: str | None
    sequences: int  # of the dataset
    metrics: dict[str, float]
    pairs: str | None = None
    retrieval: str | None = None


@dataclass(frozen=True)
class _Loaded:
    """A model with what turns texts into its batches."""

    path: str
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    collator: Any


def evaluate(options: EvaluateOptions = EvaluateOptions()) -> EvaluationResult:
    """The size of a saved model and its metrics on a dataset (see `evaluate` of its task), on rated pairs and on queries; for
    sizes, pairs, queries and speed also the teacher's (`teacher_*`). UserError for options that cannot work."""
    model = options.model or DEFAULT_TEACHER
    dataset = options.dataset or (DEFAULT_EVAL_TEXT if model == DEFAULT_TEACHER else None)
    if dataset is None and options.pairs is None and options.retrieval is None:
        raise UserError("no dataset was given: name one, e.g. --dataset held-out.txt")
    quiet_unless_terminal()
    trust = options.trust_remote_code
    config = load_config(model, what="model", trust_remote_code=trust)
    task = get_task(options.task) if options.task else detect_task(model, trust)
    tests = read_tests(options.pairs, options.retrieval, task)
    models = _load(options, model, task, dataset is not None)
    rows, sentences = {}, {}
    if dataset is not None:
        rows = dict.fromkeys(models, _rows(options, dataset, models[""].tokenizer, task, config))
    if tests:
        texts = distinct_texts(tests)
        for prefix, one in models.items():
            sentences[prefix] = sentence_rows(texts, one.model, one.tokenizer, task, options.max_length)
    metrics = {} if dataset is None else _on_dataset(options, models, task, rows[""])
    if tests:
        found = []
        for prefix, one in models.items():
            embeddings = encode(one.model, sentences[prefix], task, one.collator, options.batch_size)
            found.append(run_tests(tests, texts, embeddings))
        metrics |= compared(*found)
    for prefix, one in models.items():
        metrics |= {f"{prefix}{name}": value for name, value in model_size(one.model, one.path).items()}
    if options.measure_speed:
        metrics |= _speed(options, models, task, rows or sentences)
    sequences = len(rows[""]) if rows else 0
    return EvaluationResult(model, dataset, options.teacher, sequences, metrics, options.pairs, options.retrieval)


def _load(options: EvaluateOptions, model: str, task: Task, on_dataset: bool) -> dict[str, _Loaded]:
    """The model and, if there is one, the teacher, by the prefix of their metrics."""
    trust, device = options.trust_remote_code, "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(model, trust_remote_code=trust)
    if tokenizer is None:
        raise UserError(f"model {model!r} has no tokenizer in its folder: save one there")
    named = {"": (model, "model", tokenizer)}
    if options.teacher is not None:
        theirs = load_tokenizer(options.teacher, trust_remote_code=trust)
        if on_dataset:  # the models are compared on the same tokens
            check_tokenizers(tokenizer, theirs)
        named["teacher_"] = (options.teacher, "teacher", theirs or tokenizer)
    elif on_dataset and not task.learns_from_labels:
        raise UserError("an embedding model is measured against its teacher: name one with --teacher")
    loaded = {}
    for prefix, (path, what, own) in named.items():
        network = task.load(path, what=what, trust_remote_code=trust).to(device)
        collator = task.collator(own, options.mlm_probability or DEFAULT_MLM_PROBABILITY)
        loaded[prefix] = _Loaded(path, network, own, collator)
    return loaded


def _rows(options: EvaluateOptions, dataset: str, tokenizer: Any, task: Task, config: Any) -> Any:
    data = held_out_part(read_dataset(dataset, options.dataset_split))
    length = sequence_length(options.max_length, [config], tokenizer, data)
    return first_rows(tokenize(data, tokenizer, task, length, options.text_column), options.max_samples)


def _on_dataset(options: EvaluateOptions, models: dict[str, _Loaded], task: Task, rows: Any) -> dict[str, float]:
    """Metrics of the task."""
    student = models[""]
    source: TargetSource = NoTargets(task)
    if "teacher_" in models:
        source = LiveTargets(models["teacher_"].model, task, options.blocks)
    source.outputs = shared_outputs(student.model, source, student.tokenizer)
    check_dataset(rows, [student.model, *source.models], task, "evaluation")
    device = next(student.model.parameters()).device
    loader = DataLoader(rows, batch_size=options.batch_size, collate_fn=student.collator)
    batches = ({key: value.to(device) for key, value in batch.items()} for batch in loader)
    return task.evaluate(student.model, batches, source.output, EvaluationTools(source.outputs))


def _speed(
    options: EvaluateOptions, models: dict[str, _Loaded], task: Task, rows: dict[str, Dataset]
) -> dict[str, float]:
    """Speed on the first rows."""
    batches = {}
    for prefix, one in models.items():
        some = first_rows(rows[prefix], min(SPEED_ROWS, options.max_samples or SPEED_ROWS))
        batches[prefix] = list(DataLoader(some, batch_size=options.batch_size, collate_fn=one.collator))
    return measure_speed({prefix: one.model for prefix, one in models.items()}, batches, task)
