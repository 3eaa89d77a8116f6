"""Loading models and tokenizers safely.

Only safetensors (and GGUF) are read, never pickles; remote code runs only if the user asks for it."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from tutelage.core.errors import UserError, as_user_error, reason_of

_SAFE = ("model*.safetensors", "*.gguf")  # the names that `from_pretrained` looks for
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
MOST_BLOCKS, MOST_WIDTH = 10_000, 2**17
_WIDTHS = ("hidden_size", "n_embd", "d_model", "dim")


def load_config(path: str, *, what: str = "teacher", trust_remote_code: bool = False) -> PreTrainedConfig:
    """A model's configuration from a folder or the Hub; UserError if there is none, or its model would be too large."""
    check_name(path, what)
    file = Path(path) / "config.json"
    if file.is_file():
        with as_user_error(f"could not read the config of {what} {path!r}"):
            check_sizes(json.loads(file.read_text(encoding="utf-8")), f"the config of {what} {path!r}")
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise UserError(f"{what} folder {path!r} has no config.json: it is not a Hugging Face model folder")
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # each kind of config has its own
        if Path(path).exists():
            raise UserError(f"could not read the config of {what} {path!r}: {reason_of(error)}") from error
        raise UserError(
            f"no {what} at {path!r}: there is no local folder of that name, and it was not found on the Hub "
            f"({reason_of(error)}); give an existing folder or a Hub name such as org/model"
        ) from error


def check_name(path: str, what: str) -> None:
    """Raise UserError for a path that no file can have."""
    if any(len(os.fsencode(part)) > 255 for part in path.split("/")):
        raise UserError(f"no {what} {path[:60] + '...'!r}: no file or folder can have a name of {len(path)} characters")


def check_sizes(fields: Any, where: str) -> None:
    """Raise UserError for fields of a configuration that ask for more blocks, or wider ones, than any model has.

    To build such a model takes all memory, before any library finds a mistake."""
    if isinstance(fields, dict):
        for name, value in fields.items():
            most = MOST_WIDTH if name in _WIDTHS else MOST_BLOCKS
            if isinstance(value, int) and value > most and ("layer" in name or name in _WIDTHS):
                raise UserError(f"{where} has {name}={value}: models of at most {most} can be built")
            check_sizes(value, where)


def check_weights(path: str, *, what: str = "teacher") -> None:
    """Raise UserError for a local folder whose weights are missing or stored only as pickles."""
    folder = Path(path)
    if not folder.is_dir() or _find(folder, _SAFE):
        return
    if pickles := _find(folder, _PICKLES):
        raise UserError(
            f"{what} {path!r} stores its weights as a pickle ({pickles[0]}), which can run code when loaded: convert it "
            "with `model.save_pretrained(folder)` (safetensors) in an environment where you trust the file"
        )
    raise UserError(f"{what} folder {path!r} holds no weights: expected model.safetensors")


def find_file(path: str, name: str) -> Path | None:
    """A file of a model, from its folder or from the Hub; None if there is no such file."""
    try:
        found = Path(path) / name if Path(path).exists() else Path(cached_file(path, name) or "")
    except (OSError, ValueError):
        return None
    return found if found.is_file() else None


def has_weights(folder: Path) -> bool:
    """Whether a local folder contains weights in any format, including pickles."""
    return bool(_find(folder, (*_SAFE, *_PICKLES)))


def stored_bytes(path: str) -> int | None:
    """Size of the weight files that a model is loaded from, those of the modules of sentence-transformers included; None
    if `path` is no local folder or its weights have a different format."""
    folder = Path(path)
    modules = folder / "modules.json"
    parts = [entry["path"] for entry in json.loads(modules.read_text("utf-8"))] if modules.is_file() else []
    root = _weight_files(folder)
    rest = [file for part in parts if part for file in _weight_files(folder / part)]
    return sum(file.stat().st_size for file in (*root, *rest)) if root else None


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files that `from_pretrained` reads: one, or the shards that an index names."""
    one, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if one.is_file() or not index.is_file():
        return [one] if one.is_file() else []
    return [folder / name for name in sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))]


def _find(folder: Path, patterns: Iterable[str]) -> list[str]:
    return [file.name for pattern in patterns for file in folder.glob(pattern) if file.name != "training_args.bin"]


def load_model(
    path: str,
    auto_class: Any,
    *,
    what: str = "teacher",
    dtype: torch.dtype | str | None = None,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a pretrained model from safetensors; UserError if that cannot work, or if a teacher lacks some weights.

    Args:
        path: folder or Hub name.
        auto_class: the `AutoModelFor...` class.
        what: `teacher` or `student`, for messages.
        dtype: parameter dtype; None keeps that of the checkpoint.
        kwargs: further arguments of `from_pretrained` (`device_map`, `quantization_config`, `gguf_file`, ...)."""
    load_config(path, what=what, trust_remote_code=trust_remote_code)
    check_weights(path, what=what)
    if "gguf_file" not in kwargs:
        kwargs["use_safetensors"] = True
    kwargs |= {"trust_remote_code": trust_remote_code, "output_loading_info": True}
    with as_user_error(
        f"could not load {what} {path!r}"
    ):  # each architecture and quantisation library has its own errors
        model, info = auto_class.from_pretrained(path, dtype=dtype or "auto", **kwargs)
    # a student may start from an encoder and a new head, and no task reads a pooler that `AutoModel` adds
    missing = [name for name in info["missing_keys"] if not name.startswith("pooler.")]
    if missing and what != "student":
        raise UserError(
            f"{what} {path!r} has no weights for {missing[0]}: it was saved without the part that {auto_class.__name__} "
            "needs; set task to the task that it was trained for"
        )
    return model


def has_class(auto_class: Any, config: PreTrainedConfig) -> bool:
    """Whether an auto class of transformers has a model of a configuration."""
    return type(config) in getattr(auto_class, "_model_mapping", ())


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase | None:
    """The tokenizer stored at `path`, padding with its end token if it has no other; None where there is none, UserError if a
    local one is damaged."""
    check_name(path, "tokenizer")
    folder = Path(path)
    if folder.is_file() or (folder.is_dir() and not [*folder.glob("tokenizer*"), *folder.glob("vocab*")]):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # each kind of tokenizer has its own
        if not folder.is_dir():
            return None
        raise UserError(f"could not read the tokenizer in {path!r}: {reason_of(error)}; save it again") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def count_parameters(model: nn.Module) -> int:
    """Number of parameters of a model; shared parameters count once."""
    return sum(parameter.numel() for parameter in model.parameters())
