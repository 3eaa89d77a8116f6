"""Fixtures for the tests of the losses."""

from __future__ import annotations

import pytest

from tutelage.core import chunked


@pytest.fixture(params=[70, chunked.BLOCK_LOGITS])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The output loss compares a few positions, or all of a chunk, at a time."""
    monkeypatch.setattr(chunked, "BLOCK_LOGITS", request.param)
