"""Options of a run as text: from a YAML file, and to the parser that reads flags.

Public names: `OneLineErrors`, `ConfigParser`, `read_options`, `as_flags`.
"""

from __future__ import annotations

import json
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
