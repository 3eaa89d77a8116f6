"""One forward of a few tokens, to learn how a model behaves; it leaves the model and the random state as they were."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from tutelage.core.forward import probing
from tutelage.core.inputs import text_config, usable_positions

PROBE = 16  # positions at most


def has_no_values(model: nn.Module) -> bool:
    """Whether a model is of fake or meta tensors, which give no values; weights that are offloaded are loaded when it runs."""
    parts = list(model.parameters())
    offloaded = hasattr(model, "hf_device_map")
    return not parts or any(isinstance(p, FakeTensor) or (p.is_meta and not offloaded) for p in parts)


def probe_ids(model: nn.Module) -> torch.Tensor:
    """Different ordinary token ids, (1, T) with T at most `PROBE`: none that a configuration names, which may mean padding or
    an image."""
    config = getattr(model, "config", None)
    text = text_config(config)
    entries = int(getattr(text, "vocab_size", None) or PROBE)
    named: set[Any] = set()
    for fields in (getattr(part, "__dict__", {}) for part in (config, text)):
        for name, value in fields.items():
            if name.endswith(("token_id", "token_index")):
                named |= {entry for entry in (value if isinstance(value, list) else [value]) if isinstance(entry, int)}
    unnamed = (number for number in range(1, entries) if number not in named)
    ordinary = [*islice(unnamed, 4 * PROBE)] or [0]
    length = min(PROBE, usable_positions(text) or PROBE)
    parameter = next(model.parameters())
    device = "cpu" if parameter.is_meta else parameter.device
    return torch.tensor([(ordinary * length)[:length]], device=device)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; at the end modes, hooks, buffers and the random state are as before.

    transformers leaves hooks on a model that was asked for its hidden states, and a mark that it has them; `torch.compile`
    cannot trace them."""
    before = [(module, {**module.__dict__}, [*module._forward_hooks]) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), probing(model):
            yield
    finally:
        for module, attributes, hooks in before:
            for number in [number for number in module._forward_hooks if number not in hooks]:
                del module._forward_hooks[number]
            for name in [name for name, value in module.__dict__.items() if value is True and name not in attributes]:
                del module.__dict__[name]
            module.training = attributes["training"]
