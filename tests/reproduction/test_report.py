"""The report of `tutelage compare`: words, escaping, and the page in a real browser."""

from __future__ import annotations

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

from tutelage.core.errors import UserError
from tutelage.reproduction.report import write_report
from tutelage.reproduction.report_page import show_number

EVIL = '</script><script>document.title="bad"</script>:projection=logits,warm_start=head|a/b*'
BUDGET = 1_920_000
POINTS = 13
CHROMIUM = shutil.which("chromium")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")


def run_of(seed: int, reached: int | None, finished: bool = True, end: float = 1.0) -> dict[str, Any]:
    curve = []
    for step in range(POINTS if finished else 4):
        samples = step * BUDGET // (POINTS - 1)
        accuracy = 0.5 + (end - 0.5) * min(1.0, samples / (reached or 4 * BUDGET)) - 0.005 * seed
        point = {"samples": samples, "flops": samples * 2.5e6, "seconds": samples * (1 + 0.05 * seed) / 1e5}
        curve.append({**point, "accuracy": accuracy, "loss": 1 - accuracy})
    run: dict[str, Any] = {"seed": seed, "curve": curve}
    if finished:
        run |= {
            "samples_to_target": reached,
            "flops_to_target": None if reached is None else reached * 2.5e6,
            "seconds_to_target": None if reached is None else reached / 1e5,
            "seconds": 12.1 + seed,
            "final": {"accuracy": curve[-1]["accuracy"], "loss": curve[-1]["loss"]},
        }
    return run


def comparison() -> dict[str, Any]:
    """Two methods, three seeds; one method never gets there and has a name that attacks every format."""
    hidden = {"kind": "hidden", "steps": 500, "student_place": 1, "teacher_place": 2}
    output = {"kind": "output", "steps": 29_500, "teacher_checkpoint": None, "label_weight": 0.0}
    settings = {"projection": "gaussian", "normalize": "none", "warm_start": "none", "temperature": 1.0}
    return {
        "recipe": "parity-mlp",
        "size": "laptop",
        "command": "tutelage compare parity-mlp/laptop",
        "complete": True,
        "match": "samples",
        "budget": BUDGET,
        "metric": "accuracy",
        "better": "higher",
        "target": 0.99,
        "settings": {"d": 64, "k": 5, "note": "<b>bold</b>"},
        "teacher": {"description": "trained past convergence", "accuracy": 1.0},
        "environment": {"torch": "2.13.0", "machine": "laptop"},
        "seeds": [0, 1, 2],
        "methods": {
            "extraction": {
                "learning_rate": 0.1,
                "grid": {
                    "0.03": {"score": 152_000, "unit": "samples to target"},
                    "0.1": {"score": 144_000, "unit": "samples to target"},
                },
                "curriculum": {"method": "extraction", "stages": [hidden, output], **settings},
                "runs": [run_of(seed, 144_000 + 80_000 * seed) for seed in range(3)],
                "median_samples_to_target": 224_000,
                "ci95": [144_000, 304_000],
            },
            EVIL: {
                "learning_rate": 0.03,
                "grid": {"0.03": {"score": 0.61, "unit": "final accuracy"}},
                "curriculum": {"method": "one_shot", "stages": [{**output, "steps": 30_000}], "temperature": 1.0},
                "runs": [run_of(seed, None) for seed in range(3)],
                "median_samples_to_target": None,
                "ci95": [128_000, None],
            },
        },
        "ratios": {
            f"extraction/{EVIL}": {"median": 0.08, "ci95": [0.07, 0.1]},
            f"{EVIL}/extraction": {"median": None, "ci95": [8.5, None], "note": "a lower bound"},
        },
        "verdict": "extraction needs 8% of the samples\n<i>at most</i>",
    }


def unfinished() -> dict[str, Any]:
    """One run done, one going, a method without any."""
    data = comparison()
    data |= {"complete": False, "ratios": {}, "verdict": ""}
    first, second = data["methods"].values()
    first |= {"runs": [run_of(0, 144_000), run_of(1, None, finished=False)], "median_samples_to_target": 144_000}
    second |= {"runs": [], "ci95": [None, None], "grid": {}}
    return data


def write(folder: Path, data: dict[str, Any]) -> Path:
    (folder / "comparison.json").write_text(json.dumps(data), encoding="utf-8")
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
    assert text.startswith("# Comparison parity-mlp/laptop\n\nextraction needs 8% of the samples\n&lt;i>at most")
    row, evil = (line for line in table_of(text, "Results")[2:])
    assert row[:4] == ["extraction", "0.1", "224k", "144k to 304k"]
    assert row[4].startswith("0.08 times ")
    assert row[5:] == ["0.995<br>(0.99 to 1)", "13.1"]
    assert evil[1:5] == ["0.03", "> 1.92M", "128k to > 1.92M", "at least 8.5 times extraction"]
    ratios = table_of(text, "Ratios")[2:]
    assert [ratio[1:] for ratio in ratios] == [["0.08", "0.07 to 0.1", ""], ["-", "8.5 to unbounded", "a lower bound"]]
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


def test_a_run_that_stopped_at_the_target_keeps_its_value(tmp_path: Path) -> None:
    data = comparison()
    runs = data["methods"]["extraction"]["runs"]
    del runs[0]["curve"][3:]
    band = plot_data(write(tmp_path, data))["methods"][0]["axes"]["samples"]["band"]
    assert len(band["x"]) == POINTS and band["high"][-1] == runs[0]["curve"][-1]["accuracy"] == 1


