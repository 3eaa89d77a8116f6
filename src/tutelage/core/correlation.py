"""Correlation of two lists of numbers, by value (Pearson) and by rank (Spearman)."""

import numpy as np


def pearson(first: np.ndarray, second: np.ndarray) -> float:
    """Correlation of the values of two arrays (N,); nan if all values of one are equal."""
    with np.errstate(invalid="ignore"):
        return float(np.corrcoef(first, second)[0, 1])


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Correlation of the ranks of the values of two arrays (N,); nan if all values of one are equal."""
    return pearson(ranks(first), ranks(second))


def ranks(values: np.ndarray) -> np.ndarray:
    """The rank of each value; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[inverse]
