"""What an extraction would take: disk, teacher compute and time, against a live teacher in every run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tutelage.core.errors import UserError
from tutelage.core.records import Record
from tutelage.targets.folder import check_storable
from tutelage.targets.rows import DTYPES, RowFormat

if TYPE_CHECKING:
    from tutelage.runs.plan import Plan

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}
_BYTES = {"int8": 1, "uint16": 2, "float16": 2, "int32": 4, "float32": 4}


def read_count(text: str) -> int:
    """`1T`, `250M`, `2e9` or `1000` as a number; UserError for anything else."""
    digits = text.strip().upper().replace(",", "").replace("_", "")
    unit = digits[-1:] if digits[-1:] in _UNITS else ""
    try:
        count = float(digits.removesuffix(unit)) * _UNITS[unit]
    except ValueError:
        raise UserError(f"cannot read {text!r} as a count: write 1T, 250M, 2e9 or 1000") from None
    if not 1 <= count < float("inf"):
        raise UserError(f"a count must be at least 1, got {text!r}")
    return round(count)


@dataclass(frozen=True)
class ExtractionRequest:
    """What an extraction is planned for."""

    tokens: int  # of one run, all stages together
    width: int  # R of the stored projections
    top_k: int  # outputs kept
    runs: int = 3  # students to be trained
    tokens_per_second: float | None = None
    """Of the whole teacher's forward pass, measured on the accelerator in mind; a truncated pass is taken to be faster in
    proportion to its FLOPs."""
    predicting: float = 1.0
    """Fraction of the tokens at which there is an output: all in a causal model, the masked ones, one per row."""


@dataclass(frozen=True)
class StageExtraction(Record):
    """What a stage takes: disk by dtype, teacher compute and time."""

    name: str
    tokens: float
    bytes_per_token: dict[str, float]
    bytes: dict[str, float]
    teacher_flops: float
    hours: float | None  # None where the teacher's pace is unknown


@dataclass(frozen=True)
class ExtractionPlan(Record):
    """An extraction that was not run."""

    tokens: int
    width: int
    top_k: int
    runs: int
    stages: tuple[StageExtraction, ...]

    @property
    def bytes(self) -> dict[str, float]:
        """Of all stages, by dtype."""
        return {dtype: sum(stage.bytes[dtype] for stage in self.stages) for dtype in DTYPES}

    @property
    def teacher_flops(self) -> float:
        """Of the teacher, run once."""
        return sum(stage.teacher_flops for stage in self.stages)

    @property
    def hours(self) -> float | None:
        """Accelerator-hours of the teacher, run once; None where its pace is unknown."""
        hours = [stage.hours for stage in self.stages if stage.hours is not None]
        return sum(hours) if len(hours) == len(self.stages) else None


def plan_extraction(planned: Plan, request: ExtractionRequest) -> ExtractionPlan:
    """Disk by stage and dtype, and teacher compute, for tokens of training that are divided among the stages; UserError for a
    curriculum that no extraction is made of."""
    check_storable(planned.curriculum)
    steps = planned.curriculum.total_steps
    stages = []
    for stage in planned.stages:
        tokens = request.tokens * stage.steps / steps
        widths, outputs = [request.width] * stage.targets, request.top_k if stage.output else None
        what = (planned.vocabulary, widths, outputs, request.predicting)
        per_token = {dtype: bytes_per_token(dtype, *what) for dtype in DTYPES}
        hours = None
        if request.tokens_per_second is not None:
            depth = stage.teacher_flops_per_token / planned.teacher_forward_flops_per_token
            hours = tokens * depth / request.tokens_per_second / 3600
        sizes = {dtype: tokens * size for dtype, size in per_token.items()}
        flops = tokens * stage.teacher_flops_per_token
        stages.append(StageExtraction(stage.name, tokens, per_token, sizes, flops, hours))
    return ExtractionPlan(request.tokens, request.width, request.top_k, request.runs, tuple(stages))


def bytes_per_token(
    dtype: str, vocabulary: int, widths: Sequence[int], top_k: int | None, predicting: float = 1.0
) -> float:
    """Bytes per token on disk, with its id and without what is stored once per row.

    `widths` are R of the hidden targets; `top_k` outputs are stored at the fraction `predicting` of tokens, None for none."""
    form = RowFormat(dtype, vocabulary, "none", False, "states")
    ids, floats = _BYTES[form.ids], _BYTES[form.floats]
    outputs = 0.0 if top_k is None else predicting * (top_k * (ids + floats) + floats)
    per_state = (4 if dtype == "int8" else 0) + 1 / 8
    return ids + outputs + sum(width * _BYTES[dtype] + per_state for width in widths)


def describe_extraction_plan(found: ExtractionPlan) -> str:
    """The plan as text for the terminal."""
    heads = "".join(f"{dtype:>12}" for dtype in DTYPES)
    lines = [
        f"\nextraction of {_short(found.tokens)} tokens, projections to {found.width}, {found.top_k} outputs kept:",
        f"{'stage':<24}{'tokens':>10}{heads}{'teacher FLOPs':>16}{'hours':>10}",
    ]

    def row(name: str, tokens: float, part: StageExtraction | ExtractionPlan) -> str:
        cells = "".join(f"{_short(part.bytes[dtype]) + 'B':>12}" for dtype in DTYPES)
        return f"{name:<24}{_short(tokens):>10}{cells}{part.teacher_flops:>16.3g}{_hours(part.hours):>10}"

    lines += [row(stage.name, stage.tokens, stage) for stage in found.stages]
    lines.append(row("once", found.tokens, found))
    live = None if found.hours is None else found.hours * found.runs
    flops = f"{found.teacher_flops * found.runs:.3g} teacher FLOPs"
    lines.append(f"live teacher in {found.runs} runs: {flops}, {_hours(live)} accelerator-hours")
    if found.hours is None:
        lines.append("hours: give --tokens_per_second, the teacher's forward pass measured on your accelerator")
    return "\n".join(lines)


def _hours(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"


def _short(value: float) -> str:
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} "
