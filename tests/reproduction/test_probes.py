"""Fourier weights and n-gram probes against functions whose answers are known."""

from __future__ import annotations

import pytest
import torch

from tutelage.reproduction.probes import fourier_weights, monomials, ngram_explained, weights_by_degree
from tutelage.tasks.parity import ParityData


def bits(count: int = 4000, d: int = 8) -> torch.Tensor:
    return ParityData(d, 1, count, 3).arrays()[0]


def test_weights_of_a_sum_of_monomials() -> None:
    x = bits()
    signs = x.double() * 2 - 1
    function = 3 * signs[:, 0] + 1 * signs[:, 1] * signs[:, 2]  # variances 9 and 1
    weights = fourier_weights(function, x, [(0,), (1, 2), (3,), (0, 1)])
    torch.testing.assert_close(weights, torch.tensor([0.9, 0.1, 0.0, 0.0]).double(), rtol=0, atol=0.02)


def test_a_vector_shares_its_variance_among_components() -> None:
    x = bits()
    signs = x.double() * 2 - 1
    function = torch.stack([signs[:, 0], signs[:, 0] + signs[:, 1], torch.zeros(len(x)).double()], dim=1)
    weights = fourier_weights(function, x, [(0,), (1,)])
    torch.testing.assert_close(weights, torch.tensor([2 / 3, 1 / 3]).double(), rtol=0, atol=0.03)


def test_noise_has_no_weight_on_average() -> None:
    x = bits(500)
    noise = torch.randn(500, 200, generator=torch.Generator().manual_seed(0))
    weights = fourier_weights(noise, x, monomials(range(8), 2))
    assert abs(float(weights.mean())) < 2e-4  # without the correction 1/500


def test_weights_by_degree_of_a_parity() -> None:
    data = ParityData(8, 3, 4000, 5)
    x, labels = data.arrays()
    weights = weights_by_degree(labels.double() * 2 - 1, x, data.support)
    assert weights.support[3] == pytest.approx(1.0, abs=0.01)
    assert max(abs(weights.support[1]), abs(weights.support[2]), abs(weights.off_support[1])) < 0.01


def test_monomials_are_chosen_by_seed() -> None:
    assert monomials([1, 4, 6], 2) == [(1, 4), (1, 6), (4, 6)]
    chosen = monomials(range(10), 2, limit=5, seed=1)
    assert len(chosen) == 5
    assert chosen == monomials(range(10), 2, limit=5, seed=1) != monomials(range(10), 2, limit=5, seed=2)


def test_ngram_probe_explains_what_the_tokens_determine() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 12, (6000, 2), generator=generator)
    first, second = (torch.randn(12, 5, generator=generator) for _ in range(2))
    noise = 0.1 * torch.randn(6000, 5, generator=generator)
    states = first[ids[:, 0]] + second[ids[:, 1]] + noise
    one, two = ngram_explained(states[:4000], ids[:4000], states[4000:], ids[4000:])
    alone = first[ids[:, 0]].var(0).sum() / states.var(0).sum()
    assert one == pytest.approx(float(alone), abs=0.06)
    assert two > 0.98


def test_ngram_probe_finds_nothing_in_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    states, ids = torch.randn(4000, 5, generator=generator), torch.randint(0, 12, (4000, 2), generator=generator)
    assert all(abs(score) < 0.02 for score in ngram_explained(states[:2000], ids[:2000], states[2000:], ids[2000:]))


def test_too_few_positions_for_a_probe() -> None:
    with pytest.raises(ValueError, match="two positions on each side, got 1 and 3"):
        ngram_explained(torch.zeros(1, 2), torch.zeros(1, 1).long(), torch.zeros(3, 2), torch.zeros(3, 1).long())
