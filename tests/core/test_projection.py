"""Random and data-aware projections."""

from __future__ import annotations

import hashlib

import pytest
import torch

from tutelage import RandomProjection
from tutelage.core.projection import RANDOM_KINDS, DataProjection, spectral_projection

PINNED = {"gaussian": "809ab18f98e9db74", "rademacher": "2405fd9062ef80de"}


@pytest.mark.parametrize("kind", PINNED)
def test_the_matrix_of_a_seed_never_changes(kind: str) -> None:
    matrix = RandomProjection(13, 7, (3, 5), kind).matrix()
    assert hashlib.sha256(matrix.numpy().tobytes()).hexdigest()[:16] == PINNED[kind]


@pytest.mark.parametrize("kind", RANDOM_KINDS)
def test_narrower_is_a_prefix_of_wider(kind: str) -> None:
    wide, narrow = RandomProjection(33, 17, 4, kind).matrix(), RandomProjection(33, 5, 4, kind).matrix()
    tolerance = 1e-6 if kind == "orthogonal" else 0
    torch.testing.assert_close(wide[:, :5], narrow, rtol=0, atol=tolerance)
    assert not torch.allclose(narrow, RandomProjection(33, 5, 5, kind).matrix())


def test_entries_have_mean_zero_and_variance_one_over_width() -> None:
    for kind in ("gaussian", "rademacher"):
        matrix = RandomProjection(400, 300, 1, kind).matrix() * 20
        assert abs(matrix.mean().item()) < 0.01
        assert matrix.var().item() == pytest.approx(1, abs=0.02)
    assert RandomProjection(16, 3, 0, "rademacher").matrix().abs().unique().tolist() == [0.25]


def test_orthogonal_columns_are_orthonormal() -> None:
    matrix = RandomProjection(30, 12, 0, "orthogonal").matrix()
    torch.testing.assert_close(matrix.T @ matrix, torch.eye(12), rtol=0, atol=1e-6)
    # Gram-Schmidt on the gaussian columns, signs included
    against = matrix.double().T @ RandomProjection(30, 12, 0).matrix().double()
    torch.testing.assert_close(against.tril(-1), torch.zeros(12, 12).double(), rtol=0, atol=1e-6)
    assert against.diagonal().min() > 0


def test_bad_projections_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown random projection 'sparse': use one of gaussian"):
        RandomProjection(4, 2, 0, "sparse")
    with pytest.raises(ValueError, match="cannot widen 4 to 8"):
        RandomProjection(4, 8, 0, "orthogonal")
    with pytest.raises(ValueError, match="widths of at least 1"):
        RandomProjection(4, 0)
    with pytest.raises(ValueError, match="'pca' cannot widen 4 to 8"):
        spectral_projection(torch.eye(4), 8)


