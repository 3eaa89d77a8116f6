"""Runs made side by side."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.reproduction.comparing import METHODS, TRAINED, made, names, silent, timeless, tiny
from tutelage.cli import main
from tutelage.core.errors import UserError
from tutelage.reproduction.compare import compare
from tutelage.reproduction.recipes import resolve
from tutelage.reproduction.recipes.parity import ParityMLPRecipe
from tutelage.reproduction.run_builder import RunBuilder
from tutelage.reproduction.teachers import Teacher
from tutelage.reproduction.workers import Workers


class BrokenInWorkers(ParityMLPRecipe):
    """Its teacher can be made in the first process alone."""

    def make_teacher(self, folder: Path) -> Teacher:
        if multiprocessing.parent_process() is not None:
            raise UserError("no teacher in a worker")
        return super().make_teacher(folder)


def test_runs_side_by_side_say_what_runs_one_by_one_say(tmp_path: Path) -> None:
    fields = {**TRAINED, "learning_rates": (0.1, 0.3), "trials": 2}
    recipe, methods = resolve("parity-mlp/smoke", fields), ("extraction", "one_shot", "progressive")
    alone = made(recipe, tmp_path / "alone", methods)
    together = made(recipe, tmp_path / "together", methods, jobs=2)
    assert together.environment["jobs"] == 2 and "jobs" not in alone.environment
    assert timeless(together) == timeless(alone)
    assert names(together) == list(methods)


def test_runs_that_share_the_states_of_the_teacher_say_the_same(tmp_path: Path) -> None:
    fields = {"levels": 3, "budget_samples": 96, "eval_every": 48, "teacher_samples": 160}
    recipe, methods = resolve("pcfg-mlm/smoke", fields), ("joint", "one_shot", "extraction", "progressive")
    alone = made(recipe, tmp_path / "alone", methods)
    together = made(recipe, tmp_path / "together", methods, jobs=2)
    assert timeless(together) == timeless(alone)
    assert not (tmp_path / "together" / "states").exists()  # they are large


def test_where_seconds_are_compared_the_reported_runs_run_the_teacher(tmp_path: Path) -> None:
    recipe = resolve("pcfg-mlm/smoke", {"levels": 3})
    sketch = Teacher(recipe.sketch_teacher(), "untrained")  # type: ignore[arg-type]
    (timed, shared) = (RunBuilder(recipe, sketch, tmp_path, timed) for timed in (True, False))
    assert timed.keeps_states(tuning=True) and not timed.keeps_states(tuning=False)
    assert shared.keeps_states(tuning=True) and shared.keeps_states(tuning=False)


def test_side_by_side_an_error_of_a_run_ends_the_comparison(tmp_path: Path) -> None:
    broken = BrokenInWorkers(**{field.name: getattr(tiny(), field.name) for field in dataclasses.fields(tiny())})
    with pytest.raises(ValueError, match="no teacher in a worker"):
        compare(broken, tmp_path / "o", METHODS, jobs=2, log=silent)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"jobs": 0}, "jobs must be at least 1"), ({"jobs": 2, "match": "seconds"}, "--match seconds need --jobs 1")],
)
def test_jobs_that_cannot_work_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare(tiny(), tmp_path / "o", METHODS, log=silent, **settings)
    assert not (tmp_path / "o").exists()


@contextlib.contextmanager
def once_running(folder: Path, act: Any) -> Iterator[None]:
    """Call `act` as soon as a run has begun in the folder."""
    done = threading.Event()

    def watch() -> None:
        while not list(folder.glob("**/metrics.jsonl")):
            if done.wait(0.01):
                return
        act()

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield
    finally:
        done.set()
        watching.join()


def kill_process_of_a_run() -> None:
    pid = multiprocessing.active_children()[0].pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


def test_the_run_of_a_process_that_is_killed_is_named_and_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = tiny(budget_samples=3_200, eval_every=160, target=1.0, k=3, d=10)
    alone = made(recipe, tmp_path / "alone", ["one_shot"])
    with once_running(tmp_path / "together", kill_process_of_a_run):
        together = made(recipe, tmp_path / "together", ["one_shot"], jobs=2)
    assert timeless(together) == timeless(alone)
    (message,) = caplog.messages
    assert message.startswith("the process of run runs/one_shot-")
    assert message.endswith("-seed-0-1 was killed by SIGKILL: the run is made again")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail_oddly() -> None:
    raise type("Odd", (Exception,), {})("not to be pickled")


def test_a_run_whose_process_is_killed_each_time_ends_the_comparison(caplog: pytest.LogCaptureFixture) -> None:
    with Workers(1) as workers:
        with pytest.raises(UserError, match=r"the process of run 7 was killed by SIGKILL, 3 times: if the memory"):
            workers.submit(die, "run 7").result()
        assert len(caplog.messages) == 2
        with pytest.raises(RuntimeError, match="Odd: not to be pickled"):
            workers.submit(fail_oddly, "run 8").result()
        assert workers.submit(os.getpid, "run 9").result() != os.getpid()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_all_processes_and_says_how_to_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], number: int, code: int
) -> None:
    fields = {"d": 8, "k": 2, "teacher": "planted", "teacher_width": 64, "budget_samples": 10**7, "eval_every": 6400}
    flags = [word for name, value in fields.items() for word in (f"--{name}", str(value))]
    words = ["compare", "parity-mlp/smoke", *flags, "--learning_rates", "1e-9", "--methods", "one_shot", "scratch"]
    with once_running(tmp_path / "o", lambda: os.kill(os.getpid(), number)):
        assert main([*words, "--jobs", "2", "--output_dir", str(tmp_path / "o")]) == code
    assert "tutelage compare: interrupted; the same command continues" in capsys.readouterr().err
    assert not multiprocessing.active_children()
    commands = [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]
    assert all("forkserver" in line or "resource_tracker" in line for line in commands)
