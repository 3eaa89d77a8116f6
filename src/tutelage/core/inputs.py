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
PACKED = ("position_ids", *_PACKING)  # entries of a batch that may say so
_OPTIONS = ("output_hidden_states",)


def model_inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of `batch` that `model.forward` takes, without labels and with the key/value cache off.

    UserError where the model does not take what says that rows hold several sequences: it would read them as one."""
    parameters = _parameters(model)
    names = {*parameters} - {"labels"}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        names |= {*_PACKING}
    if left_out := [key for key in PACKED if key in batch and key not in names]:
        raise UserError(
            f"the batch has {', '.join(left_out)}, which {type(model).__name__} does not take: it would read sequences that "
            "are packed into one row as one; use a collator that does not pack, or drop the column from the dataset"
        )
    inputs = {key: value for key, value in batch.items() if key in names}
    if "use_cache" in parameters:
        inputs["use_cache"] = False
    return inputs


def accepts(model: nn.Module, name: str) -> bool:
    """Whether a model's forward has an argument of this name; those of transformers take some through `**kwargs`."""
    parameters = _parameters(model)
    others = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return name in parameters or (others and hasattr(getattr(model, "config", None), "model_type") and name in _OPTIONS)


def _parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    wrapped: Any = getattr(model, "get_base_model", None)  # an adapter's own forward has no named arguments
    return inspect.signature((wrapped() if wrapped is not None else model).forward).parameters


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
    return mask.bool().to(hidden.device)  # a teacher may span devices


def label_positions(batch: Mapping[str, Any], causal: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The positions of the output loss: mask (B, T) of positions that predict, and their labels (N,).

    A causal model predicts label t + 1 at position t, where both positions are no padding. Without labels every non-padding
    position counts (in a causal model every one that has a successor), and the labels are None."""
    labels, attention = batch.get("labels"), batch.get("attention_mask")
    like = batch["input_ids"] if labels is None else labels
    mask = torch.ones_like(like, dtype=torch.bool) if attention is None else attention.bool()
    if causal:
        mask = torch.cat([mask[:, 1:] & mask[:, :-1], torch.zeros_like(mask[:, :1])], dim=1)
    if labels is None:
        return mask, None
    if causal:
        labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED_LABEL)], dim=1)
    mask = mask & (labels != IGNORED_LABEL)
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


def first_token(hidden: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """State at the first non-padding position, (B, T, D) -> (B, D)."""
    index = attention_mask.ne(0).int().argmax(dim=1)
    return hidden[torch.arange(len(hidden), device=hidden.device), index]


def batch_size(batch: Mapping[str, Any]) -> int:
    """Number of examples."""
    return len(next(value for value in batch.values() if isinstance(value, torch.Tensor)))


def batch_sequences(batch: Mapping[str, Any]) -> int:
    """Number of examples; of packed rows, the number of sequences in them, which begin where the positions do not go on."""
    positions = batch.get("position_ids")
    if positions is None or positions.dim() != 2 or batch.get("attention_mask") is not None:
        return batch_size(batch)
    return batch_size(batch) + int((positions.diff() != 1).sum())


def batch_positions(batch: Mapping[str, Any]) -> int:
    """Number of positions including padding, which determines the compute."""
    ids = batch.get("input_ids")
    return int(ids.numel()) if ids is not None else batch_size(batch)


def text_config(config: Any) -> Any:
    """The part of a model's configuration that is about its language model; of most models, all of it."""
    try:
        return config.get_text_config() if hasattr(config, "get_text_config") else config
    except ValueError:  # it has several
        return config


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
    config = text_config(config)
    positions: int | None = getattr(config, "max_position_embeddings", None)
    if positions is None or positions < 1:  # XLNet has -1
        return None
    if config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        positions -= config.pad_token_id + 1  # these number positions from padding_idx + 1
    return positions
