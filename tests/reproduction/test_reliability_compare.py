"""A few seeded cases of `benchmarks/reliability_compare.py`; the program runs hundreds of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import reliability_compare

    yield reliability_compare
    sys.modules.pop("reliability_compare", None)


def test_damaged_comparisons_are_refused_repaired_or_the_same(tmp_path: Path, program: Any) -> None:
    worlds, expected = program.worlds_below(tmp_path)
    outcomes = [program.damage_case(worlds, expected, case, seed=0) for case in range(8)]
    assert all(outcome.good for outcome in outcomes), outcomes
    assert len({outcome.ended for outcome in outcomes}) > 1
