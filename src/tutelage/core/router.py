"""The load-balancing loss of a mixture of experts' routers, as the model's own forward computes it.

Source: Fedus, Zoph and Shazeer, Switch Transformers, arXiv:2101.03961, equations (4) to (6).
Shapes: B batch, T positions, D width."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tutelage.core.errors import UserError, as_user_error
from tutelage.core.inputs import model_inputs, text_config
from tutelage.core.probe import evaluating, has_no_values, probe_ids

_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")


def router_coefficient(model: nn.Module, causal: bool) -> float:
    """Weight of the load-balancing loss in a language model's own loss; 0 where its configuration has `output_router_logits`
    false, or does not know it.

    Raises UserError where the model's own loss, in a forward of at most 16 tokens, is not the label loss and this. A model
    without values is believed."""
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    config: Any = getattr(inner, "config", None)
    text: Any = text_config(config)
    if not any(getattr(part, "output_router_logits", False) for part in (config, text)):
        return 0.0
    named = [getattr(part, name, None) for part in (inner, text) for name in _COEFFICIENTS]
    coefficient = float(next((value for value in named if value is not None), 0.0))
    if has_no_values(model):
        return coefficient
    ids, kind = probe_ids(model), type(inner).__name__
    with as_user_error(f"{kind} cannot run {ids.shape[1]} tokens"), evaluating(model):
        output = model(**model_inputs(model, {"input_ids": ids}), labels=ids)
    logits, labels = (output.logits[:, :-1], ids[:, 1:]) if causal else (output.logits, ids)
    label_loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
    balance = getattr(output, "aux_loss", None)
    if isinstance(balance, torch.Tensor):
        error = (output.loss - label_loss - coefficient * balance).abs()
        # weights that are not finite: such a run stops at its first loss
        if not label_loss.isfinite() or error <= 0.01 * coefficient * balance.abs() + 1e-5 * label_loss:
            return coefficient
    raise UserError(
        f"the configuration of {kind} has output_router_logits=True, but its loss is not the label loss and a load-balancing "
        "loss that can be added here: set output_router_logits to False to train without it"
    )


@torch.compiler.disable  # a hook inside, and experts that depend on the data
def state_and_balance(
    model: nn.Module, head: nn.Module, inputs: Mapping[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """What enters the output head of a mixture of experts, (B, T, D), and its load-balancing loss.

    The model's own forward runs whole, but its head at one position only."""
    states: list[torch.Tensor] = []

    def shorten(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        states.append(args[0])
        return (args[0][..., :1, :],)

    undo = head.register_forward_pre_hook(shorten)
    try:
        output = model(**inputs)
    finally:
        undo.remove()
    if not isinstance(output.aux_loss, torch.Tensor):
        raise UserError(
            f"{type(model).__name__} gives no load-balancing loss in training, though it has output_router_logits=True: set "
            "output_router_logits to False, or gradient_checkpointing to False"
        )
    return states[0], output.aux_loss
