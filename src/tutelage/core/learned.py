"""Linear maps from the student's width to the teacher's, trained with the student and thrown away afterwards.

They are the regressors of FitNets (arXiv:1412.6550) and the learned projections of TinyBERT (arXiv:1909.10351): the student's
state, mapped, is compared with the teacher's own. The paper's projections go the other way and are fixed
(`tutelage.core.projection`). Shapes: R student width, D teacher width, G replicas."""

import torch
from torch import nn

from tutelage.core.projection import Projection


class LearnedMap(nn.Module):
    """`state @ weight + bias`, (..., R) -> (..., D); of a replicated student one map per replica, (B, G, R) -> (B, G, D).

    `initial` gives the first weights, (R, D) or (G, R, D); the bias starts at zero."""

    def __init__(self, initial: Projection):
        super().__init__()
        self.weight = nn.Parameter(initial.matrix())
        self.bias = nn.Parameter(torch.zeros((*self.weight.shape[:-2], self.weight.shape[-1])))

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        state = state.to(self.weight.dtype)
        if self.weight.dim() == 2:
            return state @ self.weight + self.bias
        return torch.bmm(state.transpose(0, 1), self.weight).transpose(0, 1) + self.bias
