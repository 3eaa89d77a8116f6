"""Ends a process at the n-th thing that it does to a disk, or at the n-th training step: what the reliability programs share.

A file that is being written when the process ends is left half-written."""

from __future__ import annotations

import builtins
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import safetensors.torch
import torch
from transformers import Trainer

TIMES = ("seconds", "_runtime", "_per_second", "_time")  # ends of the names of values that a second run does not repeat
LEFTOVERS = ("*.tmp", ".*.tmp", "*.lock")


class Killed(BaseException):
    """Takes the place of a SIGKILL inside of a test: nothing but the test catches it."""


def raise_killed() -> NoReturn:
    raise Killed


def kill_process() -> NoReturn:
    os.kill(os.getpid(), 9)
    raise AssertionError("the process was killed")


class Faults:
    """Counts the events of a process, and calls `end` at number `at` (from 0); after that, at each later one too.

    Events are files below `folder` that are opened for writing, written, synced, renamed or deleted, and training steps."""

    def __init__(self, folder: Path, at: int | None = None, end: Callable[[], NoReturn] = raise_killed):
        self.folder, self.at, self.end = folder.resolve(), at, end
        self.kinds: list[str] = []  # of the events so far

    def event(self, kind: str) -> None:
        """Count an event, and end the process if it is the one."""
        self.kinds.append(kind)
        if self.at is not None and len(self.kinds) > self.at:
            self.end()

    def _ours(self, path: Any) -> bool:
        return isinstance(path, str | Path) and self.folder in (Path(path).resolve(), *Path(path).resolve().parents)

    def _before(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.event(kind)
            return function(*args, **kwargs)

        return wrapped

    def _writing(self, kind: str, function: Callable[..., Any], argument: int) -> Callable[..., Any]:
        """Write the file, then leave half of it if this is the event."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            path = args[argument]
            if not self._ours(path):
                return function(*args, **kwargs)
            if self.at is not None and len(self.kinds) >= self.at:
                function(*args, **kwargs)
                os.truncate(path, os.path.getsize(path) // 2)
            self.event(kind)
            return function(*args, **kwargs)

        return wrapped

    def _opening(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            handle = function(path, mode, *args, **kwargs)
            if set(mode) & set("wax") and self._ours(path):
                try:
                    self.event("open")
                except BaseException:
                    handle.close()
                    raise
            return handle

        return wrapped

    @contextmanager
    def watching(self) -> Iterator[Faults]:
        """Count inside."""
        patches = [
            (os, "replace", self._before("rename", os.replace)),
            (os, "fsync", self._before("sync", os.fsync)),
            (os, "unlink", self._before("delete", os.unlink)),
            (shutil, "rmtree", self._before("delete", shutil.rmtree)),
            (torch, "save", self._writing("write", torch.save, 1)),
            (safetensors.torch, "serialize_file", self._writing("write", safetensors.torch.serialize_file, 1)),
            (builtins, "open", self._opening(builtins.open)),
            (io, "open", self._opening(io.open)),
            (Trainer, "training_step", self._before("step", Trainer.training_step)),
        ]
        with ExitStack() as stack:
            for owner, name, function in patches:
                stack.enter_context(mock.patch.object(owner, name, function))
            yield self


def untimed(record: dict[str, Any]) -> dict[str, Any]:
    """What of a log line a second run repeats."""
    return {name: value for name, value in record.items() if not f"_{name}".endswith(TIMES)}


def rows(folder: Path) -> list[dict[str, Any]]:
    """The log lines of a run, without times."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [untimed(json.loads(line)) for line in lines]


def weights(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a model's weights at the root of a folder, or below it but in no checkpoint."""
    files = (path for path in sorted(folder.rglob("model*.safetensors")) if "checkpoint-" not in path.as_posix())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def leftovers(folder: Path) -> list[str]:
    """Temporary files, and checkpoints that were not written to their end."""
    found = {path for pattern in LEFTOVERS for path in folder.rglob(pattern)}
    found |= {path for path in folder.rglob("checkpoint-*") if path.is_dir() and not (path / "progress.json").is_file()}
    return sorted(path.relative_to(folder).as_posix() for path in found)
