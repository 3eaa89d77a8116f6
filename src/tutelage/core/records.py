"""Dataclasses that are written to JSON and read back."""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

_Self = TypeVar("_Self", bound="Record")


class Record:
    """Base of frozen dataclasses whose fields are JSON values, records, or lists, tuples and mappings of these."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        fields: Any = dataclasses.fields(self)  # type: ignore[arg-type]
        return {field.name: _encode(getattr(self, field.name)) for field in fields}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_dict(cls: type[_Self], fields: Mapping[str, Any]) -> _Self:
        """The inverse of `to_dict`; a missing field gets its default."""
        hints = typing.get_type_hints(cls)
        return cls(**{name: _decode(hints.get(name), value) for name, value in fields.items()})

    @classmethod
    def from_json(cls: type[_Self], text: str) -> _Self:
        return cls.from_dict(json.loads(text))


def _encode(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_dict()
    if isinstance(value, list | tuple):
        return [_encode(item) for item in value]
    return {key: _encode(item) for key, item in value.items()} if isinstance(value, dict) else value


def _decode(hint: Any, value: Any) -> Any:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if value is None:
        return None
    if origin in (typing.Union, types.UnionType):
        return _decode(next(part for part in parts if part is not type(None)), value)
    if origin in (tuple, list):
        return origin(_decode(parts[0], item) for item in value)
    if origin is dict:
        return {key: _decode(parts[1], item) for key, item in value.items()}
    return hint.from_dict(value) if isinstance(hint, type) and issubclass(hint, Record) else value
