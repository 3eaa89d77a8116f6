"""The residual basis: one linear map from a teacher's residual stream to a narrower one.

Residual connections add the outputs of all blocks in the same coordinates, so one basis Q serves a whole network: with
z = Q^T h in the place of h, every matrix W that reads the stream has the counterpart W Q, every one that writes to it
Q^T W (SliceGPT, arXiv:2401.15024; GUIDE, arXiv:2510.06502). Q has orthonormal columns.
Shapes: D teacher width, R student width."""

import torch

from tutelage.core.errors import UserError
from tutelage.core.linalg import fastest
from tutelage.core.projection import RandomProjection

BASES = ("pca", "logits", "random", "identity")


def check_basis(kind: str, teacher_width: int, width: int) -> None:
    """UserError: an unknown kind, a student wider than its teacher, or an identity of different widths."""
    if kind not in BASES:
        raise UserError(f"unknown residual_basis {kind!r}: use one of {', '.join(BASES)}")
    if width > teacher_width:
        found = f"the student is {width} wide, the teacher {teacher_width}"
        raise UserError(f"{found}: student_init='teacher' needs a student that is not wider; use student_init='random'")
    if kind == "identity" and width != teacher_width:
        found = f"residual_basis='identity' needs equal widths, but the teacher is {teacher_width} wide and the student"
        raise UserError(f"{found} {width}: use 'pca'")


def residual_basis(
    kind: str, teacher_width: int, width: int, moment_DD: torch.Tensor | None, *, keeps_mean: bool, seed: int = 0
) -> torch.Tensor:
    """Q, float32, (D, R).

    Args:
        kind: one of `BASES`: the principal directions of `moment_DD` (`pca`, `logits`), a `random` orthogonal matrix, or the
            `identity` of equal widths.
        moment_DD: second moment of the states; None for `random` and `identity`.
        keeps_mean: let Q map the direction (1, ..., 1) of the teacher to that of the student, as LayerNorm needs, which
            subtracts the mean over the dimensions. A square Q then leaves LayerNorm's result as it is, up to the rotation.
        seed: of the random basis.

    Raises UserError as `check_basis`."""
    check_basis(kind, teacher_width, width)
    if kind == "identity":
        return torch.eye(width)
    count = width - 1 if keeps_mean else width
    if kind == "random":
        found_DR = RandomProjection(teacher_width, width, (seed, 0), "orthogonal").matrix().cpu().double()
        if keeps_mean:
            found_DR = torch.linalg.qr(_centred(found_DR))[0]
        found_DR = found_DR[:, :count]
    else:
        assert moment_DD is not None
        moment = moment_DD.cpu().double()
        if keeps_mean:
            moment = _centred(_centred(moment).T)
        found_DR = fastest(lambda each: torch.linalg.eigh(each)[1].flip(1)[:, :count], moment)
    if keeps_mean:
        found_DR = torch.cat(
            [found_DR, torch.full((teacher_width, 1), teacher_width**-0.5, dtype=torch.float64)], dim=1
        )
        found_DR = found_DR @ _last_to_mean(width)
    return found_DR.float()


def _centred(matrix: torch.Tensor) -> torch.Tensor:
    return matrix - matrix.mean(0, keepdim=True)


def _last_to_mean(width: int) -> torch.Tensor:
    """The reflection that swaps the last unit vector and (1, ..., 1) / sqrt(R), (R, R): it changes the others little."""
    axis = torch.full((width,), width**-0.5, dtype=torch.float64)
    axis[-1] -= 1
    size = axis.square().sum()
    identity = torch.eye(width, dtype=torch.float64)
    return identity if size == 0 else identity - 2 * torch.outer(axis, axis) / size


def kept_variance(moment_DD: torch.Tensor, basis_DR: torch.Tensor) -> float:
    """Fraction of the states' mean square that lies in the span of the basis."""
    moment, basis = moment_DD.cpu().double(), basis_DR.cpu().double()
    return float((basis.T @ moment @ basis).trace() / moment.trace())
