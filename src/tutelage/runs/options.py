"""Options of a run as text: from a YAML file, and to the parser that reads flags.

Public names: `OneLineErrors`, `ConfigParser`, `read_options`, `as_flags`, `read_value`, `type_name`.
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from tutelage.core.errors import UserError


class OneLineErrors:
    """Mistakes in flags are one line, without the usage of two hundred options above it."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        raise UserError(message)


class ConfigParser(OneLineErrors, HfArgumentParser):
    """Dataclasses from flags, with one-line errors."""


def read_options(path: Path, example: str = "method: extraction") -> dict[str, Any]:
    """A YAML file's options: each value as text, a list of texts, or None where it is left empty.

    YAML alone reads `1:2` as 62 and `1e-3` as a string; text is parsed as flags are.

    Args:
        path: the file.
        example: an option that the message may show.

    Raises:
        UserError: no such file, not YAML, or no mapping.
    """
    if not path.is_file():
        raise UserError(f"no config file {str(path)!r}")
    try:
        text = path.read_text(encoding="utf-8")
        values = yaml.safe_load(text) or {}
        words = yaml.load(text, yaml.BaseLoader)  # every scalar a string
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config {str(path)!r} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"config {str(path)!r} must be a mapping of options, e.g. `{example}`")
    return {
        key: None if value is None else json.dumps(value) if isinstance(value, dict) else words[key]
        for key, value in values.items()
    }


def as_flags(options: Mapping[str, Any]) -> list[str]:
    """Options as the flags of a command line; those that are None are left out."""
    flags: list[str] = []
    for key, value in options.items():
        if isinstance(value, list):
            flags += [f"--{key}", *map(str, value)]
        elif value is not None:
            flags.append(f"--{key}={value}")
    return flags


def read_value(value: Any, hint: Any) -> Any:
    """A value as the type of a field, e.g. `2e6` as an int or `0.1,0.3` as a tuple of floats.

    Args:
        value: text, a list of texts, or a value of that type already.
        hint: bool, int, float, str, a tuple or list of one of them, or a union with None.

    Raises:
        ValueError: it cannot be read as that type.
    """
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        if value is None or value == "none":
            return None
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    container = typing.get_origin(hint)
    if container in (tuple, list):
        parts = value.replace(",", " ").split() if isinstance(value, str) else value
        inner = typing.get_args(hint)[0]
        return container(read_value(part, inner) for part in (parts if isinstance(parts, list | tuple) else [parts]))
    if isinstance(value, list | tuple):
        raise ValueError
    if hint is bool:
        return _read_bool(str(value))
    if hint is int and isinstance(value, str):
        number = float(value)  # 2e6 and 2_000_000 alike
        if not number.is_integer():  # nor inf or nan
            raise ValueError
        return int(number)
    try:
        return hint(value)
    except TypeError as error:
        raise ValueError from error


def _read_bool(text: str) -> bool:
    if text.lower() not in ("true", "yes", "1", "false", "no", "0"):
        raise ValueError
    return text.lower() in ("true", "yes", "1")


def type_name(hint: Any) -> str:
    """A type's name in messages."""
    return getattr(hint, "__name__", None) or str(hint)
