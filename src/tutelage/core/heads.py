"""The map from the last hidden state to the outputs, separate from the model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tutelage.core.blocks import head_module
from tutelage.core.errors import UserError, as_user_error
from tutelage.core.inputs import last_token, model_inputs, output_tensor, text_config
from tutelage.core.moments import Moments
from tutelage.core.probe import evaluating, has_no_values, probe_ids

_ROWS = 4096  # that are multiplied at a time


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
        if not is_language_model(model):  # a classifier's logits are the head's own
            return cls(head, outputs=outputs)
        if "_tutelage_head" not in model.__dict__:  # kept in the model, where the compiler finds it
            model.__dict__["_tutelage_head"] = _measure(model, head)
        softcap, scale = model.__dict__["_tutelage_head"]
        return cls(head, softcap, scale, outputs)

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

    def gram(self, scale_D: torch.Tensor) -> torch.Tensor:
        """W^T W for the weight W of the outputs in use, centred over them, where the state is multiplied by `scale_D` before
        it; (D, D), float64 on the CPU."""
        weights = Moments(full=True)
        for rows_ND in self.linear.weight[: self.outputs].detach().split(_ROWS):
            weights.add(rows_ND)
        scale_D = scale_D.cpu().double()
        return weights.scatter * torch.outer(scale_D, scale_D)


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


def is_language_model(model: nn.Module) -> bool:
    """Whether a model has output embeddings, whose output it may process further."""
    get = getattr(model, "get_output_embeddings", None)
    return get is not None and get() is not None


# Fields of configurations that may say so. Their meaning differs: Granite divides by `logits_scaling`, HyperCLOVA X multiplies
# by it, and MiniCPM3 has applied it before the head. So the model itself is asked.
_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap", "softcap")
_LARGE = 100.0  # size of outputs of a head with which a cap shows that no setting names


def _settings(model: nn.Module) -> tuple[list[float], list[float]]:
    """Scales and soft caps that a configuration names."""
    config: Any = text_config(getattr(model, "config", None))
    scales = [float(getattr(config, name, None) or 1.0) for name in _SCALES]
    return scales, [float(cap) for name in _CAPS if (cap := getattr(config, name, None))]


def assume_settings(model: nn.Module) -> tuple[float | None, float]:
    """Softcap and scale that the configuration of a language model names, which count until they are measured."""
    scales, caps = _settings(model)
    named = (caps[0] if caps else None, scales[0] / scales[1])
    return model.__dict__.setdefault("_tutelage_head", named)


def measure(name: str, model: nn.Module, head: nn.Linear, run: Callable[[], torch.Tensor | None]) -> None:
    """Find softcap and scale of a language model's logits: those that turn the output of its head into them.

    `name` is the model's in messages; `run` does one forward and gives the logits, None where the model has none. Raises
    UserError where no setting of the configuration explains them; those of a classifier must be the output of its head."""
    scales, caps = _settings(model)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []  # states before the head, and the factors that its output got

    def amplify(_module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        factor = 2 * max(caps, default=_LARGE) / output.float().abs().max().clamp_min(1e-6)  # so that a cap shows
        factors = torch.where(_amplified(output), factor, 1.0)
        seen.append((args[0], factors))
        return (output * factors).to(output.dtype)

    undo = head.register_forward_hook(amplify)
    try:
        logits = run()
    finally:
        undo.remove()
    assumed = assume_settings(model)
    del model.__dict__["_tutelage_head"]
    if not seen:
        raise UserError(f"{name}: does not run its output head, so its logits cannot be rebuilt; use a different model")
    state, factors = seen[0]
    candidates: Any = [(1.0, None)]
    if is_language_model(model):
        inverse = [1 / scale for scale in scales]
        candidates = itertools.product(
            dict.fromkeys([assumed[1], 1.0, *scales, *inverse]), dict.fromkeys([assumed[0], *caps, None])
        )
    for scale, cap in candidates:
        if logits is None or _explains(OutputHead(head, cap, scale), state, factors, logits):
            model.__dict__["_tutelage_head"] = (cap, scale)
            return
    raise UserError(
        f"{name}: changes the output of its head in a way that no setting of its configuration explains, so its "
        "logits cannot be rebuilt from its last state: use a different model, and please report its architecture"
    )


def _amplified(output: torch.Tensor) -> torch.Tensor:
    """True at every second output of a head, in turn: the large ones show a cap, and the others what is added after them."""
    positions, outputs = (torch.arange(size, device=output.device) for size in output.shape[-2:])
    return ((positions[:, None] + outputs) % 2 == 0).expand(output.shape)


def _explains(head: OutputHead, state: torch.Tensor, factors: torch.Tensor, logits: torch.Tensor) -> bool:
    """Whether a head gives these logits for a state, where the output of its linear map is multiplied by factors."""
    output = OutputHead(head.linear)(state).float()
    usual, made = (_finished(values, head.softcap, head.scale) for values in (output, output * factors))
    large = _amplified(output)
    if logits.dim() == 2:
        made, large = last_token(made, {}), last_token(large, {})
    if made.shape != logits.shape:
        return False
    # an output that is ruled out says nothing; a run with weights that are not finite stops at its first loss
    finite = logits.isfinite() & made.isfinite()
    sizes = made.nan_to_num(0, 0, 0).abs()
    deviation = usual.nan_to_num(0, 0, 0).std(correction=0)
    rounding = 1e-4 * deviation + 4 * torch.finfo(logits.dtype).eps * sizes
    allowed = torch.where(large, 0.02 * sizes.max(), rounding)
    return bool(((made - logits.float()).abs() <= allowed)[finite].all())


def _measure(model: nn.Module, head: nn.Linear) -> tuple[float | None, float]:
    """Softcap and scale of a model's logits, from one forward of 16 tokens; without values, as its configuration says."""
    if not hasattr(getattr(model, "config", None), "model_type") or has_no_values(model):
        return assume_settings(model)
    ids = probe_ids(model)
    with as_user_error(f"{type(model).__name__} cannot run {ids.shape[1]} tokens"), evaluating(model):
        inputs = model_inputs(model, {"input_ids": ids})
        measure(type(model).__name__, model, head, lambda: output_tensor(model(**inputs)))
    return model.__dict__["_tutelage_head"]
