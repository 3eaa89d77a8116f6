"""What an extraction depends on, and hashes that tell models, tokenizers and datasets apart."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from tutelage.core.curriculum import Curriculum
from tutelage.core.errors import LARGEST, UserError, check_positive, check_range
from tutelage.core.records import Record
from tutelage.targets.rows import INPUT_COLUMNS, RowFormat, content_hash


@dataclass(frozen=True)
class TeacherIdentity(Record):
    name: str
    hash: str  # `model_hash`
    dtype: str  # dtype that its weights were held in
    blocks: int  # L_T
    shape: dict[str, Any] | None  # `Task.teacher_shape`
    outputs: int  # outputs of its head; 0 where none are shared

    def __post_init__(self) -> None:
        check_range("blocks", self.blocks, 1, LARGEST)
        check_range("outputs", self.outputs, 0, LARGEST)


@dataclass(frozen=True)
class DataIdentity(Record):
    name: str
    rows: int
    fingerprint: str  # `data_fingerprint`
    streamed: bool  # whether the rows are the first ones of a stream

    def __post_init__(self) -> None:
        check_range("rows", self.rows, 1, 2**53)


@dataclass(frozen=True)
class HeadSettings(Record):
    """What a stored output head does after its linear map; see `tutelage.core.heads.OutputHead`."""

    softcap: float | None = None
    scale: float = 1.0
    outputs: int | None = None

    def __post_init__(self) -> None:
        check_positive("softcap", self.softcap)
        check_positive("scale", self.scale)
        check_range("outputs", self.outputs, 1)


@dataclass(frozen=True)
class ExtractionIdentity(Record):
    """Everything that the rows of an extracted curriculum depend on."""

    task: str
    teacher: TeacherIdentity
    tokenizer: str  # `tokenizer_hash`
    data: DataIdentity
    evaluation: str  # `data_fingerprint` of the evaluation rows
    curriculum: Curriculum
    width: int  # R of the stored projections
    forms: dict[str, RowFormat]  # how the rows of each split are stored
    student: str  # the student that it was extracted for, as it was named
    causal: bool
    with_mask: bool  # whether batches had an attention mask where no row was padded
    mlm_probability: float | None
    longest: int  # tokens of the longest row
    kept: int  # outputs stored at each position
    seed: int  # of the data order
    sequential: bool
    batch_size: int
    step_examples: int  # examples of an optimiser step
    calibration_samples: int
    all_stages: bool
    shard_tokens: int
    centered: bool  # whether the targets at `final` are centred, so that a transplanted head needs a bias
    head: HeadSettings | None  # None where no head is transplanted

    def __post_init__(self) -> None:
        for name in ("width", "longest", "batch_size", "calibration_samples", "shard_tokens"):
            check_range(name, getattr(self, name), 1, LARGEST)
        check_range("step_examples", self.step_examples, 1, 2**53)
        check_range("kept", self.kept, 0, LARGEST)
        check_range("seed", self.seed, 0, 2**32 - 1)
        check_positive("mlm_probability", self.mlm_probability)
        check_range("mlm_probability", self.mlm_probability, 0, 1)
        if missing := [name for name in self.splits if name not in self.forms and name != "evaluation"]:
            raise UserError(f"forms does not say how the rows of {missing[0]} are stored")

    @property
    def splits(self) -> list[str]:
        """Names of the splits: one for each stage, the rows of a head transplant, and those for evaluation."""
        stages = [f"stage_{index + 1}" for index in range(len(self.curriculum.stages))]
        return [*stages, *(["calibration"] * (self.curriculum.transplant_stage is not None)), "evaluation"]

    def unnamed(self) -> dict[str, Any]:
        """As JSON values without the names of folders and files, which change nothing."""
        teacher, data = dataclasses.replace(self.teacher, name=""), dataclasses.replace(self.data, name="")
        return dataclasses.replace(self, teacher=teacher, data=data, student="").to_dict()

    @property
    def digest(self) -> str:
        """A short hash of everything."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]


def model_hash(model: nn.Module, values_per_tensor: int | None = None) -> str:
    """SHA-256 over a model's config and weights, in the dtype they are held in; offloaded weights count by shape only.

    `values_per_tensor` reads only so many values of each tensor, which is fast and distinguishes models that were trained
    differently; None reads all."""
    digest = hashlib.sha256(json.dumps(_config(model), sort_keys=True, default=str).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        if isinstance(value, torch.Tensor) and value.device.type != "meta":
            part = value.detach().flatten()[:values_per_tensor].cpu().contiguous()
            digest.update(part.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _config(model: nn.Module) -> dict[str, Any]:
    """What of a model's config decides what it computes: not where it was loaded from, and by which version."""
    ignored = ("_name_or_path", "transformers_version", "_attn_implementation_autoset", "use_cache")
    configs: list[Any] = [getattr(module, "config", None) for module in (model, *model.children())]
    fields: dict[str, Any] = next((config.to_dict() for config in configs if hasattr(config, "to_dict")), {})
    return {name: value for name, value in fields.items() if name not in ignored}


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over a tokenizer's vocabulary."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def data_fingerprint(dataset: Any) -> str:
    """SHA-256 over the token ids, labels, masks and types of every row, in order."""
    if not isinstance(dataset, Dataset):
        found = f"the data is a {type(dataset).__name__}, which cannot be compared with that of an extracted curriculum"
        raise UserError(f"{found}: leave the dataset out, or give it as a datasets.Dataset")
    digest = hashlib.sha256()
    columns = [name for name in INPUT_COLUMNS if name in dataset.column_names]
    for row in dataset.select_columns(columns):
        for name in columns:
            digest.update(content_hash(row[name]).to_bytes(8, "little"))
    return digest.hexdigest()
