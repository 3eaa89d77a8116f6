"""What a run trains and on what; the rest of its settings are `CurriculumConfig`.

Public names: `RunArguments`, `Run`, `fill_defaults`, `prepare_run`, `sequence_length`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, set_seed

from tutelage.core.errors import UserError
from tutelage.core.inputs import usable_positions
from tutelage.targets.extracted import ExtractedCurriculum
from tutelage.tasks.base import Task, detect_task, get_task, load_task_model
from tutelage.tasks.embedded import DEFAULT_EVAL_TEXT, DEFAULT_STUDENT, DEFAULT_TEACHER, DEFAULT_TEXT
from tutelage.tasks.embedding import EmbeddingShape
from tutelage.tasks.loading import check_weights, load_config, load_tokenizer
from tutelage.tasks.students import is_preset, make_student, student_config
from tutelage.tasks.text import keep_rows, make_collator, read_dataset, split_dataset, stream_dataset, tokenize
from tutelage.training.checks import check_tokenizers
from tutelage.training.config import CurriculumConfig

# Longest block when nothing is said: long enough to learn from, short enough for a laptop.
DEFAULT_LENGTH = 256
# Budget of a run that names neither teacher nor data nor budget: under two minutes on 2 cores.
_DEFAULT_STEPS = 200
_NO_LIMIT = 10**9
# Rows held out of a stream where nothing is said.
_STREAM_EVAL_SAMPLES = 64


@dataclass
class RunArguments:
    """What is trained, on which data."""

    student: str | None = field(
        default=None,
        metadata={"help": "Student: folder, config.json, or preset over the teacher, e.g. layers=3,hidden_size=192."},
    )
    dataset: str | None = field(
        default=None, metadata={"help": "Hub name, `datasets` folder, or .txt/.jsonl/.parquet file."}
    )
    eval_dataset: str | None = field(
        default=None, metadata={"help": "Evaluation data; unset takes a split or the dataset's end."}
    )
    dataset_split: str | None = field(default=None, metadata={"help": "Split of the dataset to train on."})
    text_column: str = field(default="text", metadata={"help": "Column that holds the text."})
    max_length: int | None = field(default=None, metadata={"help": "Tokens a sequence; unset is at most 256."})
    eval_fraction: float = field(default=0.05, metadata={"help": "Share held out where there is no eval data."})
    eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on the first so many sequences."})
    mlm_probability: float = field(default=0.3, metadata={"help": "Share of tokens masked (masked_lm)."})
    streaming: bool = field(
        default=False,
        metadata={"help": "Read the dataset only as far as max_steps needs it, e.g. from object storage."},
    )


@dataclass
class Run:
    """Everything a trainer needs, made from the settings."""

    task: Task
    student: nn.Module
    teacher: nn.Module | None
    tokenizer: PreTrainedTokenizerBase
    train_dataset: Dataset | None
    """None where it comes from a curriculum on disk."""
    eval_dataset: Dataset
    collator: Any
    names: dict[str, str]
    """For reports: teacher, student, dataset."""


def fill_defaults(run: RunArguments, args: CurriculumConfig) -> None:
    """The embedded teacher, student, text and budget, where nothing else is named."""
    if args.curriculum_dir is not None:
        if run.student is None:
            raise UserError("name a student, e.g. --student layers=3,hidden_size=192")
        return
    if args.teacher_model_name_or_path is None and args.method != "scratch":
        args.teacher_model_name_or_path = DEFAULT_TEACHER
    if args.teacher_model_name_or_path == DEFAULT_TEACHER or args.method == "scratch":
        run.student = run.student or DEFAULT_STUDENT
        if run.dataset is None:
            run.dataset, run.eval_dataset = DEFAULT_TEXT, run.eval_dataset or DEFAULT_EVAL_TEXT
            run.eval_samples = run.eval_samples or 64
            if args.max_steps <= 0 and args.num_train_epochs == type(args).num_train_epochs:
                args.max_steps = _DEFAULT_STEPS
    if run.student is None:
        raise UserError("name a student, e.g. --student layers=3,hidden_size=192")
    if run.dataset is None:
        raise UserError("name a dataset, e.g. --dataset corpus.txt")


def prepare_run(run: RunArguments, args: CurriculumConfig, devices: int | None = None) -> Run:
    """Check the settings, then load or build models and data; `fill_defaults` has been applied.

    Args:
        run, args: the settings.
        devices: that the student trains on; None is those of this run.

    Raises:
        UserError: whatever is wrong with the settings, before any training.
    """
    if args.curriculum_dir is not None:
        return _prepare_from_disk(run, args, args.curriculum_dir)
    assert run.student is not None and run.dataset is not None
    teacher_path = args.teacher_model_name_or_path
    reference = teacher_path or (DEFAULT_TEACHER if is_preset(run.student) else run.student)
    base = load_config(reference, trust_remote_code=args.trust_remote_code)
    if teacher_path is not None and args.method != "scratch":
        check_weights(teacher_path)
    task = get_task(args.task) if args.task else detect_task(reference)
    config = student_config(run.student, base)
    tokenizer = load_tokenizer(reference, trust_remote_code=args.trust_remote_code)
    own = None if is_preset(run.student) else load_tokenizer(run.student)
    if tokenizer is None and own is None:
        raise UserError(f"found no tokenizer with {reference!r} or the student: save one into its folder")
    check_tokenizers(own, tokenizer)
    tokenizer = tokenizer or own
    assert tokenizer is not None

    def encode(part: Any) -> Any:
        length = sequence_length(run.max_length, [config, base], tokenizer, part)
        return tokenize(part, tokenizer, task, length, run.text_column)

    train_dataset, eval_dataset = _streamed(run, args, devices, encode) if run.streaming else _read(run, encode)
    if task.name == "sequence_classification":
        _check_labels(train_dataset, int(base.num_labels or 0))
    teacher = None
    if teacher_path is not None and args.method != "scratch":
        teacher = load_task_model(task, teacher_path, **args.teacher_loading())
    set_seed(args.seed)
    student = make_student(run.student, task, config, teacher)
    names = {"teacher": teacher_path or "none", "student": run.student, "dataset": run.dataset}
    collator = make_collator(task, tokenizer, run.mlm_probability)
    return Run(task, student.float(), teacher, tokenizer, train_dataset, eval_dataset, collator, names)


def _read(run: RunArguments, encode: Callable[[Any], Any]) -> tuple[Dataset, Dataset]:
    """Training and evaluation rows of a dataset that is read whole."""
    assert run.dataset is not None
    data = read_dataset(run.dataset, run.dataset_split)
    if run.eval_dataset:
        train_part = split_dataset(data, run.eval_fraction)[0] if isinstance(data, dict) else data
        return encode(train_part), _held_out(run, encode)
    train_part, eval_part = split_dataset(data, run.eval_fraction)
    return encode(train_part), _first(encode(eval_part), run.eval_samples)


def _held_out(run: RunArguments, encode: Callable[[Any], Any]) -> Dataset:
    """Rows of `eval_dataset`."""
    assert run.eval_dataset is not None
    data = read_dataset(run.eval_dataset)
    return _first(encode(next(iter(data.values())) if isinstance(data, dict) else data), run.eval_samples)


def _first(rows: Dataset, count: int | None) -> Dataset:
    return rows if count is None else rows.select(range(min(count, len(rows))))


def _streamed(
    run: RunArguments, args: CurriculumConfig, devices: int | None, encode: Callable[[Any], Any]
) -> tuple[Dataset, Dataset]:
    """Training and evaluation rows of a stream, which has no end to hold out: where no eval data is named, its first rows."""
    assert run.dataset is not None
    if args.max_steps <= 0:
        raise UserError("a stream has no length to count epochs in: set --max_steps")
    count = args.max_steps * args.step_examples(devices or args.world_size)
    rows = encode(stream_dataset(run.dataset, run.dataset_split))
    if run.eval_dataset:
        return keep_rows(rows, count), _held_out(run, encode)
    held_out = run.eval_samples or _STREAM_EVAL_SAMPLES
    kept = keep_rows(rows, held_out + count)
    if len(kept) <= held_out:
        raise UserError(
            f"the stream has {len(kept)} row(s), too few to hold {held_out} out for evaluation: give an --eval_dataset, "
            "fewer --eval_samples or more data"
        )
    return kept.select(range(held_out, len(kept))), kept.select(range(held_out))


def _prepare_from_disk(run: RunArguments, args: CurriculumConfig, folder: str) -> Run:
    """A run whose targets, texts and tokenizer lie in an extracted curriculum; a teacher or data given are only compared."""
    assert run.student is not None
    if run.streaming:
        raise UserError(
            "streaming is for the text of a live run or an extraction: a curriculum is always read as needed"
        )
    stored = ExtractedCurriculum(folder, check=False)  # the trainer checks
    task, tokenizer = get_task(stored.identity["task"]), stored.tokenizer
    assert tokenizer is not None
    base = load_config(str(stored.teacher_config))
    config = student_config(run.student, base)
    check_tokenizers(None if is_preset(run.student) else load_tokenizer(run.student), tokenizer)
    given = teacher = None
    length = run.max_length or stored.identity["longest"]

    def encode(part: Any) -> Any:
        return tokenize(part, tokenizer, task, length, run.text_column)

    if run.dataset is not None:
        data = read_dataset(run.dataset, run.dataset_split)
        part = data if not isinstance(data, dict) and run.eval_dataset else split_dataset(data, run.eval_fraction)[0]
        given = encode(part)
    evaluation = _held_out(run, encode) if run.eval_dataset else _first(stored.evaluation, run.eval_samples)
    if args.teacher_model_name_or_path is not None:
        teacher = load_task_model(task, args.teacher_model_name_or_path, **args.teacher_loading())
    shape = stored.identity["teacher"]["embedding"]
    set_seed(args.seed)
    student = make_student(run.student, task, config, None if shape is None else EmbeddingShape(**shape))
    names = {
        "teacher": stored.identity["teacher"]["name"],
        "student": run.student,
        "dataset": stored.identity["data"]["name"],
    }
    collator = make_collator(task, tokenizer, run.mlm_probability)
    return Run(task, student.float(), teacher, tokenizer, given, evaluation, collator, names)


def sequence_length(
    asked: int | None, configs: Sequence[PreTrainedConfig], tokenizer: PreTrainedTokenizerBase, data: Any
) -> int:
    """Tokens of the longest sequence: what was asked, else what the models take, at most 256 for text."""
    positions = min(usable_positions(config) or _NO_LIMIT for config in configs)
    if asked is not None and asked > positions:
        raise UserError(f"max_length {asked} is longer than the model's {positions} positions: lower it")
    if asked is not None:
        return asked
    if "input_ids" in (data.column_names or next(iter(data))):  # a stream may learn its columns from its rows
        return positions
    return min(positions, tokenizer.model_max_length, DEFAULT_LENGTH)


def _check_labels(data: Dataset, classes: int) -> None:
    labels = data["labels"] if "labels" in data.column_names else []
    wrong = next((label for label in labels if not 0 <= label < classes), None)
    if wrong is not None:
        raise UserError(f"the dataset has the label {wrong}: the teacher has classes 0 to {classes - 1}")


def count_parameters(model: nn.Module) -> int:
    """Parameters of a model, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())
