"""Language models, causal and masked, and their data collators."""

import hashlib
import math
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    DataCollatorForLanguageModeling,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from tutelage.core.errors import UserError
from tutelage.core.inputs import IGNORED_LABEL, PACKED, at_positions, label_positions, text_config
from tutelage.core.router import router_coefficient
from tutelage.tasks.base import Batch, Clues, HeadTask, Selected
from tutelage.tasks.loading import has_class


class _LanguageModel(HeadTask):
    per_position = True
    warm_start = "head"

    def select(self, hidden: torch.Tensor, batch: Batch) -> Selected:
        mask, labels = label_positions(batch, self.causal)
        rows = torch.arange(len(mask), device=mask.device)[:, None].expand(mask.shape)
        return Selected(at_positions(hidden, mask), labels, at_positions(rows, mask))

    def router_coefficient(self, model: nn.Module) -> float:
        return router_coefficient(model, self.causal)

    def count_outputs(self, batch: Batch) -> torch.Tensor:
        return label_positions(batch, self.causal)[0].sum()

    def example(self, length: int) -> Batch:
        return {**super().example(length), "labels": torch.zeros((1, length), dtype=torch.long)}

    def summarize(self, parts: list[torch.Tensor], with_teacher: bool) -> dict[str, float]:
        metrics = super().summarize(parts, with_teacher)
        return {**metrics, "perplexity": perplexity(metrics["loss"])}


def perplexity(loss: float) -> float:
    """exp(loss), limited so that it does not overflow."""
    return math.exp(min(loss, 700.0))


def _is_composite(names: Sequence[str], config: Any) -> bool:
    """Whether a model is a causal language model with an encoder of images or sound beside it; T5 and BART are not."""
    text = text_config(config)
    generates = any(name.endswith("ForConditionalGeneration") for name in names)
    return generates and text is not config and not (config.is_encoder_decoder or text.is_encoder_decoder)


@final
class CausalLM(_LanguageModel):
    """Position t predicts token t + 1."""

    name = "causal_lm"
    auto_class = AutoModelForCausalLM
    suffixes = ("ForCausalLM", "LMHeadModel")
    causal = True
    pipeline_tag = "text-generation"

    def recognizes(self, clues: Clues) -> bool:
        return super().recognizes(clues) or _is_composite(clues.names, clues.config)

    def class_for(self, config: PreTrainedConfig) -> Any:
        composite = _is_composite(config.architectures or (), config) or not has_class(self.auto_class, config)
        return (
            AutoModelForImageTextToText
            if composite and has_class(AutoModelForImageTextToText, config)
            else self.auto_class
        )

    def collator(self, tokenizer: PreTrainedTokenizerBase, mlm_probability: float = 0.3) -> Any:
        return CausalCollator(tokenizer.pad_token_id)

    def outputs_per_token(self, length: int, mlm_probability: float) -> float:
        return 1.0


@final
class MaskedLM(_LanguageModel):
    """Masked positions predict the original token."""

    name = "masked_lm"
    auto_class = AutoModelForMaskedLM
    suffixes = ("ForMaskedLM",)
    pipeline_tag = "fill-mask"

    def collator(self, tokenizer: PreTrainedTokenizerBase, mlm_probability: float = 0.3) -> Any:
        return StableMaskingCollator(tokenizer, mlm_probability=mlm_probability)

    def outputs_per_token(self, length: int, mlm_probability: float) -> float:
        return mlm_probability


class CausalCollator:
    """Stacks packed blocks; pads shorter rows at their end, where the labels are ignored.
    `always_mask` returns an attention mask even if no row is padded."""

    def __init__(self, pad_token_id: int | None = None, always_mask: bool = False):
        self.pad_token_id, self.always_mask = pad_token_id or 0, always_mask

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if left_out := [column for column in PACKED if column in rows[0]]:
            raise UserError(
                f"the rows have {', '.join(left_out)}, which this collator does not pass on: drop the column, or pass a "
                "data_collator such as transformers' DataCollatorWithFlattening"
            )
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        longest = int(lengths.max())

        def stack(column: str, fill: int) -> torch.Tensor:
            return pad_sequence([torch.as_tensor(row[column]) for row in rows], batch_first=True, padding_value=fill)

        batch = {"input_ids": stack("input_ids", self.pad_token_id)}
        batch["labels"] = stack("labels" if "labels" in rows[0] else "input_ids", IGNORED_LABEL)
        if "attention_mask" in rows[0]:  # rows that were padded before
            batch["attention_mask"] = stack("attention_mask", 0)
            batch["labels"][batch["attention_mask"] == 0] = IGNORED_LABEL
        elif self.always_mask or bool((lengths != longest).any()):
            batch["attention_mask"] = (torch.arange(longest) < lengths.unsqueeze(1)).long()
        return batch


class StableMaskingCollator(DataCollatorForLanguageModeling):
    """Random masking (80/10/10) seeded by the content of the batch: the same for every method and after a resume."""

    def torch_call(self, examples: list[Any]) -> dict[str, Any]:
        # rows of numbers, arrays and tensors of the same content have the same masks
        rows = [torch.as_tensor(example["input_ids"]).tolist() for example in examples]
        content = hashlib.sha256(str(rows).encode()).digest()
        self.generator = torch.Generator().manual_seed(int.from_bytes(content[:7], "little"))
        return super().torch_call(examples)
