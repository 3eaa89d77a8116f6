"""Fixed linear maps from the teacher's width to the student's.

The paper's projection (arXiv:2503.17494) is `gaussian`: i.i.d. N(0, 1/d_T), drawn from a seed, never trained and never
stored. `pca` and `logits` are contrasts of ours that are computed from calibration statistics and stored.
Shapes: D teacher width, R projected width; a projection is applied as `hidden @ matrix`, (..., D) -> (..., R)."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tutelage.core.errors import UserError

RANDOM_KINDS = ("gaussian", "orthogonal", "rademacher")
KINDS = (*RANDOM_KINDS, "pca", "logits")


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
            moment = second_moment_DD.double().cpu()
            # A ridge of 1e-9 of the mean variance: directions that the calibration text never used stay invertible.
            moment = moment + 1e-9 * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
        # min_D |C^{1/2} (1 - P D)|, by least squares on the root; this also works if P widens (rank below R)
        root = _square_root(moment)
        decode = torch.linalg.lstsq(root @ encode, root, driver="gelsd").solution
        code = encode.T @ moment @ encode
        size = code.diagonal().mean()
        noise = 1e-4
        while max_gain is not None and decode.square().sum() * size > max_gain * moment.diagonal().sum():
            decode = torch.linalg.solve(code + noise * size * torch.eye(len(code), dtype=code.dtype), encode.T @ moment)
            noise *= 4
        return decode.float()


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
    width, kind = len(second_moment_DD), "pca" if logit_gram_DD is None else "logits"
    check_widening(kind, width, out_features)
    identity = torch.eye(width, dtype=torch.float64)
    root = identity if logit_gram_DD is None else _square_root(logit_gram_DD.double().cpu())
    values, vectors = torch.linalg.eigh(root @ second_moment_DD.double().cpu() @ root)
    top = torch.arange(width - 1, width - 1 - out_features, -1)
    scale = values[top].clamp_min(1e-12 * float(values[-1])).rsqrt()
    return DataProjection(root @ vectors[:, top] * scale, kind)


def check_widening(kind: str, in_features: int, out_features: int) -> None:
    """Raise UserError for a kind of projection that cannot map to a larger width."""
    if out_features > in_features and kind not in ("gaussian", "rademacher"):
        raise UserError(
            f"projection={kind!r} cannot widen {in_features} to {out_features}: use projection='gaussian' or a narrower student"
        )


def _square_root(gram: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(gram)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T
