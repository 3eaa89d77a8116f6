"""Options of a run as text: from a YAML file, and to the parser that reads flags.

Public names: `OptionParser`, `read_options`, `as_flags`, `parse_options`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from tutelage.core.errors import UserError

# Names that options had once, and the ones they have now.
RENAMED = {"eval_samples": "max_samples", "teacher_path": "teacher", "mask_probability": "mlm_probability"}


class OptionParser(HfArgumentParser):
    """Dataclasses from flags, with mistakes as one-line `UserError`s and no abbreviations."""

    def __init__(self, kinds: Any, **kwargs: Any):
        super().__init__(kinds, allow_abbrev=False, add_help=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage of two hundred options."""
        raise UserError(message)

    @property
    def names(self) -> set[str]:
        """Every option's names, aliases included, without dashes."""
        return {flag.lstrip("-") for action in self._actions for flag in action.option_strings}


def parse_options(parser: OptionParser, arguments: Sequence[str]) -> tuple[Any, ...]:
    """The parser's dataclasses, from a YAML file (`--config`) overridden by flags.

    Raises:
        UserError: an unknown option, a value that cannot be read, or a file that is no mapping of options.
    """
    if "config" not in parser.names:
        parser.add_argument("--config", help="YAML file with any of these options")
    config = parser.parse_known_args(list(arguments))[0].config
    if config is not None:
        options = read_options(Path(config))
        for name in options:
            if name not in parser.names - {"config"}:
                raise UserError(f"config {str(config)!r} has an unknown option {name!r}{_renamed(name)}")
        arguments = [*as_flags(options), *arguments]
    *values, rest, unknown = parser.parse_args_into_dataclasses(
        list(arguments), return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        name = unknown[0].lstrip("-").partition("=")[0]
        raise UserError(f"unknown option {unknown[0]!r}{_renamed(name)}: see {parser.prog} --help")
    return (*values, rest)


def _renamed(name: str) -> str:
    return f" (it is called {RENAMED[name]!r} now)" if name in RENAMED else ""


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
        raise UserError(f"no config file {str(path)!r}: give an existing YAML file")
    try:
        text = path.read_text(encoding="utf-8")
        values = yaml.safe_load(text) or {}
        words = yaml.load(text, yaml.BaseLoader)  # every scalar a string
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"config {str(path)!r} is not valid YAML: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"config {str(path)!r} must be a mapping of options, e.g. `{example}`")
    return {key: _as_text(value, words[key]) for key, value in values.items()}


def _as_text(value: Any, words: Any) -> Any:
    if value is None:
        return None
    return json.dumps(value) if isinstance(value, dict) else words


def as_flags(options: Mapping[str, Any]) -> list[str]:
    """Options as the flags of a command line; those that are None are left out."""
    flags: list[str] = []
    for key, value in options.items():
        if isinstance(value, list):
            flags += [f"--{key}", *map(str, value)]
        elif value is not None:
            flags.append(f"--{key}={value}")
    return flags
