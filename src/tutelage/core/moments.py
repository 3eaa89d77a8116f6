"""Mean and second moment of states that arrive in batches, in memory that does not depend on their number.

`Moments` adds batches up; `shrunk_moment` corrects the second moment of few states, whose eigenvalues are spread too far.
Shapes: N positions, D width."""

from __future__ import annotations

import warnings

import torch

from tutelage.core.linalg import whole_float32
from tutelage.core.processes import Group

# What a shrunk moment adds to every direction, as a fraction of a dimension's variance: a norm layer leaves directions in which
# no state moves.
FLOOR = 1e-3
ENOUGH = 4  # positions per dimension below which a second moment gets a warning


def check_count(count: int, width: int, what: str) -> None:
    """Warn where the second moment of states of a `width`, (width, width), comes from few positions."""
    if count < ENOUGH * width:
        warnings.warn(
            f"the second moment of the teacher's {width}-dimensional states for {what} comes from {count:,} positions, but "
            f"needs {ENOUGH * width:,} ({ENOUGH} per dimension): raise calibration_samples",
            UserWarning,
            stacklevel=3,
        )


class Moments:
    """Count, mean and centred second moment of the states added so far (Chan, Golub and LeVeque's pairwise update).

    Each batch is reduced in float32 on its own device and added in float64 on the CPU: some devices have no float64."""

    def __init__(self, full: bool = False):
        self.full = full  # whether products of different dimensions are kept too
        self.count = 0
        self.mean = torch.zeros(0, dtype=torch.float64)  # (D,)
        self.scatter = torch.zeros(0, dtype=torch.float64)  # sum of centred squares (D,), or of products (D, D)

    def add(self, states_ND: torch.Tensor) -> None:
        """Count states, on any device."""
        if len(states_ND) == 0:
            return
        with whole_float32(states_ND.device):
            first = states_ND[0].float()  # a constant dimension is exactly zero after its subtraction
            centred = states_ND.float() - first
            mean = centred.mean(0)
            centred -= mean
            scatter = centred.T @ centred if self.full else centred.square().sum(0)
        self.merge(len(states_ND), first.cpu().double() + mean.cpu().double(), scatter.cpu().double())

    def __add__(self, other: Moments) -> Moments:
        total = Moments(self.full)
        for part in (self, other):
            if part.count:
                total.merge(part.count, part.mean, part.scatter)
        return total

    def merge(self, count: int, mean_D: torch.Tensor, scatter: torch.Tensor) -> None:
        """Count states of which these are known."""
        if self.count == 0:
            self.count, self.mean, self.scatter = count, mean_D.clone(), scatter.clone()
            return
        total, step = self.count + count, mean_D - self.mean
        self.scatter += scatter
        self.scatter += self._square(step) * (self.count * count / total)
        self.mean += step * (count / total)
        self.count = total

    def over(self, group: Group) -> Moments:
        """The moments of the states of all processes."""
        if group.size == 1:
            return self
        width = max(group.gather(len(self.mean)))
        total, mean, scatter = Moments(self.full), self.mean, self.scatter
        if self.count == 0:
            mean = torch.zeros(width, dtype=torch.float64)
            scatter = self._square(mean)
        total.count = sum(group.gather(self.count))
        total.mean = group.sum(self.count * mean) / max(1, total.count)
        total.scatter = group.sum(scatter + self.count * self._square(mean - total.mean))
        return total

    def about(self, center_D: torch.Tensor) -> torch.Tensor:
        """Mean square of the distance from `center_D`, (D,), or its second moment, (D, D); float64."""
        return self.scatter / self.count + self._square(self.mean - center_D)

    def _square(self, values_D: torch.Tensor) -> torch.Tensor:
        return torch.outer(values_D, values_D) if self.full else values_D.square()


def shrunk_moment(halves: tuple[Moments, Moments], center_D: torch.Tensor, scale_D: torch.Tensor) -> torch.Tensor:
    """Second moment of `(state - center) / scale`, (D, D), float64, with its correlations shrunk towards zero.

    From few states the largest eigenvalues come out too large and the smallest too small, down to zero. The correlations are
    therefore multiplied by 1 - rho, where rho is their sampling error over their sum of squares (Ledoit and Wolf, *A
    well-conditioned estimator for large-dimensional covariance matrices*, 2004; towards the diagonal as in Schäfer and
    Strimmer 2005). Both papers take the error from states that are independent; the positions of one text are not, so here it
    is the squared difference between two `halves` of the texts. Every direction then gets `FLOOR` in addition."""
    scales = torch.outer(scale_D, scale_D).double()
    found, *parts = (each.about(center_D.double()) / scales for each in (halves[0] + halves[1], *halves) if each.count)
    count = halves[0].count + halves[1].count
    deviation = found.diagonal().sqrt()
    usual = deviation[deviation > 0].median() if bool((deviation > 0).any()) else 1.0
    unit = torch.where(deviation > 1e-6 * usual, deviation, usual)  # a dimension that is constant has no correlations
    unit = torch.outer(unit, unit)
    found /= unit
    squares = found.square()
    if len(parts) == 2:
        error = ((parts[0] - parts[1]) / unit).square() * (halves[0].count * halves[1].count / count**2)
    else:  # one example: the error of independent gaussian states
        error = (squares + 1) / count
    rho = _off_diagonal(error) / _off_diagonal(squares).clamp_min(1e-30)
    diagonal = found.diagonal().clone()
    found *= 1 - rho.clamp_max(1)
    found.diagonal().copy_(diagonal + FLOOR)
    return found * unit


def _off_diagonal(matrix_DD: torch.Tensor) -> torch.Tensor:
    return matrix_DD.sum() - matrix_DD.diagonal().sum()
