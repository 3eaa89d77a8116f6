"""Write files so that nobody reads them half-written."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from tutelage.core.errors import UserError


@contextmanager
def writing_errors(path: str | Path) -> Iterator[None]:
    """Say which path could not be written, and why, where the block raises an OSError.
    Raises UserError: the disk is full, the folder is read-only, a file is in the place of a folder..."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"could not write {str(path)!r}: {reason}; free space there, or choose a different folder"
        ) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to; it is synced and takes the name when the block ends well."""
    temporary = path.with_name(path.name + ".tmp")
    with writing_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)


def write_atomically(path: Path, text: str) -> None:
    """Write UTF-8 text to `path` whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
