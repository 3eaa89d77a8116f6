"""The map from the last hidden state to the outputs, separate from the model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from tutelage.core.blocks import head_module
from tutelage.core.errors import UserError


@dataclass(frozen=True)
class OutputHead:
    """A model's output head and what its forward does after it (`logit_scale`, soft-capping).

    With the head split off, the loss can run it over chunks of positions, and hidden stages can skip it."""

    linear: nn.Linear
    softcap: float | None = None  # logits are `softcap * tanh(logits / softcap)` (Gemma 2)
    scale: float = 1.0  # of the logits (Cohere's `logit_scale`, the inverse of Granite's `logits_scaling`)
    outputs: int | None = None  # number of outputs in use, if the vocabulary is padded; None for all

    @classmethod
    def of(cls, model: nn.Module, outputs: int | None = None) -> OutputHead:
        """The head of `model`; UserError if it has no linear output head."""
        head = head_module(model)
        if not isinstance(head, nn.Linear):
            named = [name for name, module in model.named_modules() if module is head]
            kind = "none" if head is None else f"{named[0]}, a {type(head).__name__}"
            found = f"{type(model).__name__} has no linear output head (found: {kind}); the output stage needs one"
            raise UserError(f"{found}: load the model with a language-modelling or classification head")
        get = getattr(model, "get_output_embeddings", None)
        # a language model scales and caps its logits; a classifier with the same config does not
        config = None if get is not None and get() is None else getattr(model, "config", None)
        scale = getattr(config, "logit_scale", None) or 1.0
        scale /= getattr(config, "logits_scaling", None) or 1.0
        return cls(head, getattr(config, "final_logit_softcapping", None), float(scale), outputs)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits for `hidden`, (..., D) -> (..., outputs)."""
        linear, outputs = self.linear, self.outputs
        if type(linear) is nn.Linear and not hasattr(linear, "_hf_hook"):
            # the plain product, for the outputs in use only; hooks on the module (of a FLOP counter) would break the
            # gradients that the loss computes inside its forward pass
            bias = linear.bias if linear.bias is None else linear.bias[:outputs]
            logits = F.linear(hidden, linear.weight[:outputs], bias)
        else:  # quantised or offloaded
            logits = linear(hidden)[..., :outputs]
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits
