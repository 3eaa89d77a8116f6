"""Read, tokenise and pack datasets."""

import atexit
import functools
import itertools
import json
import shutil
import tempfile
import uuid
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk
from transformers import PreTrainedTokenizerBase

from tutelage.core.errors import UserError, as_user_error, reason_of
from tutelage.io.store import Store
from tutelage.tasks.base import Task
from tutelage.tasks.pieces import token_ids, truncated

_BUILDERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_OPTIONS = {".txt": {"keep_linebreaks": True}}
_PACKED_TOGETHER = 20_000  # documents or lines whose tokens are packed as one text
_SAMPLE = 100  # rows of a stream that are checked before it is read

Rows = TypeVar("Rows", Dataset, IterableDataset)


def read_dataset(path: str, split: str | None = None) -> Dataset | DatasetDict:
    """Read a Hub dataset, a folder saved by `datasets`, or a .txt/.jsonl/.parquet file; the latter two also by fsspec URL.
    UserError for missing data, an unknown file format, a text file that is not UTF-8, and an empty dataset."""
    file = Path(path)
    if "://" in path:
        data = _read_url(path)
    elif file.is_file():
        data = _read_file(file)
    elif file.is_dir():
        try:
            data = load_from_disk(path).with_format(None)  # which the folder keeps
        except FileNotFoundError as error:
            raise UserError(
                f"dataset folder {path!r} was not written by datasets' save_to_disk; give a .txt, .jsonl or .parquet file"
            ) from error
        except IndexError as error:  # how `datasets` reads a folder saved without rows
            raise _empty(path) from error
        except Exception as error:  # each damaged file has its own
            raise UserError(f"could not read dataset folder {path!r}: {reason_of(error)}; save it again") from error
    elif file.suffix in _BUILDERS:
        raise UserError(f"no dataset file {path!r}: give an existing file")
    else:
        try:
            data = load_dataset(path)
        except Exception as error:
            raise UserError(
                f"no dataset {path!r}: there is no local file or folder of that name, and it was not found on the Hub "
                f"({reason_of(error)})"
            ) from error
    splits = data if isinstance(data, DatasetDict) else {}
    if split is not None:
        if split not in splits:
            raise UserError(f"dataset {path!r} has no split {split!r}: it has {', '.join(splits) or 'no splits'}")
        data = splits[split]
    if not any(len(part) for part in (splits.values() if data is splits else [data])):
        raise _empty(path)
    return data


def _empty(path: str | Path) -> UserError:
    return UserError(f"dataset {str(path)!r} is empty: it needs at least one example")


def _read_file(file: Path) -> Dataset:
    if file.suffix not in _BUILDERS:
        raise UserError(f"dataset {str(file)!r} ends in {file.suffix!r}: expected .txt, .jsonl or .parquet")
    if file.stat().st_size == 0:
        raise _empty(file)
    if file.suffix != ".parquet":
        _check_utf8(file)
    options = {"data_files": str(file), "split": "train", **_OPTIONS.get(file.suffix, {})}
    with as_user_error(f"could not read {str(file)!r} as {file.suffix}"):  # each format has its own errors
        return load_dataset(_BUILDERS[file.suffix], **options)


def _check_utf8(file: Path) -> None:
    offset = 0
    with file.open("rb") as handle:
        for line in handle:
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{file} is not UTF-8: byte {line[error.start]:#04x} near offset {offset + error.start}; "
                    f"convert it, e.g. `iconv -f ISO-8859-1 -t UTF-8 {file}`"
                ) from error
            offset += len(line)


def _read_url(url: str) -> Dataset | DatasetDict:
    """Fetch a file and read it, or read a folder that `datasets` saved."""
    folder, _, name = url.rpartition("/")
    store = Store(folder)  # deletes the fetched file at its own end
    try:
        return read_dataset(str(store.fetch(name))) if Path(url).suffix in _BUILDERS else load_from_disk(url)
    except Exception as error:  # each file system has its own
        raise UserError(f"could not read dataset {url!r}: {reason_of(error)}") from error


