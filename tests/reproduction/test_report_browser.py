"""The report's page in a real browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("plotly", reason="report.html needs tutelage[report]")

from tests.reproduction.reporting import EVIL, comparison, empty, plot_data, unfinished, write
from tutelage.reproduction.results import Comparison

CHROMIUM = shutil.which("chromium")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")


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
