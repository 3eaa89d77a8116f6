"""A comparison's report as one HTML page that works offline.

Public names: `Report`, `build_page`.

The first screen is the verdict, one small table and one plot; everything else is folded.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from tutelage.core.curriculum import Curriculum, HiddenStage, Stage
from tutelage.reproduction.display import Table, show_number
from tutelage.reproduction.report_curves import AXES, MethodCurves
from tutelage.reproduction.report_tables import settings_words, stage_words
from tutelage.reproduction.results import Comparison

_DARK_COLORS = {"#000000": "#FFFFFF"}  # the one method colour that a dark page would hide
_LONG_CELL = 40  # characters of a line of a cell; longer ones wrap
_ROOM_FOR_NUMBER = 0.06  # a stage's number fits into its part of the bar from this fraction on


@dataclass(frozen=True)
class Report:
    """Everything that a report says, as plain text and numbers: nothing is escaped yet."""

    comparison: Comparison
    curves: Sequence[MethodCurves]
    banner: str
    """Says that runs are missing; empty for a finished comparison."""
    verdict: str
    """On the first screen."""
    summary: Table
    """The small table of the first screen."""
    tables: Sequence[Table]
    """Folded."""
    reading: Sequence[str]
    """How to read the report."""

    @property
    def title(self) -> str:
        """Title of the page."""
        return f"Comparison {self.comparison.recipe}/{self.comparison.size}"

    @property
    def full_verdict(self) -> str:
        """All lines of the verdict; empty where the first screen has them."""
        return "" if self.comparison.verdict == self.verdict else self.comparison.verdict

    @property
    def curricula(self) -> dict[str, Curriculum]:
        """Curricula by method."""
        return {m.name: m.curriculum for m in self.comparison.methods if m.curriculum is not None}


def build_page(report: Report, plotly_js: str, fallback_png: bytes) -> str:
    """One HTML page with the library and the data inside; `fallback_png` shows where scripts do not run."""
    buttons = {"samples": "samples", "flops": "FLOPs", "seconds": "seconds"}
    parts = {
        "TITLE": html.escape(report.title),
        "BANNER": f'<p class="banner" role="status">{html.escape(report.banner)}</p>' if report.banner else "",
        "VERDICT": _paragraphs(report.verdict),
        "SUMMARY": _html_table(report.summary),
        "METRIC": html.escape(report.comparison.metric),
        "AXIS_BUTTONS": "".join(
            f'<button type="button" data-x="{axis}" aria-pressed="false">{label}</button>'
            for axis, label in buttons.items()
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
        yield _fold("Full verdict", _paragraphs(report.full_verdict))
    yield from (_fold(table.title, _html_table(table)) for table in report.tables)
    longest = max((curriculum.total_steps for curriculum in report.curricula.values()), default=0)
    if report.curricula:
        bars = (_curriculum(name, curriculum, longest) for name, curriculum in report.curricula.items())
        yield _fold("Curricula", "".join(bars))
    lines = "".join(f"<li>{html.escape(line)}</li>" for line in report.reading)
    yield _fold("How to read this report", f"<ul>{lines}</ul>")


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
    total = curriculum.total_steps
    segments: list[str] = []
    items: list[str] = []
    colors: list[str] = []
    for number, stage in enumerate(curriculum.stages, 1):
        colors.append(_stage_color(stage))
        shade = f"{colors[-1]} {'odd' if colors.count(colors[-1]) % 2 else 'even'}"  # neighbours of a colour differ
        shown = number if stage.steps / longest >= _ROOM_FOR_NUMBER else ""
        segments.append(f'<span class="{shade}" style="flex:{stage.steps} 1 0">{shown}</span>')
        words = f"{html.escape(stage_words(stage))} ({show_number(round(100 * stage.steps / total, 1))}%)"
        items.append(f'<li><span class="swatch {shade}"></span>{words}</li>')
    label = html.escape(f"Curriculum of {name}: {len(items)} stages, {total:,} steps, listed below")
    return (
        f'<figure class="curriculum"><figcaption><strong>{html.escape(name)}</strong>: {total:,} steps; '
        f"{html.escape(settings_words(curriculum))}</figcaption>"
        f'<div class="bar" role="img" aria-label="{label}" style="width:{100 * total / longest:.4g}%">'
        f"{''.join(segments)}</div><ol>{''.join(items)}</ol></figure>"
    )


def _stage_color(stage: Stage) -> str:
    """Class of the page's style sheet."""
    if isinstance(stage, HiddenStage):
        return "hidden"
    return "output" if stage.needs_teacher else "labels"


def _paragraphs(text: str) -> str:
    return "".join(f"<p>{html.escape(line)}</p>" for line in text.splitlines() if line.strip())


def _fold(title: str, content: str) -> str:
    return f"<details><summary>{html.escape(title)}</summary>{content}</details>"


def _html_table(table: Table) -> str:
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in table.columns)
    rows = "".join(
        f'<tr><th scope="row">{_breakable(first)}</th>{"".join(map(_html_cell, cells))}</tr>'
        for first, *cells in table.rows
    )
    note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ""
    label = html.escape(table.title)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{label}"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>{note}"
    )


def _html_cell(text: str) -> str:
    long = ' class="long"' if max(map(len, text.splitlines()), default=0) > _LONG_CELL else ""
    return f"<td{long}>" + "<br>".join(map(html.escape, text.splitlines())) + "</td>"


def _breakable(name: str) -> str:
    """A long name that may break after its punctuation."""
    return "<wbr>".join(map(html.escape, re.split("(?<=[:,=/])", name)))
