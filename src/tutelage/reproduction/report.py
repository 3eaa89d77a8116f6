"""The report of `tutelage compare`, made from comparison.json: tables and plots in Markdown, and a page that works offline.

The first screen of the page is the verdict, one small table and one plot; everything else is folded."""

import base64
import dataclasses
import html
import json
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from tutelage.core.curriculum import Curriculum
from tutelage.core.stages import HiddenStage
from tutelage.io.files import write_atomically
from tutelage.reproduction.display import Table, show_number
from tutelage.reproduction.report_curves import AXES, MethodCurves, draw_curves, method_curves
from tutelage.reproduction.report_tables import COST_NAMES, detail_tables, settings_words, stage_words, summary_table
from tutelage.reproduction.results import Comparison
from tutelage.reproduction.summary import headline
from tutelage.runs.escaping import as_markdown

_DARK_COLORS = {"#000000": "#FFFFFF"}  # the one method colour that a dark page would hide
_LONG_CELL = 40  # characters of a line of a cell; longer ones wrap
_ROOM_FOR_NUMBER = 0.06  # a stage's number fits into its part of the bar from this fraction on


@dataclass(frozen=True)
class Report:
    """Everything that a report says, as plain text and numbers: nothing is escaped yet."""

    comparison: Comparison
    curves: Sequence[MethodCurves]
    banner: str  # says that runs are missing; empty for a finished comparison
    verdict: str  # on the first screen, as `summary`
    summary: Table
    tables: Sequence[Table]  # folded
    reading: Sequence[str]  # how to read the report

    @property
    def title(self) -> str:
        return f"Comparison {self.comparison.recipe}/{self.comparison.size}"

    @property
    def full_verdict(self) -> str:
        """All lines of the verdict; empty where the first screen has them."""
        return "" if self.comparison.verdict == self.verdict else self.comparison.verdict

    @property
    def curricula(self) -> dict[str, Curriculum]:
        """Curricula by method."""
        return {m.name: m.curriculum for m in self.comparison.methods if m.curriculum is not None}


