"""What the documentation promises: its length, its links, its picture, and the names that it imports."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tutelage.reproduction.results import Comparison

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]*)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_anchors_are_headings(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]*)\)", page.read_text(encoding="utf-8")):
        text = (page.parent / target if target else page).read_text(encoding="utf-8")
        headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, anchor


def test_the_readme_imports_from_the_package_alone() -> None:
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    imports = [node for node in ast.walk(ast.parse(program)) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [node.module for node in imports if isinstance(node, ast.ImportFrom)] == ["tutelage"]
    assert len(imports) == 1


def test_the_picture_is_drawn_from_the_committed_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from readme_picture import PICTURE, SOURCE, draw, median_curve, read_curves

    curves = read_curves(Comparison.read(SOURCE.parent), "extraction")
    assert len(curves) == 3
    assert round(median_curve(curves)[-1][1], 3) == 0.623  # as the README's table says
    draw(SOURCE, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    assert PICTURE.is_file()


def test_the_tables_of_results_are_those_of_the_committed_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import results_tables

    texts = [page.read_text(encoding="utf-8") for page in results_tables.PAGES]
    assert any("<!-- table: parity_mlp -->" in text for text in texts)
    assert [results_tables.filled(text) for text in texts] == texts, "run python scripts/results_tables.py"