def stream_dataset(path: str, split: str | None = None) -> IterableDataset:
    """Like `read_dataset`, but rows are fetched only as they are iterated. A URL may contain a `*`, for many files."""
    suffix, split_name = Path(path).suffix, split or "train"
    options: dict[str, Any] = {"path": path, "split": split_name, "streaming": True}
    if "://" not in path and not any(mark in path for mark in "*?["):
        if Path(path).exists() or suffix in _BUILDERS:
            data = read_dataset(path, split)
            rows = _training_split(data) if isinstance(data, DatasetDict) else data
            local = rows.to_iterable_dataset()
            # forgotten by `datasets`; the lines of a text file are packed as one document
            local.info.builder_name = rows.builder_name
            return local
    elif suffix in _BUILDERS:
        options |= {"path": _BUILDERS[suffix], "data_files": {split_name: path}, **_OPTIONS.get(suffix, {})}
    elif "://" in path:
        options |= {"path": "arrow", "data_files": {split_name: _saved_files(path, split_name)}}
    try:
        stream = load_dataset(**options)
        if next(iter(stream), None) is None:
            raise UserError("there is no file, or no file contains a row")
    except Exception as error:  # each file system has its own
        raise UserError(f"could not stream dataset {path!r}: {reason_of(error)}") from error
    return stream


def _saved_files(url: str, split: str) -> list[str]:
    """The data files in a folder that `datasets` saved; it may contain more files."""
    try:
        store = Store(url)
        if store.exists("dataset_dict.json"):
            url = f"{url.rstrip('/')}/{split or 'train'}"
            store = Store(url)
        return [f"{url.rstrip('/')}/{file['filename']}" for file in json.loads(store.read("state.json"))["_data_files"]]
    except Exception as error:  # each file system has its own
        raise UserError(f"{url!r} was not written by datasets' save_to_disk: {reason_of(error)}") from error


