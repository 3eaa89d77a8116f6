"""The report of `tutelage compare`: words, escaping, and the page in a real browser."""

from __future__ import annotations

import dataclasses
import html
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("plotly", reason="report.html needs tutelage[report]")

from tutelage.core.curriculum import Curriculum, HiddenStage, OutputStage
from tutelage.core.errors import UserError
from tutelage.reproduction.display import show_number
from tutelage.reproduction.report import write_report
from tutelage.reproduction.results import (
    Comparison,
    CurvePoint,
    MethodResult,
    Ratio,
    RunRecord,
    TeacherRecord,
    Trial,
)
from tutelage.reproduction.statistics import Estimate, PairedRatio
from tutelage.reproduction.variants import Candidate, Variant

EVIL = '</script><script>document.title="bad"</script>:projection=logits,warm_start=head|a/b*'
BUDGET = 1_920_000
POINTS = 13
CHROMIUM = shutil.which("chromium")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")


def run_of(seed: int, reached: int | None, end: float = 1.0) -> RunRecord:
    curve = []
    for step in range(POINTS):
        samples = step * BUDGET // (POINTS - 1)
        accuracy = 0.5 + (end - 0.5) * min(1.0, samples / (reached or 4 * BUDGET)) - 0.005 * seed
        seconds = samples * (1 + 0.05 * seed) / 1e5
        curve.append(CurvePoint(samples, samples * 2.5e6, seconds, {"accuracy": accuracy, "loss": 1 - accuracy}))
    at_target = None if reached is None else CurvePoint(reached, reached * 2.5e6, reached / 1e5, {"accuracy": 1.0})
    return RunRecord(seed, tuple(curve), at_target=at_target)


def comparison() -> Comparison:
    """Two methods, three seeds; one method never gets there and has a name that attacks every format."""
    output = OutputStage(29_500)
    settings = {"projection": "gaussian", "normalize": "none", "warm_start": "none", "temperature": 1.0}
    extraction = MethodResult(
        variant=Variant("extraction", "extraction", {"layer_map": "1:2"}),
        candidate=Candidate(0.1),
        trials=(
            Trial(Candidate(0.03), "samples to target", score=152_000),
            Trial(Candidate(0.1), "samples to target", score=144_000),
        ),
        curriculum=Curriculum("extraction", (HiddenStage(500, 1, 2), output), **settings),
        runs=tuple(run_of(seed, 144_000 + 80_000 * seed) for seed in range(3)),
        samples_to_target=Estimate(224_000, 144_000, 304_000),
    )
    evil = MethodResult(
        variant=Variant(EVIL, "one_shot"),
        candidate=Candidate(0.03),
        trials=(Trial(Candidate(0.03), "final accuracy", score=0.61),),
        curriculum=Curriculum("one_shot", (dataclasses.replace(output, steps=30_000),)),
        runs=tuple(run_of(seed, None) for seed in range(3)),
        samples_to_target=Estimate(None, 128_000, None),
    )
    return Comparison(
        recipe="parity-mlp",
        size="laptop",
        command="tutelage compare parity-mlp/laptop",
        complete=True,
        match="samples",
        budget=BUDGET,
        metric="accuracy",
        better="higher",
        target=0.99,
        seeds=(0, 1, 2),
        settings={"d": 64, "k": 5, "note": "<b>bold</b>"},
        teacher=TeacherRecord("trained past convergence", {"accuracy": 1.0}),
        environment={"torch": "2.13.0", "machine": "laptop"},
        methods=(extraction, evil),
        ratios=(
            Ratio("extraction", EVIL, "samples", 3, PairedRatio(Estimate(0.08, 0.07, 0.1), 3)),
            Ratio(EVIL, "extraction", "samples", 3, PairedRatio(Estimate(None, 8.5, None), 3)),
        ),
        verdict="extraction needs 8% of the samples\n<i>at most</i>",
    )


def with_method(data: Comparison, name: str, **changes: Any) -> Comparison:
    """A comparison with a change in one of its methods."""
    methods = tuple(dataclasses.replace(m, **changes) if m.name == name else m for m in data.methods)
    return dataclasses.replace(data, methods=methods)


