"""Teacher states that are kept on disk by the batch they belong to: runs over the same batches run the teacher once."""

import hashlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tutelage.io.files import replacing, writing_errors

OUTPUT = "output"  # name of what enters the output loss
_STATE = "state"
_SPARE = 4 * 2**30  # bytes of the disk that are left free: keeping states saves time, no more


@dataclass(frozen=True)
class StateMemory:
    """States of one teacher, below `folder`; several processes may share it.

    What is read back is what was computed, to the last bit."""

    folder: Path
    names: tuple[str, ...] | None = None  # the states that are kept; None keeps all

    def keeps(self, name: str) -> bool:
        """Whether the states called `name` are kept."""
        return self.names is None or name in self.names

    def recall(self, name: str, batch: Mapping[str, Any], compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The states called `name` of a batch: read, or computed and kept."""
        file = self.folder / name / f"{_digest(batch)}.safetensors"
        device = next(value.device for value in batch.values() if isinstance(value, torch.Tensor))
        try:
            return load_file(file)[_STATE].to(device)
        except (OSError, SafetensorError, KeyError):  # not there, or not whole
            state = compute()
        if shutil.disk_usage(self._made).free > _SPARE:
            with replacing(file, durable=False) as temporary:
                save_file({_STATE: state.detach().cpu().contiguous().clone()}, temporary)
        return state

    @cached_property
    def _made(self) -> Path:
        with writing_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder


def _digest(batch: Mapping[str, Any]) -> str:
    """Of every tensor of a batch but the labels, which no teacher reads."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(batch):
        value = batch[name]
        if isinstance(value, torch.Tensor) and name != "labels":
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
