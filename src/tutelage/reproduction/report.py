"""The report of `tutelage compare`: comparison.json in, words, tables, plots and a page out.

Public names: `write_report`.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from tutelage.core.errors import UserError
from tutelage.io.files import replacing, write_atomically
from tutelage.reproduction.report_page import Report, Table, build_markdown, build_page, is_number, show_number
from tutelage.reproduction.statistics import FEWEST_FOR_INTERVAL
from tutelage.runs import plots

AXES = {
    "samples": "training samples",
    "flops": plots.AXES["flops"],
    "seconds": plots.AXES["seconds"],
}
MATPLOTLIB_DASHES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}  # by plotly's name
BAND_POINTS = 400  # at most so many points of a median in the page
VALUE_ROWS = 12  # rows of a method in the table of a plot's values

Json = Mapping[str, Any]
Line = tuple[list[float], list[float]]


def write_report(folder: Path) -> Path:
    """Write report.md, report.html and three PNGs from `folder/comparison.json`, which may be of a run still going.

    Returns the path of report.html, or, with a warning, that of report.md if plotly is not installed.
    """
    comparison = _read(folder / "comparison.json")
    curves = _curves(comparison)
    for axis in AXES:
        _plot(curves, comparison, axis, folder / f"curves_{axis}.png")
    report = _report(comparison, curves)
    markdown = folder / "report.md"
    write_atomically(markdown, build_markdown(report))
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        warnings.warn("no report.html, as plotly is not installed: install tutelage[report]", stacklevel=2)
        return markdown
    page = folder / "report.html"
    write_atomically(page, build_page(report, get_plotlyjs(), (folder / "curves_samples.png").read_bytes()))
    return page


def _read(path: Path) -> Json:
    if not path.is_file():
        raise UserError(f"no {path.name} in {path.parent}: make one with tutelage compare")
    try:
        comparison = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON ({error}): make it again with tutelage compare") from error
    if not isinstance(comparison, dict) or "methods" not in comparison or "metric" not in comparison:
        raise UserError(f"{path} is no comparison: it needs `methods` and `metric`; make it with tutelage compare")
    return comparison


def _report(comparison: Json, curves: list[dict[str, Any]]) -> Report:
    methods: Json = comparison["methods"]
    metric, target, seeds = comparison["metric"], comparison.get("target"), comparison.get("seeds") or []
    done = sum(len(_finished(method)) for method in methods.values())
    expected = max(len(methods) * len(seeds), done)
    direction = comparison.get("better", "higher")
    facts = [
        _budget(comparison) if comparison.get("budget") else "",
        f"Metric: held-out {metric}, {direction} is better"
        + (
            f"; target {show_number(target)}."
            if target is not None
            else "; no target, so the final values are compared."
        ),
        f"Seeds: {', '.join(map(str, seeds))}." if seeds else "",
    ]
    tables = [_results(comparison), _ratios(comparison), _learning_rates(comparison)]
    folded = [
        _every_run(comparison),
        _pairs("Settings", {**comparison.get("settings", {}), "command": comparison.get("command")}),
        _pairs("Teacher", comparison.get("teacher", {})),
        _pairs("Environment", comparison.get("environment", {})),
    ]
    return Report(
        title=f"Comparison {'/'.join(str(comparison[key]) for key in ('recipe', 'size') if key in comparison)}".strip(),
        facts=" ".join(filter(None, facts)),
        banner="" if comparison.get("complete", True) else f"still running: {done} of {expected} runs",
        verdict=str(comparison.get("verdict") or "No verdict yet."),
        tables=[table for table in tables if table.rows],
        folded=[table for table in folded if table.rows],
        values=_values(curves, metric),
        reading=_how_to_read(comparison),
        curricula={name: method.get("curriculum") or {} for name, method in methods.items()},
        curves={"metric": metric, "target": target, "axes": AXES, "methods": curves},
    )


def _results(comparison: Json) -> Table:
    metric, target = comparison["metric"], comparison.get("target")
    ratios = _ratio_pairs(comparison)
    columns = ["method", "learning rate"]
    columns += [] if target is None else ["samples to target, median", _spread(comparison)]
    columns += ["ratio to others"] if ratios else []
    rows = []
    for name, method in comparison["methods"].items():
        finals = [run["final"].get(metric) for run in _finished(method)]
        seconds = [run.get("seconds") for run in _finished(method)]
        rate = [show_number(method.get("learning_rate")), method.get("schedule")]
        row = [name, ", ".join(filter(None, rate))]
        if target is not None:
            row += [
                _reached(method.get("median_samples_to_target"), method, comparison),
                _interval(method.get("ci95"), "-" if not _finished(method) else _beyond(method, comparison)),
            ]
        if ratios:
            others = [f"{_ratio(ratio)} {other}" for (this, other), ratio in ratios.items() if this == name]
            row.append("\n".join(others) or "-")
        rows.append((*row, _median(finals, with_range=True), _median(seconds)))
    return Table("Results", (*columns, f"final {metric}, median (range)", "seconds, median"), rows)


def _ratios(comparison: Json) -> Table:
    """The ratios with their intervals and notes."""
    rows = []
    for key, ratio in (comparison.get("ratios") or {}).items():
        interval = _interval(ratio.get("ci95") if ratio.get("pairs", 1) else None, "unbounded")
        rows.append((key, show_number(ratio.get("median")), interval, str(ratio.get("note") or "")))
    note = "Of the samples to target, or of the FLOPs or seconds where the name says so."
    return Table("Ratios", ("ratio", "median", _spread(comparison), "note"), rows, note)


def _spread(comparison: Json) -> str:
    """What the two numbers beside a median are: with few seeds, their bootstrap interval is their range."""
    return "95% interval" if len(comparison.get("seeds") or ()) >= FEWEST_FOR_INTERVAL else "range"


def _ratio(ratio: Json) -> str:
    """A ratio as the words before the other method's name; its note says if it is an upper bound."""
    bounded = str(ratio.get("note") or "").startswith("at most")
    if is_number(ratio.get("median")):
        return f"{'at most ' if bounded else ''}{show_number(ratio['median'])} times"
    low, _ = ratio.get("ci95") or [None, None]
    return "unknown against" if bounded or low is None else f"at least {show_number(low)} times"


