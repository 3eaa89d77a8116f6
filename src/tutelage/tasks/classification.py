"""Classifiers of token sequences, and plain networks that classify any tensors."""

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase, default_data_collator

from tutelage.core.errors import UserError
from tutelage.core.inputs import last_token, text_config
from tutelage.core.losses import OutputSettings, logits_loss, logits_metrics
from tutelage.tasks.base import Batch, EvaluationTools, HeadTask, OutputTarget, Selected, Task, name_metrics


@final
class SequenceClassification(HeadTask):
    """One class per token sequence, from the last token or a pooled state.

    Classifiers have a nonlinearity before their head, whose output range does not match the targets. Extraction therefore
    uses the paper's stages by default, without a head transplant."""

    name = "sequence_classification"
    auto_class = AutoModelForSequenceClassification
    suffixes = ("ForSequenceClassification",)
    columns = ("text", "label")
    pools_final = True

    def check_model(self, model: nn.Module) -> None:
        """Refuse models whose outputs are not the classes of a softmax."""
        config: Any = getattr(model, "config", None)
        wrong_kinds = ("regression", "multi_label_classification")
        if config is not None and (config.num_labels < 2 or config.problem_type in wrong_kinds):
            raise UserError(
                f"{type(model).__name__} has {config.num_labels} output(s) and problem_type {config.problem_type!r}: only "
                "classification into one of two or more classes can be distilled"
            )

    def output_names(self, config: Any) -> tuple[str, ...] | None:
        """Names of the classes; None for the generic LABEL_0, LABEL_1, ..."""
        names = tuple(str(name) for _, name in sorted((getattr(config, "id2label", None) or {}).items()))
        return None if all(name.startswith("LABEL_") for name in names) else names

    def example(self, length: int) -> Batch:
        return {**super().example(length), "labels": torch.zeros((1,), dtype=torch.long)}

    def output_state(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """As transformers' classifiers pool: at the last token that is not the padding token, whatever the mask says."""
        hidden = super().output_state(model, batch)
        padding = getattr(text_config(getattr(model, "config", None)), "pad_token_id", None)
        if padding is None:
            return last_token(hidden, batch)
        return last_token(hidden, {"attention_mask": batch["input_ids"].to(hidden.device) != padding})

    def select(self, hidden: Tensor, batch: Batch) -> Selected:
        state = last_token(hidden, batch)
        return Selected(state, batch.get("labels"), torch.arange(len(state), device=state.device))


@final
class PlainClassification(Task):
    """Plain networks, compared on their logits; replicated networks on the logits of every replica."""

    name = "classification"
    columns = ("input_ids", "labels")
    tokenized = False

    def collator(self, tokenizer: PreTrainedTokenizerBase, mlm_probability: float = 0.3) -> Any:
        return default_data_collator

    def output_loss(
        self, student: nn.Module, batch: Batch, target: OutputTarget | None, settings: OutputSettings
    ) -> Tensor:
        logits = self.whole_output(student, batch)
        return logits_loss(logits, None if target is None else target.whole, batch.get("labels"), settings)

    def measure(self, student: nn.Module, batch: Batch, target: OutputTarget | None, tools: EvaluationTools) -> Tensor:
        logits = self.whole_output(student, batch)
        return logits_metrics(logits, batch["labels"], None if target is None else target.whole)

    def summarize(self, parts: list[Tensor], with_teacher: bool) -> dict[str, float]:
        """Means over examples; a replicated student has means over all replicas, and `loss_0`, `accuracy_0`... of each."""
        means = torch.cat(parts).double().mean(0)  # (6,) or, replicated, (G, 6)
        if means.dim() == 1:
            return name_metrics(means, with_teacher)
        metrics = name_metrics(means.mean(0), with_teacher)
        for replica, own in enumerate(means):
            metrics |= {f"{name}_{replica}": value for name, value in name_metrics(own, False).items()}
        return metrics
