"""What an extraction would take: disk, teacher compute and time, against a live teacher in every run.

Public names: `plan_extraction`, `describe_extraction_plan`, `read_count`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tutelage.core.errors import UserError
from tutelage.targets.rows import DTYPES, RowFormat

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}
_BYTES = {"int8": 1, "uint16": 2, "float16": 2, "int32": 4, "float32": 4}


def read_count(text: str) -> int:
    """`1T`, `250M`, `2e9` or `1000` as a number.

    Raises:
        UserError: anything else.
    """
    unit = text.strip()[-1:].upper()
    unit = unit if unit in _UNITS else ""
    try:
        count = float(text.strip()[: len(text.strip()) - len(unit)].replace(",", "").replace("_", "")) * _UNITS[unit]
    except ValueError:
        raise UserError(f"cannot read {text!r} as a count: write 1T, 250M, 2e9 or 1000") from None
    if not 1 <= count < float("inf"):
        raise UserError(f"a count must be at least 1, got {text!r}")
    return round(count)


def plan_extraction(
    planned: Mapping[str, Any],
    tokens: int,
    *,
    vocabulary: int,
    width: int,
    top_k: int,
    runs: int = 3,
    tokens_per_second: float | None = None,
    predicting: float = 1.0,
) -> dict[str, Any]:
    """Disk by stage and dtype, and teacher compute, for `tokens` tokens of training divided among the stages.

    Args:
        planned: what `plan` returns.
        tokens: of one run, all stages together.
        vocabulary: of the teacher; decides how ids are stored.
        width: R of the stored projections.
        top_k: outputs kept.
        runs: students to be trained.
        tokens_per_second: of the whole teacher's forward pass, measured on the accelerator in mind; a truncated pass is taken
            to be faster by its share of the FLOPs.
        predicting: share of the tokens at which there is an output: all in a causal model, the masked ones, one a row.

    Returns:
        `stages` (name, tokens, `bytes` by dtype, teacher FLOPs and hours) and `total` (the same, `once` and `live`, the latter
        for `runs` runs).

    Raises:
        UserError: a number that makes no sense.
    """
    for name, value in (("projection_dim", width), ("top_k", top_k), ("runs", runs)):
        if value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
    if tokens_per_second is not None and not 0 < tokens_per_second < math.inf:
        raise UserError(f"tokens_per_second must be a positive number, got {tokens_per_second}")
    steps = sum(stage["steps"] for stage in planned["stages"])
    stages = []
    for stage in planned["stages"]:
        share = tokens * stage["steps"] / steps
        per_token = {
            dtype: bytes_per_token(dtype, vocabulary, width if stage["kind"] == "hidden" else None, top_k, predicting)
            for dtype in DTYPES
        }
        flops = share * stage["teacher_flops_per_token"]
        hours = None
        if tokens_per_second is not None:
            whole = planned["teacher_forward_flops_per_token"]
            hours = share * stage["teacher_flops_per_token"] / whole / tokens_per_second / 3600
        stages.append(
            {
                "name": stage["name"],
                "tokens": share,
                "bytes_per_token": per_token,
                "bytes": {dtype: share * size for dtype, size in per_token.items()},
                "teacher_flops": flops,
                "hours": hours,
            }
        )
    flops = sum(stage["teacher_flops"] for stage in stages)
    total_hours = None if tokens_per_second is None else sum(stage["hours"] for stage in stages)
    return {
        "tokens": tokens,
        "width": width,
        "top_k": top_k,
        "runs": runs,
        "stages": stages,
        "total": {
            "bytes": {dtype: sum(stage["bytes"][dtype] for stage in stages) for dtype in DTYPES},
            "once": {"teacher_flops": flops, "hours": total_hours},
            "live": {"teacher_flops": flops * runs, "hours": None if total_hours is None else total_hours * runs},
        },
    }


def bytes_per_token(dtype: str, vocabulary: int, width: int | None, top_k: int, predicting: float = 1.0) -> float:
    """Bytes that a token takes on disk, ids included and what belongs to a whole row left out.

    Args:
        dtype: of the stored values.
        vocabulary: entries.
        width: R of a hidden stage; None is the output stage.
        top_k: outputs kept there.
        predicting: share of the tokens at which there is an output.
    """
    form = RowFormat(dtype, vocabulary, "none", False, "states")
    ids, floats = _BYTES[form.ids], _BYTES[form.floats]
    if width is None:
        return ids + predicting * (top_k * (ids + floats) + floats)
    return ids + width * _BYTES[dtype] + (4 if dtype == "int8" else 0) + 1 / 8


def describe_extraction_plan(found: Mapping[str, Any]) -> str:
    """The plan as text for the terminal."""
    lines = [
        "",
        f"extraction of {_short(found['tokens'])} tokens, projections to {found['width']}, {found['top_k']} outputs kept:",
        f"{'stage':<24}{'tokens':>10}"
        + "".join(f"{dtype:>12}" for dtype in DTYPES)
        + f"{'teacher FLOPs':>16}{'hours':>10}",
    ]

    def row(name: str, tokens: float, sizes: Mapping[str, float], flops: float, hours: float | None) -> str:
        shown = "-" if hours is None else f"{hours:,.1f}"
        cells = "".join(f"{_short(sizes[dtype]) + 'B':>12}" for dtype in DTYPES)
        return f"{name:<24}{_short(tokens):>10}{cells}{flops:>16.3g}{shown:>10}"

    for stage in found["stages"]:
        lines.append(row(stage["name"], stage["tokens"], stage["bytes"], stage["teacher_flops"], stage["hours"]))
    total, runs = found["total"], found["runs"]
    lines.append(row("once", found["tokens"], total["bytes"], total["once"]["teacher_flops"], total["once"]["hours"]))
    live = total["live"]
    hours = "-" if live["hours"] is None else f"{live['hours']:,.1f}"
    lines.append(f"live teacher in {runs} runs: {live['teacher_flops']:.3g} teacher FLOPs, {hours} accelerator-hours")
    if total["once"]["hours"] is None:
        lines.append("hours: give --tokens_per_second, the teacher's forward pass measured on your accelerator")
    return "\n".join(lines)


def _short(value: float) -> str:
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} "