def _ratio_pairs(comparison: Json) -> dict[tuple[str, str], Json]:
    """The ratios by their two methods: a name may hold a slash itself, so keys are matched, not split."""
    ratios = comparison.get("ratios") or {}
    names = list(comparison["methods"])
    return {(a, b): ratios[f"{a}/{b}"] for a in names for b in names if a != b and f"{a}/{b}" in ratios}


def _learning_rates(comparison: Json) -> Table:
    """Scores by learning rate; a key of a grid is a rate, or a rate and the name of a schedule."""
    cells: dict[tuple[str, str], dict[float, str]] = {}  # text by (method, schedule) and rate
    units = {cell.get("unit", "") for method in comparison["methods"].values() for cell in _grid(method).values()}
    for name, method in comparison["methods"].items():
        chosen = (method.get("learning_rate"), method.get("schedule") or "")
        for key, cell in _grid(method).items():
            rate, _, schedule = key.partition(" ")
            score, stopped = cell.get("score"), cell.get("stopped_after")
            text = f"> {show_number(stopped)}" if score is None and stopped else show_number(score)
            text = "diverged" if cell.get("diverged") else text
            text += f" {cell.get('unit', '')}" if len(units) > 1 else ""
            text += " ✓" if (float(rate), schedule) == chosen else ""
            cells.setdefault((name, schedule), {})[float(rate)] = text
    rates = sorted({rate for row in cells.values() for rate in row})
    rows = [(" ".join(filter(None, key)), *(row.get(rate, "") for rate in rates)) for key, row in cells.items()]
    unit = f"Scores are {next(iter(units))}. " if len(units) == 1 and units != {""} else ""
    note = f"{unit}✓ marks what the method was then run with."
    return Table("Learning rates tried", ("method", *(f"{rate:g}" for rate in rates)), rows, note)


def _grid(method: Json) -> Mapping[str, Json]:
    return method.get("grid") or {}


