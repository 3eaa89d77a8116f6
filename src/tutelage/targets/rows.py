"""Rows of an extracted curriculum: from tensors to Arrow columns and back.

A row is one example without its padding. Lists are flat: the states of a row of T tokens are T x R values, its outputs those
of the positions that predict, n x K.

*int8* states have one scale per token, the largest magnitude over 127: tokens of one text differ in norm far more than the
dimensions of a standardised, projected state do.
Shapes: B rows, T positions, R width of the stored states, N positions that predict, K stored outputs."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Features, List, Value

from tutelage.core.errors import UserError, check_range
from tutelage.core.inputs import IGNORED_LABEL
from tutelage.core.records import Record
from tutelage.core.topk import TopK

STATES, SCALE, KEEP = "teacher_states", "teacher_scale", "teacher_keep"
TOP_IDS, LOG_PROBS, LOG_REST = "teacher_top_ids", "teacher_log_probs", "teacher_log_rest"
OUTPUT = "teacher_output"
INPUT_COLUMNS = ("input_ids", "attention_mask", "token_type_ids", "labels")
DTYPES = ("int8", "float16", "float32")
_LABELS, _HIDDEN = ("none", "tokens", "class"), ("states", "pooled")
_LARGEST = 127


@dataclass(frozen=True)
class RowFormat(Record):
    dtype: str  # of states: `int8`, `float16` or `float32`. Log-probabilities are float32 with float32, else float16.
    vocabulary: int  # ids are uint16 up to 65,536 of them, else int32
    label: str  # `none` (labels follow from the ids), `tokens` (a list) or `class` (one number)
    token_types: bool  # whether rows have `token_type_ids`
    content: str  # `states`, `pooled` (one state per row), `top_k`, `whole` (one output per row) or `inputs`
    beside: tuple[str, ...] = ()  # of a joint stage: `states` or `pooled` for each pair, beside the output

    def __post_init__(self) -> None:
        contents = (*_HIDDEN, "top_k", "whole", "inputs")
        known = [("dtype", self.dtype, DTYPES), ("label", self.label, _LABELS), ("content", self.content, contents)]
        for name, value, choices in [*known, *(("beside", content, _HIDDEN) for content in self.beside)]:
            if value not in choices:
                raise UserError(f"unknown {name} {value!r}: use one of {', '.join(choices)}")
        check_range("vocabulary", self.vocabulary, 1)

    @property
    def ids(self) -> str:
        return "uint16" if self.vocabulary <= 1 << 16 else "int32"

    @property
    def floats(self) -> str:
        """Arrow type of log-probabilities and outputs."""
        return "float32" if self.dtype == "float32" else "float16"

    @property
    def hidden(self) -> tuple[str, ...]:
        """`states` or `pooled` for each hidden target of a row."""
        return (self.content,) if self.content in _HIDDEN else self.beside

    @property
    def features(self) -> Features:
        columns: dict[str, Any] = {"example_id": Value("int64"), "content_hash": Value("uint64")}
        columns["input_ids"] = List(Value(self.ids))
        if self.token_types:
            columns["token_type_ids"] = List(Value("uint8"))
        if self.label != "none":
            columns["labels"] = List(Value("int32")) if self.label == "tokens" else Value("int64")
        for number in range(len(self.hidden)):
            columns[numbered(STATES, number)] = List(Value(self.dtype))
            if self.dtype == "int8":
                columns[numbered(SCALE, number)] = List(Value("float32"))
            columns[numbered(KEEP, number)] = List(Value("bool"))
        if self.content == "top_k":
            columns[TOP_IDS] = List(Value(self.ids))
            columns |= {name: List(Value(self.floats)) for name in (LOG_PROBS, LOG_REST)}
        elif self.content == "whole":
            columns[OUTPUT] = List(Value(self.floats))
        return Features(columns)


def numbered(column: str, number: int) -> str:
    """The column of hidden target `number` of a row, from 0."""
    return f"{column}_{number}" if number else column


def lengths_of(batch: Mapping[str, Any]) -> list[int]:
    """Tokens of each row, padding left out; UserError for padding that is not at the end of its row."""
    mask = batch.get("attention_mask")
    if mask is None:
        return [batch["input_ids"].shape[1]] * len(batch["input_ids"])
    lengths = mask.sum(1)
    if not bool((mask.bool() == (torch.arange(mask.shape[1], device=mask.device) < lengths[:, None])).all()):
        raise UserError("rows are padded at their beginning: an extracted curriculum stores rows padded at their end")
    return [int(length) for length in lengths]


def encode_inputs(batch: Mapping[str, Any], example_ids: Sequence[int], form: RowFormat) -> dict[str, pa.Array]:
    """Ids, hashes and what the student reads."""
    lengths = lengths_of(batch)

    def rows_of(column: str) -> list[np.ndarray]:
        return [row[:length] for row, length in zip(batch[column].cpu().numpy(), lengths, strict=True)]

    columns = {
        "example_id": pa.array(example_ids, pa.int64()),
        "content_hash": pa.array([content_hash(row) for row in rows_of("input_ids")], pa.uint64()),
    }
    stored = {"input_ids": form.ids} | ({"token_type_ids": "uint8"} if form.token_types else {})
    for column, kind in (stored | ({"labels": "int32"} if form.label == "tokens" else {})).items():
        columns[column] = _lists(np.concatenate(rows_of(column)), lengths, kind)
    if form.label == "class":
        columns["labels"] = pa.array(batch["labels"].cpu().numpy(), pa.int64())
    return columns


def content_hash(ids: Any) -> int:
    """A hash of a row's token ids, the same on every machine."""
    digest = hashlib.blake2b(np.asarray(ids, dtype="<i8").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def encode_states(
    states: torch.Tensor, keep: torch.Tensor, lengths: Sequence[int], form: RowFormat, number: int = 0
) -> dict[str, pa.Array]:
    """Targets (B, T, R) and which count (B, T); pooled, (B, R) and (B,). `number` is that of the target in its row."""
    if states.dim() == 2:
        lengths, states, keep = [1] * len(states), states[:, None], keep[:, None]
    width = states.shape[-1]
    inside = torch.arange(states.shape[1], device=states.device) < torch.tensor(lengths, device=states.device)[:, None]
    kept_NR = states[inside].float()
    columns = {}
    if form.dtype == "int8":
        scale_N = kept_NR.abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny) / _LARGEST
        kept_NR = (kept_NR / scale_N[:, None]).round().to(torch.int8)
        columns[numbered(SCALE, number)] = _lists(scale_N.cpu().numpy(), lengths, "float32")
    values = kept_NR.cpu().numpy().astype(form.dtype, copy=False)
    if form.dtype == "float16" and not np.isfinite(values).all():
        raise UserError(
            "a projected state is too large for float16: use dtype int8 or float32, or normalize='standardize'"
        )
    columns[numbered(STATES, number)] = _lists(values.reshape(-1), [length * width for length in lengths], form.dtype)
    columns[numbered(KEEP, number)] = _lists(keep[inside].cpu().numpy(), lengths, "bool")
    return columns


