"""Processes that make runs at the same time. One that is killed is replaced, and its run is made again.

`Workers`."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from tutelage.core.errors import UserError, as_user_error
from tutelage.runs.environment import quiet_unless_terminal

_ATTEMPTS = 3  # a run is begun this many times before its process being killed is taken for its fault
_PATIENCE = 10.0  # seconds that a process gets to end by itself

_log = logging.getLogger(__name__)


class Workers:
    """A pool of `count` processes, each with its part of the machine's threads.

    Each process belongs to a thread of this process, which waits for its run: so it is known whose process was killed."""

    def __init__(self, count: int):
        # CUDA rules out a plain fork; a fork server imports the libraries once for all workers, where there is one
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        self.count, self._context = count, multiprocessing.get_context(method)
        if method == "forkserver":
            self._context.set_forkserver_preload(["tutelage.reproduction.runner"])
        self._threads = ThreadPoolExecutor(count, initializer=_block_interrupts)
        self._mine, self._lock, self._ended = threading.local(), threading.Lock(), False
        self._processes: list[_Process] = []

    def submit(self, make: Callable[[], Any], name: str) -> Future[Any]:
        """Call `make` in a process as soon as one is free; the future raises what it raises.

        Where the process is killed three times, the future raises a UserError with the `name` of the run."""
        return self._threads.submit(self._make, make, name)

    def end(self) -> None:
        """End the processes now; runs that have not begun are not made."""
        self._ended = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            for process in self._processes:
                process.end(0.0)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind is not None:
            self.end()
        self._threads.shutdown()
        for process in self._processes:
            process.pipe.close()  # the process ends when it finds its pipe closed
        for process in self._processes:
            process.end(_PATIENCE)

    def _make(self, make: Callable[[], Any], name: str) -> Any:
        for attempt in range(1, _ATTEMPTS + 1):
            process = self._process()
            try:
                value, error, where = process.call(make)
            except (EOFError, ConnectionError):
                self._mine.process = None
                how = process.ending()
                if self._ended:
                    raise RuntimeError("the processes were ended") from None
                if attempt < _ATTEMPTS:
                    _log.warning("the process of %s %s: the run is made again", name, how)
                continue
            if error is not None:
                raise error from (None if isinstance(error, UserError) else _InWorker(where))
            return value
        raise UserError(
            f"the process of {name} {how}, {_ATTEMPTS} times: if the memory of the machine does not suffice for runs at the "
            "same time, give fewer --jobs. Finished runs are kept: give the same command to resume"
        )

    def _process(self) -> _Process:
        """The process of this thread."""
        kept: _Process | None = getattr(self._mine, "process", None)
        if kept is not None:
            return kept
        with self._lock:
            if self._ended:
                raise RuntimeError("the processes were ended")
            made = self._mine.process = _Process(self._context, max(1, torch.get_num_threads() // self.count))
            self._processes.append(made)
        return made


class _InWorker(Exception):
    """The traceback of an error in a worker, as text."""


class _Process:
    """One process, and the pipe to it."""

    def __init__(self, context: Any, threads: int):
        # a fork server makes its socket in TMPDIR
        with as_user_error(
            "could not start a process (give fewer --jobs, or set TMPDIR to a different folder)", OSError
        ):
            self.pipe, theirs = context.Pipe()
            self.process = context.Process(target=_serve, args=(theirs, threads))
            self.process.start()
            theirs.close()

    def call(self, make: Callable[[], Any]) -> Any:
        """What `_serve` sends; EOFError or ConnectionError where the process has ended."""
        self.pipe.send(make)
        # not the pipe alone: children of a process that was killed can keep its end of it open
        wait([self.pipe, self.process.sentinel])
        if not self.pipe.poll():
            raise EOFError
        return self.pipe.recv()

    def end(self, patience: float) -> None:
        """End the process, after some seconds in which it may end by itself."""
        for stop in (self.process.terminate, self.process.kill):
            self.process.join(patience)
            if not self.process.is_alive():
                return
            stop()
            patience = _PATIENCE
        self.process.join()

    def ending(self) -> str:
        """How the process ended, in words."""
        self.end(_PATIENCE)
        code = self.process.exitcode
        if code is not None and code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        return f"ended with the exit code {code}"


def _block_interrupts() -> None:
    """Ctrl-C reaches every process of a terminal. Those that this thread starts inherit that it does not take it."""
    if hasattr(signal, "pthread_sigmask"):
        resource_tracker.ensure_running()  # which would unblock it again
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def _serve(pipe: Connection, threads: int) -> None:
    """Make the runs that are asked for, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one ends it
    torch.set_num_threads(threads)
    quiet_unless_terminal(True)
    threading.Thread(target=_follow_parent, daemon=True).start()
    while True:
        try:
            make = pipe.recv()
        except (EOFError, ConnectionError):  # closed, or the process there was killed
            return
        try:
            pipe.send((make(), None, ""))
        except BaseException as error:
            pipe.send((None, _portable(error), f"\n{traceback.format_exc()}"))


def _portable(error: BaseException) -> BaseException:
    """The error, or one with its text where the error itself cannot be sent."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        text = str(error)
        return UserError(text) if isinstance(error, UserError) else RuntimeError(f"{type(error).__name__}: {text}")


def _follow_parent() -> None:
    """End with the parent, also where the parent was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