def _every_run(comparison: Json) -> Table:
    metric, target = comparison["metric"], comparison.get("target")
    rows = []
    for name, method in comparison["methods"].items():
        for run in method.get("runs") or []:
            final = run.get("final") or {}
            row = [name, str(run.get("seed", "-"))]
            if target is not None:
                beyond = _beyond(method, comparison) if final else "-"
                reached = run.get("samples_to_target")
                row.append(beyond if reached is None else show_number(reached))
                row += [show_number(run.get(f"{axis}_to_target")) for axis in ("flops", "seconds")]
            state = show_number(final.get(metric)) if final else "still running"
            state += " (diverged)" if run.get("diverged") else ""
            rows.append((*row, state, show_number(run.get("seconds"))))
    to_target = () if target is None else ("samples to target", "FLOPs to target", "seconds to target")
    return Table("Every run", ("method", "seed", *to_target, f"final {metric}", "seconds"), rows)


def _pairs(title: str, values: Json) -> Table:
    rows = [
        (name.replace("_", " "), value if isinstance(value, str) else json.dumps(value))
        for name, value in values.items()
        if value is not None
    ]
    return Table(title, ("what", "value"), rows)


def _values(curves: list[dict[str, Any]], metric: str) -> Table:
    """A few points of each method's median against samples: the plot in words."""
    rows = []
    for curve in curves:
        band = curve["axes"]["samples"]["band"]
        size = len(band["x"])
        for index in np.unique(np.linspace(0, size - 1, min(size, VALUE_ROWS)).round().astype(int)) if size else ():
            rows.append((curve["name"], *(show_number(band[key][index]) for key in ("x", "median", "low", "high"))))
    return Table(
        "Values of the curves", ("method", "samples", f"median {metric}", "smallest seed", "largest seed"), rows
    )


def _how_to_read(comparison: Json) -> list[str]:
    lines = [
        "Each method was run once per seed. Thin lines are seeds; the thick line is their median and the shade goes "
        "from the smallest to the largest. A run that stopped at the target keeps its last value there.",
        "FLOPs include those of the teacher. Seconds are those of the machine under Environment.",
        "A dash (-) means that there is no figure, or none yet: figures are of finished runs.",
    ]
    if comparison.get("target") is None:
        return lines
    return [
        *lines[:2],
        "Samples to target: training samples when it was first reached. > N means that it was not reached within the "
        "N samples of the budget, so that the true figure is larger by an unknown amount.",
        "A ratio of 0.1 times B says that the method needed a tenth of the samples of B; below 1 is better. "
        "'at most': B did not reach the target with some seeds, and its budget stands in for its samples. "
        "'unbounded': the method itself did not reach it with some seeds.",
        *lines[2:],
    ]


def _curves(comparison: Json) -> list[dict[str, Any]]:
    """Each method's curves against each axis: its seeds' own, and the median and range of the finished ones."""
    found = []
    for number, (name, method) in enumerate(comparison["methods"].items()):
        axes = {}
        for axis in AXES:
            lines = [(run, *_line(run, axis, comparison["metric"])) for run in method.get("runs") or []]
            lines = [line for line in lines if line[1]]
            band = _band([(x, y, is_number(run.get("samples_to_target"))) for run, x, y in lines if run.get("final")])
            axes[axis] = {"runs": [{"seed": run.get("seed"), "x": x, "y": y} for run, x, y in lines], "band": band}
        rounds, color = divmod(number, len(plots.COLORS))
        dash = list(MATPLOTLIB_DASHES)[rounds % len(MATPLOTLIB_DASHES)]
        found.append({"name": name, "color": plots.COLORS[color], "dash": dash, "axes": axes})
    return found


def _line(run: Json, axis: str, metric: str) -> Line:
    """The points of a run that have both coordinates, in order of x."""
    points = [(point.get(axis), point.get(metric)) for point in run.get("curve") or []]
    finite = sorted((point for point in points if all(map(is_number, point))), key=lambda point: point[0])
    return [_round(x) for x, _ in finite], [_round(y) for _, y in finite]


