"""Runs made side by side."""

from __future__ import annotations

import dataclasses
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from tests.reproduction.comparing import METHODS, TRAINED, made, names, silent, timeless, tiny
from tutelage.core.errors import UserError
from tutelage.reproduction.compare import compare
from tutelage.reproduction.recipes import resolve
from tutelage.reproduction.recipes.parity import ParityMLPRecipe
from tutelage.reproduction.teachers import Teacher


class BrokenInWorkers(ParityMLPRecipe):
    """Its teacher can be made in the first process alone."""

    def make_teacher(self, folder: Path) -> Teacher:
        if multiprocessing.parent_process() is not None:
            raise UserError("no teacher in a worker")
        return super().make_teacher(folder)


def test_runs_side_by_side_say_what_runs_one_by_one_say(tmp_path: Path) -> None:
    fields = {**TRAINED, "learning_rates": (0.1, 0.3)}
    recipe, methods = resolve("parity-mlp/smoke", fields), ("extraction", "one_shot", "progressive")
    alone = made(recipe, tmp_path / "alone", methods)
    together = made(recipe, tmp_path / "together", methods, jobs=2)
    assert together.environment["jobs"] == 2 and "jobs" not in alone.environment
    assert timeless(together) == timeless(alone)
    assert names(together) == list(methods)


def test_side_by_side_an_error_of_a_run_ends_the_comparison(tmp_path: Path) -> None:
    broken = BrokenInWorkers(**{field.name: getattr(tiny(), field.name) for field in dataclasses.fields(tiny())})
    with pytest.raises(ValueError, match="no teacher in a worker"):
        compare(broken, tmp_path / "o", METHODS, jobs=2, log=silent)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"jobs": 0}, "jobs must be at least 1"), ({"jobs": 2, "match": "seconds"}, "--match seconds needs --jobs 1")],
)
def test_jobs_that_cannot_work_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare(tiny(), tmp_path / "o", METHODS, log=silent, **settings)
    assert not (tmp_path / "o").exists()
