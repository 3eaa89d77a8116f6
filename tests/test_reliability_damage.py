"""The harness that damages folders notices what must not happen, and finds nothing of it."""

from __future__ import annotations

import importlib
import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tutelage.core.errors import UserError
from tutelage.core.records import sealed

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def damage(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("damage")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small folder, and beside it an older one."""
    for name, steps in (("folder", 3), ("older", 2)):
        (tmp_path / name / "part").mkdir(parents=True)
        (tmp_path / name / "part" / "a.bin").write_bytes(bytes(range(64)))
        values = {"file": "part/a.bin", "steps": steps}
        (tmp_path / name / "record.json").write_text(json.dumps(sealed(values)))
    return tmp_path / "folder"


def refuse(copy: Path, output: Path) -> Any:
    raise UserError("something is wrong somewhere")


def name_all(copy: Path, output: Path) -> Any:
    raise UserError("record.json or a.bin is damaged")


def fail(copy: Path, output: Path) -> Any:
    return {}["key"]


def ignore(copy: Path, output: Path) -> Any:
    return 1


def use(copy: Path, output: Path) -> Any:
    return sorted((str(path.relative_to(copy)), path.read_bytes()) for path in copy.rglob("*") if path.is_file())


def escape(copy: Path, output: Path) -> Any:
    (copy.parent / "stranger").write_text("")
    return 1


@pytest.mark.parametrize(
    ("attempt", "verdict"),
    [
        (refuse, "refused, without the file"),
        (name_all, "refused, with the file named"),
        (fail, "traceback"),
        (ignore, "without effect"),
        (use, "silently changed"),
        (escape, "wrote outside"),
    ],
)
def test_every_outcome_has_its_verdict(
    damage: Any, folder: Path, tmp_path: Path, attempt: Callable[[Path, Path], Any], verdict: str
) -> None:
    subject = damage.Subject("toy", folder, attempt, folder.with_name("older"))
    reference = 1 if attempt is not use else use(folder, tmp_path)
    cases = [damage.judge(subject, f"0/{number}", reference, tmp_path / "case") for number in range(30)]
    assert {case.verdict for case in cases} == {verdict}
    assert {case.good for case in cases} == {verdict in damage.GOOD}
    assert {case.kind for case in cases} >= {"flip", "truncate", "delete", "older", "rename", "edit", "outside"}
    again = damage.judge(subject, "0/7", reference, tmp_path / "case")
    assert (again.what, again.kind) == (cases[7].what, cases[7].kind)


def test_a_file_that_is_made_again_is_repaired(damage: Any, folder: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def repair(copy: Path, output: Path) -> Any:
        (copy / "record.json").write_bytes(before["record.json"])
        (copy / "part" / "a.bin").write_bytes(before["a.bin"])
        return 1

    subject = damage.Subject("toy", folder, repair)
    assert damage.judge(subject, "0", 1, tmp_path / "case").verdict == "repaired"


def test_a_name_that_leads_outside_has_the_right_digest(damage: Any, folder: Path) -> None:
    damage.KINDS["outside"](folder, ["record.json"], random.Random(0), damage.Subject("toy", folder, ignore))
    values = json.loads((folder / "record.json").read_text())
    assert values["file"] != "part/a.bin" and values["steps"] == 3
    assert values == sealed({name: value for name, value in values.items() if name != "digest"})


@pytest.mark.parametrize(("family", "count"), [("curricula", 12), ("runs", 10), ("comparisons", 8)])
def test_damaged_folders_are_refused_or_repaired_or_give_the_same(
    damage: Any, tmp_path: Path, family: str, count: int
) -> None:
    """A few cases of each; `python benchmarks/reliability_damage.py` runs hundreds."""
    program: Any = importlib.import_module("reliability_damage")
    subjects = program.FAMILIES[family](tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that an older checkpoint is used
        cases = program.run_cases(subjects, range(count), seed=2, scratch=tmp_path / "cases")
    assert [case for case in cases if not case.good] == []
    assert len({case.kind for case in cases}) > 3 and {case.subject for case in cases} == {s.name for s in subjects}
