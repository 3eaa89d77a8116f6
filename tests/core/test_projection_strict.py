"""Projections: reproducible to the bit, the distribution of the paper, optimal decoders and data-aware codes."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from torch import nn

from tutelage.core.projection import (
    KINDS,
    RANDOM_KINDS,
    DataProjection,
    RandomProjection,
    head_projection,
    pca_projection,
)

HASHES = {
    ("gaussian", 0): "0a3c5bec883e598d4304efaf796c2148c3bbd180628dfee4e329a5e1e537c560",
    ("gaussian", (3, 2)): "09bbf72d91466760f0ef639768d42309e857e883891948426a02a3a7f2635be3",
    ("rademacher", 0): "3e166d07a80ca044e03a11ffcd62dac28233ed5d1b852b34401a9afa883f3afc",
    ("rademacher", (3, 2)): "6e314201c91fa5c4a11b1506fd0dc9f60fb47dd5fec69d285e30372d15f7405f",
}
every_kind = pytest.mark.parametrize("kind", RANDOM_KINDS)


def second_moment(width: int, seed: int = 0) -> torch.Tensor:
    """A well-conditioned but far from isotropic second moment."""
    return states(width, seed=seed).T @ states(width, seed=seed) / 1000


def states(width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    scales = torch.logspace(0, -1, width, dtype=torch.float64)
    return torch.randn(1000, width, generator=generator, dtype=torch.float64) @ (scales[:, None] * mixing)


def test_kinds() -> None:
    assert RANDOM_KINDS == ("gaussian", "orthogonal", "rademacher")
    assert KINDS == ("gaussian", "orthogonal", "rademacher", "pca", "head")


@every_kind
@pytest.mark.parametrize("seed", [0, 7, (7, 3)])
def test_drawn_again_from_its_seed(kind: str, seed: int | tuple[int, ...]) -> None:
    torch.manual_seed(0)
    first = RandomProjection(24, 8, seed, kind).matrix()
    torch.manual_seed(1)
    second = RandomProjection(24, 8, seed, kind).matrix()
    assert first.shape == (24, 8) and first.dtype == torch.float32 and first.device.type == "cpu"
    assert torch.equal(first, second)


@every_kind
def test_seeds_give_different_matrices(kind: str) -> None:
    drawn = [RandomProjection(24, 8, seed, kind).matrix() for seed in (0, 1, (0, 1), (1, 0), (0, 2))]
    for index, matrix in enumerate(drawn):
        assert not any(torch.equal(matrix, other) for other in drawn[:index])


@pytest.mark.parametrize(("kind", "seed"), HASHES)
def test_bytes_are_pinned(kind: str, seed: int | tuple[int, ...]) -> None:
    data = RandomProjection(48, 16, seed, kind).matrix().contiguous().numpy().astype("<f4").tobytes()
    assert hashlib.sha256(data).hexdigest() == HASHES[kind, seed]


def test_stream_is_numpys_legacy_generator() -> None:
    # the first normals of MT19937 seeded with 0, known from any NumPy of the last fifteen years
    column = RandomProjection(4, 2, 0).matrix()[:, 0] * 2
    torch.testing.assert_close(column, torch.tensor([1.76405235, 0.40015721, 0.97873798, 2.24089320]))


@every_kind
@pytest.mark.parametrize("narrow", [1, 5, 16])
def test_first_columns_are_the_narrower_projection(kind: str, narrow: int) -> None:
    wide, expected = RandomProjection(32, 20, 3, kind).matrix(), RandomProjection(32, narrow, 3, kind).matrix()
    if kind == "orthogonal":
        torch.testing.assert_close(wide[:, :narrow], expected)
    else:
        assert torch.equal(wide[:, :narrow], expected)


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
def test_entries_have_mean_0_and_variance_one_over_width(kind: str) -> None:
    width, entries = 256, 256 * 300
    matrix = RandomProjection(width, 300, 0, kind).matrix().double()
    # three standard errors, of the mean and (for a Gaussian) of the variance
    assert abs(float(matrix.mean())) < 3 / math.sqrt(width * entries)
    assert abs(float(matrix.var()) * width - 1) < 3 * math.sqrt(2 / entries)


def test_gaussian_entries_are_gaussian() -> None:
    matrix = RandomProjection(256, 300, 0).matrix().double() * 16
    assert abs(float(matrix.pow(4).mean()) - 3) < 3 * math.sqrt(96 / matrix.numel())
    assert len(matrix.unique()) > 0.99 * matrix.numel()


def test_rademacher_entries() -> None:
    matrix = RandomProjection(64, 64, 0, "rademacher").matrix()
    assert sorted(matrix.unique().tolist()) == [-0.125, 0.125]


@pytest.mark.parametrize(("width", "columns"), [(32, 1), (32, 20), (32, 32)])
def test_orthogonal_columns_are_orthonormal(width: int, columns: int) -> None:
    matrix = RandomProjection(width, columns, 5, "orthogonal").matrix()
    torch.testing.assert_close(matrix.T @ matrix, torch.eye(columns))


def test_orthogonal_spans_the_gaussian() -> None:
    matrix = RandomProjection(32, 6, 5, "orthogonal").matrix()
    gaussian = RandomProjection(32, 6, 5, "gaussian").matrix()
    torch.testing.assert_close(matrix @ (matrix.T @ gaussian), gaussian)
    # with the Gram-Schmidt signs: each column points the way of the Gaussian's
    assert bool(((matrix * gaussian).sum(0) > 0).all())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((8, 4, 0, "pca"), r"unknown random projection 'pca': use one of gaussian, orthogonal, rademacher"),
        ((0, 4), r"a projection needs widths of at least 1, got 0 -> 4"),
        ((8, 0), r"a projection needs widths of at least 1, got 8 -> 0"),
        ((8, 9, 0, "orthogonal"), r"an orthogonal projection cannot widen 8 to 9: use projection='gaussian'"),
    ],
)
def test_errors(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RandomProjection(*arguments)


def test_data_projections_cannot_widen() -> None:
    eye = torch.eye(8)
    with pytest.raises(ValueError, match=r"projection='pca' cannot widen 8 to 9: use projection='gaussian'"):
        pca_projection(eye, 9)
    with pytest.raises(ValueError, match=r"projection='head' cannot widen 8 to 9: use projection='gaussian'"):
        head_projection(eye, eye, 9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_call_is_the_product_in_the_dtype_of_the_states(dtype: torch.dtype) -> None:
    projection = RandomProjection(24, 8)
    hidden = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    projected = projection(hidden)
    assert projected.dtype == dtype and projected.shape == (2, 3, 8)
    torch.testing.assert_close(projected, hidden @ projection.matrix().to(dtype))


def test_placed_matrix_is_kept_until_the_dtype_changes() -> None:
    projection = RandomProjection(24, 8)
    kept = projection.to("cpu", torch.float64)
    assert projection.to(torch.device("cpu"), torch.float64) is kept
    assert projection.to("cpu", torch.bfloat16).dtype == torch.bfloat16
    torch.testing.assert_close(projection.to("cpu", torch.float64), kept, rtol=0, atol=0)


def test_never_part_of_a_checkpoint() -> None:
    module = nn.Linear(2, 2)
    module.projection = RandomProjection(24, 8)
    assert not isinstance(module.projection, nn.Module)
    assert set(module.state_dict()) == {"weight", "bias"}


@every_kind
def test_decoder_without_moment_is_the_pseudo_inverse(kind: str) -> None:
    projection = RandomProjection(24, 8, 1, kind)
    decoder, matrix = projection.decoder(), projection.matrix()
    assert decoder.shape == (8, 24) and decoder.dtype == torch.float32
    torch.testing.assert_close(decoder, torch.linalg.pinv(matrix.double()).float())
    torch.testing.assert_close(decoder @ matrix, torch.eye(8))
    torch.testing.assert_close(matrix @ decoder, (matrix @ decoder).T)


@every_kind
@pytest.mark.parametrize("columns", [1, 8])
def test_decoder_with_moment_is_least_squares_on_the_states(kind: str, columns: int) -> None:
    projection, sample = RandomProjection(24, columns, 1, kind), states(24)
    expected = torch.linalg.lstsq(sample @ projection.matrix().double(), sample).solution
    decoder = projection.decoder(second_moment(24).float())
    torch.testing.assert_close(decoder, expected.float())
    assert not torch.allclose(decoder, projection.decoder(), atol=0.05)


@every_kind
@pytest.mark.parametrize("moment", [None, second_moment(16)])
def test_decoder_at_full_width_is_the_inverse(kind: str, moment: torch.Tensor | None) -> None:
    projection = RandomProjection(16, 16, 4, kind)
    inverse = torch.linalg.inv(projection.matrix().double())
    torch.testing.assert_close(projection.decoder(moment), inverse.float())


@pytest.mark.parametrize("moment", [None, second_moment(16)])
def test_decoder_of_a_widening_projection_gives_the_states_back(moment: torch.Tensor | None) -> None:
    projection = RandomProjection(16, 24, 4)
    torch.testing.assert_close(projection.matrix() @ projection.decoder(moment), torch.eye(16))


def test_decoder_with_directions_that_never_occur() -> None:
    sample = states(24)
    sample[:, 20:] = 0
    projection = RandomProjection(24, 8, 1)
    expected = torch.linalg.lstsq(sample @ projection.matrix().double(), sample).solution
    torch.testing.assert_close(projection.decoder(sample.T @ sample / len(sample)), expected.float())


@pytest.mark.parametrize("columns", [1, 8, 24])
def test_codes_of_data_projections_have_unit_second_moment(columns: int) -> None:
    moment, gram = second_moment(24), second_moment(24, seed=9)
    for projection in (pca_projection(moment, columns), head_projection(moment, gram, columns)):
        matrix = projection.matrix()
        assert isinstance(projection, DataProjection)
        assert (projection.in_features, projection.out_features) == matrix.shape == (24, columns)
        assert matrix.dtype == torch.float32
        codes = matrix.double().T @ moment @ matrix.double()
        torch.testing.assert_close(codes.float(), torch.eye(columns))


def test_data_projections_are_nested() -> None:
    moment, gram = second_moment(24), second_moment(24, seed=9)
    torch.testing.assert_close(pca_projection(moment, 9).matrix()[:, :4], pca_projection(moment, 4).matrix())
    torch.testing.assert_close(
        head_projection(moment, gram, 9).matrix()[:, :4], head_projection(moment, gram, 4).matrix()
    )


def test_projection_of_fewer_directions_than_columns_is_finite() -> None:
    sample = states(24)
    sample[:, 4:] = 0
    moment = sample.T @ sample / len(sample)
    assert bool(torch.isfinite(pca_projection(moment, 8).matrix()).all())
    assert bool(torch.isfinite(head_projection(moment, second_moment(24), 8).matrix()).all())


def expected_error(projection: RandomProjection | DataProjection, moment: torch.Tensor, readout: torch.Tensor) -> float:
    """E |W (h - decoded h)|^2 with the best linear decoder."""
    lost = (
        torch.eye(len(moment), dtype=torch.float64) - projection.matrix().double() @ projection.decoder(moment).double()
    )
    return float(torch.trace(readout @ lost.T @ moment @ lost @ readout.T))


def optimal_error(moment: torch.Tensor, readout: torch.Tensor, rank: int) -> float:
    """Eckart-Young: the squared singular values of W C^{1/2} beyond the rank."""
    factor = torch.linalg.cholesky(moment)
    return float(torch.linalg.svdvals(readout @ factor)[rank:].square().sum())


@pytest.mark.parametrize("rank", [1, 4, 8, 16])
def test_head_projection_has_the_least_logit_error(rank: int) -> None:
    moment = second_moment(24)
    readout = states(24, seed=5)[:60] / 8
    readout = readout - readout.mean(0)
    gram = readout.T @ readout
    best = expected_error(head_projection(moment, gram, rank), moment, readout)
    assert best == pytest.approx(optimal_error(moment, readout, rank), rel=1e-6)
    assert best < 0.99 * expected_error(pca_projection(moment, rank), moment, readout)
    assert best < 0.99 * expected_error(RandomProjection(24, rank), moment, readout)


@pytest.mark.parametrize("rank", [1, 4, 8, 16])
def test_pca_has_the_least_error_in_the_states(rank: int) -> None:
    moment, eye = second_moment(24), torch.eye(24, dtype=torch.float64)
    best = expected_error(pca_projection(moment, rank), moment, eye)
    assert best == pytest.approx(optimal_error(moment, eye, rank), rel=1e-6)
    assert best < 0.99 * expected_error(RandomProjection(24, rank), moment, eye)
