"""The report of `tutelage compare`: comparison.json in; a verdict, tables, plots and a page out.

Public names: `write_report`.
"""

from __future__ import annotations

import warnings
from pathlib import Path

from tutelage.io.files import write_atomically
from tutelage.reproduction.report_curves import AXES, draw_curves, method_curves
from tutelage.reproduction.report_page import Report, build_markdown, build_page
from tutelage.reproduction.report_tables import detail_tables, summary_table
from tutelage.reproduction.results import Comparison
from tutelage.reproduction.verdict import headline


def write_report(folder: Path) -> Path:
    """Write report.md, report.html and three PNGs from `folder/comparison.json`, which may be of unfinished runs.

    Returns:
        The path of report.html, or, with a warning, that of report.md if plotly is not installed.

    Raises:
        UserError: no comparison.json, or one of an earlier version.
    """
    comparison = Comparison.read(folder)
    curves = method_curves(comparison)
    for axis in AXES:
        draw_curves(curves, comparison, axis, folder / f"curves_{axis}.png")
    shown = headline(comparison)
    report = Report(
        title=f"Comparison {comparison.recipe}/{comparison.size}",
        banner=_banner(comparison),
        verdict=shown or "No verdict yet.",
        full_verdict="" if shown == comparison.verdict else comparison.verdict,
        summary=summary_table(comparison),
        tables=detail_tables(comparison, curves),
        reading=_how_to_read(comparison),
        curricula={m.name: m.curriculum for m in comparison.methods if m.curriculum is not None},
        metric=comparison.metric,
        target=comparison.target,
        curves=curves,
    )
    markdown = folder / "report.md"
    write_atomically(markdown, build_markdown(report))
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        warnings.warn("report.html was not written, as plotly is missing: install tutelage[report]", stacklevel=2)
        return markdown
    page = folder / "report.html"
    write_atomically(page, build_page(report, get_plotlyjs(), (folder / "curves_samples.png").read_bytes()))
    return page


def _banner(comparison: Comparison) -> str:
    """Says that runs are missing; empty for a finished comparison."""
    if comparison.complete:
        return ""
    done = sum(len(method.runs) for method in comparison.methods)
    expected = max(len(comparison.methods) * len(comparison.seeds), done)
    return f"still running: {done} of {expected} runs"


def _how_to_read(comparison: Comparison) -> list[str]:
    lines = [
        "Each method was run once per seed. Thin lines are seeds; the thick line is their median, and the shaded area goes "
        "from the smallest to the largest. A run that stopped at the target keeps its last value there.",
        "FLOPs include those of the teacher. Seconds are those of the machine under Environment.",
        "A dash (-) means that there is no value, or none yet.",
    ]
    if comparison.target is None:
        return lines
    return [
        *lines[:2],
        "Samples to target: training samples when the target was first reached. > N means that it was not reached within N "
        "samples, so the true number is larger by an unknown amount.",
        "A ratio of 0.1 to B means that the method needed a tenth of the samples of B; below 1 is better. "
        "'at most': B did not reach the target on some seeds, and its budget stands in for its samples. "
        "'at least', 'not reached' and 'unbounded': the method itself did not reach the target on some or all seeds. "
        "'unknown': neither bound holds.",
        *lines[2:],
    ]
