"""Rank correlation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tutelage.core.correlation import pearson, ranks, spearman


def test_equal_values_share_their_rank() -> None:
    """Repeated sentences have equal similarities, whose order in the file says nothing."""
    assert ranks(np.array([0.3, 0.1, 0.3, 0.9])).tolist() == [2.5, 1.0, 2.5, 4.0]
    assert np.array_equal(ranks(np.array([0.3, 0.1, 0.2])), [3, 1, 2])


def test_ranks_are_correlated_not_values() -> None:
    values, curved = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 10.0, 100.0, 1000.0])
    assert spearman(values, curved) == pytest.approx(1)
    assert pearson(values, curved) < 0.9
    assert spearman(np.array([1.0, 2.0, 3.0]), np.array([2.0, 1.0, 3.0])) == pytest.approx(0.5)


def test_a_constant_has_no_correlation() -> None:
    assert math.isnan(spearman(np.ones(3), np.array([1.0, 2.0, 3.0])))
