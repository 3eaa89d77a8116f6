"""What a state says of its input: Fourier weights of parities, and n-gram probes of language models.

Shapes: N examples or positions, d input bits, W width, T positions, n length of the context."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tutelage.core.errors import UserError
from tutelage.core.records import Record

Monomial = tuple[int, ...]


def monomials(coordinates: Sequence[int], degree: int, limit: int | None = None, seed: int = 0) -> list[Monomial]:
    """Products of `degree` of the coordinates: all of them, or a seeded choice of `limit`."""
    found = list(itertools.combinations(coordinates, degree))
    if limit is not None and len(found) > limit:
        chosen = np.random.RandomState(seed).choice(len(found), limit, replace=False)
        found = [found[index] for index in sorted(chosen)]
    return found


def fourier_weights(values: torch.Tensor, bits_Nd: torch.Tensor, which: Sequence[Monomial]) -> torch.Tensor:
    """Fraction of a function's variance on each monomial chi_S(x) = prod_{i in S} x_i, (len(which),).

    For vector-valued functions, the sum of squared coefficients E[f_w chi_S] over components w, divided by the sum of
    their variances. Estimated from N uniform examples, with the bias of a squared mean taken off, so that a monomial
    with no weight is at zero on average and may come out slightly negative. `values`, f, are (N,) or (N, W); bits 0 or 1."""
    outputs = values.double().reshape(len(values), -1)
    outputs = outputs - outputs.mean(0)
    variance = outputs.square().mean(0).sum().clamp_min(1e-30)
    signs = bits_Nd.double() * 2 - 1
    weights = []
    for subset in which:
        character = signs[:, list(subset)].prod(1, keepdim=True)
        products = outputs * character
        coefficient = products.mean(0)
        noise = (products - coefficient).square().mean(0) / (len(outputs) - 1)
        weights.append((coefficient.square() - noise).sum() / variance)
    return torch.stack(weights)


@dataclass(frozen=True)
class DegreeWeights(Record):
    """Fourier weight of a function at each degree."""

    support: dict[int, float]  # at each degree from 1 to k: the total over all monomials of support coordinates
    off_support: dict[int, float]
    """At degrees 1 and 2: the mean over a sample of monomials off the support, times the number of support monomials of
    that degree, so that the two can be compared."""


def weights_by_degree(
    values: torch.Tensor, bits_Nd: torch.Tensor, support: Sequence[int], off_support: int = 32
) -> DegreeWeights:
    """Fourier weight of a function, `values` (N,) or (N, W), at each degree of the monomials of `support`.

    At each degree, `off_support` monomials off the support are sampled."""
    outside = [index for index in range(bits_Nd.shape[1]) if index not in set(support)]
    weights = DegreeWeights({}, {})
    for degree in range(1, len(support) + 1):
        inside = monomials(support, degree)
        weights.support[degree] = float(fourier_weights(values, bits_Nd, inside).sum())
        if degree <= 2 and len(outside) >= degree:
            others = monomials(outside, degree, off_support)
            weights.off_support[degree] = float(fourier_weights(values, bits_Nd, others).mean()) * len(inside)
    return weights


def ngram_explained(
    states_NW: torch.Tensor,
    contexts_Nn: torch.Tensor,
    held_out_NW: torch.Tensor,
    held_out_contexts_Nn: torch.Tensor,
    *,
    ridge: float = 1.0,
    sweeps: int = 6,
) -> list[float]:
    """Fraction (R^2) of the variance of held-out states that a linear probe of the last 1, 2, ... n tokens explains.

    The probe is additive in one-hot tokens, h_t = mean + sum_j A_j[x_{t-j}], fitted by ridge regression (by backfitting,
    so no vocabulary is too large). Dimensions are scaled to unit variance first.

    Args:
        states_NW, contexts_Nn: states and the ids of the last n tokens there, newest first.
        held_out_NW, held_out_contexts_Nn: the same for held-out text.
        ridge: pseudo-count that shrinks a rare token's row.
        sweeps: rounds of backfitting."""
    if len(states_NW) < 2 or len(held_out_NW) < 2:
        raise UserError(f"a probe needs two positions on each side, got {len(states_NW)} and {len(held_out_NW)}")
    mean, scale = states_NW.double().mean(0), states_NW.double().std(0).clamp_min(1e-6)
    train, test = ((part.double() - mean) / scale for part in (states_NW, held_out_NW))
    vocabulary = int(max(contexts_Nn.max(), held_out_contexts_Nn.max())) + 1
    total = test.square().sum()
    scores = []
    for length in range(1, contexts_Nn.shape[1] + 1):
        tables = [torch.zeros(vocabulary, train.shape[1], dtype=torch.float64) for _ in range(length)]
        counts = [torch.bincount(contexts_Nn[:, j], minlength=vocabulary).double()[:, None] for j in range(length)]
        residual = train.clone()
        for _ in range(1 if length == 1 else sweeps):
            for j, table in enumerate(tables):
                ids = contexts_Nn[:, j]
                residual += table[ids]
                table.zero_().index_add_(0, ids, residual).div_(counts[j] + ridge)
                residual -= table[ids]
        predicted = sum(table[held_out_contexts_Nn[:, j]] for j, table in enumerate(tables))
        scores.append(float(1 - (test - predicted).square().sum() / total))
    return scores