def _band(lines: Sequence[tuple[list[float], list[float], bool]]) -> dict[str, list[float]]:
    """Median, smallest and largest at every x that any line has, as far as all go.

    A line that reached the target (its third value) may have stopped there: it keeps its last value.
    """
    grid = np.unique(np.concatenate([x for x, *_ in lines])) if lines else np.empty(0)
    if lines:
        end = min((x[-1] for x, _, held in lines if not held), default=grid[-1])
        grid = grid[(grid >= max(x[0] for x, *_ in lines)) & (grid <= end)]
    if not grid.size:
        return {"x": [], "median": [], "low": [], "high": []}
    if grid.size > BAND_POINTS:
        grid = grid[np.linspace(0, grid.size - 1, BAND_POINTS).round().astype(int)]
    values = np.stack([np.interp(grid, x, y) for x, y, _ in lines])
    rows = {"x": grid, "median": np.median(values, axis=0), "low": values.min(axis=0), "high": values.max(axis=0)}
    return {name: [_round(float(value)) for value in row] for name, row in rows.items()}


def _plot(curves: Sequence[Json], comparison: Json, axis: str, path: Path) -> None:
    """The static picture of all methods against one axis."""
    columns = 1 if max(map(len, comparison["methods"]), default=0) > 45 else 2
    rows = math.ceil((len(curves) + 1) / columns)
    figure = Figure(figsize=(8, 4.5 + 0.22 * rows), layout="constrained")  # the legend has its own height
    ax = figure.subplots()
    for curve in curves:
        style: dict[str, Any] = {"color": curve["color"], "linestyle": MATPLOTLIB_DASHES[curve["dash"]]}
        lines, band = curve["axes"][axis]["runs"], curve["axes"][axis]["band"]
        for line in lines:
            ax.plot(line["x"], line["y"], linewidth=0.8, alpha=0.45, **style)
        ax.fill_between(band["x"], band["low"], band["high"], color=curve["color"], alpha=0.15, linewidth=0)
        ax.plot(band["x"], band["median"], linewidth=2.2, label=curve["name"].replace("$", r"\$"), **style)
    metric, target = comparison["metric"], comparison.get("target")
    if target is not None:
        ax.axhline(target, color="#777777", linestyle=":", label=f"target {show_number(target)}")
    ax.set(xlabel=AXES[axis], ylabel=f"held-out {metric}".replace("$", r"\$"))
    ax.grid(alpha=0.3)
    if axis != "seconds":
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=columns)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


def _finished(method: Json) -> list[Json]:
    return [run for run in method.get("runs") or [] if run.get("final")]


def _budget(comparison: Json) -> str:
    samples, match = show_number(comparison["budget"]), comparison.get("match", "samples")
    if match == "samples":
        return f"Budget of every method: {samples} samples."
    unit = "FLOPs" if match == "flops" else match
    return f"Budget of one_shot: {samples} samples; every other method got as many {unit}."


def _beyond(method: Json, comparison: Json) -> str:
    """How a target that a method never reached is shown: by the samples that it had."""
    if comparison.get("match") == "samples" and comparison.get("budget"):
        return f"> {show_number(comparison['budget'])}"
    ends = [run["curve"][-1].get("samples") for run in _finished(method) if run.get("curve")]
    return f"> {show_number(max(ends))}" if ends and all(map(is_number, ends)) else "not reached"


def _reached(samples: float | None, method: Json, comparison: Json) -> str:
    if samples is None and "median_samples_to_target" in method and _finished(method):
        return _beyond(method, comparison)
    return show_number(samples)


def _interval(ends: Sequence[float | None] | None, beyond: str) -> str:
    if not ends:
        return "-"
    low, high = (beyond if end is None else show_number(end) for end in ends)
    return low if low == high else f"{low} to {high}"


def _median(values: Sequence[Any], with_range: bool = False) -> str:
    numbers = [value for value in values if is_number(value)]
    if not numbers:
        return "-"
    text = show_number(float(np.median(numbers)))
    low, high = show_number(min(numbers)), show_number(max(numbers))
    return f"{text}\n({low} to {high})" if with_range and low != high else text


def _round(value: float) -> float:
    """Six digits: enough for a plot, and half the page's data."""
    return float(f"{value:.6g}")
