"""The report of `tutelage compare`: words, tables and escaping."""

from __future__ import annotations

import dataclasses
import html
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("plotly", reason="report.html needs tutelage[report]")

from tests.reproduction.reporting import (
    BUDGET,
    EVIL,
    POINTS,
    comparison,
    empty,
    plot_data,
    unfinished,
    with_method,
    write,
)
from tutelage.core.curriculum import one_shot
from tutelage.core.errors import UserError
from tutelage.core.stages import JointStage
from tutelage.reproduction.display import show_number
from tutelage.reproduction.report import write_report
from tutelage.reproduction.report_tables import settings_words, stage_words
from tutelage.reproduction.results import MethodResult, Ratio, Trial, Tuning
from tutelage.reproduction.statistics import Estimate, PairedRatio
from tutelage.reproduction.variants import Candidate, Variant


class Elements(HTMLParser):
    """Every element of a page with its attributes; the text of scripts is no markup."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.mark.figures
def test_all_files_are_written(tmp_path: Path) -> None:
    page = write(tmp_path, comparison())
    pictures = {f"curves_{axis}.png" for axis in ("samples", "flops", "seconds")}
    assert {path.name for path in tmp_path.iterdir()} == {"comparison.json", "report.md", page.name, *pictures}
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert pictures == set(re.findall(r"!\[[^]]*\]\(([^)]*)\)", text))


def test_markdown_says_it_all(tmp_path: Path) -> None:
    write(tmp_path, comparison())
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert text.startswith("# Comparison parity-mlp/laptop\n\n* extraction needs 8% of the samples\n* &lt;i>at most")
    header, _, row, evil = table_of(text, "Results")
    assert header[:3] == ["method", "samples to accuracy 0.99", "final accuracy"] and header[3].startswith("ratio to ")
    assert header[4] == "trials"
    assert row == ["extraction", "224k", "0.995", "0.08", "2 (at an edge: learning_rate)"]
    assert evil[1:] == ["> 1.92M", "0.62", "1", "1"]
    row, evil = (line for line in table_of(text, "Results in detail")[2:])
    assert row[:5] == ["extraction", "0.1", "2 (at an edge: learning_rate)", "224k", "144k to 304k"]
    assert row[5:] == ["0.995<br>(0.99 to 1)", "20.16"]
    assert evil[1:5] == ["0.03", "1", "> 1.92M", "128k to > 1.92M"]
    ratios = table_of(text, "Ratios")[2:]
    assert [ratio[1:] for ratio in ratios] == [
        ["samples", "0.08", "0.07 to 0.1", ""],
        ["samples", "-", "8.5 to unbounded", ""],
    ]
    header, _, difference = table_of(text, "Differences")
    assert header[:2] == ["difference of final accuracy", "mean"]
    assert difference == [f"extraction - {evil_name(text)}", "0.36", "0.35 to 0.37", "range", "3"]
    header, _, *rows = table_of(text, "Trials")
    assert header == ["method", "learning rate", "settings", "score", "of", "tuning seeds"]
    assert rows[0] == ["extraction", "0.03", "-", "152k", "samples to target", "3"]
    assert rows[1] == ["extraction", "0.1", "-", "144k ✓", "samples to target", "3"]
    assert rows[2][1:] == ["0.03", "-", "0.61 ✓", "final accuracy", "2"]
    assert ["d", "64"] in table_of(text, "Settings")
    assert ["torch", "2.13.0"] in table_of(text, "Environment")
    assert ["description", "trained past convergence"] in table_of(text, "Teacher")
    assert len(table_of(text, "Every run")) == 2 + 6
    (curriculum, _) = table_of(text, "Curricula")[2:]
    assert "1. student's block 1 learns teacher's block 2, 500 steps" in curriculum[1]
    assert "still running" not in text


def evil_name(text: str) -> str:
    """How a cell shows the name that attacks every format."""
    return table_of(text, "Results")[3][0]


def test_runs_on_several_teachers_are_told_apart(tmp_path: Path) -> None:
    data = comparison()
    (first,) = data.teachers
    second = dataclasses.replace(first, description="trained on a different parity", metrics={"accuracy": 0.999})
    extraction = data.method("extraction")
    more = tuple(dataclasses.replace(run, teacher=1) for run in extraction.runs)
    data = with_method(data, "extraction", runs=(*extraction.runs, *more))
    data = dataclasses.replace(data, teachers=(first, second))
    assert data.pairs == 6
    write(tmp_path, dataclasses.replace(data, complete=False))
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "Medians over seeds 0, 1, 2, each with 2 teachers." in text.partition("<details>")[0]
    assert ["description", "trained past convergence"] in table_of(text, "Teacher 1")
    assert ["description", "trained on a different parity"] in table_of(text, "Teacher 2")
    places = [tuple(row[1:3]) for row in table_of(text, "Every run")[2:]]
    assert places[:6] == [(teacher, seed) for teacher in "12" for seed in "012"]
    assert "**still running: 9 of 12 runs**" in text


def test_first_screen_is_verdict_table_and_plot(tmp_path: Path) -> None:
    """Everything else is folded, in both formats."""
    page = write(tmp_path, comparison())
    shown, _, folded = (tmp_path / "report.md").read_text(encoding="utf-8").partition("<details>")
    assert shown.count("\n| ---") == 1 and shown.count("![") == 1 and "#" not in shown.removeprefix("# ")
    outside = re.sub(r"<details>.*?</details>", "", f"<details>{folded}", flags=re.DOTALL)
    assert not outside.strip()
    body = page.read_text(encoding="utf-8").split("<main>")[1].split("</main>")[0]
    shown, _, folded = body.partition('<section id="details">')
    assert shown.count("<table>") == 1 and shown.count('id="plot"') == 1 and "<details" not in shown
    outside = re.sub(r"<details>.*?</details>", "", folded.removesuffix("</section>\n"), flags=re.DOTALL)
    assert not outside.strip()


def test_one_legend_says_what_the_names_are(tmp_path: Path) -> None:
    page = write(tmp_path, comparison())
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    header, _, extraction, evil = table_of(text, "Methods")
    assert header == ["name", "method", "settings"]
    assert extraction == ["extraction", "extraction", "layer_map=1:2"]
    assert evil[1:] == ["one_shot", "the recipe's own"]
    assert text.count("layer_map=1:2") == page.read_text(encoding="utf-8").count("layer_map=1:2") == 1


def test_a_long_verdict_is_folded(tmp_path: Path) -> None:
    """The first screen has the best variant of extraction and one-shot."""
    data = comparison()
    extraction, evil = data.methods
    slow = dataclasses.replace(extraction, variant=Variant("slow", "extraction"), samples_to_target=Estimate(900_000))
    data = dataclasses.replace(data, methods=(slow, extraction, evil), verdict="one\ntwo\nthree\nfour\nfive")
    write(tmp_path, data)
    shown, _, folded = (tmp_path / "report.md").read_text(encoding="utf-8").partition("<details>")
    assert "* extraction reached accuracy 0.99 in 3 of 3 runs, after 224,000 samples (median)." in shown
    assert "* extraction is the best of 2 variants of extraction, chosen on these same runs." in shown
    assert "extraction needed 0.08 times the samples of" in shown
    assert "five" not in shown and "slow reached" not in shown
    assert "one\n\ntwo\n\nthree\n\nfour\n\nfive" in folded


def test_a_run_that_stopped_at_the_target_keeps_its_value(tmp_path: Path) -> None:
    data = comparison()
    first, *others = data.method("extraction").runs
    first = dataclasses.replace(first, curve=first.curve[:3])
    data = with_method(data, "extraction", runs=(first, *others))
    band = plot_data(write(tmp_path, data))["methods"][0]["axes"]["samples"]["band"]
    assert len(band["x"]) == POINTS and band["high"][-1] == first.curve[-1].metrics["accuracy"] == 1


@pytest.mark.parametrize("match", ["samples", "flops"])
def test_each_method_is_bounded_by_the_end_of_its_own_runs(tmp_path: Path, match: str) -> None:
    data = dataclasses.replace(comparison(), match=match)
    runs = tuple(dataclasses.replace(run, curve=run.curve[:-1]) for run in data.method(EVIL).runs)
    short = Variant(EVIL, "one_shot", budget_fraction=0.92)
    write(tmp_path, with_method(data, EVIL, runs=runs, variant=short))
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert table_of(text, "Results in detail")[3][3:5] == ["> 1.76M", "128k to > 1.76M"]
    assert table_of(text, "Results")[3][1] == "> 1.76M"
    assert ", unless its settings give a budget or match a cost." in text


def test_every_trial_has_a_row(tmp_path: Path) -> None:
    unit, two, paced = "samples to target", {"phase_samples": 640, "schedule": "two"}, {"schedule": "pace-4"}
    trials = (
        Trial(Candidate(0.1, two), unit, score=75_200, seeds=3),
        Trial(Candidate(0.03, two), unit, stopped_after=76_800),
        Trial(Candidate(0.1, paced), unit),
        Trial(Candidate(0.03, paced), unit, diverged=True),
    )
    edges = ("phase_samples", "learning_rate")
    method = MethodResult(Variant("progressive", "progressive"), (Tuning(Candidate(0.1, two), trials, edges),))
    write(tmp_path, dataclasses.replace(empty(), methods=(method,)))
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    long = "phase samples 640, schedule two"
    assert [row[1:] for row in table_of(text, "Trials")[2:]] == [
        ["0.1", long, "75.2k ✓", unit, "3"],
        ["0.03", long, "> 76.8k", unit, "1"],
        ["0.1", "schedule pace-4", "-", unit, "1"],
        ["0.03", "schedule pace-4", "diverged", unit, "1"],
    ]
    shown = "4 (at an edge: phase_samples, learning_rate)"
    assert table_of(text, "Results in detail")[2][1:3] == [f"0.1, {long}", shown]
    assert table_of(text, "Results")[2][-1] == shown
    assert "✓ marks what the method was then run with" in text


@pytest.mark.parametrize(
    ("paired", "words"),
    [
        (PairedRatio(Estimate(0.08, 0.07, 0.1), 5), "0.08"),
        (PairedRatio(Estimate(0.08, 0.07, 0.1), 5, unreached=1), "at most 0.08"),
        (PairedRatio(Estimate(None, 8.5, None), 5), "at least 8.5"),
        (PairedRatio(Estimate(None, 0.5, None), 5, unreached=1), "unknown"),
        (PairedRatio(Estimate(None, None, None), 5), "not reached"),
        (PairedRatio(Estimate(None, None, None), 0), "-"),
        (None, "-"),
    ],
)
def test_ratios_say_no_more_than_is_known(tmp_path: Path, paired: PairedRatio | None, words: str) -> None:
    ratios = () if paired is None else (Ratio("a", "one_shot", "samples", 5, paired),)
    write(tmp_path, dataclasses.replace(empty("a", "one_shot"), target=0.9, ratios=ratios))
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert table_of(text, "Results")[2][3] == words
    bounds = [row for row in table_of(text, "Ratios")[2:] if "at most" in row[4]] if ratios else []
    assert len(bounds) == (paired is not None and paired.is_bound)


def table_of(text: str, title: str) -> list[list[str]]:
    """Cells of a folded table, or of the one of the first screen (`Results`): header and rule first."""
    part = text.partition("<details>")[0]
    if title != "Results":
        part = text.split(f"\n<summary>{title}</summary>\n", 1)[1].split("</details>", 1)[0]
    rows = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]


def test_no_name_breaks_the_formats(tmp_path: Path) -> None:
    page = write(tmp_path, comparison())
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "<script" not in text
    assert "</script" not in text
    for title in ("Results", "Results in detail", "Methods", "Every run", "Curricula", "Trials"):
        rows = table_of(text, title)
        assert {len(row) for row in rows} == {len(rows[0])}
    source = page.read_text(encoding="utf-8")
    assert 'document.title="bad"' not in source
    assert "<b>bold" not in source
    assert html.escape(EVIL) in source.replace("<wbr>", "")
    assert [tag for tag, _ in Elements(source).found].count("script") == 3


def test_page_loads_nothing(tmp_path: Path) -> None:
    page = write(tmp_path, comparison())
    elements = Elements(page.read_text(encoding="utf-8")).found
    loads = [str(value) for _, attrs in elements for name, value in attrs.items() if name in ("src", "href")]
    assert [load for load in loads if not load.startswith("data:image/png;base64,")] == []
    assert not [tag for tag, _ in elements if tag in ("link", "iframe", "object")]
    policy = next(attrs["content"] for _, attrs in elements if "http-equiv" in attrs)
    assert policy is not None and policy.startswith("default-src 'none'")


def test_data_of_the_plot(tmp_path: Path) -> None:
    extraction, evil = plot_data(write(tmp_path, comparison()))["methods"]
    band = extraction["axes"]["samples"]["band"]
    assert band["x"] == [step * BUDGET // (POINTS - 1) for step in range(POINTS)]
    assert band["median"][-1] == 0.995 and band["low"][-1] == 0.99 and band["high"][-1] == 1
    # seconds differ by seed: one that reached the target keeps its value, one that did not ends the median
    seconds, unreached = extraction["axes"]["seconds"], evil["axes"]["seconds"]
    assert seconds["runs"][0]["x"][-1] < seconds["runs"][2]["x"][-1] == seconds["band"]["x"][-1]
    assert seconds["band"]["high"][-1] == 1
    assert unreached["band"]["x"][-1] == unreached["runs"][0]["x"][-1]
    assert evil["name"] == EVIL and evil["color"] != extraction["color"]


def test_unfinished_comparison_says_so(tmp_path: Path) -> None:
    page = write(tmp_path, unfinished())
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "**still running: 1 of 6 runs**" in text
    assert "No verdict yet." in text
    extraction, evil = table_of(text, "Results")[2:]
    assert extraction[1] == "144k"
    assert evil[1:] == ["-", "-", "1", "1"]  # no run: nothing is known, least of all that it failed
    assert table_of(text, "Results in detail")[3][1:] == ["-", "1", "-", "-", "-", "-"]
    assert [row[-2] for row in table_of(text, "Every run")[2:]] == ["1"]
    assert '<p class="banner" role="status">still running: 1 of 6 runs</p>' in page.read_text(encoding="utf-8")
    data = plot_data(page)["methods"][0]["axes"]["samples"]
    assert [len(run["x"]) for run in data["runs"]] == [POINTS]
    assert len(data["band"]["x"]) == POINTS


def test_nothing_but_names(tmp_path: Path) -> None:
    page = write(tmp_path, empty("one_shot", complete=False))
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert table_of(text, "Results")[2] == ["one_shot", "-", "1"]
    assert table_of(text, "Results in detail")[2] == ["one_shot", "-", "1", "-", "-"]
    assert page.is_file()
    assert write(tmp_path, empty()).is_file()


def test_a_method_that_diverged_at_every_rate_says_so(tmp_path: Path) -> None:
    trials = (Trial(Candidate(0.1), "final accuracy", diverged=True),)
    write(tmp_path, with_method(empty("one_shot"), "one_shot", tunings=(Tuning(None, trials),)))
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert table_of(text, "Results in detail")[2] == ["one_shot", "all diverged", "1", "-", "-"]


def test_without_a_target_the_final_values_are_compared(tmp_path: Path) -> None:
    data = dataclasses.replace(comparison(), target=None, ratios=(), match="flops", better="lower")
    write(tmp_path, data)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert table_of(text, "Results")[0] == ["method", "final accuracy", "trials"]
    assert table_of(text, "Results in detail")[0] == [
        "method",
        "chosen",
        "trials",
        "final accuracy, median (range)",
        "seconds, median",
    ]
    assert (
        "Budget of one-shot: 1.92M samples; every other method got the same number of FLOPs." in text
        and "lower is better; there is no target" in text
    )
    assert "to target" not in "".join(table_of(text, "Every run")[0])


def test_points_without_the_metric_are_left_out(tmp_path: Path) -> None:
    """A metric that was not finite is not in its point."""
    data = comparison()
    first, *others = data.method("extraction").runs
    curve = list(first.curve)
    curve[5] = dataclasses.replace(curve[5], metrics={"loss": 1.0})
    data = with_method(data, "extraction", runs=(dataclasses.replace(first, curve=tuple(curve)), *others))
    axes = plot_data(write(tmp_path, data))["methods"][0]["axes"]
    assert [len(run["x"]) for run in axes["samples"]["runs"]] == [POINTS - 1, POINTS, POINTS]
    assert [len(run["x"]) for run in axes["flops"]["runs"]] == [POINTS - 1, POINTS, POINTS]


def test_without_plotly_the_rest_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.warns(UserWarning, match=r"install tutelage\[report\]"):
        path = write(tmp_path, comparison())
    assert path == tmp_path / "report.md" and path.is_file()
    assert not (tmp_path / "report.html").exists()
    assert (tmp_path / "curves_seconds.png").is_file()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"found no comparison\.json in .*: make one with tutelage compare"),
        ("{", r"cannot read .*comparison\.json': not JSON: .*give the command of the comparison again"),
        ("[]", "it was written by an earlier version of tutelage, or is not a comparison"),
        ('{"metric": "accuracy", "methods": {"extraction": {}}}', "it was written by an earlier version of tutelage"),
        ('{"metric": "accuracy", "colour": "red"}', "it was written by an earlier version of tutelage"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "comparison.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        write_report(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (math.inf, "-"),
        (0, "0"),
        (0.98765, "0.9877"),
        (1.0, "1"),
        (9999, "9999"),
        (144_000, "144k"),
        (1_920_000, "1.92M"),
        (999_999.9, "1M"),
        (2.5e12, "2.5T"),
        (3e-5, "3e-05"),
    ],
)
def test_numbers(value: float | None, text: str) -> None:
    assert show_number(value) == text


def test_a_joint_stage_is_told_in_words() -> None:
    stage = JointStage(10, [(1, 2), ("final", "final")], hidden_weight=0.5)
    pairs = "student's block 1 learns teacher's block 2, student's final state learns teacher's final state"
    assert stage_words(stage) == f"output of the teacher and (weight 0.5) {pairs}, 10 steps"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "temperature 1"),
        ({"temperature": 2.0, "output_positions": "all"}, "temperature 2, outputs of all positions"),
        ({"output_loss": "mse"}, "mean square of the logits"),
        ({"student_init": "teacher"}, "warm start none, starts from the teacher, temperature 1"),
        ({"warm_start": "embedding"}, "warm start embedding, temperature 1"),
        (
            {"warm_start": "head", "projection": "logits", "normalize": "none"},
            "projection logits, normalize none, warm start head, temperature 1",
        ),
    ],
)
def test_settings_of_a_method_without_stages_are_told_in_words(settings: dict[str, Any], words: str) -> None:
    assert settings_words(one_shot(10, **settings)) == words
