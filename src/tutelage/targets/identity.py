"""Hashes that say whether two models, tokenizers or datasets are the same.

Public names: `model_hash`, `tokenizer_hash`, `data_fingerprint`.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from tutelage.targets.rows import INPUT_COLUMNS, content_hash


def model_hash(model: nn.Module) -> str:
    """SHA-256 over a model's config and weights, in the dtype they are held in; offloaded weights count by shape only."""
    digest = hashlib.sha256()
    for part in _configs(model):
        digest.update(json.dumps(part, sort_keys=True, default=str).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        if isinstance(value, torch.Tensor) and value.device.type != "meta":
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _configs(model: nn.Module) -> list[dict[str, Any]]:
    """What of the configs decides what the model computes."""
    found = []
    for module in (model, *model.children()):
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "to_dict"):
            fields = config.to_dict()
            # where it was loaded from, by which version and how attention is computed change nothing
            for name in ("_name_or_path", "transformers_version", "_attn_implementation_autoset", "use_cache"):
                fields.pop(name, None)
            found.append(fields)
    return found[:1]


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over a tokenizer's vocabulary."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def data_fingerprint(dataset: Any) -> str:
    """SHA-256 over the token ids, labels, masks and types of every row, in order."""
    digest = hashlib.sha256()
    columns = [name for name in INPUT_COLUMNS if name in dataset.column_names]
    for row in dataset.select_columns(columns):
        for name in columns:
            digest.update(content_hash(row[name]).to_bytes(8, "little"))
    return digest.hexdigest()
