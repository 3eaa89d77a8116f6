"""Tables, numbers and plots as reports show them."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from tutelage.runs.escaping import as_cell, as_markdown
from tutelage.runs.plots import save_figure

_SIZES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Table:
    """A table of plain text; a line break in a cell is kept."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]  # the first cell names the row
    note: str = ""

    def to_markdown(self) -> str:
        """The rows, and the note below them."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        text = "\n".join(f"| {' | '.join(map(as_cell, line))} |" for line in lines)
        return f"{text}\n\n{as_markdown(self.note)}" if self.note else text


def listed(values: Iterable[Any]) -> str:
    """Values with commas between them."""
    return ", ".join(map(str, values))


def show_number(value: float | None) -> str:
    """At most four digits and a suffix, e.g. 1.92M; a dash where there is no number."""
    if value is None or not math.isfinite(value):
        return "-"
    value = float(f"{value:.4g}")
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.4g}"
    for size, suffix in _SIZES:
        if abs(value) >= size:
            return f"{value / size:.4g}{suffix}"
    return f"{value:.3g}"


def save_plot(figure: Figure, path: Path) -> None:
    """Write a figure, with a grid and a legend in each panel that has labelled lines."""
    for axis in figure.axes:
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    save_figure(figure, path)
