"""Fields of recipes, read from text.

Public names: `read_fields`.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from tutelage.core.errors import UserError


def read_fields(fields: Any, overrides: Mapping[str, Any], name: str) -> Any:
    """A dataclass of fields with some changed; text values are read as the field's type."""
    hints = typing.get_type_hints(type(fields))
    changed = {}
    for key, value in overrides.items():
        if key not in hints:
            raise UserError(f"{name} has no field {key!r}: it has {', '.join(hints)}")
        changed[key] = _read(key, value, hints[key])
    return dataclasses.replace(fields, **changed)


def _read(key: str, value: Any, hint: Any) -> Any:
    """A value given as text (or a list of texts), as the type of a field."""
    if isinstance(hint, types.UnionType):
        kinds = [part for part in typing.get_args(hint) if part is not type(None)]
        if value is None or value == "none":
            return None
        hint = kinds[0]
    try:
        if typing.get_origin(hint) is tuple:
            parts = value.replace(",", " ").split() if isinstance(value, str) else value
            kind = typing.get_args(hint)[0]
            return tuple(kind(part) for part in (parts if isinstance(parts, list | tuple) else [parts]))
        if hint is int and isinstance(value, str):
            number = float(value)  # 2e6 and 2_000_000 alike
            if number != int(number):
                raise ValueError
            return int(number)
        return hint(value)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"cannot read {key}={value!r} as {getattr(hint, '__name__', hint)}") from None
