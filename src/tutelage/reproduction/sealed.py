"""Records in JSON files that contain a digest of their own values, so that a change on disk is noticed when they are read.

`write_sealed` and `read_sealed`."""

import json
from pathlib import Path
from typing import TypeVar

from tutelage.core.errors import UserError
from tutelage.core.records import Record, sealed, unsealed
from tutelage.io.files import write_atomically

_Kind = TypeVar("_Kind", bound=Record)


def write_sealed(path: Path, record: Record) -> None:
    """Write a record and its digest, whole or not at all."""
    write_atomically(path, json.dumps(sealed(record.to_dict()), indent=1, allow_nan=False) + "\n")


def read_sealed(path: Path, kind: type[_Kind], needs_digest: bool = True) -> _Kind:
    """The record that was written; without `needs_digest` a file that has none is read as it is.

    Raises UserError, which names the file: it cannot be read, is not JSON, or its values are not those that were written."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        has_digest = isinstance(values, dict) and "digest" in values
        return kind.from_dict(unsealed(values) if needs_digest or has_digest else values)
    except (OSError, UserError) as error:
        raise UserError(f"cannot read {str(path)!r}: {getattr(error, 'strerror', None) or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"cannot read {str(path)!r}: not JSON: {error}") from error
