"""What a run trains and on what: from options to models and datasets."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, set_seed

from tutelage.core.errors import LARGEST, UserError, check_positive, check_range, check_texts
from tutelage.core.inputs import usable_positions
from tutelage.targets.extracted import ExtractedTargets
from tutelage.targets.live import LiveTargets
from tutelage.targets.source import NoTargets, TargetSource
from tutelage.tasks.base import Task
from tutelage.tasks.embedded import DEFAULT_EVAL_TEXT, DEFAULT_STUDENT, DEFAULT_TEACHER, DEFAULT_TEXT
from tutelage.tasks.loading import check_weights, load_config, load_tokenizer
from tutelage.tasks.registry import detect_task, get_task
from tutelage.tasks.students import WEIGHTS, is_preset, is_untrained, make_student, student_config
from tutelage.tasks.text import keep_rows, read_dataset, split_dataset, stream_dataset, tokenize
from tutelage.training.checks import check_not_read, check_tokenizers
from tutelage.training.config import CurriculumConfig, option
from tutelage.training.preparation import Given, compare_given, open_extracted
from tutelage.training.resolution import check_made

DEFAULT_LENGTH = 256  # tokens, where nothing is given: long enough to learn from, short enough for a laptop
DEFAULT_MLM_PROBABILITY = 0.3
DEFAULT_STEPS = 200  # of a run that names neither teacher nor data nor budget: under two minutes on 2 cores
DEFAULT_RATE = 1e-2  # of a run with the embedded teacher: it did best of 5e-3, 1e-2 and 2e-2
_DEFAULT_EVAL_SAMPLES = 64
NO_LIMIT = 10**9  # positions of a model that has no limit


@dataclass(frozen=True)
class RunOptions:
    """What is trained, on which data. None means not given."""

    student: str | None = option("Folder, config.json, or preset over the teacher: layers=3,hidden_size=192.")
    dataset: str | None = option("Hub name, `datasets` folder, or .txt/.jsonl/.parquet file.")
    eval_dataset: str | None = option("Evaluation data; default: a split of the dataset, or its end.")
    dataset_split: str | None = option("Split of the dataset to train on.")
    text_column: str = option("Column that holds the text.", "text")
    max_length: int | None = option("Maximum tokens per sequence; default: the model's limit, capped at 256.")
    eval_fraction: float = option("Fraction of the dataset held out where there is no evaluation data.", 0.05)
    max_samples: int | None = option(
        "Evaluate on the first N sequences; default: all, or 64 of the text in the package."
    )
    mlm_probability: float | None = option("Fraction of tokens masked (masked_lm); default: 0.3.")
    streaming: bool = option("Read the dataset only as far as max_steps needs it, e.g. from object storage.", False)

    def __post_init__(self) -> None:
        check_texts(self)
        check_data_numbers(self.max_length, self.max_samples, self.mlm_probability)
        check_range("eval_fraction", self.eval_fraction, 0, 1)


def check_data_numbers(max_length: int | None, max_samples: int | None, mlm_probability: float | None) -> None:
    """Raise UserError for numbers that no run or evaluation can have."""
    check_range("max_length", max_length, 1, LARGEST)
    check_range("max_samples", max_samples, 1, LARGEST)
    check_positive("mlm_probability", mlm_probability)
    check_range("mlm_probability", mlm_probability, 0, 1)


@dataclass(frozen=True)
class RunInputs:
    """Everything that a trainer needs beside its settings."""

    source: TargetSource
    student: nn.Module
    tokenizer: PreTrainedTokenizerBase
    train_dataset: Dataset | None  # None where the target source brings its rows along
    eval_dataset: Dataset
    collator: Any
    names: dict[str, str]  # for reports: teacher, student, dataset

    @property
    def task(self) -> Task:
        """What the models are for."""
        return self.source.task


def with_defaults(options: RunOptions, args: CurriculumConfig) -> tuple[RunOptions, CurriculumConfig]:
    """Copies with the embedded teacher, student, text and budget, where nothing else is named."""
    if args.curriculum_dir is not None:
        return options, args
    args = copy.copy(args)
    if args.teacher_model_name_or_path is None and args.method != "scratch":
        args.teacher_model_name_or_path = DEFAULT_TEACHER
    if args.teacher_model_name_or_path == DEFAULT_TEACHER or args.method == "scratch":
        options = dataclasses.replace(options, student=options.student or DEFAULT_STUDENT)
        if args.learning_rate is None:
            args.learning_rate = DEFAULT_RATE
        if options.dataset is None:
            held_out, count = options.eval_dataset or DEFAULT_EVAL_TEXT, options.max_samples or _DEFAULT_EVAL_SAMPLES
            options = dataclasses.replace(options, dataset=DEFAULT_TEXT, eval_dataset=held_out, max_samples=count)
            if args.max_steps <= 0 and args.num_train_epochs is None:
                args.max_steps = DEFAULT_STEPS
    if options.student is None:
        raise UserError("no student was given: name one, e.g. --student layers=3,hidden_size=192")
    if options.dataset is None:
        raise UserError("no dataset was given: name one, e.g. --dataset corpus.txt")
    return options, args


def load_inputs(options: RunOptions, args: CurriculumConfig, devices: int | None = None) -> RunInputs:
    """Check the options, then load or build models and data; `with_defaults` has been applied.

    The student trains on `devices`; None is those of this run. Raises UserError for whatever is wrong with the options."""
    check_not_read(args.output_dir, options.student, options.dataset, options.eval_dataset)
    if args.curriculum_dir is not None:
        return _from_disk(options, args, args.curriculum_dir)
    assert options.student is not None and options.dataset is not None
    named = args.teacher_model_name_or_path
    teacher_path = None if args.method == "scratch" else named
    reference = named or (DEFAULT_TEACHER if is_preset(options.student) else options.student)
    base = load_config(reference, trust_remote_code=args.trust_remote_code)
    if teacher_path is not None:
        check_weights(teacher_path)
    task = get_task(args.task) if args.task else detect_task(reference, args.trust_remote_code)
    config = student_config(options.student, base, task)
    tokenizer = _tokenizer(reference, options.student, args.trust_remote_code)

    def encode(part: Any) -> Any:
        length = sequence_length(options.max_length, [config, base], tokenizer, part)
        return tokenize(part, tokenizer, task, length, options.text_column)

    rows = _streamed(options, args, devices, encode) if options.streaming else _read(options, encode)
    source: TargetSource = NoTargets(task)
    shape = None
    if teacher_path is not None:
        teacher = task.load(teacher_path, **args.teacher_loading())
        source, shape = LiveTargets(teacher, task, args.blocks), task.teacher_shape(teacher)
    set_seed(args.seed)
    student = make_student(options.student, task, config, shape)
    names = {"teacher": named or "none", "student": options.student, "dataset": options.dataset}
    collator = task.collator(tokenizer, options.mlm_probability or DEFAULT_MLM_PROBABILITY)
    return RunInputs(source, student, tokenizer, *rows, collator, names)


def _tokenizer(reference: str, student: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of the teacher, after comparing it with the student's own if there is one."""
    tokenizer = load_tokenizer(reference, trust_remote_code=trust_remote_code)
    own = None if is_preset(student) else load_tokenizer(student)
    check_tokenizers(own, tokenizer)
    found = tokenizer or own
    if found is None:
        raise UserError(f"found no tokenizer with {reference!r} or the student: save one into its folder")
    return found


