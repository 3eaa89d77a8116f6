"""The benchmark of bad options, short: some of its cases and a few random command lines, the same in every run."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def programs() -> Iterator[tuple[Any, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("reliability_options"), importlib.import_module("reliability_options_world")


@pytest.fixture(scope="module")
def world(programs: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    return programs[1].make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands write below a folder of the test, also to `..`."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")


def test_bad_values_are_refused_in_one_line(programs: tuple[Any, Any], world: Any) -> None:
    options, _ = programs
    assert len(options.cases()) >= 350
    assert {case.command for case in options.cases()} == set(options.SOUND)
    quick = [case for case in options.chosen(40, seed=0) if case.ends == "refused"]
    assert {case.name: problem for case in quick if (problem := options.try_case(case, world)) is not None} == {}


def test_random_options_never_end_in_a_traceback(programs: tuple[Any, Any], world: Any) -> None:
    counts = programs[0].fuzz(world, examples=25)
    assert sum(counts.values()) >= 25 and counts["long"] == 0


def test_a_wrong_ending_is_noticed(programs: tuple[Any, Any], world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    options, worlds = programs
    case = next(case for case in options.cases() if case.ends == "refused")
    for code, error in ((1, "Traceback\n"), (2, "tutelage: a\nb\n"), (0, "")):
        monkeypatch.setattr(options, "run", lambda *_, code=code, error=error: worlds.Outcome(code, error, ""))
        assert str(options.try_case(case, world)).startswith(f"exit code {code}")
    monkeypatch.setattr(options, "run", lambda *_: worlds.Outcome(1, "Traceback\n", ""))
    with pytest.raises(AssertionError):
        options.fuzz(world, examples=1)
