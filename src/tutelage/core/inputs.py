"""Select what a model's forward takes from a batch, and which positions of a batch count.
Shapes: B batch, T positions, D width."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from tutelage.core.errors import UserError

IGNORED_LABEL = -100

# How transformers' models are told that rows hold several sequences; their forwards take these through `**kwargs`.
_PACKING = ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def model_inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of `batch` that `model.forward` takes, without labels and with the key/value cache off."""
    wrapped: Any = getattr(model, "get_base_model", None)  # an adapter's own forward has no named arguments
    parameters = inspect.signature((wrapped() if wrapped is not None else model).forward).parameters
    names = {*parameters} - {"labels"}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        names |= {*_PACKING}
    inputs = {key: value for key, value in batch.items() if key in names}
    if "use_cache" in parameters:
        inputs["use_cache"] = False
    return inputs


def output_tensor(output: Any) -> torch.Tensor:
    """The output of a model's forward as one tensor: the output itself, or its `logits`."""
    found = output if isinstance(output, torch.Tensor) else getattr(output, "logits", None)
    if not isinstance(found, torch.Tensor):
        raise UserError(
            f"a forward gave a {type(output).__name__}, which is no tensor and has no logits: write the `whole_output` of the "
            "task (docs/new_task.md)"
        )
    return found


def position_mask(batch: Mapping[str, Any], hidden: torch.Tensor) -> torch.Tensor:
    """True at non-padding positions of `hidden`, (B, T); for pooled states (B, D) all True, (B,)."""
    mask = batch.get("attention_mask")
    if mask is None or hidden.dim() == 2:
        return torch.ones(hidden.shape[:-1], dtype=torch.bool, device=hidden.device)
    return mask.bool()


def label_positions(batch: Mapping[str, Any], causal: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The positions of the output loss: mask (B, T) of positions that predict, and their labels (N,).

    A causal model predicts label t + 1 at position t. Without labels every non-padding position counts (in a causal model
    every one that has a successor), and the labels are None."""
    labels, attention = batch.get("labels"), batch.get("attention_mask")
    attention = None if attention is None else attention.bool()
    if labels is None:
        mask = torch.ones_like(batch["input_ids"], dtype=torch.bool) if attention is None else attention
        if causal:  # both the position and the one that it predicts are no padding
            mask = torch.cat([mask[:, 1:] & mask[:, :-1], torch.zeros_like(mask[:, :1])], dim=1)
        return mask, None
    if causal:
        labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED_LABEL)], dim=1)
    mask = labels != IGNORED_LABEL
    if attention is not None:  # with padding at the left, the last position of it is followed by a label
        mask = mask & attention
    return mask, at_positions(labels, mask)


def at_positions(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The rows of `values` (B, T, ...) where `mask` (B, T) is True, (N, ...); of tensors without values (of a plan, or on
    `meta`), all rows."""
    return values.flatten(0, 1) if isinstance(values, FakeTensor) or values.is_meta else values[mask]


def last_token(hidden: torch.Tensor, batch: Mapping[str, Any]) -> torch.Tensor:
    """State at the last non-padding position, (B, T, D) -> (B, D); pooled states (B, D) are returned as they are."""
    if hidden.dim() == 2:
        return hidden
    mask = position_mask(batch, hidden)
    index = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(dim=1)
    return hidden[torch.arange(len(hidden), device=hidden.device), index]


def batch_size(batch: Mapping[str, Any]) -> int:
    """Number of examples."""
    return len(next(value for value in batch.values() if isinstance(value, torch.Tensor)))


def batch_positions(batch: Mapping[str, Any]) -> int:
    """Number of positions including padding, which determines the compute."""
    ids = batch.get("input_ids")
    return int(ids.numel()) if ids is not None else batch_size(batch)


def count_tokens(batch: Mapping[str, Any]) -> torch.Tensor:
    """Number of positions that are no padding, on the device of the batch, (); no step waits for it."""
    mask = batch.get("attention_mask")
    return count_on_device(batch, batch_positions(batch)) if mask is None else mask.sum()


def count_on_device(batch: Mapping[str, Any], count: int) -> torch.Tensor:
    """A count as a tensor on the device of the batch, ()."""
    example = next(value for value in batch.values() if isinstance(value, torch.Tensor))
    return torch.full((), count, dtype=torch.long, device=example.device)


def usable_positions(config: Any) -> int | None:
    """Largest number of tokens per sequence that a model with this config accepts; None if there is no limit."""
    positions: int | None = getattr(config, "max_position_embeddings", None)
    if positions is not None and config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        positions -= config.pad_token_id + 1  # these number positions from padding_idx + 1
    return positions
