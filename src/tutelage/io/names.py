"""Names of files below a folder. They may come from a file that a stranger wrote, and lead nowhere else."""

import os
import re
from pathlib import Path

from tutelage.core.errors import UserError

_CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff\\]")  # with halves of characters, which no file name can have
_DRIVE = re.compile(r"[A-Za-z]:")


def check_name(name: str, where: str) -> None:
    """Raise UserError for a name that is not a plain relative path with `/`; `where` is what names it, for the message."""
    parts = name.split("/")
    if _CONTROL.search(name) or any(part in ("", ".", "..") or _DRIVE.match(part) for part in parts):
        raise UserError(
            f"{where} names a file {name!r}: expected a relative path inside its folder, without '..', a backslash, a drive "
            "letter or a control character"
        )


def check_inside(folder: Path, name: str) -> None:
    """Raise UserError where links lead from a name in a folder out of it."""
    root, found = os.path.realpath(folder), os.path.realpath(folder / name)
    if found != root and os.path.commonpath([root, found]) != root:
        raise UserError(
            f"{name} in {str(folder)!r} is a link that leads out of its folder, to {found!r}: put a copy in its place"
        )