def _read(options: RunOptions, encode: Callable[[Any], Any]) -> tuple[Dataset, Dataset]:
    """Training and evaluation rows of a dataset that is read whole."""
    train_part, eval_part = _divided(options)
    train = encode(train_part)
    if eval_part is None:
        return train, _held_out(options, encode)
    with _named(
        f"the held-out part of the dataset ({len(eval_part)} of its rows; name an eval_dataset to use another)"
    ):
        return train, first_rows(encode(eval_part), options.max_samples)


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Say which data a mistake is in."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}") from error


def _divided(options: RunOptions) -> tuple[Any, Any]:
    """Texts to train on, and to evaluate on: None where those are named, and a dataset without splits is not divided."""
    assert options.dataset is not None
    data = read_dataset(options.dataset, options.dataset_split)
    if options.eval_dataset and not isinstance(data, dict):
        return data, None
    train_part, eval_part = split_dataset(data, options.eval_fraction)
    return train_part, None if options.eval_dataset else eval_part


def _held_out(options: RunOptions, encode: Callable[[Any], Any]) -> Dataset:
    """Rows of `eval_dataset`."""
    assert options.eval_dataset is not None
    data = read_dataset(options.eval_dataset)
    with _named(f"eval_dataset {options.eval_dataset!r}"):
        return first_rows(encode(next(iter(data.values())) if isinstance(data, dict) else data), options.max_samples)


def first_rows(rows: Dataset, count: int | None) -> Dataset:
    """The first `count` rows; None is all."""
    return rows if count is None else rows.select(range(min(count, len(rows))))


