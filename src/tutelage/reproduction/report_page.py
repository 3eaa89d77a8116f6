"""How a comparison's report looks: as one HTML page that works offline, and as Markdown.

Public names: `Report`, `build_page`, `build_markdown`.

The first screen is the verdict, one small table and one plot; everything else is folded.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from tutelage.core.blocks import FINAL, Place
from tutelage.core.curriculum import Curriculum, HiddenStage, OutputStage, Stage
from tutelage.reproduction.display import Table, show_number
from tutelage.reproduction.report_curves import AXES, MethodCurves

_DARK_COLORS = {"#000000": "#FFFFFF"}  # the one method colour that a dark page would hide
_LONG_CELL = 40  # characters of a line of a cell; longer ones wrap
_ROOM_FOR_NUMBER = 0.06  # a stage's number fits into its part of the bar from this fraction on


@dataclass(frozen=True)
class Report:
    """Everything that a report says, as plain text and numbers: nothing is escaped yet."""

    title: str
    banner: str
    """Says that runs are missing; empty for a finished comparison."""
    verdict: str
    full_verdict: str
    """All lines of the verdict; empty where `verdict` has them."""
    summary: Table
    """The small table of the first screen."""
    tables: Sequence[Table]
    """Folded."""
    reading: Sequence[str]
    """How to read the report."""
    curricula: Mapping[str, Curriculum]
    """By method."""
    metric: str
    target: float | None
    curves: Sequence[MethodCurves]


def build_page(report: Report, plotly_js: str, fallback_png: bytes) -> str:
    """One HTML page with the library and the data inside; `fallback_png` shows where scripts do not run."""
    parts = {
        "TITLE": html.escape(report.title),
        "BANNER": f'<p class="banner" role="status">{html.escape(report.banner)}</p>' if report.banner else "",
        "VERDICT": _paragraphs(report.verdict),
        "SUMMARY": _html_table(report.summary),
        "METRIC": html.escape(report.metric),
        "AXIS_BUTTONS": "".join(
            f'<button type="button" data-x="{axis}" aria-pressed="false">{label}</button>'
            for axis, label in (("samples", "samples"), ("flops", "FLOPs"), ("seconds", "seconds"))
        ),
        "FALLBACK": base64.b64encode(fallback_png).decode("ascii"),
        "FOLDED": "".join(_html_folded(report)),
        "DATA": _script_json(_plot_data(report)),
        "PLOTLY": re.sub("</(?=script)", r"<\\/", plotly_js, flags=re.IGNORECASE),
    }
    template = resources.files("tutelage.reproduction").joinpath("report.html.in").read_text(encoding="utf-8")
    return re.sub("@@([A-Z_]+)@@", lambda match: parts[match[1]], template)  # one pass: data is never a placeholder


def _html_folded(report: Report) -> Iterable[str]:
    if report.full_verdict:
        yield _fold("Full verdict", _paragraphs(report.full_verdict))
    yield from (_fold(table.title, _html_table(table)) for table in report.tables)
    if report.curricula:
        yield _fold("Curricula", _curricula(report.curricula))
    yield _fold(
        "How to read this report", f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in report.reading)}</ul>"
    )


def _plot_data(report: Report) -> dict[str, Any]:
    """What the page's script draws."""
    methods = [
        {**dataclasses.asdict(curve), "dark": _DARK_COLORS.get(curve.color, curve.color)} for curve in report.curves
    ]
    return {"metric": report.metric, "target": report.target, "axes": AXES, "methods": methods}


