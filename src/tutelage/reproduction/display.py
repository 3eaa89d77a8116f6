"""Tables of text, and numbers as a report shows them.

Public names: `Table`, `show_number`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_SIZES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Table:
    """A table of plain text; a line break in a cell stays one."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    """The first cell names the row."""
    note: str = ""


def show_number(value: float | None) -> str:
    """A number in four digits at most and a suffix: 1.92M; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "-"
    value = float(f"{value:.4g}")
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.4g}"
    for size, suffix in _SIZES:
        if abs(value) >= size:
            return f"{value / size:.4g}{suffix}"
    return f"{value:.3g}"
