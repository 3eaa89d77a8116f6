"""Write files so that nobody reads them half-written."""

import errno
import importlib
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from tutelage.core.errors import UserError, reason_of

_locks: Any = importlib.import_module("fcntl") if os.name == "posix" else None
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_LEFTOVER = re.compile(r"\.[0-9a-f]{16}\.tmp$")
# how libraries in Rust (tokenizers) and C++ (torch) say that a file could not be written, in exceptions of no special class
_WRITING = re.compile(r"\(os error \d+\)|PytorchStreamWriter|inline_container|cannot be opened|iostream error")


def is_leftover(name: str | Path) -> bool:
    """Whether a file has one of the temporary names of this module: a process that was killed leaves it behind."""
    return _LEFTOVER.search(str(name)) is not None


@contextmanager
def writing_errors(path: str | Path, via: str | Path | None = None, only: Collection[int] = ()) -> Iterator[None]:
    """Say which path could not be written, and why, where the block raises an OSError, or what libraries make of one.
    Raises UserError: the disk is full, the folder is read-only, a file is in the place of a folder...

    `via` is the temporary folder that is written to first; with `only`, other errors than these numbers stay as they are."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number, known = getattr(error, "errno", None), isinstance(error, OSError | SafetensorError)
        if not (known or _WRITING.search(str(error))) or (only and number not in only):
            raise
        reason = getattr(error, "strerror", None) or reason_of(error)
        where, how = (f" by way of {str(via)!r}", "set TMPDIR to") if via else ("", "choose")
        free = "free space there, or " if number in (None, *NO_SPACE) else ""
        raise UserError(f"could not write {str(path)!r}{where}: {reason}; {free}{how} a different folder") from error


def sync(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk. Not every file system can sync a folder."""
    with suppress(*([OSError] if path.is_dir() else [])):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def alone(folder: Path, what: str) -> Iterator[None]:
    """Let no other process that asks for it work in a folder meanwhile; it is made if it is not there, and nothing is left in
    it. UserError where another process does `what` there. Without effect where the system or the file system has no locks of
    folders (Windows, some network disks)."""
    with writing_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if _locks is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            _locks.flock(handle, _locks.LOCK_EX | _locks.LOCK_NB)
        except BlockingIOError:
            found = f"another process is {what} in {str(folder)!r}"
            raise UserError(f"{found}: wait until it has ended, or choose a different output_dir") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(handle)


@contextmanager
def replacing(path: Path, durable: bool = True) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to; it is synced and takes the name when the block ends well. One that need
    not be `durable`, since whoever reads it checks it and can do without, is not synced."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    with writing_errors(_LEFTOVER.sub("", str(path))):  # of a file that is itself a temporary one, the last name
        path.parent.mkdir(parents=True, exist_ok=True)
        # made here and new: whoever writes to it follows no link that was put in its place
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        try:
            yield temporary
            if durable:
                sync(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        if durable:
            sync(path.parent)


def write_atomically(path: Path, text: str) -> None:
    """Write UTF-8 text to `path` whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def new_temporary_folder(inside: Path | None = None) -> Path:
    """A folder of this process, where TMPDIR says by default; UserError where none can be made."""
    try:
        return Path(tempfile.mkdtemp(prefix="tutelage-", dir=inside))
    except OSError as error:
        how = "free space there, or set TMPDIR to a different folder"
        raise UserError(f"could not make a temporary folder: {error}; {how}") from error


@contextmanager
def temporary_folder(what: str) -> Iterator[Path]:
    """A temporary folder to write `what` to, deleted at the end; UserError where that cannot be written."""
    folder = new_temporary_folder()
    try:
        with writing_errors(what, via=folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