def build_markdown(report: Report) -> str:
    """The same in Markdown, with the three static plots beside it."""
    pictures = {axis: f"![Held-out {_md(report.metric)} against {AXES[axis]}](curves_{axis}.png)" for axis in AXES}
    curricula = Table(
        "Curricula",
        ("method", "stages", "settings"),
        [
            (
                name,
                "\n".join(f"{number}. {_stage_words(stage)}" for number, stage in enumerate(curriculum.stages, 1)),
                _settings_words(curriculum),
            )
            for name, curriculum in report.curricula.items()
        ],
    )
    tables = [*report.tables, *([curricula] if report.curricula else [])]
    parts = [
        f"# {_md(report.title)}",
        f"**{_md(report.banner)}**" if report.banner else "",
        "\n".join(f"* {line}" for line in _md(report.verdict, "\n").splitlines()),
        _md_table(report.summary),
        pictures["samples"],
        _md_fold("Full verdict", _md(report.full_verdict, "\n\n")) if report.full_verdict else "",
        _md_fold("Curves against FLOPs and seconds", f"{pictures['flops']}\n\n{pictures['seconds']}"),
        *(_md_fold(table.title, _md_table(table)) for table in tables),
        _md_fold("How to read this report", "\n".join(f"* {_md(line)}" for line in report.reading)),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _stage_words(stage: Stage) -> str:
    """What a stage does, in words."""
    rate = f" at learning rate {stage.learning_rate:g}" if stage.learning_rate else ""
    return f"{_task_words(stage)}, {stage.steps:,} steps{rate}"


def _task_words(stage: Stage) -> str:
    if isinstance(stage, HiddenStage):
        return f"student's {_place(stage.student_place)} learns teacher's {_place(stage.teacher_place)}"
    assert isinstance(stage, OutputStage)
    if not stage.needs_teacher:
        return "labels alone"
    words = "output of the teacher"
    if stage.teacher_checkpoint:
        words = f"output of teacher checkpoint {Path(stage.teacher_checkpoint).name}"
    return words + (f" and labels (weight {stage.label_weight:g})" if stage.label_weight else "")


def _place(place: Place) -> str:
    return "final state" if place == FINAL else f"block {place}"


def _settings_words(curriculum: Curriculum) -> str:
    """The settings that hidden stages share, and the temperature."""
    words = [f"temperature {curriculum.temperature:g}"]
    if curriculum.hidden_stages:
        words = [
            f"projection {curriculum.projection}",
            f"normalize {curriculum.normalize}",
            f"warm start {curriculum.warm_start}",
            *words,
        ]
    return ", ".join(words)


def _curricula(curricula: Mapping[str, Curriculum]) -> str:
    """Each curriculum as a bar whose parts are its stages, and the same as a list."""
    longest = max(curriculum.total_steps for curriculum in curricula.values())
    return "".join(_curriculum(name, curriculum, longest) for name, curriculum in curricula.items())


def _curriculum(name: str, curriculum: Curriculum, longest: int) -> str:
    total = curriculum.total_steps
    segments: list[str] = []
    items: list[str] = []
    colors: list[str] = []
    for number, stage in enumerate(curriculum.stages, 1):
        colors.append(_stage_color(stage))
        shade = f"{colors[-1]} {'odd' if colors.count(colors[-1]) % 2 else 'even'}"  # neighbours of a colour differ
        shown = number if stage.steps / longest >= _ROOM_FOR_NUMBER else ""
        segments.append(f'<span class="{shade}" style="flex:{stage.steps} 1 0">{shown}</span>')
        words = f"{html.escape(_stage_words(stage))} ({show_number(round(100 * stage.steps / total, 1))}%)"
        items.append(f'<li><span class="swatch {shade}"></span>{words}</li>')
    label = html.escape(f"Curriculum of {name}: {len(items)} stages, {total:,} steps, listed below")
    return (
        f'<figure class="curriculum"><figcaption><strong>{html.escape(name)}</strong>: {total:,} steps; '
        f"{html.escape(_settings_words(curriculum))}</figcaption>"
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


def _script_json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _md_table(table: Table) -> str:
    lines = [table.columns, tuple("---" for _ in table.columns), *table.rows]
    text = "\n".join("| " + " | ".join(_md(cell, "<br>") for cell in line) + " |" for line in lines)
    return f"{text}\n\n{_md(table.note)}" if table.note else text


def _md_fold(title: str, content: str) -> str:
    return f"<details>\n<summary>{_md(title)}</summary>\n\n{content}\n\n</details>"


def _md(text: str, line_break: str = " ") -> str:
    """Text that Markdown shows as it is."""
    escaped = re.sub(r"([\\`*\[\]|])", r"\\\1", text).replace("&", "&amp;").replace("<", "&lt;")
    return line_break.join(escaped.splitlines())
