"""The one exception that means a user's mistake, and the checks that raise it."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any

LARGEST = 2**31 - 1
"""The largest count that a setting may have: what a signed integer of 32 bits holds."""


class UserError(ValueError):
    """Options, files or data that cannot work; the message says what was found, what was expected and what to do.

    The command line prints it as one line and exits with code 2. Any other exception is a bug of tutelage."""


def check_finite(**values: float | None) -> None:
    """Raise UserError where one of these values is not a finite number; None means not given."""
    for name, value in values.items():
        if value is not None and not math.isfinite(value):
            raise UserError(f"{name} must be a finite number, got {value}")


def check_range(name: str, value: Any, least: int, most: float = math.inf) -> None:
    """Raise UserError where a setting is not a finite number from `least` to `most`; None means not given."""
    if value is None:
        return
    _check_number(name, value)
    if least <= value <= most and math.isfinite(value):
        return
    expected = f"at least {least}" if least else "a number from 0 up"
    if most not in (LARGEST, math.inf) or value > most:
        expected = f"a number from {least} to {most}"
    raise UserError(f"{name} must be {expected}, got {value}")


def check_positive(name: str, value: Any) -> None:
    """Raise UserError where a setting is not a finite number above 0; None means not given."""
    if value is None:
        return
    _check_number(name, value)
    if not 0 < value < math.inf:
        raise UserError(f"{name} must be positive and finite, got {value}")


def _check_number(name: str, value: Any) -> None:
    if not isinstance(value, Real):
        raise UserError(f"{name} must be a number, got {value!r}")


def check_texts(options: Any) -> None:
    """Raise UserError for a field of a dataclass of options that is empty text, or text that no file can hold."""
    for field in dataclasses.fields(options):
        if (value := getattr(options, field.name)) != field.default:
            check_text(field.name, value)


def check_text(name: str, value: Any) -> None:
    """Raise UserError where a setting, or an entry of its list, is empty text, or text that no file can hold."""
    for text in value if isinstance(value, list | tuple) else [value]:
        if isinstance(text, str) and not text.strip():
            raise UserError(f"{name} is empty: give a value, or leave it out")
        if isinstance(text, str) and not is_text(text):
            raise UserError(f"{name} is {text!r}, which has characters that no file can hold: correct it")


def is_text(word: str) -> bool:
    """Whether a word can be printed and be the name of a file; a byte that is not UTF-8 cannot."""
    return "\0" not in word and not any("\ud800" <= character <= "\udfff" for character in word)


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise UserError where a setting is none of those that there are."""
    if value not in choices:
        raise UserError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


@contextmanager
def as_user_error(what: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn the errors of these kinds (default: all) that a library raises into `UserError(f"{what}: {reason}")`."""
    wanted = kinds or (Exception,)
    try:
        yield
    except UserError:
        raise
    except wanted as error:
        raise UserError(f"{what}: {reason_of(error)}") from error


def reason_of(error: BaseException) -> str:
    """First line of the original error, which libraries wrap in general ones."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return (str(text).strip().splitlines() or [type(error).__name__])[0]
