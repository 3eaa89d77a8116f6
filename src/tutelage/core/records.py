"""Dataclasses that are written to JSON and read back."""

import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from tutelage.core.errors import UserError

_Self = TypeVar("_Self", bound="Record")
_Sealed = TypeVar("_Sealed", bound="Sealed")


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
        """The inverse of `to_dict`; a missing field gets its default.

        Raises UserError, with the path of the field: one that is not known, one that is missing and has no default, or a value
        of another type than the field's."""
        if not isinstance(fields, Mapping):
            raise _NotRead("", f"is {_shown(fields)}, not a mapping")
        hints = typing.get_type_hints(cls)
        known: dict[str, Any] = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
        if unknown := fields.keys() - known.keys():
            raise _NotRead(min(map(str, unknown)), "is not a field that is known")
        none = dataclasses.MISSING
        for name, field in known.items():
            if name not in fields and field.default is none and field.default_factory is none:
                raise _NotRead(name, "is missing")
        return cls(**{name: _at(name, hints[name], value) for name, value in fields.items()})

    @classmethod
    def from_json(cls: type[_Self], text: str) -> _Self:
        """As `from_dict`; UserError also where the text is not JSON."""
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"not JSON: {error}") from error
        return cls.from_dict(fields)


class Sealed(Record):
    """A record whose JSON carries a digest of its other fields, so that a change by accident or by hand is noticed. It is not
    a signature: anyone can compute it."""

    def to_dict(self) -> dict[str, Any]:
        return sealed(super().to_dict())

    @classmethod
    def from_dict(cls: type[_Sealed], fields: Mapping[str, Any]) -> _Sealed:
        """As `Record.from_dict`; UserError also where the digest is missing or not that of the fields."""
        return super().from_dict(unsealed(fields))


def sealed(fields: Mapping[str, Any]) -> dict[str, Any]:
    """JSON values with their digest."""
    return {**fields, "digest": _digest(fields)}


def unsealed(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `sealed`."""
    if not isinstance(fields, Mapping) or "digest" not in fields:
        raise UserError("it has no digest")
    rest = {name: value for name, value in fields.items() if name != "digest"}
    if fields["digest"] != _digest(rest):
        raise UserError("it was changed: its digest is not that of its content")
    return rest


def _digest(fields: Mapping[str, Any]) -> str:
    values = json.loads(json.dumps(fields))  # as they are read: keys that are text, lists
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


class _NotRead(UserError):
    """A value that a record cannot have, and where it is."""

    def __init__(self, path: str, what: str):
        self.path, self.what = path, what
        super().__init__(f"{path or 'it'} {what}")


def _encode(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_dict()
    if isinstance(value, list | tuple):
        return [_encode(item) for item in value]
    return {key: _encode(item) for key, item in value.items()} if isinstance(value, dict) else value


def _at(name: str, hint: Any, value: Any) -> Any:
    """`_decode`, with the name of the field or entry in its errors."""
    try:
        return _decode(hint, value)
    except _NotRead as error:
        between = "." if error.path and not error.path.startswith("[") else ""
        raise _NotRead(f"{name}{between}{error.path}", error.what) from None


def _decode(hint: Any, value: Any) -> Any:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _decode_one_of(parts, value)
    if origin is typing.ClassVar or hint in (Any, typing.ClassVar):
        return value
    if origin in (tuple, list, Sequence):
        return _decode_list(origin, parts, value)
    if origin in (dict, Mapping):
        _expect(value, Mapping, "a mapping")
        key_of = int if parts[0] is int else str  # in JSON every key is text
        if key_of is int and not all(str(key).lstrip("-").isdigit() for key in value):
            raise _NotRead("", "has a key that is not a whole number")
        return {key_of(key): _at(f"[{key!r}]", parts[1], item) for key, item in value.items()}
    if isinstance(hint, type) and issubclass(hint, Record):
        return hint.from_dict(value)
    if hint in (float, int) and isinstance(value, bool):
        raise _NotRead("", f"is {_shown(value)}, not a number")
    expected, words = _PLAIN.get(hint, (hint, getattr(hint, "__name__", str(hint))))
    _expect(value, expected, words)
    return value


_PLAIN: dict[Any, tuple[Any, str]] = {
    float: ((int, float), "a number"),
    int: (int, "a whole number"),
    str: (str, "text"),
    bool: (bool, "true or false"),
    type(None): (type(None), "null"),
}


def _decode_one_of(parts: Sequence[Any], value: Any) -> Any:
    """A value of the first of several types that it fits."""
    errors = []
    for part in parts:
        try:
            return _decode(part, value)
        except _NotRead as error:
            errors.append(error)
    raise max(errors, key=lambda error: len(error.path))  # of the type that it fits best


def _decode_list(origin: Any, parts: Sequence[Any], value: Any) -> Any:
    _expect(value, (list, tuple), "a list")
    if origin is tuple and parts[-1] is not Ellipsis:
        if len(value) != len(parts):
            raise _NotRead("", f"has {len(value)} entries, not {len(parts)}")
        hints = list(parts)
    else:
        hints = [parts[0]] * len(value)
    items = [_at(f"[{number}]", hint, item) for number, (hint, item) in enumerate(zip(hints, value, strict=True))]
    return items if origin is list else tuple(items)


def _expect(value: Any, kind: Any, words: str) -> None:
    if not isinstance(value, kind):
        raise _NotRead("", f"is {_shown(value)}, not {words}")


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) < 40 else text[:37] + "..."
