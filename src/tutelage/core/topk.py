"""A distribution over outputs, given by its k largest entries and the total probability of all others.

The divergence merges all other entries into one bucket. By the data-processing inequality it is a lower bound of the full
KL(p || q), too small by p_rest KL(p(. | rest) || q(. | rest)): the student does not learn how to divide its probability
among the entries in the bucket. With k = V it is the full KL. Shapes: N positions, V outputs, K = k."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TopK:
    """The largest entries of N distributions."""

    ids: torch.Tensor  # outputs (N, K), int64, largest first
    log_probs: torch.Tensor  # their log-probabilities (N, K) in nats, float32
    log_rest: torch.Tensor  # log of the total probability of all other outputs (N,); -inf if there are none

    def __getitem__(self, rows: slice) -> TopK:
        return TopK(self.ids[rows], self.log_probs[rows], self.log_rest[rows])

    def __len__(self) -> int:
        return len(self.ids)


def top_k(logits_NV: torch.Tensor, k: int, temperature: float = 1.0) -> TopK:
    """The k largest entries of softmax(logits / temperature); all entries if k is V or more."""
    logits = logits_NV.float() / temperature if temperature != 1 else logits_NV.float()
    log_p = torch.log_softmax(logits, dim=-1)
    log_probs, ids = log_p.topk(min(k, log_p.shape[-1]), dim=-1)
    # the sum of the entries themselves: one minus the sum of the others would be lost in rounding if it is small
    rest = log_p.exp_().scatter_(-1, ids, 0.0).sum(-1)
    return TopK(ids, log_probs, rest.log())


def top_k_divergence(
    log_q_NV: torch.Tensor, target: TopK, with_grad: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Sum over positions of KL(target || q), with all other entries as one bucket, and its gradient for the logits, (N, V).

    Overwrites `log_q_NV`. The probabilities of `target` are normalised first, because stored ones are rounded."""
    ids, rest = target.ids, target.log_rest.float().exp()
    p = target.log_probs.float().exp()
    mass = p.sum(-1) + rest
    p, rest = p / mass[:, None], rest / mass
    log_q = log_q_NV.gather(-1, ids)
    q_NV = log_q_NV.exp_()
    q = log_q.exp()
    q_NV.scatter_(-1, ids, 0.0)
    q_rest = q_NV.sum(-1)
    # an output that the teacher rules out contributes nothing, also where the student rules it out
    loss = (torch.special.xlogy(p, p) - (p * log_q).masked_fill_(p == 0, 0.0)).sum()
    # the student's probability of the bucket counts as at least the smallest float32
    tiny = torch.finfo(torch.float32).tiny
    loss = loss + (torch.special.xlogy(rest, rest) - rest * q_rest.clamp_min(tiny).log()).sum()
    if not with_grad:
        return loss, None
    q_NV.mul_((1 - rest / q_rest.clamp_min(tiny))[:, None])
    return loss, q_NV.scatter_(-1, ids, q - p)