def test_without_equal_samples_each_method_has_its_own_bound(tmp_path: Path) -> None:
    data = comparison() | {"match": "flops"}
    for run in data["methods"][EVIL]["runs"]:
        del run["curve"][-1]
    write(tmp_path, data)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert table_of(text, "Results")[3][2:4] == ["> 1.76M", "128k to > 1.76M"]


def test_schedules_have_rows_of_their_own(tmp_path: Path) -> None:
    scores = {"0.1 two": {"score": 75_200}, "0.03 two": {"score": None, "stopped_after": 76_800}, "0.1 four": {}}
    grid = {key: {"unit": "samples to target", **cell} for key, cell in scores.items()}
    method = {"learning_rate": 0.1, "schedule": "two", "grid": grid}
    write(tmp_path, {"metric": "accuracy", "methods": {"progressive": method}})
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    header, _, two, four = table_of(text, "Learning rates tried")
    assert header == ["method", "0.03", "0.1"]
    assert two == ["progressive two", "> 76.8k", "75.2k ✓"]
    assert four == ["progressive four", "", "-"]
    assert table_of(text, "Results")[2][1] == "0.1, two"
    assert "Scores are samples to target. ✓ marks" in text


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        ({"median": 0.08, "ci95": [0.07, 0.1]}, "0.08 times"),
        ({"median": 0.08, "ci95": [0.07, 0.1], "note": "at most: one of 5 did not"}, "at most 0.08 times"),
        ({"median": None, "ci95": [8.5, None]}, "at least 8.5 times"),
        ({"median": None, "ci95": [0.5, None], "note": "at most: one of 5 did not"}, "unknown against"),
        ({"median": None, "ci95": [None, None], "pairs": 0}, "unknown against"),
        ({}, "unknown against"),
    ],
)
def test_ratios_say_no_more_than_is_known(tmp_path: Path, ratio: dict[str, Any], words: str) -> None:
    write(tmp_path, {"metric": "accuracy", "methods": {"a": {}, "b": {}}, "ratios": {"a/b": ratio}})
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert table_of(text, "Results")[2][2] == f"{words} b"


def table_of(text: str, title: str) -> list[list[str]]:
    """Cells of the table under a heading, header and rule first."""
    part = text.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]
    rows = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]


def test_no_name_breaks_the_formats(tmp_path: Path) -> None:
    page = write(tmp_path, comparison())
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "<script" not in text
    assert "</script" not in text
    for title in ("Results", "Every run", "Curricula", "Learning rates tried"):
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
    assert extraction[2] == "144k"
    assert evil[2:] == ["-", "-", "-", "-"]  # no run: nothing is known, least of all that it failed
    assert [row[-2] for row in table_of(text, "Every run")[2:]] == ["1", "still running"]
    assert '<p class="banner" role="status">still running: 1 of 6 runs</p>' in page.read_text(encoding="utf-8")
    data = plot_data(page)["methods"][0]["axes"]["samples"]
    assert [len(run["x"]) for run in data["runs"]] == [POINTS, 4]
    assert len(data["band"]["x"]) == POINTS  # the run still going does not cut the median short


def test_nothing_but_names(tmp_path: Path) -> None:
    page = write(tmp_path, {"metric": "accuracy", "complete": False, "methods": {"extraction": {}}})
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert table_of(text, "Results")[2] == ["extraction", "-", "-", "-"]
    assert page.is_file()
    assert write(tmp_path, {"metric": "accuracy", "methods": {}}).is_file()


def test_without_a_target_the_final_values_are_compared(tmp_path: Path) -> None:
    data = comparison() | {"target": None, "ratios": {}, "match": "flops", "better": "lower"}
    write(tmp_path, data)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert table_of(text, "Results")[0] == [
        "method",
        "learning rate",
        "final accuracy, median (range)",
        "seconds, median",
    ]
    assert (
        "Budget of one_shot: 1.92M samples; every other method got as many FLOPs." in text
        and "lower is better; no target" in text
    )
    assert "to target" not in "".join(table_of(text, "Every run")[0])


def test_values_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    data = comparison()
    runs = data["methods"]["extraction"]["runs"]
    runs[0]["curve"][5]["accuracy"] = math.nan
    runs[1]["curve"][5]["flops"] = None
    axes = plot_data(write(tmp_path, data))["methods"][0]["axes"]
    assert [len(run["x"]) for run in axes["samples"]["runs"]] == [POINTS - 1, POINTS, POINTS]
    assert [len(run["x"]) for run in axes["flops"]["runs"]] == [POINTS - 1, POINTS - 1, POINTS]


def test_without_plotly_the_rest_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.warns(UserWarning, match=r"install tutelage\[report\]"):
        path = write(tmp_path, comparison())
    assert path == tmp_path / "report.md" and path.is_file()
    assert not (tmp_path / "report.html").exists()
    assert (tmp_path / "curves_seconds.png").is_file()


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no comparison\.json in .*: make one with tutelage compare"):
        write_report(tmp_path)
    (tmp_path / "comparison.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="is not JSON"):
        write_report(tmp_path)
    (tmp_path / "comparison.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match="needs `methods` and `metric`"):
        write_report(tmp_path)


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
@pytest.mark.parametrize("data", [unfinished(), {"metric": "accuracy", "methods": {"extraction": {}}}])
def test_browser_shows_what_there_is(tmp_path: Path, data: dict[str, Any]) -> None:
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
