"""Metrics of student and teacher by name.

Public names: `name_metrics`, `embedding_metrics`, `perplexity`, `METRIC_COLUMNS`.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

# Pairs grow with the square of the sentences: 1,000 of them give half a million pairs, plenty for a correlation.
_PAIRED_SENTENCES = 1000

METRIC_COLUMNS = ("loss", "accuracy", "kl", "agreement", "teacher_loss", "teacher_accuracy")


def name_metrics(means: torch.Tensor, with_teacher: bool) -> dict[str, float]:
    """The columns of `tutelage.core.losses.output_metrics` by name; without a teacher, the first two alone."""
    return dict(zip(METRIC_COLUMNS if with_teacher else METRIC_COLUMNS[:2], means.tolist(), strict=False))


def perplexity(loss: float) -> float:
    """exp(loss), short of overflow."""
    return math.exp(min(loss, 700.0))


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
