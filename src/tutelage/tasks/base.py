"""The tasks a teacher can be distilled on, and loading whole models for them.

Public names: `Task`, `TASKS`, `detect_task`, `load_task_model`, `build_task_model`, `backbone`, `default_warm_start`,
`hidden_size`, `replica_seeds`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)

from tutelage.core.errors import UserError
from tutelage.tasks.embedding import EmbeddingModel, EmbeddingShape, load_embedding_model
from tutelage.tasks.loading import find_file, load_config, load_model


@dataclass(frozen=True)
class Task:
    """What a model puts out and how it is loaded."""

    name: str
    """Value of the `task` setting."""
    auto_class: Any
    """The transformers auto class with the task's head."""
    columns: tuple[str, ...]
    """Dataset columns needed, where the dataset is not tokenised yet."""

    @property
    def whole(self) -> bool:
        """Whether the output stage compares what the models put out as they are, with no head split off."""
        return self.name in ("embedding", "classification")

    @property
    def plain(self) -> bool:
        """Whether models and data are any module's and any tensors, without a tokenizer."""
        return self.name == "classification"

    @property
    def causal(self) -> bool:
        """Whether position t predicts token t + 1."""
        return self.name == "causal_lm"

    @property
    def per_position(self) -> bool:
        """Whether outputs belong to positions (language models), not to whole sequences."""
        return self.name in ("causal_lm", "masked_lm")


TASKS = {
    task.name: task
    for task in (
        Task("causal_lm", AutoModelForCausalLM, ("text",)),
        Task("masked_lm", AutoModelForMaskedLM, ("text",)),
        Task("sequence_classification", AutoModelForSequenceClassification, ("text", "label")),
        Task("embedding", AutoModel, ("text",)),
        Task("classification", AutoModel, ("input_ids", "labels")),
    )
}


def get_task(name: str) -> Task:
    """Look a task up by name."""
    if name not in TASKS:
        raise UserError(f"unknown task {name!r}: use one of {', '.join(TASKS)}")
    return TASKS[name]


def detect_task(model_or_config: nn.Module | PreTrainedConfig | str) -> Task:
    """The task of a model, from its class, its config's `architectures`, or sentence-transformers' `modules.json`.

    Raises:
        UserError: no known head.
    """
    if isinstance(model_or_config, str):
        if find_file(model_or_config, "modules.json") is not None:
            return TASKS["embedding"]
        return detect_task(load_config(model_or_config))
    if isinstance(model_or_config, EmbeddingModel):
        return TASKS["embedding"]
    if isinstance(model_or_config, PreTrainedConfig):
        names = model_or_config.architectures or [""]
    else:
        names = [cls.__name__ for cls in type(model_or_config).__mro__]
    for name in names:
        if name.endswith(("ForCausalLM", "LMHeadModel")):
            return TASKS["causal_lm"]
        if name.endswith("ForMaskedLM"):
            return TASKS["masked_lm"]
        if name.endswith("ForSequenceClassification"):
            return TASKS["sequence_classification"]
    if isinstance(model_or_config, PreTrainedConfig) and names[0].endswith("Model"):
        return TASKS["embedding"]
    raise UserError(f"cannot tell the task of {names[0] or 'this model'}: set task to one of {', '.join(TASKS)}")


def load_task_model(task: Task, path: str, *, what: str = "teacher", **kwargs: Any) -> nn.Module:
    """Load a whole model for `task` from a folder or the Hub."""
    if task.name == "embedding":
        return load_embedding_model(path, what=what, **kwargs)
    return load_model(path, task.auto_class, what=what, **kwargs)


def build_task_model(
    task: Task, config: PreTrainedConfig, teacher: nn.Module | EmbeddingShape | None = None
) -> nn.Module:
    """A randomly initialised model for `task`; an embedding model gets a head to the teacher's embedding width."""
    try:
        model = task.auto_class.from_config(config)
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"could not build the {config.model_type} student: {error}") from error
    if task.name != "embedding":
        return model
    if not isinstance(teacher, EmbeddingModel | EmbeddingShape):
        return EmbeddingModel(model)
    return EmbeddingModel(model, teacher.embedding_size, teacher.pooling, teacher.normalize)


def backbone(model: nn.Module) -> nn.Module:
    """The part of a model that hidden stages run in: an embedding model's encoder, else the model itself."""
    return model.encoder if isinstance(model, EmbeddingModel) else model


def default_warm_start(task: Task) -> str:
    """The `warm_start` of extraction where nothing is said.

    Classifiers put a nonlinearity before their head, whose range the targets do not keep to, so they get the paper's stages.
    """
    return "head" if task.per_position or task.name == "embedding" else "none"


def hidden_size(model: nn.Module) -> int:
    """Width of a model's hidden states."""
    config: Any = backbone(model).config
    return int(config.hidden_size)


def replica_seeds(model: nn.Module) -> list[int] | None:
    """Seeds of the networks that train side by side in a replicated model; None for an ordinary one."""
    return getattr(backbone(model).config, "replica_seeds", None)


def read_json(path: Path) -> Any:
    """Parse a JSON file, with its name in the error."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