def encode_outputs(kept: TopK, counts: Sequence[int], form: RowFormat) -> dict[str, pa.Array]:
    """The largest outputs of N positions, `counts` of them in each row."""
    size = kept.ids.shape[-1]
    flat = [count * size for count in counts]
    columns = {TOP_IDS: _lists(kept.ids.cpu().numpy().reshape(-1), flat, form.ids)}
    # outputs that the teacher rules out have the smallest number of float16, whose probability is zero too
    log_probs, log_rest = (t.clamp_min(torch.finfo(torch.float16).min) for t in (kept.log_probs, kept.log_rest))
    columns[LOG_PROBS] = _lists(log_probs.cpu().numpy().reshape(-1), flat, form.floats)
    return columns | {LOG_REST: _lists(log_rest.cpu().numpy(), counts, form.floats)}


def encode_whole(output_BC: torch.Tensor, form: RowFormat) -> dict[str, pa.Array]:
    """One output per row."""
    values = output_BC.float().cpu().numpy()
    return {OUTPUT: _lists(values.reshape(-1), [values.shape[1]] * len(values), form.floats)}


def _lists(values: np.ndarray, lengths: Sequence[int], kind: str) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    flat = pa.array(values if kind == "bool" else values.astype(kind, copy=False))
    return pa.ListArray.from_arrays(pa.array(offsets), flat)


