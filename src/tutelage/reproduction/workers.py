"""Processes that make the runs of a comparison side by side.

Public names: `Workers`.

A run depends on its own settings and seeds alone, so the number of processes changes nothing but the seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from tutelage.reproduction.recipe import Recipe
from tutelage.reproduction.results import RunRecord
from tutelage.reproduction.runner import PlannedRun, Runner
from tutelage.runs.environment import quiet_unless_terminal


class Workers:
    """A pool of `count` processes, each with its part of the machine's threads.

    Used as a context manager; a process makes its teacher once for as long as runs of the same comparison come in.
    """

    def __init__(self, count: int):
        self.count = count
        threads = max(1, torch.get_num_threads() // count)
        self._pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _start, (threads,))

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: Any) -> None:
        self.stop()

    def stop(self) -> None:
        """Let the runs that have begun end, and begin no other."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def submit(self, runner: Runner, planned: PlannedRun) -> Future[list[RunRecord]]:
        """`Runner.run` in a process of the pool."""
        return self._pool.submit(_run, runner.recipe, runner.root, runner.match, planned)


def _start(threads: int) -> None:
    torch.set_num_threads(threads)
    quiet_unless_terminal(True)
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    """End with the parent, also where it was killed and could not say so."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


_kept: dict[tuple[Path, str], Runner] = {}  # of the present comparison; its folder and match tell it from others


def _run(recipe: Recipe, root: Path, match: str, planned: PlannedRun) -> list[RunRecord]:
    if (root, match) not in _kept:
        _kept.clear()
        _kept[root, match] = Runner(recipe, recipe.make_teacher(root), root, match)
    return _kept[root, match].run(planned)
