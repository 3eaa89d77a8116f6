"""Measuring a student, alone or against its teacher.

Public names: `evaluate_batches`, `embedding_metrics`, `perplexity`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tutelage.core.blocks import FINAL, forward_to
from tutelage.core.errors import UserError
from tutelage.core.heads import OutputHead
from tutelage.core.inputs import label_positions, last_token, model_inputs, output_tensor
from tutelage.core.losses import logits_metrics, output_metrics
from tutelage.targets.live import LiveTeacher
from tutelage.targets.rows import OUTPUT
from tutelage.tasks.base import Task

Gather = Callable[[torch.Tensor], torch.Tensor]

# Pairs grow with the square of the sentences: 1,000 of them give half a million pairs, plenty for a correlation.
_PAIRED_SENTENCES = 1000


@torch.inference_mode()
def evaluate_batches(
    student: nn.Module,
    batches: Iterable[dict[str, Any]],
    task: Task,
    teacher: LiveTeacher | None = None,
    *,
    outputs: int | None = None,
    chunk_size: int | None = None,
    gather: Gather = lambda tensor: tensor,
    on_step: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Metrics of `student` over `batches`, averaged over positions (language models) or sequences.

    Returns:
        Language models and classifiers: `loss` (nats), `perplexity` (language models), `accuracy` (top 1), and with a
        teacher `kl` (teacher || student, nats), `agreement` (top 1), and the teacher's own `teacher_loss` and
        `teacher_accuracy`. Encoders: see `embedding_metrics`.
    """
    student.eval()
    if task.name == "embedding":
        pairs = []
        for batch in batches:
            if teacher is None and OUTPUT not in batch:
                raise UserError("an embedding model is measured against its teacher: give one")
            mine = student(**model_inputs(student, batch))
            theirs = batch[OUTPUT] if teacher is None else teacher.output(batch)
            pairs.append((gather(mine.float()).cpu(), gather(theirs.float()).cpu()))
            on_step()
        return embedding_metrics(torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs]))
    if task.plain:
        return _classification_metrics(student, batches, teacher, gather, on_step)
    totals, count = torch.zeros(6, dtype=torch.float64), 0.0
    for batch in batches:
        per_example = gather(_per_example(student, batch, task, teacher, outputs, chunk_size)).double().cpu()
        totals += per_example[:, :-1].sum(0)
        count += float(per_example[:, -1].sum())
        on_step()
    if count == 0:
        raise UserError("nothing to evaluate: the evaluation set has no labelled position")
    metrics = _named(totals / count, teacher is not None)
    if task.per_position:
        metrics["perplexity"] = perplexity(metrics["loss"])
    return metrics


def _named(means: torch.Tensor, with_teacher: bool) -> dict[str, float]:
    """The columns of `output_metrics` by name."""
    names = ("loss", "accuracy", "kl", "agreement", "teacher_loss", "teacher_accuracy")
    return dict(zip(names if with_teacher else names[:2], means.tolist(), strict=False))


def _classification_metrics(
    student: nn.Module,
    batches: Iterable[dict[str, Any]],
    teacher: LiveTeacher | None,
    gather: Gather,
    on_step: Callable[[], None],
) -> dict[str, float]:
    """Means over examples; for a replicated student over all replicas, and `loss_0`, `accuracy_0`... of each."""
    parts = []
    for batch in batches:
        logits = output_tensor(student(**model_inputs(student, batch)))
        target = None if teacher is None else teacher.output(batch)
        parts.append(gather(logits_metrics(logits, batch["labels"], target)).double().cpu())
        on_step()
    means = torch.cat(parts).mean(0)  # (6,) or, replicated, (G, 6)
    if means.dim() == 1:
        return _named(means, teacher is not None)
    metrics = _named(means.mean(0), teacher is not None)
    for replica, own in enumerate(means):
        metrics |= {f"{name}_{replica}": value for name, value in _named(own, False).items()}
    return metrics


def perplexity(loss: float) -> float:
    """exp(loss), short of overflow."""
    return math.exp(min(loss, 700.0))


def _per_example(
    student: nn.Module,
    batch: dict[str, Any],
    task: Task,
    teacher: LiveTeacher | None,
    outputs: int | None,
    chunk_size: int | None,
) -> torch.Tensor:
    """Sums of the columns of `output_metrics` and the number of positions, for each example, (B, 7).

    Kept by example so that gathering over devices can drop the rows that only fill up the last batch.
    """
    state = forward_to(student, FINAL, **model_inputs(student, batch))
    teacher_state = teacher.hidden(FINAL, batch) if teacher is not None else None
    if task.per_position:
        mask, labels = label_positions(batch, task.causal)
        rows = mask.nonzero()[:, 0]
        state, teacher_state = state[mask], None if teacher_state is None else teacher_state[mask]
    else:
        labels, state = batch.get("labels"), last_token(state, batch)
        teacher_state = None if teacher_state is None else last_token(teacher_state, batch)
        rows = torch.arange(len(state), device=state.device)
    if labels is None:
        raise UserError("evaluation needs labels: the evaluation set has none")
    head = OutputHead.of(student, outputs)
    teacher_head = None if teacher is None else OutputHead.of(teacher.model, outputs)
    values = output_metrics(state, head, labels, teacher_state, teacher_head, chunk_size)
    values = torch.cat([values, torch.ones_like(values[:, :1])], dim=1)
    examples = len(batch["input_ids"])
    return torch.zeros(examples, values.shape[1], device=values.device).index_add_(0, rows, values)


def embedding_metrics(student_BE: torch.Tensor, teacher_BE: torch.Tensor) -> dict[str, float]:
    """Closeness of two sets of embeddings of the same sentences.

    Returns:
        `loss` (1 - cosine), `cosine` (mean over sentences), and over all pairs of the first 1,000 sentences the Pearson and
        Spearman correlation of pairwise cosine similarities, `similarity_pearson` and `similarity_spearman`.
    """
    cosine = F.cosine_similarity(student_BE, teacher_BE, dim=-1).mean().item()
    metrics = {"loss": 1 - cosine, "cosine": cosine}
    count = min(len(student_BE), _PAIRED_SENTENCES)
    if count >= 3:
        upper = torch.triu_indices(count, count, offset=1)
        sims = []
        for embeddings in (student_BE[:count], teacher_BE[:count]):
            unit = F.normalize(embeddings, dim=-1)
            sims.append((unit @ unit.T)[upper[0], upper[1]].double().numpy())
        metrics["similarity_pearson"] = float(np.corrcoef(sims[0], sims[1])[0, 1])
        ranks = [np.argsort(np.argsort(values)) for values in sims]
        metrics["similarity_spearman"] = float(np.corrcoef(ranks[0], ranks[1])[0, 1])
    return metrics
