"""Fixed linear maps from the teacher's width to the student's.

The paper's projection (arXiv:2503.17494) is `gaussian`: i.i.d. N(0, 1/d_T), drawn from a seed, never trained and never
stored. `pca` and `logits` are contrasts of ours that are computed from calibration statistics and stored.
Shapes: D teacher width, R projected width; a projection is applied as `hidden @ matrix`, (..., D) -> (..., R)."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from tutelage.core.errors import UserError
from tutelage.core.linalg import fastest

RANDOM_KINDS = ("gaussian", "orthogonal", "rademacher")
DATA_KINDS = ("pca", "logits")
KINDS = (*RANDOM_KINDS, *DATA_KINDS)
LEARNED = "learned"  # no fixed map: the student's state goes through one that is trained with it (`core.learned`)


class Projection(ABC):
    """A fixed linear map. It is not an `nn.Module`, so that no checkpoint contains it."""

    in_features: int
    out_features: int
    _cached: tuple[Any, torch.Tensor] | None = None

    @abstractmethod
    def matrix(self) -> torch.Tensor:
        """The map as a float32 CPU tensor, (in_features, out_features)."""

    def to(self, device: torch.device | str, dtype: torch.dtype) -> torch.Tensor:
        """The matrix on `device` in `dtype`, cached between calls."""
        wanted = (torch.device(device), dtype)
        if self._cached is None or self._cached[0] != wanted:
            self._cached = (wanted, self.matrix().to(device=device, dtype=dtype))
        return self._cached[1]

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Project `hidden`, (..., in_features) -> (..., out_features)."""
        return hidden @ self.to(hidden.device, hidden.dtype)

    def decoder(self, second_moment_DD: torch.Tensor | None = None, max_gain: float | None = None) -> torch.Tensor:
        """The linear map back, (out_features, in_features), with the least expected squared error.

        Args:
            second_moment_DD: E[h h^T] of the projected states; None uses the identity, which gives the pseudo-inverse.
            max_gain: largest mean square, after the map, of noise that is as large as the targets. The inverse of a square
                gaussian matrix can magnify noise a thousandfold; if the bound is exceeded, the map is the one with the least
                error for noisy targets. None sets no bound."""
        encode = self.matrix().double()
        moment = torch.eye(len(encode), dtype=torch.float64)
        if second_moment_DD is not None:
            moment = _regular(second_moment_DD)
        return fastest(partial(_decoder, max_gain), encode, moment).float()


def _decoder(max_gain: float | None, encode_DR: torch.Tensor, moment_DD: torch.Tensor) -> torch.Tensor:
    """min_X |C^{1/2} (1 - P X)| by the normal equations P^T C P X = P^T C, (R, D)."""
    right = encode_DR.T @ moment_DD
    values, vectors = torch.linalg.eigh(right @ encode_DR)
    right = vectors.T @ right
    # columns that depend on each other (a projection that widens) have eigenvalues of zero, and get the least norm
    used = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
    size, squares, noise = values.mean(), right.square().sum(1), 0.0

    def inverse() -> torch.Tensor:
        return torch.where(used, 1 / (values + noise * size), 0)

    while max_gain is not None and (inverse().square() * squares).sum() * size > max_gain * moment_DD.diagonal().sum():
        noise = 4 * noise or 1e-4
    return vectors * inverse() @ right


class RandomProjection(Projection):
    """A random matrix that can be drawn again from its seed.

    NumPy's frozen legacy generator (MT19937) draws it column by column in float64, and it is rounded to float32. `gaussian`
    and `rademacher` are therefore bit-identical on every machine and device, and the first r columns of a wider projection
    are the narrower projection. `orthogonal` has orthonormal columns (QR of the gaussian matrix, nested as well) and is
    identical up to the rounding of the linear algebra library.

    Args:
        in_features, out_features: the widths d_T of the teacher and r of the student; UserError below 1.
        seed: a non-negative integer, or a sequence of them.
        kind: `gaussian` (entries N(0, 1/d_T), as in the paper), `orthogonal` (UserError if r > d_T), or `rademacher` (entries
            ±1/sqrt(d_T))."""

    def __init__(self, in_features: int, out_features: int, seed: int | Sequence[int] = 0, kind: str = "gaussian"):
        if kind not in RANDOM_KINDS:
            raise UserError(f"unknown random projection {kind!r}: use one of {', '.join(RANDOM_KINDS)}")
        if in_features < 1 or out_features < 1:
            raise UserError(f"a projection needs widths of at least 1, got {in_features} -> {out_features}")
        check_widening(kind, in_features, out_features)
        self.in_features, self.out_features = in_features, out_features
        self.seed, self.kind = seed, kind

    def matrix(self) -> torch.Tensor:
        generator = np.random.RandomState(self.seed if isinstance(self.seed, int) else list(self.seed))
        shape = (self.out_features, self.in_features)
        if self.kind == "rademacher":
            # one 32-bit word per sign, in sequence, so that a prefix of columns does not depend on the number of columns
            signs = np.frombuffer(generator.bytes(4 * shape[0] * shape[1]), dtype="<u4").reshape(shape) & 1
            columns = (2.0 * signs - 1.0) / np.sqrt(self.in_features)
        else:
            columns = generator.standard_normal(shape) / np.sqrt(self.in_features)
            if self.kind == "orthogonal":
                q, r = np.linalg.qr(columns.T)
                columns = (q * np.sign(np.diagonal(r))).T
        return torch.from_numpy(np.ascontiguousarray(columns.T)).float()


