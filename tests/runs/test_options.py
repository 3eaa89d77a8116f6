"""Options of a run as text."""

from __future__ import annotations

from typing import Any

import pytest

from tutelage.runs.options import read_value


@pytest.mark.parametrize(
    ("text", "hint", "value"),
    [
        ("2e6", int, 2_000_000),
        ("1_000", int, 1000),
        ("1e-3", float, 1e-3),
        ("No", bool, False),
        (True, bool, True),
        ("none", int | None, None),
        ("7", int | None, 7),
        ("a,b", str, "a,b"),
        ("1,2 3", tuple[int, ...], (1, 2, 3)),
        (["1", "2"], list[int], [1, 2]),
        (0.1, tuple[float, ...], (0.1,)),
        ("0.5", list[float] | None, [0.5]),
    ],
)
def test_text_is_read_as_its_type(text: Any, hint: Any, value: Any) -> None:
    read = read_value(text, hint)
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "hint"),
    [("8.5", int), ("inf", int), ("x", float), ("maybe", bool), (["1", "2"], int), ("1 x", tuple[int, ...])],
)
def test_text_that_is_not_of_its_type_is_refused(text: Any, hint: Any) -> None:
    with pytest.raises(ValueError):
        read_value(text, hint)
