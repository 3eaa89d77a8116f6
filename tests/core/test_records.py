"""Records whose JSON carries a digest."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

from tutelage.core.errors import UserError
from tutelage.core.records import Sealed, sealed


@dataclass(frozen=True)
class Point(Sealed):
    x: int
    names: dict[int, str]


POINT = Point(1, {10: "a", 9: "b"})


def test_a_sealed_record_is_read_back_as_it_was() -> None:
    assert Point.from_json(POINT.to_json()) == POINT
    assert Point.from_dict(POINT.to_dict()) == POINT


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": 2}, "it was changed: its digest is not that of its content"),
        ({"names": {"9": "b", "10": "c"}}, "it was changed"),
        ({"digest": "0" * 64}, "it was changed"),
        ({"digest": None}, "it was changed"),
    ],
)
def test_a_changed_value_of_a_sealed_record_is_noticed(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Point.from_json(json.dumps({**json.loads(POINT.to_json()), **change}))


def test_a_sealed_record_without_a_digest_is_refused() -> None:
    with pytest.raises(UserError, match="it has no digest"):
        Point.from_json('{"x": 1, "names": {}}')
    with pytest.raises(UserError, match="it has no digest"):
        Point.from_json("[1]")


def test_a_sealed_record_has_fields_of_its_types_too() -> None:
    with pytest.raises(UserError, match="x is true, not a number"):
        Point.from_dict(sealed({"x": True, "names": {}}))