def empty(*names: str, complete: bool = True) -> Comparison:
    """A comparison in which no method has run."""
    methods = tuple(MethodResult(Variant(name, "one_shot")) for name in names)
    data = dataclasses.replace(comparison(), complete=complete, target=None, seeds=(), ratios=(), verdict="")
    return dataclasses.replace(data, methods=methods)


def unfinished() -> Comparison:
    """One run is finished; a method has none."""
    data = dataclasses.replace(comparison(), complete=False, ratios=(), verdict="")
    data = with_method(
        data, "extraction", runs=(run_of(0, 144_000),), samples_to_target=Estimate(144_000, 144_000, 144_000)
    )
    return with_method(data, EVIL, runs=(), trials=(), samples_to_target=Estimate())


def write(folder: Path, data: Comparison) -> Path:
    data.write(folder)
    return write_report(folder)


def browse(page: Path, fragment: str = "", script: str = "", first: str = "", flags: Sequence[str] = ()) -> str:
    """The page's DOM once its scripts have run, with the test's own first and last; the console must stay silent."""
    assert CHROMIUM is not None
    if script or first:
        text = page.read_text(encoding="utf-8")
        page = page.with_name("with_script.html")
        text = text.replace("<title>", f"<script>{first}</script><title>", 1)
        page.write_text(text.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    profile = page.with_name("profile")
    always = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0", "--dump-dom"]
    always += [f"--user-data-dir={profile}", "--window-size=1000,900", "--virtual-time-budget=4000"]
    command = [CHROMIUM, *always, *flags, page.as_uri() + fragment]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert [line for line in result.stderr.splitlines() if "CONSOLE" in line] == []
    return result.stdout


class Elements(HTMLParser):
    """Every element of a page with its attributes; the text of scripts is no markup."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


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
    assert row == ["extraction", "224k", "0.995", "0.08"]
    assert evil[1:] == ["> 1.92M", "0.62", "1"]
    row, evil = (line for line in table_of(text, "Results in detail")[2:])
    assert row[:4] == ["extraction", "0.1", "224k", "144k to 304k"]
    assert row[4:] == ["0.995<br>(0.99 to 1)", "20.16"]
    assert evil[1:4] == ["0.03", "> 1.92M", "128k to > 1.92M"]
    ratios = table_of(text, "Ratios")[2:]
    assert [ratio[1:] for ratio in ratios] == [
        ["samples", "0.08", "0.07 to 0.1", ""],
        ["samples", "-", "8.5 to unbounded", ""],
    ]
    grid = table_of(text, "Learning rates tried")
    assert grid[0] == ["method", "0.03", "0.1"]
    assert grid[2] == ["extraction", "152k samples to target", "144k samples to target ✓"]
    assert grid[3][1:] == ["0.61 final accuracy ✓", ""]
    assert ["d", "64"] in table_of(text, "Settings")
    assert ["torch", "2.13.0"] in table_of(text, "Environment")
    assert ["description", "trained past convergence"] in table_of(text, "Teacher")
    assert len(table_of(text, "Every run")) == 2 + 6
    (curriculum, _) = table_of(text, "Curricula")[2:]
    assert "1. student's block 1 learns teacher's block 2, 500 steps" in curriculum[1]
    assert "still running" not in text


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
    assert "* extraction reached accuracy 0.99 on 3 of 3 seeds, after 224,000 samples (median)." in shown
    assert "* extraction is the best of 2 variants of extraction, chosen on these same seeds." in shown
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


def test_without_equal_samples_each_method_has_its_own_bound(tmp_path: Path) -> None:
    data = dataclasses.replace(comparison(), match="flops")
    runs = tuple(dataclasses.replace(run, curve=run.curve[:-1]) for run in data.method(EVIL).runs)
    write(tmp_path, with_method(data, EVIL, runs=runs))
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert table_of(text, "Results in detail")[3][2:4] == ["> 1.76M", "128k to > 1.76M"]
    assert table_of(text, "Results")[3][1] == "> 1.76M"


def test_schedules_have_rows_of_their_own(tmp_path: Path) -> None:
    unit = "samples to target"
    method = MethodResult(
        Variant("progressive", "progressive"),
        Candidate(0.1, "two"),
        trials=(
            Trial(Candidate(0.1, "two"), unit, score=75_200),
            Trial(Candidate(0.03, "two"), unit, stopped_after=76_800),
            Trial(Candidate(0.1, "four"), unit),
            Trial(Candidate(0.03, "four"), unit, diverged=True),
        ),
    )
    write(tmp_path, dataclasses.replace(empty(), methods=(method,)))
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    header, _, two, four = table_of(text, "Learning rates tried")
    assert header == ["method", "0.03", "0.1"]
    assert two == ["progressive two", "> 76.8k", "75.2k ✓"]
    assert four == ["progressive four", "diverged", "-"]
    assert table_of(text, "Results in detail")[2][1] == "0.1, two"
    assert "Scores are samples to target. ✓ marks" in text


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
    for title in ("Results", "Results in detail", "Methods", "Every run", "Curricula", "Learning rates tried"):
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


def plot_data(page: Path) -> dict[str, Any]:
    found = re.search(r'id="curves-data">(.*?)</script>', page.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_unfinished_comparison_says_so(tmp_path: Path) -> None:
    page = write(tmp_path, unfinished())
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "**still running: 1 of 6 runs**" in text
    assert "No verdict yet." in text
    extraction, evil = table_of(text, "Results")[2:]
    assert extraction[1] == "144k"
    assert evil[1:] == ["-", "-", "1"]  # no run: nothing is known, least of all that it failed
    assert table_of(text, "Results in detail")[3][2:] == ["-", "-", "-", "-"]
    assert [row[-2] for row in table_of(text, "Every run")[2:]] == ["1"]
    assert '<p class="banner" role="status">still running: 1 of 6 runs</p>' in page.read_text(encoding="utf-8")
    data = plot_data(page)["methods"][0]["axes"]["samples"]
    assert [len(run["x"]) for run in data["runs"]] == [POINTS]
    assert len(data["band"]["x"]) == POINTS


def test_nothing_but_names(tmp_path: Path) -> None:
    page = write(tmp_path, empty("one_shot", complete=False))
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert table_of(text, "Results")[2] == ["one_shot", "-"]
    assert table_of(text, "Results in detail")[2] == ["one_shot", "-", "-", "-"]
    assert page.is_file()
    assert write(tmp_path, empty()).is_file()


def test_a_method_that_diverged_at_every_rate_says_so(tmp_path: Path) -> None:
    trials = (Trial(Candidate(0.1), "final accuracy", diverged=True),)
    write(tmp_path, with_method(empty("one_shot"), "one_shot", trials=trials))
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert table_of(text, "Results in detail")[2] == ["one_shot", "all diverged", "-", "-"]


def test_without_a_target_the_final_values_are_compared(tmp_path: Path) -> None:
    data = dataclasses.replace(comparison(), target=None, ratios=(), match="flops", better="lower")
    write(tmp_path, data)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert table_of(text, "Results")[0] == ["method", "final accuracy"]
    assert table_of(text, "Results in detail")[0] == [
        "method",
        "learning rate",
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
        ("{", r"cannot read .*comparison\.json.*: it is not JSON .*Make it again with tutelage compare"),
        ("[]", "it was written by an earlier version of tutelage, or is something else"),
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


PLOTTED = "JSON.stringify(document.getElementById('plot').data.map(trace => trace.x))"
RECORD = f"document.body.dataset.{{}} = {PLOTTED};"


def recorded(dom: str, name: str) -> Any:
    found = re.search(rf'<body[^>]* data-{name}="([^"]*)"', dom)
    assert found is not None
    return json.loads(html.unescape(found[1]))


@needs_browser
def test_browser_draws_every_curve(tmp_path: Path) -> None:
    page = write(tmp_path, comparison())
    dom = browse(page, script=RECORD.format("before"))
    data = plot_data(page)
    # two edges of the band, three seeds and the median of each method, and the target
    drawn = recorded(dom, "before")
    assert len(drawn) == 2 * 6 + 1
    assert drawn[2] == data["methods"][0]["axes"]["samples"]["runs"][0]["x"]
    assert '<figure id="curves-figure" data-axis="samples" data-scale="linear">' in dom
    assert ">training samples</text>" in dom
    buttons = set(re.findall(r'data-title="([^"]*)"', dom.split('id="curves-data"')[0]))
    assert "Zoom in" in buttons and not [title for title in buttons if "Share" in title]  # the data stays here
    assert "<title>Comparison parity-mlp/laptop</title>" in dom  # and not the title that the evil name sets
    legend = re.search(r'<div id="legend".*?</div>', dom, re.DOTALL)
    assert legend is not None and html.escape(EVIL, quote=False) in legend[0].replace("<wbr>", "")


@needs_browser
def test_browser_takes_the_view_from_the_address(tmp_path: Path) -> None:
    dom = browse(write(tmp_path, comparison()), "#x=flops&scale=log")
    assert 'data-axis="flops" data-scale="log"' in dom
    assert ">training FLOPs, teacher included</text>" in dom
    assert re.search(r'data-x="flops" aria-pressed="true"', dom)
    assert re.search(r'data-x="samples" aria-pressed="false"', dom)


@needs_browser
def test_browser_buttons_change_the_curves(tmp_path: Path) -> None:
    page = write(tmp_path, comparison())
    click = "document.querySelector('button[data-x={}]').click();"
    script = RECORD.format("before") + click.format("seconds") + RECORD.format("after")
    script += "document.querySelector('button[data-scale=log]').click();"
    script += "document.querySelector('#legend button').click();"
    script += "document.body.dataset.shown = JSON.stringify(plot.data.map(trace => trace.visible !== false));"
    script += "document.body.dataset.type = JSON.stringify([plot.layout.xaxis.type, location.hash]);"
    dom = browse(page, script=script)
    runs = plot_data(page)["methods"][0]["axes"]
    before, after = recorded(dom, "before"), recorded(dom, "after")
    assert before[2] == runs["samples"]["runs"][0]["x"]
    assert after[2] == runs["seconds"]["runs"][0]["x"] != before[2]
    assert after[5] == runs["seconds"]["band"]["x"]
    assert recorded(dom, "shown") == [False] * 6 + [True] * 7  # the legend hides the whole method
    assert recorded(dom, "type") == ["log", "#x=seconds&scale=log"]
    assert ">training seconds</text>" in dom


@needs_browser
@pytest.mark.parametrize("data", [unfinished(), empty("one_shot")])
def test_browser_shows_what_there_is(tmp_path: Path, data: Comparison) -> None:
    dom = browse(write(tmp_path, data))
    assert 'data-axis="samples"' in dom


@needs_browser
def test_page_fits_a_phone(tmp_path: Path) -> None:
    """Nothing but the tables, each in its own box, is wider than the screen."""
    page = write(tmp_path, comparison())
    # headless windows have a least width, so the page goes into a frame of a phone's, and tells its width from there
    framed = page.with_name("framed.html")
    report = "parent.postMessage([document.documentElement.scrollWidth, innerWidth], '*')"
    tell = f"<script>setTimeout(() => {report}, 500)</script></body>"
    framed.write_text(page.read_text(encoding="utf-8").replace("</body>", tell), encoding="utf-8")
    outer = page.with_name("outer.html")
    listen = "onmessage = event => { document.body.dataset.widths = JSON.stringify(event.data) }"
    outer.write_text(
        f'<body><script>{listen}</script><iframe src="framed.html" width="390" height="844" style="border:0"></iframe>',
        encoding="utf-8",
    )
    content, screen = recorded(browse(outer), "widths")
    assert content <= screen == 390


@needs_browser
def test_plot_is_dark_when_the_page_is(tmp_path: Path) -> None:
    record = "document.body.dataset.ink = JSON.stringify(plot.layout.font.color);"
    page = write(tmp_path, comparison())
    inks = [
        recorded(browse(page, script=record, flags=[f"--blink-settings=preferredColorScheme={n}"]), "ink")
        for n in (0, 1)
    ]
    assert inks == ["#e6e9ee", "#1b1f24"]


@needs_browser
def test_plot_follows_a_change_of_the_colour_scheme(tmp_path: Path) -> None:
    """The browser's answer is played, as headless runs cannot change theirs: the target's line tells the colours."""
    play = "const played = { matches: false, addEventListener: (_, changed) => { played.changed = changed; } };"
    play += "const real = matchMedia; window.matchMedia = query => query.includes('dark') ? played : real(query);"
    line = "plot.data.at(-1).line.color"
    script = f"const light = {line}; played.matches = true; played.changed();"
    script += f"document.body.dataset.lines = JSON.stringify([light, {line}]);"
    assert recorded(browse(write(tmp_path, comparison()), script=script, first=play), "lines") == ["#57606a", "#a3adb9"]
