"""Standardisation and attention sinks."""

from __future__ import annotations

import pytest
import torch

from tutelage.core.standardize import SINK_FACTOR, Standardizer


@pytest.fixture
def states() -> torch.Tensor:
    """(200, 6), every dimension with its own mean and spread."""
    generator = torch.Generator().manual_seed(0)
    spread, mean = torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0, 0.1]), torch.tensor([0.0, 1.0, -2.0, 3.0, 0.5, 2.0])
    return torch.randn(200, 6, generator=generator) * spread + mean


def test_sink_factor() -> None:
    assert SINK_FACTOR == 4.0


def test_centres_and_scales(states: torch.Tensor) -> None:
    fitted = Standardizer.fit(states)
    torch.testing.assert_close(fitted.mean, states.mean(0))
    torch.testing.assert_close(fitted.scale, states.std(0, correction=0))
    standard = fitted(states)
    torch.testing.assert_close(standard.mean(0), torch.zeros(6))
    torch.testing.assert_close(standard.square().mean(0), torch.ones(6))


def test_without_centring_scales_by_the_root_mean_square(states: torch.Tensor) -> None:
    fitted = Standardizer.fit(states, center=False)
    assert torch.equal(fitted.mean, torch.zeros(6))
    torch.testing.assert_close(fitted.scale, states.square().mean(0).sqrt())
    torch.testing.assert_close(fitted(states).square().mean(0), torch.ones(6))


@pytest.mark.parametrize("center", [True, False])
def test_sinks_change_no_statistics(states: torch.Tensor, center: bool) -> None:
    sinks = torch.zeros(5, 6)
    sinks[:, 2] = 1000.0
    clean, fitted = Standardizer.fit(states, center), Standardizer.fit(torch.cat([sinks, states]), center)
    torch.testing.assert_close(fitted.mean, clean.mean)
    torch.testing.assert_close(fitted.scale, clean.scale)
    keep = fitted.keep(torch.cat([sinks, states]))
    assert keep.dtype == torch.bool
    assert keep.tolist() == [False] * 5 + [True] * 200


def test_threshold_is_a_multiple_of_the_median_norm() -> None:
    states = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [0.0, 11.0], [0.0, 13.0]])
    assert Standardizer.fit(states).sink_norm == 12.0
    fitted = Standardizer.fit(states, sink_factor=3.5)
    assert fitted.sink_norm == 10.5
    torch.testing.assert_close(fitted.mean, states[:3].mean(0))
    assert fitted.keep(states).tolist() == [True, True, True, False, False]
    assert fitted.keep(torch.tensor([[10.5, 0.0], [0.0, 10.6]])).tolist() == [
        True,
        False,
    ]  # the threshold itself counts


def test_keep_does_not_depend_on_the_batch(states: torch.Tensor) -> None:
    fitted = Standardizer.fit(states)
    batch = torch.cat([states, 100 * states]).reshape(2, 200, 6)
    keep = fitted.keep(batch)
    assert keep.shape == (2, 200)
    alone = torch.stack([fitted.keep(row) for row in batch.flatten(0, 1)[:, None]]).reshape(2, 200)
    assert torch.equal(keep, alone) and bool(keep[0].all()) and not bool(keep[1].all())


@pytest.mark.parametrize("value", [7.0, 1000.1])
def test_dimension_that_never_moves_stays_at_zero(states: torch.Tensor, value: float) -> None:
    states[:, 1] = value
    fitted = Standardizer.fit(states)
    assert float(fitted.scale[1]) == 1.0
    assert torch.equal(fitted(states)[:, 1], torch.zeros(200))


def test_all_zero_states() -> None:
    fitted = Standardizer.fit(torch.zeros(3, 4))
    assert torch.equal(fitted(torch.zeros(3, 4)), torch.zeros(3, 4))


def test_large_offset_in_half_precision_is_fitted_in_double(states: torch.Tensor) -> None:
    halves = (states + 100).to(torch.bfloat16)
    fitted = Standardizer.fit(halves)
    assert fitted.mean.dtype == fitted.scale.dtype == torch.float32
    torch.testing.assert_close(fitted.mean, halves.double().mean(0).float())
    standard = fitted(halves)
    assert standard.dtype == torch.float32
    torch.testing.assert_close(standard, (halves.float() - fitted.mean) / fitted.scale)


def test_identity_changes_nothing(states: torch.Tensor) -> None:
    identity = Standardizer.identity(6)
    assert torch.equal(identity(states), states)
    assert bool(identity.keep(1e6 * states).all())


def test_to_keeps_everything(states: torch.Tensor) -> None:
    fitted = Standardizer.fit(states)
    moved = fitted.to("meta")
    assert moved.mean.device.type == moved.scale.device.type == "meta"
    assert moved.sink_norm == fitted.sink_norm
    assert torch.equal(fitted.to("cpu").scale, fitted.scale)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_positions(count: int) -> None:
    with pytest.raises(ValueError, match=rf"standardising needs at least 2 calibration positions, got {count}"):
        Standardizer.fit(torch.ones(count, 4))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_states_that_are_not_finite(states: torch.Tensor, value: float) -> None:
    states[3, 2] = value
    with pytest.raises(ValueError, match=r"hidden states are not finite on the calibration text: check its dtype"):
        Standardizer.fit(states)
