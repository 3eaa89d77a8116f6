"""Fixtures of comparisons."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.reproduction.comparing import tiny
from tutelage.reproduction import run_builder
from tutelage.training.trainer import CurriculumTrainer


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep trained teachers out of the user's cache."""
    monkeypatch.setenv("TUTELAGE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What every trainer of a run is given."""
    seen: list[dict[str, Any]] = []

    class Spy(CurriculumTrainer):
        def __init__(self, **given: Any):
            seen.append({**given, "start": copy.deepcopy(given["model"].state_dict())})
            super().__init__(**given)

    monkeypatch.setattr(run_builder, "CurriculumTrainer", Spy)
    return seen


@pytest.fixture
def kill(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """Interrupt the runs of a method at a step, once."""

    def at(method: str, step: int) -> None:
        original, left = CurriculumTrainer.training_step, [1]

        def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
            running = "/runs/" in self.args.output_dir and self.curriculum.method == method
            if left and running and self.state.global_step == step:
                left.clear()
                raise KeyboardInterrupt
            return original(self, *args, **kwargs)

        monkeypatch.setattr(CurriculumTrainer, "training_step", training_step)

    return at


@pytest.fixture
def given_teacher(tmp_path: Path) -> str:
    """A finished teacher of the tiny parity, without checkpoints."""
    model: Any = tiny().make_teacher(tmp_path).model
    model.save_pretrained(tmp_path / "given")
    return str(tmp_path / "given")
