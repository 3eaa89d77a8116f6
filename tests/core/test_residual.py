"""The residual basis. Shapes: D teacher width, R student width."""

from __future__ import annotations

import pytest
import torch

from tutelage.core.residual import kept_variance, residual_basis

MOMENT_DD = (lambda states_ND: states_ND.T @ states_ND / 200)(
    torch.randn(200, 16, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 17).flip(0) + 1
)
ONES_D = torch.ones(16) / 4


def basis(kind: str, width: int = 6, *, keeps_mean: bool = False, seed: int = 0) -> torch.Tensor:
    return residual_basis(kind, 16, width, MOMENT_DD, keeps_mean=keeps_mean, seed=seed)


@pytest.mark.parametrize("kind", ["pca", "random"])
@pytest.mark.parametrize("width", [1, 6, 16])
@pytest.mark.parametrize("keeps_mean", [False, True])
def test_columns_are_orthonormal_and_the_same_each_time(kind: str, width: int, keeps_mean: bool) -> None:
    found_DR = basis(kind, width, keeps_mean=keeps_mean)
    torch.testing.assert_close(found_DR.T @ found_DR, torch.eye(width), rtol=0, atol=1e-6)
    assert torch.equal(found_DR, basis(kind, width, keeps_mean=keeps_mean))


@pytest.mark.parametrize("kind", ["pca", "random"])
@pytest.mark.parametrize("width", [1, 6, 16])
def test_the_mean_direction_of_the_teacher_becomes_that_of_the_student(kind: str, width: int) -> None:
    """So that LayerNorm, which takes the mean over the dimensions away, removes the same part in both."""
    mapped_R = ONES_D @ basis(kind, width, keeps_mean=True)
    torch.testing.assert_close(mapped_R, torch.ones(width) / width**0.5, rtol=0, atol=1e-6)


def test_principal_directions_keep_the_greatest_variance() -> None:
    values = torch.linalg.eigvalsh(MOMENT_DD.double())
    expected = float(values[-6:].sum() / values.sum())
    assert kept_variance(MOMENT_DD, basis("pca")) == pytest.approx(expected, rel=1e-6)
    assert kept_variance(MOMENT_DD, basis("random")) < expected
    assert kept_variance(MOMENT_DD, basis("pca", 16)) == pytest.approx(1)


def test_another_seed_gives_another_random_basis() -> None:
    assert not torch.allclose(basis("random"), basis("random", seed=1))


def test_the_identity_is_the_identity() -> None:
    assert torch.equal(basis("identity", 16), torch.eye(16))
