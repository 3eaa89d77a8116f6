"""New processes for tests, forked from one that has imported the libraries: the imports take seconds, a fork does not."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

_PATIENCE = 240  # seconds


def launch(processes: int, function: Callable[..., Any], *arguments: Any) -> None:
    """Call `function(*arguments)` in each of some new processes, which form a group as under torchrun if several.

    `function` is found by its name, so it belongs to a module.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tutelage.cli.commands", "tutelage.reproduction.runner"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    started = []
    for rank in range(processes):
        own = {**group, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes)}
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_call, args=(own if processes > 1 else {}, sender, function, arguments))
        process.start()
        sender.close()
        started.append((process, receiver))
    try:
        for process, receiver in started:
            assert receiver.poll(_PATIENCE), "a process did not end"
            assert (found := _received(receiver)) == "", found
            process.join()
    finally:
        for process, _ in started:
            process.kill()


def _call(environment: dict[str, str], sender: Connection, function: Callable[..., Any], arguments: Any) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        function(*arguments)
    except BaseException:
        sender.send(traceback.format_exc())
    else:
        sender.send("")


def _received(receiver: Connection) -> str:
    """The traceback of a process, empty if it ended well."""
    try:
        found: str = receiver.recv()
    except EOFError:
        found = "a process died"
    return found
