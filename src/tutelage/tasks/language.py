"""Language models: causal and masked.

Public names: `CausalLM`, `MaskedLM`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, final

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedTokenizerBase

from tutelage.core.inputs import at_positions, label_positions
from tutelage.tasks.base import Batch, HeadTask, Targets
from tutelage.tasks.collators import CausalCollator, StableMaskingCollator
from tutelage.tasks.metrics import perplexity
from tutelage.tasks.outputs import EvaluationTools, Selected


class _LanguageModel(HeadTask):
    """Outputs at every position; text is packed into blocks."""

    per_position = True
    warm_start = "head"

    def select(self, hidden: torch.Tensor, batch: Batch) -> Selected:
        mask, labels = label_positions(batch, self.causal)
        rows = torch.arange(len(mask), device=mask.device)[:, None].expand(mask.shape)
        return Selected(at_positions(hidden, mask), labels, at_positions(rows, mask))

    def count_outputs(self, batch: Batch) -> torch.Tensor:
        return label_positions(batch, self.causal)[0].sum()

    def example(self, length: int) -> Batch:
        return {**super().example(length), "labels": torch.zeros((1, length), dtype=torch.long)}

    def evaluate(
        self, student: nn.Module, batches: Iterable[Batch], targets: Targets, tools: EvaluationTools
    ) -> dict[str, float]:
        """As of every `HeadTask`, and `perplexity`."""
        metrics = super().evaluate(student, batches, targets, tools)
        return {**metrics, "perplexity": perplexity(metrics["loss"])}


@final
class CausalLM(_LanguageModel):
    """Position t predicts token t + 1."""

    name = "causal_lm"
    auto_class = AutoModelForCausalLM
    suffixes = ("ForCausalLM", "LMHeadModel")
    causal = True
    pipeline_tag = "text-generation"

    def collator(self, tokenizer: PreTrainedTokenizerBase, mlm_probability: float = 0.3) -> Any:
        return CausalCollator(tokenizer.pad_token_id)

    def outputs_per_token(self, length: int, mlm_probability: float) -> float:
        return 1.0


@final
class MaskedLM(_LanguageModel):
    """Masked positions predict the token that was there."""

    name = "masked_lm"
    auto_class = AutoModelForMaskedLM
    suffixes = ("ForMaskedLM",)
    pipeline_tag = "fill-mask"

    def collator(self, tokenizer: PreTrainedTokenizerBase, mlm_probability: float = 0.3) -> Any:
        return StableMaskingCollator(tokenizer, mlm_probability=mlm_probability)

    def outputs_per_token(self, length: int, mlm_probability: float) -> float:
        return mlm_probability