def correlated(count: int = 4000, width: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    scales = torch.linspace(3, 0.1, width).double()
    mix = torch.randn(width, width, generator=generator).double()
    return (torch.randn(count, width, generator=generator).double() * scales) @ mix


def test_decoder_is_the_pseudo_inverse_or_least_squares() -> None:
    projection, states = RandomProjection(12, 5, 3), correlated()
    torch.testing.assert_close(projection.decoder(), torch.linalg.pinv(projection.matrix()))
    codes = states @ projection.matrix().double()
    best = torch.linalg.lstsq(codes, states).solution
    decoder = projection.decoder(states.T @ states / len(states))
    torch.testing.assert_close(decoder.double(), best, rtol=1e-4, atol=1e-4)


def test_square_decoder_is_the_inverse() -> None:
    projection, states = RandomProjection(12, 12, 3), correlated()
    product = projection.matrix().double() @ projection.decoder(states.T @ states / len(states)).double()
    torch.testing.assert_close(product, torch.eye(12).double(), rtol=0, atol=1e-4)


def test_head_projection_has_the_least_logit_error() -> None:
    states, rank = correlated(), 4
    moment = states.T @ states / len(states)
    weight = torch.randn(50, 12, generator=torch.Generator().manual_seed(1)).double()
    weight[:, 0] = 0  # a direction that the outputs never see

    def error(projection: RandomProjection | DataProjection) -> float:
        back = states @ projection.matrix().double() @ projection.decoder(moment).double()
        return ((states - back) @ weight.T).square().sum(-1).mean().item()

    chosen = spectral_projection(moment, rank, weight.T @ weight)
    values = torch.linalg.svdvals(weight @ torch.linalg.cholesky(moment))
    assert error(chosen) == pytest.approx(values[rank:].square().sum().item(), rel=1e-3)
    assert error(chosen) < error(spectral_projection(moment, rank)) < error(RandomProjection(12, rank, 0))
    for projection in (chosen, spectral_projection(moment, rank)):
        codes = states @ projection.matrix().double()
        assert torch.allclose((codes.T @ codes / len(codes)), torch.eye(rank).double(), atol=1e-4)


def test_projecting_is_a_matrix_product_kept_on_the_device() -> None:
    projection, hidden = RandomProjection(12, 5, 3), torch.randn(2, 3, 12)
    torch.testing.assert_close(projection(hidden), hidden @ projection.matrix())
    assert projection.to("cpu", torch.float32) is projection.to("cpu", torch.float32)
    assert projection.to("meta", torch.float32).device.type == "meta"
    double = projection.to("cpu", torch.float64)
    assert double.dtype == torch.float64
    assert torch.equal(double.float(), projection.matrix())


@pytest.mark.parametrize("columns", [12, 20])
def test_decoder_of_a_projection_that_loses_nothing_gives_the_states_back(columns: int) -> None:
    states = correlated()
    projection = RandomProjection(12, columns, 3)
    decoder = projection.decoder(states.T @ states / len(states))
    torch.testing.assert_close(decoder, torch.linalg.pinv(projection.matrix().double()).float(), rtol=1e-4, atol=1e-5)


def test_decoder_of_columns_that_depend_on_each_other() -> None:
    states = correlated()
    moment, independent = states.T @ states / len(states), RandomProjection(12, 3, 1).matrix()
    doubled = DataProjection(torch.cat([independent, independent[:, :1]], dim=1), "mine")
    expected = DataProjection(independent, "mine").decoder(moment)
    torch.testing.assert_close(doubled.matrix() @ doubled.decoder(moment), independent @ expected, rtol=1e-4, atol=1e-5)


def test_decoder_where_the_text_never_used_a_direction() -> None:
    states = correlated()
    states[:, 0] = 0
    projection = RandomProjection(12, 12, 3)
    decoder = projection.decoder(states.T @ states / len(states))
    torch.testing.assert_close(decoder, torch.linalg.inv(projection.matrix().double()).float(), rtol=1e-3, atol=1e-4)


def test_head_projection_is_the_top_of_the_singular_values() -> None:
    states, rank = correlated(), 4
    moment = states.T @ states / len(states)
    weight = torch.randn(50, 12, generator=torch.Generator().manual_seed(1)).double()
    chosen = spectral_projection(moment, rank, weight.T @ weight)
    # z = L^{-1/2} U^T M^{1/2} h is decoded by L^{1/2} U^T M^{-1/2}, with L and U of M^{1/2} C M^{1/2}
    values, vectors = torch.linalg.eigh(weight.T @ weight)
    root, inverse = (vectors * values**power @ vectors.T for power in (0.5, -0.5))
    values, vectors = torch.linalg.eigh(root @ moment @ root)
    top, directions = values[-rank:].flip(0), vectors[:, -rank:].flip(1)
    decoder = chosen.decoder(moment).double()
    expected = (inverse @ directions * top.sqrt()).T
    signs = (decoder * expected).sum(1, keepdim=True).sign()
    torch.testing.assert_close(decoder, signs * expected, rtol=1e-5, atol=1e-5)


def test_more_columns_than_directions_stay_finite() -> None:
    moment = torch.zeros(12, 12).double()
    moment[:3, :3] = torch.eye(3)
    for projection in (spectral_projection(moment, 6), spectral_projection(moment, 6, torch.eye(12))):
        assert torch.isfinite(projection.matrix()).all()
        assert torch.isfinite(projection.decoder(moment)).all()
