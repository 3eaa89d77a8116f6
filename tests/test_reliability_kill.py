"""One kill; `python benchmarks/reliability_kill.py` makes hundreds, of every command and task."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("reliability_kill")


def test_a_command_that_was_killed_ends_as_if_it_had_not_been(program: Any, tmp_path: Path) -> None:
    arguments = ["--what", "extract", "--tasks", "causal", "--cases", "1", "--seed", "3"]
    assert program.main([*arguments, "--output", str(tmp_path / "kill.json")]) == 0
    found = json.loads((tmp_path / "kill.json").read_text())
    assert found["cases"] == {"extract": 1} and found["problems"] == []
    assert all(outcome["killed_at"] for outcome in found["outcomes"])


def test_a_different_result_is_a_problem(program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "run" / "model.safetensors"
    file.parent.mkdir()
    file.write_bytes(b"1")
    (file.parent / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "seconds": 3.0}\n')
    expected = program.result_of("distill", file.parent)
    ended: dict[str, Any] = {"code": 0}
    assert program._problem("distill", file.parent, ended, expected, tmp_path / "report.json") == ""
    file.write_bytes(b"2")
    assert program._problem("distill", file.parent, ended, expected, tmp_path / "report.json") == "the result differs"
    file.write_bytes(b"1")
    (file.parent / "checkpoint-3").mkdir()
    assert "leftovers" in program._problem("distill", file.parent, ended, expected, tmp_path / "report.json")
