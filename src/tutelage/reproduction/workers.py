"""Processes that make the runs of a comparison side by side.

Public names: `Workers`.

A run depends on its own settings and seeds alone, so what comes out does not depend on how many there are, seconds apart.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from tutelage.reproduction.recipe import Recipe
from tutelage.reproduction.runner import Runner
from tutelage.reproduction.variants import Candidate, Variant
from tutelage.runs.distill import quiet_unless_terminal


class Workers:
    """A pool of `count` processes, each with its share of the machine's threads.

    Used as a context manager; a process makes its system and teacher once for as long as runs of the same one come in.
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
        """Let runs that have begun end, and begin no other."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def submit(
        self,
        runner: Runner,
        variant: Variant,
        candidate: Candidate,
        seeds: Sequence[int],
        folder: Path,
        limit: float | None,
    ) -> Future[list[dict[str, Any]]]:
        """`Runner.run` in a process of the pool."""
        return self._pool.submit(
            _run, runner.system, runner.root, runner.match, variant, candidate, list(seeds), folder, limit
        )


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


_kept: dict[tuple[Path, str], Runner] = {}  # of the comparison at hand, which its folder and budget tell from others


def _runner(system: Recipe, root: Path, match: str) -> Runner:
    if (root, match) not in _kept:
        _kept.clear()
        _kept[root, match] = Runner(system, system.make_teacher(root), root, match)
    return _kept[root, match]


def _run(
    system: Recipe,
    root: Path,
    match: str,
    variant: Variant,
    candidate: Candidate,
    seeds: list[int],
    folder: Path,
    limit: float | None,
) -> list[dict[str, Any]]:
    return _runner(system, root, match).run(variant, candidate, seeds, folder, limit)
