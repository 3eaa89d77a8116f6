"""How a comparison's report looks: as one HTML page that works offline, and as Markdown.

Public names: `Report`, `Table`, `build_page`, `build_markdown`, `show_number`, `is_number`.
"""

from __future__ import annotations

import base64
import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

SIZES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
DARK_COLORS = {"#000000": "#FFFFFF"}  # the one method colour that a dark page would hide
LONG_CELL = 40  # characters of a line of a cell; longer ones wrap
SHARE_WITH_NUMBER = 0.06  # a stage's number fits into its part of the bar from this share on


@dataclass(frozen=True)
class Table:
    """A table of plain text; a line break in a cell stays one."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    """The first cell names the row."""
    note: str = ""


@dataclass(frozen=True)
class Report:
    """Everything that a report says, as plain text and numbers: nothing is escaped yet."""

    title: str
    facts: str
    """Budget, metric, target and seeds in a sentence or two."""
    banner: str
    """Says that runs are missing; empty for a finished comparison."""
    verdict: str
    tables: Sequence[Table]
    """Shown at once."""
    folded: Sequence[Table]
    """Shown on demand."""
    values: Table
    """The plot in words."""
    reading: Sequence[str]
    """How to read it."""
    curricula: Mapping[str, Mapping[str, Any]]
    """Curriculum of each method, as in `Curriculum.to_json`; empty if unknown."""
    curves: Mapping[str, Any]
    """Data of the interactive plot: metric, target, label of each axis, methods."""


def build_page(report: Report, plotly_js: str, fallback_png: bytes) -> str:
    """One HTML page with the library and the data inside; `fallback_png` shows where scripts do not run."""
    methods = [
        {**method, "dark": DARK_COLORS.get(method["color"], method["color"])} for method in report.curves["methods"]
    ]
    parts = {
        "TITLE": html.escape(report.title),
        "BANNER": f'<p class="banner" role="status">{html.escape(report.banner)}</p>' if report.banner else "",
        "FACTS": html.escape(report.facts),
        "VERDICT": "".join(f"<p>{html.escape(line)}</p>" for line in report.verdict.splitlines() if line.strip()),
        "METRIC": html.escape(str(report.curves["metric"])),
        "AXIS_BUTTONS": "".join(
            f'<button type="button" data-x="{axis}" aria-pressed="false">{label}</button>'
            for axis, label in (("samples", "samples"), ("flops", "FLOPs"), ("seconds", "seconds"))
        ),
        "FALLBACK": base64.b64encode(fallback_png).decode("ascii"),
        "VALUES": _folded(report.values),
        "TABLES": "".join(_section(table) for table in report.tables),
        "CURRICULA": _curricula(report.curricula),
        "READING": "".join(f"<li>{html.escape(line)}</li>" for line in report.reading),
        "FOLDED": "".join(_folded(table) for table in report.folded),
        "DATA": _script_json({**report.curves, "methods": methods}),
        "PLOTLY": re.sub("</(?=script)", r"<\\/", plotly_js, flags=re.IGNORECASE),
    }
    template = resources.files("tutelage.reproduction").joinpath("report.html.in").read_text(encoding="utf-8")
    return re.sub("@@([A-Z_]+)@@", lambda match: parts[match[1]], template)  # one pass: data is never a placeholder


def build_markdown(report: Report) -> str:
    """The same in Markdown, with the three static plots beside it."""
    pictures = "\n\n".join(f"![Curves against {axis}](curves_{axis}.png)" for axis in report.curves["axes"])
    curricula = Table(
        "Curricula",
        ("method", "stages", "settings"),
        [
            (
                name,
                "\n".join(f"{number}. {stage_words(stage)}" for number, stage in enumerate(_stages(curriculum), 1)),
                _settings_words(curriculum),
            )
            for name, curriculum in report.curricula.items()
            if curriculum
        ],
    )
    parts = [
        f"# {_md(report.title)}",
        f"**{_md(report.banner)}**" if report.banner else "",
        _md(report.verdict, "\n"),
        _md(report.facts),
        *(_md_table(table) for table in report.tables),
        "## Curves",
        pictures,
        _md_table(curricula) if curricula.rows else "",
        "## How to read it",
        "\n".join(f"* {_md(line)}" for line in report.reading),
        *(_md_table(table) for table in report.folded),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def show_number(value: Any) -> str:
    """A number in four digits at most and a suffix: 1.92M; a dash for what is none."""
    if not is_number(value):
        return "-"
    value = float(f"{value:.4g}")
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.4g}"
    for size, suffix in SIZES:
        if abs(value) >= size:
            return f"{value / size:.4g}{suffix}"
    return f"{value:.3g}"


def is_number(value: Any) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def stage_words(stage: Mapping[str, Any]) -> str:
    """What a stage does, in words."""
    weight = stage.get("label_weight") or 0.0
    if stage["kind"] == "hidden":
        student, teacher = (_place(stage.get(f"{who}_place")) for who in ("student", "teacher"))
        words = f"student's {student} learns teacher's {teacher}"
    elif weight >= 1:
        words = "labels alone"
    else:
        checkpoint = stage.get("teacher_checkpoint")
        words = f"output of teacher checkpoint {Path(checkpoint).name}" if checkpoint else "output of the teacher"
        words += f" and labels (weight {weight:g})" if weight else ""
    rate = stage.get("learning_rate")
    return f"{words}, {stage['steps']:,} steps" + (f" at learning rate {rate:g}" if rate else "")


def _place(place: Any) -> str:
    return str(place) if place == "final" else f"block {place}"


def _stages(curriculum: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return curriculum.get("stages") or []


def _settings_words(curriculum: Mapping[str, Any]) -> str:
    """The settings that hidden stages share, and the temperature."""
    names = ("projection", "normalize", "warm_start") if any(s["kind"] == "hidden" for s in _stages(curriculum)) else ()
    return ", ".join(
        f"{name.replace('_', ' ')} {curriculum[name]}" for name in (*names, "temperature") if name in curriculum
    )


def _curricula(curricula: Mapping[str, Mapping[str, Any]]) -> str:
    """Each curriculum as a bar whose parts are its stages, and the same as a list."""
    totals = {name: sum(stage["steps"] for stage in _stages(value)) for name, value in curricula.items()}
    longest = max(totals.values(), default=0)
    figures = []
    for name, curriculum in curricula.items():
        if not totals[name]:
            continue
        segments: list[str] = []
        items: list[str] = []
        kinds: list[str] = []
        for number, stage in enumerate(_stages(curriculum), 1):
            share = stage["steps"] / totals[name]
            kind = (
                "hidden" if stage["kind"] == "hidden" else "labels" if stage.get("label_weight", 0) >= 1 else "output"
            )
            kinds.append(kind)
            shade = f"{kind} {'odd' if kinds.count(kind) % 2 else 'even'}"  # neighbours of a kind differ
            shown = number if share * totals[name] / longest >= SHARE_WITH_NUMBER else ""
            segments.append(f'<span class="{shade}" style="flex:{stage["steps"]} 1 0">{shown}</span>')
            words = f"{html.escape(stage_words(stage))} ({show_number(round(100 * share, 1))}%)"
            items.append(f'<li><span class="swatch {shade}"></span>{words}</li>')
        settings = html.escape(_settings_words(curriculum))
        label = html.escape(f"Curriculum of {name}: {len(items)} stages, {totals[name]:,} steps, listed below")
        figures.append(
            f'<figure class="curriculum"><figcaption><strong>{html.escape(name)}</strong>: {totals[name]:,} steps'
            f"{f'; {settings}' if settings else ''}</figcaption>"
            f'<div class="bar" role="img" aria-label="{label}" style="width:{100 * totals[name] / longest:.4g}%">'
            f"{''.join(segments)}</div><ol>{''.join(items)}</ol></figure>"
        )
    return f"<section><h2>Curricula</h2>{''.join(figures)}</section>" if figures else ""


def _section(table: Table) -> str:
    return f"<section><h2>{html.escape(table.title)}</h2>{_html_table(table)}</section>"


def _folded(table: Table) -> str:
    return f"<details><summary>{html.escape(table.title)}</summary>{_html_table(table)}</details>" if table.rows else ""


def _html_table(table: Table) -> str:
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in table.columns)
    rows = "".join(
        f'<tr><th scope="row">{_breakable(first)}</th>{"".join(map(_html_cell, cells))}</tr>'
        for first, *cells in table.rows
    )
    note = f"<p>{html.escape(table.note)}</p>" if table.note else ""
    label = html.escape(table.title)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{label}"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>{note}"
    )


def _html_cell(text: str) -> str:
    long = ' class="long"' if max(map(len, text.splitlines()), default=0) > LONG_CELL else ""
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
    note = f"\n\n{_md(table.note)}" if table.note else ""
    return f"## {_md(table.title)}\n\n{text}{note}"


def _md(text: str, line_break: str = " ") -> str:
    """Text that Markdown shows as it is."""
    escaped = re.sub(r"([\\`*\[\]|])", r"\\\1", text).replace("&", "&amp;").replace("<", "&lt;")
    return line_break.join(escaped.splitlines())
