"""Options of a run as text: from a YAML file, and to the parser that reads flags."""

import json
import os
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from tutelage.core.errors import UserError, as_user_error

# names that options had once, and the ones they have now
RENAMED = {
    **{"eval_samples": "max_samples", "teacher_path": "teacher", "mask_probability": "mlm_probability"},
    "split": "dataset_split",
}


class OptionParser(HfArgumentParser):
    """Dataclasses from flags, with mistakes as one-line `UserError`s and no abbreviations."""

    def __init__(self, kinds: Any, **kwargs: Any):
        super().__init__(kinds, allow_abbrev=False, add_help=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage of two hundred options."""
        raise UserError(message)


def parse_options(parser: OptionParser, arguments: Sequence[str]) -> tuple[Any, ...]:
    """The parser's dataclasses, from a YAML file (the option `config`) overridden by flags.
    Raises UserError for an unknown option, a value that cannot be read, or a file that is not a mapping of options."""
    config = parser.parse_known_args(list(arguments))[0].config
    if config is not None:
        options = read_options(Path(config))
        actions = {flag.lstrip("-"): action for action in parser._actions for flag in action.option_strings}
        given: dict[str, str] = {}
        for name, value in options.items():
            if name not in actions or name == "config":
                raise UserError(f"config {config!r} has an unknown option {name!r}{renamed(name)}")
            if (other := given.setdefault(actions[name].dest, name)) != name:
                raise UserError(f"config {config!r}: {other} and {name} are the same option: leave one out")
            if isinstance(value, list) and actions[name].nargs not in ("+", "*"):
                raise UserError(f"config {config!r}: {name} takes one value, not the list [{', '.join(value)}]")
        arguments = [*as_flags(options), *arguments]
    *values, _, unknown = parser.parse_args_into_dataclasses(
        list(arguments), return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        name = unknown[0].lstrip("-").partition("=")[0]
        raise UserError(f"unknown option {unknown[0]!r}{renamed(name)}: see {parser.prog} --help")
    return tuple(values)


def renamed(name: str) -> str:
    """What to add to an error about an unknown option that had this name once; empty for any other."""
    return f" (it is called {RENAMED[name]!r} now)" if name in RENAMED else ""


def read_options(path: Path, example: str = "method: extraction") -> dict[str, Any]:
    """A YAML file's options: each value as text, a list of texts, or None where it is left empty; `example` is for messages.

    YAML alone reads `1:2` as 62 and `1e-3` as a string; text is parsed as flags are. Raises UserError for any other file."""
    where = f"config {str(path)!r}"
    if not os.path.isfile(path):
        raise UserError(f"no config file {str(path)!r}: give an existing YAML file")
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, yaml.SafeLoader)
        values = yaml.safe_load(text)
        words = yaml.load(text, yaml.BaseLoader)  # every scalar a string
    except RecursionError as error:
        raise UserError(
            f"{where} has lists or mappings too deep inside each other: options are one level deep"
        ) from error
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise UserError(f"{where} is not valid YAML: {error}") from error
    values, words = values or {}, words or {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{where} must be a mapping of options, e.g. `{example}`")
    names = [] if root is None else [key.value for key, _ in root.value]
    if repeated := [name for name in names if name == "<<" or names.count(name) > 1]:
        how = "merges another mapping with" if repeated[0] == "<<" else "has twice"
        raise UserError(f"{where} {how} {repeated[0]!r}: write every option once, by itself")
    with as_user_error(where, TypeError, ValueError):  # a date or bytes inside a mapping
        texts = {key: json.dumps(value) if isinstance(value, dict) else words[key] for key, value in values.items()}
    for key, value in texts.items():
        if not all(isinstance(item, str) for item in (value if isinstance(value, list) else [value])):
            raise UserError(f"{where}: {key} must be one value or a list of values, not a list of lists or mappings")
    return {key: None if values[key] is None else text for key, text in texts.items()}


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

    `value` is text, a list of texts, or of that type already; `hint` is bool, int, float, str, a tuple or list of one of
    them, or a union with None. Raises ValueError where it cannot be read as that type."""
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
        text = str(value).lower()
        if text not in ("true", "yes", "1", "false", "no", "0"):
            raise ValueError
        return text in ("true", "yes", "1")
    if hint is int and isinstance(value, str):
        if value.strip().lstrip("+-").isdecimal():
            return int(value)
        number = float(value)  # 2e6 and 2_000_000 alike
        if not number.is_integer():  # nor inf or nan
            raise ValueError
        return int(number)
    try:
        return hint(value)
    except TypeError as error:
        raise ValueError from error


def type_name(hint: Any) -> str:
    """What a value of a type is, in messages."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return " or ".join("none" if part is type(None) else type_name(part) for part in typing.get_args(hint))
    if typing.get_origin(hint) in (tuple, list):
        return f"{type_name(typing.get_args(hint)[0]).removeprefix('a ')}s separated by commas"
    return {int: "a whole number", float: "a number", bool: "true or false"}.get(hint, "text")
