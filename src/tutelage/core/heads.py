"""The map from the last hidden state to the outputs, separate from the model."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tutelage.core.blocks import head_module
from tutelage.core.errors import UserError, as_user_error
from tutelage.core.inputs import last_token, model_inputs, output_tensor, text_config
from tutelage.core.probe import evaluating, has_no_values, probe_ids


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
        return _finished(logits, self.softcap, self.scale)


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


def believe(model: nn.Module) -> tuple[float | None, float]:
    """Softcap and scale that the configuration of a language model names, which count until they are measured."""
    scales, caps = _settings(model)
    named = (caps[0] if caps else None, scales[0] / scales[1])
    return model.__dict__.setdefault("_tutelage_head", named)


def measure(name: str, model: nn.Module, head: nn.Linear, run: Callable[[], torch.Tensor | None]) -> None:
    """Find softcap and scale of a language model's logits: those that turn the output of its head into them.

    `name` is the model's in messages; `run` does one forward and gives the logits, None where the model has none. Raises
    UserError where no setting of the configuration explains them; those of a classifier must be the output of its head."""
    scales, caps = _settings(model)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []  # states before the head, and the factor that its output got

    def amplify(_module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        factor = 2 * max(caps, default=_LARGE) / output.float().abs().max().clamp_min(1e-6)  # so that a cap shows
        seen.append((args[0], factor))
        return output * factor

    undo = head.register_forward_hook(amplify)
    try:
        logits = run()
    finally:
        undo.remove()
    believed = believe(model)
    del model.__dict__["_tutelage_head"]
    if not seen:
        raise UserError(f"{name}: does not run its output head, so its logits cannot be rebuilt; use a different model")
    state, factor = seen[0]
    candidates: Any = [(1.0, None)]
    if is_language_model(model):
        inverse = [1 / scale for scale in scales]
        candidates = itertools.product(
            dict.fromkeys([believed[1], 1.0, *scales, *inverse]), dict.fromkeys([believed[0], *caps, None])
        )
    for scale, cap in candidates:
        if logits is None or _explains(OutputHead(head, cap, scale), state, factor, logits):
            model.__dict__["_tutelage_head"] = (cap, scale)
            return
    raise UserError(
        f"{name}: changes the output of its head in a way that no setting of its configuration explains, so its "
        "logits cannot be rebuilt from its last state: use a different model, and please report its architecture"
    )


def _explains(head: OutputHead, state: torch.Tensor, factor: torch.Tensor, logits: torch.Tensor) -> bool:
    """Whether a head gives these logits for a state, where the output of its linear map is multiplied by a factor."""
    state = last_token(state, {}) if logits.dim() == 2 else state
    made = _finished(OutputHead(head.linear)(state).float() * factor, head.softcap, head.scale)
    if made.shape != logits.shape:
        return False
    # an output that is ruled out says nothing; a run with weights that are not finite stops at its first loss
    finite = logits.isfinite() & made.isfinite()
    difference, size = (made - logits.float())[finite].abs(), logits[finite].abs()
    return not finite.any() or bool(difference.max() <= 0.02 * size.max())


def _measure(model: nn.Module, head: nn.Linear) -> tuple[float | None, float]:
    """Softcap and scale of a model's logits, from one forward of 16 tokens. A model without values is believed."""
    if not hasattr(getattr(model, "config", None), "model_type") or has_no_values(model):
        return believe(model)
    ids = probe_ids(model)
    with as_user_error(f"{type(model).__name__} cannot run {ids.shape[1]} tokens"), evaluating(model):
        inputs = model_inputs(model, {"input_ids": ids})
        measure(type(model).__name__, model, head, lambda: output_tensor(model(**inputs)))
    return model.__dict__["_tutelage_head"]
