"""Values that tasks, targets and training hand to each other about a model's output.

Public names: `OutputTarget`, `Selected`, `EvaluationTools`.

Shapes: B batch, T positions, E teacher width, N positions that predict, V outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from tutelage.core.heads import OutputHead
from tutelage.core.topk import TopK


@dataclass(frozen=True)
class OutputTarget:
    """What the teacher puts out for a batch, in one of three forms."""

    state: torch.Tensor | None = None
    """What enters the teacher's output head, (B, T, E) or pooled (B, E); with `head`."""
    head: OutputHead | None = None
    top_k: TopK | None = None
    """The largest outputs at the positions that predict, N of them."""
    whole: torch.Tensor | None = None
    """The output as it is: an embedding (B, E), or logits (..., V)."""


@dataclass(frozen=True)
class Selected:
    """Hidden states at the positions that predict."""

    state: torch.Tensor
    """(N, D)."""
    labels: torch.Tensor | None
    """(N,); None where the batch has no labels."""
    rows: torch.Tensor
    """Example that each position belongs to, (N,)."""


@dataclass(frozen=True)
class EvaluationTools:
    """What an evaluation needs beside models and batches."""

    outputs: int | None = None
    """Outputs shared by student and teacher, where a vocabulary is padded; None for all."""
    chunk_size: int | None = None
    """Positions whose logits are held at a time; None chooses it."""
    gather: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor
    """Collects a tensor's rows over devices."""
    on_step: Callable[[], None] = lambda: None
    """Called after each batch."""
