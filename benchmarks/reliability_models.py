"""Tiny teachers of every task, and text, made on the spot: what the reliability programs train from."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from tutelage.tasks.embedding import EmbeddingModel

TASKS = ("causal", "masked", "classifier", "encoder")
SPECIAL = ("[PAD]", "[UNK]", "[MASK]", "[CLS]", "[SEP]")
WORDS = tuple(first + last for first in "bdfgklmnprst" for last in ("a", "en", "ik", "o", "ul", "ys"))
CLASSES = 3


def make_teacher(task: str, folder: Path) -> Path:
    """A random teacher of 4 blocks and its tokenizer, in a folder."""
    sizes: dict[str, Any] = {"vocab_size": len(SPECIAL) + len(WORDS), "hidden_size": 32, "intermediate_size": 64}
    sizes |= {"num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.2}
    torch.manual_seed(0)
    model: Any
    if task == "causal":
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, pad_token_id=0))
    elif task == "masked":
        model = BertForMaskedLM(BertConfig(**sizes))
    elif task == "classifier":
        model = BertForSequenceClassification(BertConfig(**sizes, num_labels=CLASSES))
    else:
        model = EmbeddingModel(BertModel(BertConfig(**sizes)))
    model.save_pretrained(folder)
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate((*SPECIAL, *WORDS))}, unk_token="[UNK]"))
    backend.pre_tokenizer = WhitespaceSplit()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
    names |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=64, **names).save_pretrained(folder)
    return folder


def make_text(file: Path, count: int = 200, seed: int = 0) -> Path:
    """Random sentences with labels, as JSON lines."""
    draw = random.Random(seed)
    rows = [{"text": " ".join(draw.choices(WORDS, k=draw.randint(6, 12))), "label": n % CLASSES} for n in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file
