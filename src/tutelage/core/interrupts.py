"""SIGINT (Ctrl-C) and SIGTERM: a training loop ends with its step, everything else at once."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """A signal ended the work; the text says what was saved."""

    def __init__(self, number: int, what: str = ""):
        super().__init__(what)
        self.number = number  # of the signal

    @property
    def exit_code(self) -> int:
        """That of a process which the signal ends: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.number


class Interrupts:
    """What this process does when it is asked to end."""

    def __init__(self) -> None:
        self.received: int | None = None  # the signal that came while the work was `finishing`
        self.active = False  # whether the signals are handled here
        self._finishing = self._importing = False
        self._process, self._name = os.getpid(), ""

    @contextmanager
    def handled(self, name: str) -> Iterator[None]:
        """Handle the signals inside; `name` begins the lines on stderr. Nothing changes outside of the main thread."""
        self._name, self._process, self.received = name, os.getpid(), None
        before = {}
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                before[number] = signal.signal(number, self._receive)
            self.active = True
        except ValueError:  # not the main thread
            pass
        try:
            yield
        finally:
            self.active = False
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def importing(self) -> Iterator[None]:
        """End the process at once inside: an exception during an import is not raised cleanly, and nothing is lost."""
        self._importing = True
        try:
            yield
        finally:
            self._importing = False

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """Only note the first signal inside: the work looks at `received`, and ends by itself."""
        self._finishing, self.received = True, None
        try:
            yield
        finally:
            self._finishing = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked helper, such as a data loader's worker: its parent ends it
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if self._importing:
            self._say("interrupted")
            os._exit(128 + number)
        if self._finishing and self.received is None:
            self.received = number
            self._say("finishing the step and saving; interrupt again to stop at once")
            return
        raise Interrupted(number)

    def _say(self, what: str) -> None:
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"{self._name}: {what}\n".encode())


interrupts = Interrupts()
"""Those of this process: signals are the process's own."""
