"""Checkpoints: checking and loading other weights of the same architecture."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from tutelage.core.errors import UserError, as_user_error
from tutelage.tasks.loading import load_config


def load_checkpoint(model: nn.Module, folder: str, what: str = "teacher") -> None:
    """Take the weights of another checkpoint of the same architecture (safetensors); `what` is the model in messages."""
    check_checkpoint(model, folder, what)
    for subfolder, part, prefix in _stored_parts(model):
        state: dict[str, torch.Tensor] = {}
        for file in sorted((Path(folder) / subfolder).glob("model*.safetensors")):
            state.update(load_file(file))
        part.load_state_dict({name.removeprefix(prefix): value for name, value in state.items()}, strict=False)


def check_checkpoint(model: nn.Module, folder: str, what: str = "teacher") -> None:
    """Raise UserError unless `folder` holds safetensors of `model`'s architecture; reads headers only."""
    _check_replaceable(model)
    different = f"checkpoint {folder!r} has a different architecture than the {what}"
    if hasattr(model, "config") and (Path(folder) / "config.json").is_file():
        config = load_config(folder, what=f"{what} checkpoint")
        for field in ("model_type", "num_attention_heads", "num_key_value_heads"):  # the shapes do not show these
            theirs, ours = getattr(config, field, None), getattr(model.config, field, None)
            if theirs != ours:
                raise UserError(f"{different}: its {field} is {theirs}, the {what}'s is {ours}")
    for subfolder, part, prefix in _stored_parts(model):
        shapes = _stored_shapes(Path(folder) / subfolder, prefix, what)
        if difference := _difference(part, shapes, what):
            raise UserError(f"{different}: {difference}")


def _check_replaceable(model: nn.Module) -> None:
    """Refuse a teacher whose weights are not held as a checkpoint stores them."""
    parts: list[Any] = [model, *model.children()]
    how = "load the teacher without it to learn from its checkpoints"
    if any(getattr(part, "is_quantized", False) for part in parts):
        raise UserError(f"the teacher is quantised, so that no checkpoint can take the place of its weights: {how}")
    placed = any(hasattr(part, "hf_device_map") for part in parts)
    if placed and any(parameter.is_meta for parameter in model.parameters()):
        found = "teacher_device_map keeps a part of the teacher outside of the devices, where no checkpoint can take its place"
        raise UserError(f"{found}: {how}")


def _stored_parts(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Folder below a checkpoint's, module stored there, and prefix of the names in the file."""
    return model.stored_parts() if hasattr(model, "stored_parts") else [("", model, "")]  # type: ignore[operator]


def _stored_shapes(folder: Path, prefix: str, what: str) -> dict[str, list[int]]:
    files = sorted(folder.glob("model*.safetensors")) if folder.is_dir() else []
    if not files:
        raise UserError(f"{what} checkpoint {str(folder)!r} is not a folder with model.safetensors in it")
    shapes: dict[str, list[int]] = {}
    for file in files:
        kind = f"{what} checkpoint {str(file)!r} is not a safetensors file"
        with as_user_error(kind, SafetensorError), safe_open(file, "pt") as handle:
            shapes |= {n.removeprefix(prefix): list(handle.get_slice(n).get_shape()) for n in handle.keys()}  # noqa: SIM118
    return shapes


def _difference(model: nn.Module, shapes: Mapping[str, list[int]], what: str) -> str | None:
    """How stored tensors differ from the model's, in words; None where they do not."""
    state = model.state_dict()
    for name, value in state.items():
        # an entry that shares its storage with a different one need not be stored
        if name not in shapes and not any(
            n != name and v.data_ptr() == state[name].data_ptr() for n, v in state.items()
        ):
            return f"it lacks {name}"
        if name in shapes and shapes[name] != list(value.shape):
            return f"{name} has shape {shapes[name]} there and {list(value.shape)} in the {what}"
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    extra = [name for name in shapes if name not in state and not any(re.search(p, name) for p in ignored)]
    return f"the {what} lacks its {extra[0]}" if extra else None
