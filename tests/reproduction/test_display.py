"""Names of users in Markdown and in plots: shown as they are, never interpreted."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from matplotlib import cbook

from tests.reproduction.reporting import comparison
from tutelage.reproduction import report_curves
from tutelage.reproduction.display import Table
from tutelage.reproduction.report_curves import draw_curves, method_curves
from tutelage.runs.escaping import as_label


def test_a_cell_of_a_table_begins_no_list() -> None:
    rows = Table("t", ("name", "stages"), [("_a|", "1. first\n2. second"), ("-", "$")]).to_markdown().splitlines()
    assert rows[2:] == [r"| \_a\| | 1. first<br>2. second |", "| - | &#36; |"]


@pytest.mark.parametrize("name", ["$x^2$", "_hidden", "a$b", r"\\$\\frac$", "a\nb"])
def test_a_plot_shows_a_name_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(report_curves.plots, "save_figure", lambda figure, path: drawn.append(figure))
    data = comparison()
    method = dataclasses.replace(data.methods[0], variant=dataclasses.replace(data.methods[0].variant, name=name))
    data = dataclasses.replace(data, methods=(method,), metric="$loss$")
    draw_curves(method_curves(data), data, "samples", tmp_path / "curves.png")
    labels = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert labels[0] == as_label(name) and not any(map(cbook.is_math_text, [*labels, drawn[0].axes[0].get_ylabel()]))
    assert labels[0].replace(r"\$", "$").strip() == name.replace("\n", " ")