class StackedProjection(Projection):
    """One projection per replica, (B, G, in_features) -> (B, G, out_features)."""

    def __init__(self, parts: Sequence[Projection]):
        self.parts = list(parts)
        self.in_features, self.out_features = parts[0].in_features, parts[0].out_features

    def matrix(self) -> torch.Tensor:
        return torch.stack([part.matrix() for part in self.parts])

    def __call__(self, hidden_BGD: torch.Tensor) -> torch.Tensor:
        matrix_GDR = self.to(hidden_BGD.device, hidden_BGD.dtype)
        return torch.bmm(hidden_BGD.transpose(0, 1), matrix_GDR).transpose(0, 1)


class DataProjection(Projection):
    """A projection given by its matrix, (in_features, out_features), computed from data."""

    def __init__(self, matrix_DR: torch.Tensor, kind: str):
        self._matrix, self.kind = matrix_DR.float().cpu(), kind
        self.in_features, self.out_features = matrix_DR.shape

    def matrix(self) -> torch.Tensor:
        return self._matrix


def spectral_projection(
    second_moment_DD: torch.Tensor, out_features: int, logit_gram_DD: torch.Tensor | None = None
) -> DataProjection:
    """Directions of the standardised states, scaled to unit mean square: the principal ones (`pca`), or with a `logit_gram_DD`
    those that the teacher's logits depend on (`logits`), the rank-R code with the least squared error in the logits.

    With C the second moment of the standardised state and M = W^T W (`logit_gram_DD`; W is the output head, centred over the
    vocabulary, in standardised coordinates), take the top eigenvectors U of M^{1/2} C M^{1/2} and encode z = U^T M^{1/2} h."""
    kind = "pca" if logit_gram_DD is None else "logits"
    check_widening(kind, len(second_moment_DD), out_features)
    # what few outputs do not see is filled with principal directions
    grams = [] if logit_gram_DD is None else [_regular(logit_gram_DD)]
    return DataProjection(fastest(partial(_directions, out_features), _regular(second_moment_DD), *grams), kind)


def _directions(count: int, moment_DD: torch.Tensor, gram_DD: torch.Tensor | None = None) -> torch.Tensor:
    """The matrix of `spectral_projection`. With C = L L^T, the eigenvectors of L^T M L take the place of those of
    M^{1/2} C M^{1/2}, which need a root of M: U = M^{1/2} L V / values^{1/2}, and M^{1/2} U / values^{1/2} = M L V / values."""
    if gram_DD is None:
        values, vectors = torch.linalg.eigh(moment_DD)
        return vectors[:, -count:].flip(1) * values[-count:].flip(0).rsqrt()
    root = torch.linalg.cholesky(moment_DD)
    values, vectors = torch.linalg.eigh(root.T @ gram_DD @ root)
    return gram_DD @ root @ vectors[:, -count:].flip(1) / values[-count:].flip(0)


def _regular(moment: torch.Tensor) -> torch.Tensor:
    """In float64 on the CPU, with a ridge of 1e-8 of the mean variance: directions that were never used stay invertible."""
    moment = moment.cpu().double()
    return moment + 1e-8 * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)


def check_widening(kind: str, in_features: int, out_features: int) -> None:
    """Raise UserError for a kind of projection that cannot map to a larger width."""
    if out_features > in_features and kind not in ("gaussian", "rademacher", LEARNED):
        raise UserError(
            f"projection={kind!r} cannot widen {in_features} to {out_features}: use projection='gaussian' or a narrower student"
        )
