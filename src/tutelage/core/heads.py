"""The map from the last hidden state to the outputs, separate from the model."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from tutelage.core.blocks import head_module
from tutelage.core.errors import UserError, as_user_error
from tutelage.core.inputs import model_inputs, output_tensor, probe_ids


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
        if get is None or get() is None:  # a classifier's logits are the head's own
            return cls(head, outputs=outputs)
        if "_tutelage_head" not in model.__dict__:  # kept in the model, where the compiler finds it
            model.__dict__["_tutelage_head"] = _measure(model, head)
        return cls(head, *model.__dict__["_tutelage_head"], outputs)

    def plain(self) -> LinearHead | None:
        """The head as a product with its weight, for the outputs in use only; None if it is quantised, adapted or offloaded."""
        linear, outputs = self.linear, self.outputs
        if type(linear) is not nn.Linear or hasattr(linear, "_hf_hook"):
            return None
        tensors = [linear.weight] if linear.bias is None else [linear.weight, linear.bias]
        used = tensors if outputs is None else [tensor[:outputs] for tensor in tensors]
        return LinearHead.of(used, self.softcap, self.scale)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits for `hidden`, (..., D) -> (..., outputs)."""
        plain = self.plain()
        if plain is not None:
            return plain(hidden)
        return _finished(self.linear(hidden)[..., : self.outputs], self.softcap, self.scale)


@dataclass(frozen=True)
class LinearHead:
    """An output head as tensors, which `torch.compile` and a loss that makes its own gradients can handle."""

    weight: torch.Tensor  # (V, D)
    bias: torch.Tensor | None  # (V,)
    softcap: float | None = None  # as in `OutputHead`
    scale: float = 1.0

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor], softcap: float | None, scale: float) -> LinearHead:
        """The inverse of `tensors`."""
        return cls(tensors[0], tensors[1] if len(tensors) > 1 else None, softcap, scale)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Weight, and bias if there is one."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def to(self, dtype: torch.dtype) -> LinearHead:
        """The same head in another dtype."""
        return self.of([tensor.to(dtype) for tensor in self.tensors], self.softcap, self.scale)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits for `hidden`, (..., D) -> (..., V)."""
        return _finished(F.linear(hidden, self.weight, self.bias), self.softcap, self.scale)

    def gradients(
        self, hidden_ND: torch.Tensor, logits_NV: torch.Tensor, logit_grad_NV: torch.Tensor, wanted: Sequence[bool]
    ) -> list[torch.Tensor | None]:
        """Gradients of hidden states, weight and bias, those that are `wanted`; `logit_grad_NV` is overwritten."""
        if self.softcap is not None:  # the derivative of softcap * tanh(x / softcap)
            logit_grad_NV.mul_(1 - (logits_NV.float() / self.softcap).square())
        if self.scale != 1.0:
            logit_grad_NV.mul_(self.scale)
        grad_NV = logit_grad_NV.to(hidden_ND.dtype)
        products = (lambda: grad_NV @ self.weight, lambda: grad_NV.T @ hidden_ND, lambda: grad_NV.sum(0))
        return [product() if want else None for product, want in zip(products, wanted, strict=False)]


def _finished(logits: torch.Tensor, softcap: float | None, scale: float) -> torch.Tensor:
    """What follows the product with the head's weight."""
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


# Fields of configurations that may say so. Their meaning differs: Granite divides by `logits_scaling`, HyperCLOVA X multiplies
# by it, and MiniCPM3 has applied it before the head. So the model itself is asked.
_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap", "softcap")


def _measure(model: nn.Module, head: nn.Linear) -> tuple[float | None, float]:
    """Softcap and scale of a model's logits, from one forward of 16 tokens: those that turn the head's output into them.

    Raises UserError where no setting of the configuration explains the logits. A model without values is believed."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    given = [float(getattr(config, name, None) or 1.0) for name in _SCALES]
    caps = [float(cap) for name in _CAPS if (cap := getattr(config, name, None))]
    believed = (caps[0] if caps else None, given[0] / given[1])
    if not hasattr(config, "model_type") or head.weight.is_meta or isinstance(head.weight, FakeTensor):
        return believed
    raw: list[torch.Tensor] = []

    def amplify(_module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        factor = 2 * max(caps) / output.float().abs().max().clamp_min(1e-6) if caps else 1.0  # so that a cap shows
        raw.append((output * factor).float())
        return output * factor

    device, ids = head.weight.device, probe_ids(model, head.out_features)
    undo = head.register_forward_hook(amplify)
    try:  # a model that trains may draw, e.g. for dropout: the run draws what it would have drawn
        cuda, failed = (
            [device] if device.type == "cuda" else [],
            f"{type(model).__name__} cannot run {ids.shape[1]} tokens",
        )
        with torch.no_grad(), torch.random.fork_rng(cuda), as_user_error(failed):
            logits = output_tensor(model(**model_inputs(model, {"input_ids": ids}))).float()
    finally:
        undo.remove()
    # an output that is ruled out says nothing; a run with weights that are not finite stops at its first loss
    finite = logits.isfinite() & raw[-1].isfinite()
    if not finite.any():
        return believed
    raw_N, logits_N = raw[-1][finite], logits[finite]
    scales = dict.fromkeys([believed[1], 1.0, *given, *(1 / scale for scale in given)])
    for scale, cap in itertools.product(scales, dict.fromkeys([believed[0], *caps, None])):
        if (_finished(raw_N, cap, scale) - logits_N).abs().max() <= 0.02 * logits_N.abs().max():
            return cap, scale
    raise UserError(
        f"{type(model).__name__} changes the output of its head in a way that no setting of its configuration explains, so its "
        "logits cannot be rebuilt from its last state: use a different model, and please report its architecture"
    )