def decode_inputs(table: pa.Table, form: RowFormat, pad_id: int, with_mask: bool) -> dict[str, torch.Tensor]:
    """What the student reads, padded at the end: `input_ids`, `labels`, and a mask where it is asked for or needed."""
    ids, lengths = _flat(table, "input_ids")
    inside = _inside(lengths)
    batch = {"input_ids": _padded(ids.astype(np.int64), inside, pad_id)}
    if with_mask or not bool(inside.all()):
        batch["attention_mask"] = torch.from_numpy(inside).long()
    if form.token_types:
        batch["token_type_ids"] = _padded(_flat(table, "token_type_ids")[0].astype(np.int64), inside, 0)
    if form.label == "tokens":
        batch["labels"] = _padded(_flat(table, "labels")[0].astype(np.int64), inside, IGNORED_LABEL)
    elif form.label == "class":
        batch["labels"] = torch.from_numpy(table["labels"].to_numpy().copy())
    return batch


def decode_states(
    table: pa.Table, form: RowFormat, width: int, stored_width: int, number: int = 0
) -> dict[str, torch.Tensor]:
    """The first `width` columns of the stored states of hidden target `number`, as they are stored, with their scales, and
    which positions count."""
    values, _ = _flat(table, numbered(STATES, number))
    keep, lengths = _flat(table, numbered(KEEP, number))
    inside = _inside(lengths)
    states = values.reshape(-1, stored_width)[:, :width]
    batch = {STATES: _padded(states, inside, 0), KEEP: _padded(keep, inside, False)}
    if form.dtype == "int8":
        batch[SCALE] = _padded(_flat(table, numbered(SCALE, number))[0], inside, 0)
    if form.hidden[number] == "pooled":
        batch = {name: value[:, 0] for name, value in batch.items()}
    return batch


def decode_outputs(table: pa.Table, k: int) -> dict[str, torch.Tensor]:
    """The largest outputs of the positions that predict, row after row, (N, K) and (N,)."""
    ids, log_probs = _flat(table, TOP_IDS)[0], _flat(table, LOG_PROBS)[0]
    return {
        TOP_IDS: torch.from_numpy(ids.astype(np.int64).reshape(-1, k)),
        LOG_PROBS: torch.from_numpy(log_probs.astype(np.float32).reshape(-1, k)),
        LOG_REST: torch.from_numpy(_flat(table, LOG_REST)[0].astype(np.float32)),
    }


def decode_whole(table: pa.Table) -> dict[str, torch.Tensor]:
    """One output per row, (B, C)."""
    values, _ = _flat(table, OUTPUT)
    return {OUTPUT: torch.from_numpy(values.astype(np.float32).reshape(table.num_rows, -1))}


def dequantized(batch: Mapping[str, torch.Tensor], number: int = 0) -> torch.Tensor:
    """Stored states of hidden target `number` as float32 targets, on the device they are on."""
    states, scale = batch[numbered(STATES, number)].float(), numbered(SCALE, number)
    return states * batch[scale].unsqueeze(-1) if scale in batch else states


def _flat(table: pa.Table, column: str) -> tuple[np.ndarray, np.ndarray]:
    """All values of a list column, and the rows' lengths."""
    chunked = table[column]
    array = chunked.chunk(0) if chunked.num_chunks == 1 else pa.concat_arrays(chunked.chunks)
    values = array.flatten()
    return values.to_numpy(zero_copy_only=False), np.diff(array.offsets.to_numpy())


def _inside(lengths: np.ndarray) -> np.ndarray:
    return np.arange(lengths.max()) < lengths[:, None]


def _padded(values: np.ndarray, inside: np.ndarray, fill: Any) -> torch.Tensor:
    """Values of the positions inside the rows, (N, ...), as a padded (B, T, ...) tensor."""
    if inside.all():
        return torch.from_numpy(np.ascontiguousarray(values).reshape(*inside.shape, *values.shape[1:]).copy())
    padded = np.full((*inside.shape, *values.shape[1:]), fill, dtype=values.dtype)
    padded[inside] = values
    return torch.from_numpy(padded)
