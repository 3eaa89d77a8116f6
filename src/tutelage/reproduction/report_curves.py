"""The curves of a comparison: each method's seeds, and their median and range, against each cost."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from tutelage.reproduction.display import show_number
from tutelage.reproduction.results import Comparison, MethodResult
from tutelage.reproduction.statistics import rounded
from tutelage.runs import plots
from tutelage.runs.escaping import as_label

_DIGITS = 6  # enough for a plot, and half the page's data
AXES = {"samples": "training samples", "flops": plots.AXES["flops"], "seconds": plots.AXES["seconds"]}
_DASHES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}  # plotly's name: matplotlib's
_BAND_POINTS = 400  # points of a median in the page, at most
_WIDE_LEGEND = 45  # characters of a name; the legend of longer ones has one column


@dataclass(frozen=True)
class SeedCurve:
    """The metric of one run."""

    seed: int
    x: list[float]
    y: list[float]


@dataclass(frozen=True)
class Band:
    """Median and range over runs."""

    x: list[float]
    median: list[float]
    low: list[float]
    high: list[float]


@dataclass(frozen=True)
class AxisCurves:
    """A method against one cost."""

    runs: tuple[SeedCurve, ...]
    band: Band


@dataclass(frozen=True)
class MethodCurves:
    """A method and how it is drawn."""

    name: str
    color: str
    dash: str  # as plotly names it
    axes: Mapping[str, AxisCurves]


def method_curves(comparison: Comparison) -> tuple[MethodCurves, ...]:
    """The curves of every method, each with a different colour and dash."""
    looks = itertools.cycle((color, dash) for dash in _DASHES for color in plots.COLORS)
    return tuple(
        MethodCurves(method.name, *look, {axis: _against(axis, method, comparison.metric) for axis in AXES})
        for method, look in zip(comparison.methods, looks, strict=False)
    )


def _against(axis: str, method: MethodResult, metric: str) -> AxisCurves:
    lines = []
    for run in method.runs:
        points = sorted((point.cost(axis), point.metrics[metric]) for point in run.curve if metric in point.metrics)
        if points:
            line = SeedCurve(
                run.seed, [rounded(x, _DIGITS) for x, _ in points], [rounded(y, _DIGITS) for _, y in points]
            )
            lines.append((line, run.at_target is not None))
    return AxisCurves(tuple(line for line, _ in lines), _band(lines))


def _band(lines: Sequence[tuple[SeedCurve, bool]]) -> Band:
    """Median, smallest and largest at every x that any line has, as far as all lines go.

    A line that reached the target (its second value) may have stopped there: it keeps its last value."""
    grid = np.unique([x for line, _ in lines for x in line.x])
    start = max((line.x[0] for line, _ in lines), default=math.inf)
    grid = grid[(grid >= start) & (grid <= min((line.x[-1] for line, held in lines if not held), default=math.inf))]
    if not grid.size:
        return Band([], [], [], [])
    if grid.size > _BAND_POINTS:
        grid = grid[np.linspace(0, grid.size - 1, _BAND_POINTS).round().astype(int)]
    values = np.stack([np.interp(grid, line.x, line.y) for line, _ in lines])
    rows = (grid, np.median(values, axis=0), values.min(axis=0), values.max(axis=0))
    return Band(*([rounded(float(value), _DIGITS) for value in row] for row in rows))


def draw_curves(curves: Sequence[MethodCurves], comparison: Comparison, axis: str, path: Path) -> None:
    """The static picture of all methods against one cost."""
    columns = 1 if max((len(curve.name) for curve in curves), default=0) > _WIDE_LEGEND else 2
    rows = math.ceil((len(curves) + 1) / columns)
    figure = Figure(figsize=(8, 4.5 + 0.22 * rows), layout="constrained")  # the legend has its own height
    ax = figure.subplots()
    for curve in curves:
        style: dict[str, Any] = {"color": curve.color, "linestyle": _DASHES[curve.dash]}
        lines, band = curve.axes[axis].runs, curve.axes[axis].band
        for line in lines:
            ax.plot(line.x, line.y, linewidth=0.8, alpha=0.45, **style)
        ax.fill_between(band.x, band.low, band.high, color=curve.color, alpha=0.15, linewidth=0)
        ax.plot(band.x, band.median, linewidth=2.2, label=as_label(curve.name), **style)
    if comparison.target is not None:
        ax.axhline(comparison.target, color="#777777", linestyle=":", label=f"target {show_number(comparison.target)}")
    ax.set(xlabel=AXES[axis], ylabel=as_label(f"held-out {comparison.metric}"))
    ax.grid(alpha=0.3)
    if axis != "seconds":
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=columns)
    plots.save_figure(figure, path)
