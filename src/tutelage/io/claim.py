"""Claim a folder for a run, an extraction, a comparison or a teacher, so that nothing else writes to it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tutelage.core.errors import UserError
from tutelage.io.store import Store


@dataclass(frozen=True)
class Claim:
    """The purpose of a folder, and the file in it that records the purpose."""

    record: str  # name of the file
    contents: Mapping[str, Any]  # its JSON values: a folder with different values has a different owner
    what: str  # description for messages, e.g. `a comparison`.


def claim(store: Store, mine: Claim) -> bool:
    """Write the record into an empty folder, or check the record that is there; True if there was one. What a process that
    was killed left half-written is deleted, so nobody else may be writing there.
    Raises UserError if the folder contains something else, or a record with different values."""
    found = store.exists(mine.record)
    if found:
        check_same(store, mine, read_record(store, mine.record))
    elif not store.is_empty():
        found_none = f"is not empty and does not contain {mine.what}: choose a different --output_dir"
        raise UserError(f"'{store}' {found_none} (there is no {mine.record})")
    store.clean()
    if not found:
        store.write(mine.record, json.dumps(mine.contents, indent=1, default=str) + "\n")
    return found


def read_record(store: Store, record: str) -> dict[str, Any]:
    """The JSON values of a record; UserError if it is damaged."""
    try:
        values = json.loads(store.read(record))
        if not isinstance(values, dict):
            raise ValueError("it is not a mapping")
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{store}/{record} is damaged ({error}): delete the folder, or choose a different --output_dir"
        ) from error
    return values


def check_same(store: Store, mine: Claim, theirs: Mapping[str, Any]) -> None:
    """Raise UserError if the record of a folder has different values."""
    contents = json.loads(json.dumps(mine.contents, default=str))
    different = sorted(key for key in contents.keys() | theirs.keys() if contents.get(key) != theirs.get(key))
    if different:
        raise UserError(
            f"{str(store)!r} contains {mine.what} with a different {', '.join(different)}: give the original settings, or "
            f"choose a different --output_dir ({mine.record} says what they were)"
        )
