"""Sentence encoders, distilled on their pooled embedding.

Public names: `SentenceEmbedding`.

Shapes: B batch, E embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, final

import torch
from torch import nn
from transformers import DataCollatorWithPadding, PreTrainedConfig, PreTrainedTokenizerBase

from tutelage.core.errors import UserError
from tutelage.core.heads import OutputHead
from tutelage.core.inputs import model_inputs
from tutelage.core.losses import OutputSettings, embedding_loss
from tutelage.tasks.base import Batch, Clues, Targets, Task
from tutelage.tasks.embedding import EmbeddingModel, load_embedding_model
from tutelage.tasks.metrics import embedding_metrics
from tutelage.tasks.outputs import EvaluationTools, OutputTarget


@final
class SentenceEmbedding(Task):
    """Encoder, pooling and a linear head (`EmbeddingModel`); the output is the embedding itself."""

    name = "embedding"
    suffixes = ("SentenceTransformer",)
    learns_from_labels = False
    warm_start = "head"
    metric, better = "cosine", "higher"
    pipeline_tag, library = "sentence-similarity", "sentence-transformers"

    def recognizes(self, clues: Clues) -> bool:
        if clues.model is not None:
            return isinstance(clues.model, EmbeddingModel)
        first = clues.names[0]
        return super().recognizes(clues) or (first.endswith("Model") and not first.endswith("LMHeadModel"))

    def load(self, path: str, *, what: str = "teacher", **kwargs: Any) -> nn.Module:
        return load_embedding_model(path, what=what, **kwargs)

    def build(self, config: PreTrainedConfig, shape: Mapping[str, Any] | None = None) -> nn.Module:
        """An encoder; with a teacher's shape, with its pooling and a head to its embedding width."""
        encoder: Any = super().build(config)
        return EmbeddingModel(encoder, **(shape or {}))

    def teacher_shape(self, teacher: nn.Module) -> dict[str, Any] | None:
        assert isinstance(teacher, EmbeddingModel)
        return {"embedding_size": teacher.embedding_size, "pooling": teacher.pooling, "normalize": teacher.normalize}

    def fit_to_teacher(self, student: nn.Module, shape: Mapping[str, Any] | None) -> None:
        assert isinstance(student, EmbeddingModel)
        if shape is not None:
            student.fit_head(shape["embedding_size"])

    def backbone(self, model: nn.Module) -> nn.Module:
        return model.encoder if isinstance(model, EmbeddingModel) else model

    def output_head(self, model: nn.Module, outputs: int | None = None) -> OutputHead | None:
        """The linear map on the pooled state; None where the embedding is the pooled state."""
        head = model.head if isinstance(model, EmbeddingModel) else None
        return None if head is None else OutputHead(head)

    def restore(self, model: nn.Module, folder: Path, standard: Callable[[], None]) -> None:
        model.load_state_dict(load_embedding_model(str(folder)).state_dict())

    def collator(self, tokenizer: PreTrainedTokenizerBase, mlm_probability: float = 0.3) -> Any:
        return DataCollatorWithPadding(tokenizer)

    def output_loss(
        self,
        student: nn.Module,
        batch: Batch,
        target: OutputTarget | None,
        settings: OutputSettings,
        outputs: int | None,
    ) -> torch.Tensor:
        assert target is not None and target.whole is not None
        return embedding_loss(student(**model_inputs(student, batch)), target.whole, settings.embedding_loss)

    def teacher_outputs(self, target: OutputTarget, batch: Batch) -> torch.Tensor:
        assert target.whole is not None
        return target.whole

    @torch.inference_mode()
    def evaluate(
        self, student: nn.Module, batches: Iterable[Batch], targets: Targets, tools: EvaluationTools
    ) -> dict[str, float]:
        """See `tutelage.tasks.metrics.embedding_metrics`."""
        student.eval()
        pairs = []
        for batch in batches:
            target = targets(batch)
            if target is None or target.whole is None:
                raise UserError("an embedding model is measured against its teacher: name one with --teacher")
            mine = student(**model_inputs(student, batch))
            pairs.append((tools.gather(mine.float()).cpu(), tools.gather(target.whole.float()).cpu()))
            tools.on_step()
        return embedding_metrics(torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs]))