def write_report(folder: Path) -> Path:
    """Write report.md, report.html and three PNGs from `folder/comparison.json`, whose runs may be unfinished.

    Returns the path of report.html, or, with a warning, that of report.md if plotly is not installed.

    Raises UserError: there is no comparison.json, or an earlier version wrote it."""
    comparison = Comparison.read(folder)
    curves = method_curves(comparison)
    for axis in AXES:
        draw_curves(curves, comparison, axis, folder / f"curves_{axis}.png")
    done = sum(len(method.runs) for method in comparison.methods)
    expected = max(len(comparison.methods) * comparison.pairs, done)
    report = Report(
        comparison,
        curves,
        banner="" if comparison.complete else f"still running: {done} of {expected} runs",
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
    write_atomically(page, _page(report, get_plotlyjs(), (folder / "curves_samples.png").read_bytes()))
    return page


def _about_seconds(comparison: Comparison) -> str:
    jobs = comparison.environment.get("jobs", 1)
    if jobs == 1:
        return "Seconds are those of the machine under Environment."
    return (
        f"Seconds say little here: {jobs} runs were made at the same time, and they may have read the teacher's states from "
        "disk where an earlier run had computed them (FLOPs are counted as if each run had computed them)."
    )


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
        "Each method was run once per teacher and seed. Thin lines are runs; the thick line is their median, and the "
        "shaded area goes from the smallest to the largest value. A run that stopped at the target keeps its last value there.",
        "FLOPs include those of the teacher. " + _about_seconds(comparison),
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
    curricula = Table("Curricula", ("method", "stages", "settings"), rows)
    full_verdict = as_markdown(report.full_verdict, "\n\n")
    parts = [
        f"# {as_markdown(report.title)}",
        f"**{report.banner}**" if report.banner else "",
        "\n".join(f"* {line}" for line in as_markdown(report.verdict, "\n").splitlines()),
        report.summary.to_markdown(),
        pictures["samples"],
        _fold("Full verdict", full_verdict) if full_verdict else "",
        _fold("Curves against FLOPs and seconds", f"{pictures['flops']}\n\n{pictures['seconds']}"),
        *(_fold(table.title, table.to_markdown()) for table in (*report.tables, curricula) if table.rows),
        _fold("How to read this report", "\n".join(f"* {as_markdown(line)}" for line in report.reading)),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _fold(title: str, content: str) -> str:
    return f"<details>\n<summary>{as_markdown(title)}</summary>\n\n{content}\n\n</details>"


def _page(report: Report, plotly_js: str, fallback_png: bytes) -> str:
    """One HTML page with the library and the data inside; `fallback_png` shows where scripts do not run."""
    parts = {
        "TITLE": html.escape(report.title),
        "BANNER": f'<p class="banner" role="status">{html.escape(report.banner)}</p>' if report.banner else "",
        "VERDICT": _paragraphs(report.verdict),
        "SUMMARY": _html_table(report.summary),
        "METRIC": html.escape(report.comparison.metric),
        "AXIS_BUTTONS": "".join(
            f'<button type="button" data-x="{axis}" aria-pressed="false">{label}</button>'
            for axis, label in COST_NAMES.items()
        ),
        "FALLBACK": base64.b64encode(fallback_png).decode("ascii"),
        "FOLDED": "".join(_html_folded(report)),
        "DATA": _plot_data(report),
        "PLOTLY": re.sub("</(?=script)", r"<\\/", plotly_js, flags=re.IGNORECASE),
    }
    template = resources.files("tutelage.reproduction").joinpath("report.html.in").read_text(encoding="utf-8")
    return re.sub("@@([A-Z_]+)@@", lambda match: parts[match[1]], template)  # one pass: data is never a placeholder


def _html_folded(report: Report) -> Iterable[str]:
    if report.full_verdict:
        yield _html_fold("Full verdict", _paragraphs(report.full_verdict))
    yield from (_html_fold(table.title, _html_table(table)) for table in report.tables)
    longest = max((curriculum.total_steps for curriculum in report.curricula.values()), default=0)
    if bars := "".join(_curriculum(name, curriculum, longest) for name, curriculum in report.curricula.items()):
        yield _html_fold("Curricula", bars)
    lines = "".join(f"<li>{html.escape(line)}</li>" for line in report.reading)
    yield _html_fold("How to read this report", f"<ul>{lines}</ul>")


def _plot_data(report: Report) -> str:
    """What the page's script draws, as JSON that cannot end the script element around it."""
    methods = [
        {**dataclasses.asdict(curve), "dark": _DARK_COLORS.get(curve.color, curve.color)} for curve in report.curves
    ]
    comparison = report.comparison
    data: dict[str, Any] = {"metric": comparison.metric, "target": comparison.target, "axes": AXES, "methods": methods}
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _curriculum(name: str, curriculum: Curriculum, longest: int) -> str:
    """A bar whose parts are the stages, and the stages as a list."""
    total, segments, items, colors = curriculum.total_steps, "", "", []
    for number, stage in enumerate(curriculum.stages, 1):
        output = "output" if stage.needs_teacher else "labels"
        colors.append("hidden" if isinstance(stage, HiddenStage) else output)  # a class of the page's style sheet
        shade = f"{colors[-1]} {'odd' if colors.count(colors[-1]) % 2 else 'even'}"  # neighbours of a colour differ
        shown = number if stage.steps / longest >= _ROOM_FOR_NUMBER else ""
        segments += f'<span class="{shade}" style="flex:{stage.steps} 1 0">{shown}</span>'
        words = f"{html.escape(stage_words(stage))} ({show_number(round(100 * stage.steps / total, 1))}%)"
        items += f'<li><span class="swatch {shade}"></span>{words}</li>'
    label = html.escape(f"Curriculum of {name}: {len(colors)} stages, {total:,} steps, listed below")
    return (
        f'<figure class="curriculum"><figcaption><strong>{html.escape(name)}</strong>: {total:,} steps; '
        f"{html.escape(settings_words(curriculum))}</figcaption>"
        f'<div class="bar" role="img" aria-label="{label}" style="width:{100 * total / longest:.4g}%">'
        f"{segments}</div><ol>{items}</ol></figure>"
    )


def _paragraphs(text: str) -> str:
    return "".join(f"<p>{html.escape(line)}</p>" for line in text.splitlines() if line.strip())


def _html_fold(title: str, content: str) -> str:
    return f"<details><summary>{html.escape(title)}</summary>{content}</details>"


def _html_table(table: Table) -> str:
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in table.columns)

    def breakable(name: str) -> str:  # a long name, after its punctuation
        return "<wbr>".join(map(html.escape, re.split("(?<=[:,=/])", name)))

    rows = "".join(
        f'<tr><th scope="row">{breakable(first)}</th>{"".join(map(_html_cell, cells))}</tr>'
        for first, *cells in table.rows
    )
    note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ""
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{html.escape(table.title)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{note}"
    )


def _html_cell(text: str) -> str:
    long = ' class="long"' if max(map(len, text.splitlines()), default=0) > _LONG_CELL else ""
    return f"<td{long}>" + "<br>".join(map(html.escape, text.splitlines())) + "</td>"
