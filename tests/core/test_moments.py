"""Moments that are added up batch by batch, and the shrinkage of a second moment."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tutelage.core.moments import FLOOR, Moments, shrunk_moment
from tutelage.core.projection import RandomProjection, spectral_projection

WIDTH = 24


def mixed(count: int, seed: int) -> torch.Tensor:
    """Correlated states of unit variance, (count, WIDTH), with the same distribution for every seed."""
    mix = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -2, WIDTH)
    mix /= mix.norm(dim=1, keepdim=True)
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed)) @ mix.T


def halves_of(states_ND: torch.Tensor) -> tuple[Moments, Moments]:
    halves = Moments(full=True), Moments(full=True)
    for half, moments in enumerate(halves):
        moments.add(states_ND[half::2])
    return halves


def shrunk(states_ND: torch.Tensor) -> torch.Tensor:
    return shrunk_moment(halves_of(states_ND), torch.zeros(WIDTH), torch.ones(WIDTH))


@pytest.mark.parametrize("full", [False, True])
def test_moments_of_batches_are_those_of_all_states(full: bool) -> None:
    states = mixed(200, 1) * 3 + torch.arange(WIDTH) * 100
    exact, center = states.double(), torch.full((WIDTH,), 7.0, dtype=torch.float64)
    found, other = Moments(full), Moments(full)
    for batch in states[:150].split([1, 64, 0, 85]):
        found.add(batch)
    other.add(states[150:])
    total = found + other + Moments(full)
    expected = (exact - center).T @ (exact - center) / 200
    assert total.count == 200
    torch.testing.assert_close(total.mean, exact.mean(0), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(total.about(center), expected if full else expected.diagonal(), rtol=1e-5, atol=1e-4)
    variance = (exact - exact.mean(0)).square().mean(0)
    squares = total.about(total.mean)
    torch.testing.assert_close(squares.diagonal() if full else squares, variance, rtol=1e-5, atol=0)


def test_products_are_exact_in_mixed_precision() -> None:
    plain, mixed_precision = Moments(full=True), Moments(full=True)
    states = mixed(50, 1)
    plain.add(states)
    with torch.autocast("cpu", torch.bfloat16):
        mixed_precision.add(states)
    assert torch.equal(plain.scatter, mixed_precision.scatter)


@pytest.mark.parametrize("newer", [False, True])
def test_products_are_in_whole_float32_where_the_user_allows_tf32(newer: bool) -> None:
    settings: Any = torch.backends.cuda.matmul
    if newer and not hasattr(settings, "fp32_precision"):
        pytest.skip("torch 2.9 and newer")
    states, seen = mixed(8, 1), []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.mm.default:
                seen.append(settings.allow_tf32)
            return func(*args, **(kwargs or {}))

    try:
        if newer:
            settings.fp32_precision = "tf32"
        else:
            torch.set_float32_matmul_precision("high")
        with Products():
            Moments(full=True).add(states)
        assert (settings.fp32_precision == "tf32") if newer else settings.allow_tf32
    finally:
        if newer:
            settings.fp32_precision = "ieee"
        torch.set_float32_matmul_precision("highest")
    assert seen == [False]


def test_a_moment_of_many_states_is_left_as_it_is() -> None:
    states = mixed(100_000, 1)
    exact = states.double().T @ states.double() / len(states)
    torch.testing.assert_close(shrunk(states), exact, rtol=0, atol=0.005)


@pytest.mark.parametrize("count", [3, 12, 24, 48])
def test_directions_that_few_states_never_used_are_not_blown_up(count: int) -> None:
    states, held_out = mixed(count, 1), mixed(2000, 2)
    exact = states.double().T @ states.double() / count
    before, after = (
        spectral_projection(moment, 16)(held_out).square().mean().item() for moment in (exact, shrunk(states))
    )
    assert after < before and after < 4
    if count < 16:
        assert before > 1000


@pytest.mark.parametrize("count", [3, 12])
def test_a_decoder_from_few_states_serves_other_states(count: int) -> None:
    states, held_out, projection = mixed(count, 1), mixed(2000, 2), RandomProjection(WIDTH, 8, 0)

    def lost(moment: torch.Tensor) -> float:
        back = projection(held_out) @ projection.decoder(moment)
        return ((held_out - back).square().sum() / held_out.square().sum()).item()

    assert lost(shrunk(states)) < 0.8 * lost(states.T @ states / count)


def test_positions_that_repeat_each_other_count_once() -> None:
    """The papers' formulas take them for independent, and shrink sixteen times less."""
    states = mixed(32, 1)
    once, repeated = halves_of(states), (Moments(full=True), Moments(full=True))
    for half, moments in enumerate(repeated):
        moments.add(states[half::2].repeat(16, 1))
    found = [shrunk_moment(halves, torch.zeros(WIDTH), torch.ones(WIDTH)) for halves in (once, repeated)]
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


def test_shrinkage_does_not_depend_on_the_scale_of_a_dimension() -> None:
    """As with `normalize=none`, where a few dimensions are thousands of times larger."""
    states, scale = mixed(40, 1), torch.logspace(-3, 3, WIDTH)
    units = torch.outer(scale, scale).double()
    torch.testing.assert_close(shrunk(states * scale) / units, shrunk(states), rtol=1e-4, atol=1e-5)


def test_every_direction_has_a_least_variance() -> None:
    states = mixed(5000, 1)
    states[:, 0] = 0  # a dimension that is constant,
    states[:, 1] = states[:, 2]  # and a direction in which no state moves
    values = torch.linalg.eigvalsh(shrunk(states))
    assert values[0] > 0.5 * FLOOR
    assert values[1] < 3 * FLOOR


def test_one_example_alone_is_shrunk_too() -> None:
    alone = Moments(full=True)
    alone.add(mixed(6, 1))
    found = shrunk_moment((alone, Moments(full=True)), torch.zeros(WIDTH), torch.ones(WIDTH))
    assert torch.linalg.cond(found) < 1e5