def keep_rows(stream: IterableDataset, count: int) -> Dataset:
    """The first `count` rows of a stream, or all if there are fewer, in a memory-mapped file that is deleted at exit."""
    folder = tempfile.mkdtemp(prefix="tutelage-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    first = functools.partial(itertools.islice, stream, count)
    with as_user_error("could not read the rows of the stream"):  # such as rows of different types
        return Dataset.from_generator(first, cache_dir=folder, fingerprint=uuid.uuid4().hex)


def split_dataset(data: Dataset | DatasetDict, eval_fraction: float) -> tuple[Dataset, Dataset]:
    """Training and evaluation parts: the dataset's own splits, else the last `eval_fraction` of its examples."""
    if isinstance(data, DatasetDict):
        named = [data[name] for name in ("validation", "eval", "test") if name in data]
        data = _training_split(data)
        if named:
            return data, named[0]
    count = max(1, round(len(data) * eval_fraction))
    if len(data) <= count:
        found = f"the dataset has {len(data)} example(s), too few to hold {count} out for evaluation"
        raise UserError(f"{found}: give an --eval_dataset or more data")
    return data.select(range(len(data) - count)), data.select(range(len(data) - count, len(data)))


def _training_split(data: DatasetDict) -> Dataset:
    return data["train"] if "train" in data else next(iter(data.values()))


def tokenize(
    data: Rows, tokenizer: PreTrainedTokenizerBase, task: Task, max_length: int, text_column: str = "text"
) -> Rows:
    """Turn text into model inputs; a stream is tokenised as it is read and has the same rows.

    Language models get packed blocks of exactly `max_length` tokens, and the remainder is dropped. In a causal model's, each
    document begins with what the tokenizer puts before a text (its beginning-of-text token, if it has one) and ends with the
    end-of-text token; the lines of a .txt file are joined as they are, into one document without this end. Other tasks get
    one truncated example per row. A dataset with `input_ids` is only checked for its length. Raises UserError: a column is
    missing or has a different type, rows are longer than `max_length`, or there is too little text for one block."""
    streamed = isinstance(data, IterableDataset)
    sample = data.with_format(None)
    if isinstance(sample, IterableDataset):
        with as_user_error("could not read the first rows of the stream"):  # such as rows of different types
            sample = Dataset.from_list(list(sample.take(_SAMPLE)))
    columns = sample.column_names
    if "input_ids" in columns:
        check_token_ids(sample, "the dataset")
        longest = max(len(ids or ()) for ids in sample["input_ids"])
        if longest > max_length:
            found = f"the dataset has a sequence of {longest} tokens, the model takes {max_length}: truncate it"
            raise UserError(f"{found}, or pass text and let tutelage tokenise it")
        return data
    needed = [text_column, *(column for column in task.columns if column != "text")]
    if missing := [column for column in needed if column not in columns]:
        raise UserError(
            f"the dataset has no column {missing[0]!r} (it has {', '.join(columns)}); "
            f"task {task.name} needs {' and '.join(needed)}: rename the column or set --text_column"
        )
    _check_column(sample, text_column, "str", "text")
    special = tokenizer.num_special_tokens_to_add() if not task.causal else 1  # a causal model predicts from 1 token on
    if max_length <= special:
        raise UserError(f"max_length {max_length} is too short: task {task.name} needs at least {special + 1} tokens")
    if not task.per_position:
        if "label" in needed:
            _check_column(sample, "label", "int", "class numbers")
        rows = data.map(
            lambda batch: truncated(batch[text_column], tokenizer, max_length),
            batched=True,
            remove_columns=[name for name in columns if name != "label" or name not in needed],
            **({} if streamed else {"desc": "Tokenising"}),
        )
        return rows.rename_column("label", "labels") if "label" in needed else rows
    # the lines of one text file, with their line breaks, are no separate documents
    lines = data.builder_name == "text" and any(line.endswith("\n") for line in sample[:100][text_column])
    packed = data.map(
        lambda batch, numbers: _pack(batch[text_column], tokenizer, task, max_length, numbers if lines else []),
        batched=True,
        with_indices=True,
        batch_size=_PACKED_TOGETHER,
        remove_columns=columns,
        **({} if streamed else {"desc": "Packing"}),
    )
    if next(iter(packed), None) is None:
        raise UserError(f"the text is too short for one block of {max_length} tokens: lower --max_length or add text")
    return packed


def check_token_ids(data: Dataset, where: str) -> None:
    """Raise UserError for a column `input_ids` that does not have lists of whole numbers."""
    kind = data.features["input_ids"]
    if "int" not in str(getattr(getattr(kind, "feature", None), "dtype", "")):
        raise UserError(f"{where} has input_ids of the type {kind}: each row needs a list of whole numbers")


def _check_column(data: Dataset, column: str, wanted: str, meaning: str) -> None:
    dtype = str(getattr(data.features[column], "dtype", data.features[column]))
    if wanted not in dtype or dtype.startswith("List"):
        raise UserError(f"column {column!r} of the dataset has the type {dtype}: expected {meaning}")
    if data.data.column(column).null_count:
        raise UserError(f"column {column!r} of the dataset has rows without a value: drop them first")


def _pack(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, task: Task, max_length: int, lines: list[int]
) -> dict[str, Any]:
    """Blocks of `max_length` tokens. `lines` are the numbers of the texts if they are the lines of one document, else empty."""
    if lines:
        texts = ["".join(texts)]
    ids = token_ids(texts, tokenizer)
    before, after = _special_tokens(tokenizer)
    if task.causal:  # a block may begin anywhere in a document
        end = after if tokenizer.eos_token_id in (None, *after) else [*after, tokenizer.eos_token_id]
        begin = before if not lines or lines[0] == 0 else []
        ahead, behind = (np.array(part, dtype=np.int64) for part in (begin, [] if lines else end))
        ids = [np.concatenate([ahead, document, behind]) for document in ids]
        before, after = [], []
    stream = np.concatenate(ids)
    body = max_length - len(before) - len(after)
    count = len(stream) // body
    inner = stream[: count * body].reshape(count, body)
    sides = [np.tile(np.array(part, dtype=np.int64), (count, 1)) for part in (before, after)]
    blocks = np.concatenate([sides[0], inner, sides[1]], axis=1)
    return {"input_ids": list(blocks)}  # the collator makes the labels


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What a tokenizer puts before and after a text, e.g. [CLS] and [SEP]."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    ids, special = encoded["input_ids"], encoded["special_tokens_mask"]
    if all(special):  # a vocabulary without this letter
        return ids, []
    return ids[: special.index(0)], ids[len(special) - special[::-1].index(0) :]