def _streamed(
    options: RunOptions, args: CurriculumConfig, devices: int | None, encode: Callable[[Any], Any]
) -> tuple[Dataset, Dataset]:
    """Training and evaluation rows of a stream, which has no end to hold out: where no eval data is named, its first rows."""
    assert options.dataset is not None
    if args.max_steps <= 0:
        raise UserError("a stream has no length to count epochs in: set --max_steps")
    count = args.max_steps * args.step_examples(devices or args.world_size)
    rows = encode(stream_dataset(options.dataset, options.dataset_split))
    if options.eval_dataset:
        return keep_rows(rows, count), _held_out(options, encode)
    held_out = options.max_samples or _DEFAULT_EVAL_SAMPLES
    kept = keep_rows(rows, held_out + count)
    if len(kept) <= held_out:
        found = f"the stream has {len(kept)} row(s), too few to hold {held_out} out for evaluation"
        raise UserError(f"{found}: give an --eval_dataset, fewer --max_samples or more data")
    return kept.select(range(held_out, len(kept))), kept.select(range(held_out))


def _from_disk(options: RunOptions, args: CurriculumConfig, folder: str) -> RunInputs:
    """Targets, texts and tokenizer of an extracted curriculum; a teacher or data that are given are only compared."""
    if options.streaming:
        what = "streaming is for the text of a live run or an extraction, but an extracted curriculum"
        raise UserError(f"{what} is always read as needed: leave streaming out")
    source = open_extracted(folder, args)
    task, tokenizer, identity = source.task, source.tokenizer, source.folder.identity
    assert tokenizer is not None
    made: dict[str, Any] = {"mlm_probability": identity.mlm_probability}
    if task.per_position:
        made["max_length"] = identity.longest
    check_made(f"the extracted curriculum in {str(source.folder.store)!r}", made, options)
    student = options.student or str(source.folder.student)
    base = load_config(str(source.folder.teacher_config))
    config = student_config(student, base, task)
    length = options.max_length or identity.longest

    def encode(part: Any) -> Any:
        return tokenize(part, tokenizer, task, length, options.text_column)

    given = None if options.dataset is None else encode(_divided(options)[0])
    own = None if is_preset(student) else load_tokenizer(student)
    compare_given(source, Given(student, None, given, None, own, None), args)
    stored = source.folder.evaluation
    evaluation = _held_out(options, encode) if options.eval_dataset else first_rows(stored, options.max_samples)
    set_seed(args.seed)
    model = _stored_student(args, source, student, config)
    named = options.student or identity.student
    names = {"teacher": identity.teacher.name, "student": named, "dataset": identity.data.name}
    collator = task.collator(tokenizer, identity.mlm_probability or DEFAULT_MLM_PROBABILITY)
    return RunInputs(source, model, tokenizer, None, evaluation, collator, names)


def _stored_student(
    args: CurriculumConfig, source: ExtractedTargets, student: str, config: PreTrainedConfig
) -> nn.Module:
    """The student of a run from disk: with the weights that the extraction gave it, where it has the same shape."""
    folder, task, shape = source.folder.student, source.task, source.folder.identity.teacher.shape
    same = Path(student) == folder or (
        is_untrained(student) and load_config(str(folder), what="student").to_diff_dict() == config.to_diff_dict()
    )
    stored = same and source.folder.curriculum.student_init == "teacher"
    # where the hidden targets are residual, and are read
    needed = None if (args.method or source.method) == "one_shot" else source.folder.settings.get("student_init")
    asked = args.student_init or needed
    if stored and (asked or args.value("student_init")) == "teacher":
        model = make_student(str(folder), task, config, shape)
        model.__dict__[WEIGHTS] = "teacher"
        return model
    if args.student_init == "teacher" or (asked == "teacher" and is_untrained(student)):
        how = "extract with --student_init teacher and this student, or train with --student_init random"
        if needed:
            how = (
                "leave the student out, or extract again for this one; for students of several shapes, extract with "
                "--student_init random or a --projection_dim wider than the student"
            )
        where = f"the extracted curriculum in {str(source.folder.store)!r}"
        raise UserError(f"{where} has no weights from the teacher for this student: {how}")
    return make_student(str(folder / "config.json") if stored else student, task, config, shape)


def sequence_length(
    asked: int | None, configs: Sequence[PreTrainedConfig], tokenizer: PreTrainedTokenizerBase, data: Any
) -> int:
    """Tokens of the longest sequence: what was asked, else what the models take, at most 256 for text."""
    positions = min(usable_positions(config) or NO_LIMIT for config in configs)
    if asked is not None:
        check_length(asked, positions)
        return asked
    if "input_ids" in (data.column_names or next(iter(data))):  # a stream may learn its columns from its rows
        return positions
    return min(positions, tokenizer.model_max_length, DEFAULT_LENGTH)


def check_length(asked: int, positions: int) -> None:
    """Raise UserError where sequences are longer than the model's positions."""
    if asked > positions:
        raise UserError(f"max_length {asked} is longer than the model's {positions} positions: lower it")
