"""The report of `tutelage compare`: a verdict, tables, plots and a page, made from comparison.json.

Public names: `write_report`.
"""

from __future__ import annotations

import warnings
from pathlib import Path

from tutelage.io.files import write_atomically
from tutelage.reproduction.display import Table, as_markdown
from tutelage.reproduction.report_curves import AXES, draw_curves, method_curves
from tutelage.reproduction.report_page import Report, build_page
from tutelage.reproduction.report_tables import detail_tables, settings_words, stage_words, summary_table
from tutelage.reproduction.results import Comparison
from tutelage.reproduction.summary import headline


def write_report(folder: Path) -> Path:
    """Write report.md, report.html and three PNGs from `folder/comparison.json`, whose runs may be unfinished.

    Returns:
        The path of report.html, or, with a warning, that of report.md if plotly is not installed.

    Raises:
        UserError: there is no comparison.json, or an earlier version wrote it.
    """
    comparison = Comparison.read(folder)
    curves = method_curves(comparison)
    for axis in AXES:
        draw_curves(curves, comparison, axis, folder / f"curves_{axis}.png")
    report = Report(
        comparison,
        curves,
        banner=_banner(comparison),
        verdict=headline(comparison) or "No verdict yet.",
        summary=summary_table(comparison),
        tables=detail_tables(comparison, curves),
        reading=_how_to_read(comparison),
    )
    markdown = folder / "report.md"
    write_atomically(markdown, _markdown(report))
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        warnings.warn("report.html was not written because plotly is missing: install tutelage[report]", stacklevel=2)
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
    targets = [
        "Samples to target: the training samples after which the target was first reached. > N means that it was not "
        "reached within N samples, so the true number is larger by an unknown amount.",
        "A ratio of 0.1 to B means that the method needed a tenth of the samples of B; below 1 is better. "
        "'at most': B did not reach the target on some seeds, and its budget is used in place of its samples. "
        "'at least', 'not reached' and 'unbounded': the method itself did not reach the target on some or all seeds. "
        "'unknown': neither bound holds.",
    ]
    return [
        "Each method was run once per seed. Thin lines are seeds; the thick line is their median, and the shaded area goes "
        "from the smallest to the largest value. A run that stopped at the target keeps its last value there.",
        "FLOPs include those of the teacher. Seconds are those of the machine under Environment.",
        *([] if comparison.target is None else targets),
        "A dash (-) means that there is no value, or none yet.",
    ]


def _markdown(report: Report) -> str:
    """The report in Markdown, with the three static plots beside it."""
    metric = as_markdown(report.comparison.metric)
    pictures = {axis: f"![Held-out {metric} against {AXES[axis]}](curves_{axis}.png)" for axis in AXES}
    rows = []
    for name, curriculum in report.curricula.items():
        stages = "\n".join(f"{number}. {stage_words(stage)}" for number, stage in enumerate(curriculum.stages, 1))
        rows.append((name, stages, settings_words(curriculum)))
    tables = [*report.tables, *([Table("Curricula", ("method", "stages", "settings"), rows)] if rows else [])]
    full_verdict = as_markdown(report.full_verdict, "\n\n")
    parts = [
        f"# {as_markdown(report.title)}",
        f"**{report.banner}**" if report.banner else "",
        "\n".join(f"* {line}" for line in as_markdown(report.verdict, "\n").splitlines()),
        report.summary.to_markdown(),
        pictures["samples"],
        _fold("Full verdict", full_verdict) if full_verdict else "",
        _fold("Curves against FLOPs and seconds", f"{pictures['flops']}\n\n{pictures['seconds']}"),
        *(_fold(table.title, table.to_markdown()) for table in tables),
        _fold("How to read this report", "\n".join(f"* {as_markdown(line)}" for line in report.reading)),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _fold(title: str, content: str) -> str:
    return f"<details>\n<summary>{as_markdown(title)}</summary>\n\n{content}\n\n</details>"
