"""Standardisation of teacher states per dimension, and detection of attention sinks.

Pretrained language models have massive activations: a few dimensions, and a few positions (attention sinks, mostly the
first token), hundreds of times larger than the rest. Without standardisation they dominate every projection.

A position is a *sink* if the norm of its state is above `SINK_FACTOR` times the median norm over the calibration text. The
threshold is fixed at calibration, so whether a position counts does not depend on its batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tutelage.core.errors import UserError
from tutelage.core.moments import Moments

SINK_FACTOR = 4.0


@dataclass(frozen=True)
class Standardizer:
    """`(hidden - mean) / scale` per dimension, and the norm above which a position is an attention sink."""

    mean: torch.Tensor  # over calibration positions, per dimension, (D,); zeros if the states are not centred
    scale: torch.Tensor  # standard deviation per dimension (root mean square if not centred), (D,)
    sink_norm: float = float("inf")  # larger states are excluded from statistics and loss
    is_identity: bool = False  # whether this is the identity, which steps need not compute

    @classmethod
    def fit(cls, states_ND: torch.Tensor, center: bool = True, sink_factor: float = SINK_FACTOR) -> Standardizer:
        """Fit on calibration states of non-padding positions; `center=False` scales by the root mean square only.
        Raises UserError for fewer than two positions and for states that are not finite."""
        norms, moments = state_norms(states_ND), Moments()
        sink_norm = sink_threshold(norms, sink_factor)
        moments.add(states_ND[norms <= sink_norm])
        return cls.of(moments, sink_norm, center)

    @classmethod
    def of(cls, moments: Moments, sink_norm: float, center: bool = True) -> Standardizer:
        """From the moments of the states whose norm is at most `sink_norm`."""
        mean = moments.mean if center else torch.zeros_like(moments.mean)
        squares = moments.about(mean)
        scale = (squares.diagonal() if moments.full else squares).sqrt()
        # a dimension that is constant carries no information: keep its deviation of zero instead of dividing by ~0
        scale = torch.where(scale > 1e-6 * scale.max().clamp_min(1e-12), scale, torch.ones_like(scale))
        return cls(mean.float(), scale.float(), sink_norm)

    @classmethod
    def identity(cls, width: int) -> Standardizer:
        """No change and no sinks: the setting of the paper (`normalize="none"`)."""
        return cls(torch.zeros(width), torch.ones(width), is_identity=True)

    def to(self, device: torch.device | str) -> Standardizer:
        return Standardizer(self.mean.to(device), self.scale.to(device), self.sink_norm, self.is_identity)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Standardise `hidden`, (..., D), in float32."""
        return hidden.float() if self.is_identity else (hidden.float() - self.mean) / self.scale

    def keep(self, hidden: torch.Tensor) -> torch.Tensor:
        """True where a position is not an attention sink, (...)."""
        if self.sink_norm == float("inf"):
            return torch.ones(hidden.shape[:-1], dtype=torch.bool, device=hidden.device)
        return state_norms(hidden) <= self.sink_norm


def state_norms(hidden: torch.Tensor) -> torch.Tensor:
    """Norms of states, (..., D) -> (...), float32."""
    return hidden.float().norm(dim=-1)


def sink_threshold(norms_N: torch.Tensor, sink_factor: float = SINK_FACTOR) -> float:
    """The norm above which a position is a sink, from the norms of the calibration positions; errors as in `fit`."""
    if len(norms_N) < 2:
        raise UserError(f"standardising needs at least 2 calibration positions, got {len(norms_N)}")
    check_finite(norms_N)
    return sink_factor * norms_N.median().item()


def check_finite(values: torch.Tensor) -> None:
    """Raise UserError where states, or what was computed from them, are not finite."""
    if not torch.isfinite(values).all():
        raise UserError("the teacher's hidden states are not finite on the calibration text: check its dtype")
