"""Tiny tokenizers, teachers and texts on disk, made once for the whole test session; nothing is fetched."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the first import of a Hugging Face library

import gc
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import matplotlib.pyplot as plt
import pytest
import torch
import transformers
from datasets import Dataset
from matplotlib.figure import Figure
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from tutelage.runs import plots
from tutelage.tasks.embedding import EmbeddingModel

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<eos>")
WORDS = tuple(first + last for first in "bdfgklmnprst" for last in ("a", "en", "ik", "o", "ul", "ys", "ar", "om"))
VOCAB = len(SPECIAL) + len(WORDS)
POSITIONS = 64
CLASSES = 3


def make_tokenizer(encoder: bool = False, words: tuple[str, ...] = WORDS) -> PreTrainedTokenizerFast:
    """One id a word; an encoder's tokenizer puts [CLS] and [SEP] around a sequence, the other knows `<eos>`."""
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate((*SPECIAL, *words))}, unk_token="[UNK]"))
    backend.pre_tokenizer = WhitespaceSplit()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
    if encoder:
        backend.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        names |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    else:
        names["eos_token"] = "<eos>"
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=POSITIONS, **names)


def sentences(count: int, words: int = 9, seed: int = 0) -> list[str]:
    """Random sentences of the tiny vocabulary."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(words - 3, words + 3))) for _ in range(count)]


_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.2,
}


def llama_config(**fields: Any) -> LlamaConfig:
    """A 4-block, 32-wide Llama with grouped queries."""
    settings = {**_SIZES, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 5}
    return LlamaConfig(**{**settings, **fields})


def bert_config(**fields: Any) -> BertConfig:
    """A 4-block, 32-wide BERT."""
    return BertConfig(**{**_SIZES, **fields})


def save_llama(folder: Path, seed: int = 0, **fields: Any) -> Path:
    """A folder with a random Llama and its tokenizer."""
    torch.manual_seed(seed)
    LlamaForCausalLM(llama_config(**fields)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what `datasets` prepares out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module", autouse=True)
def short_collections() -> Iterator[None]:
    """Each run collects garbage; leave the imported modules out of it."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module", autouse=True)
def restore_global_settings() -> Iterator[None]:
    """The command line silences libraries for its own process; other tests run in it too."""
    verbosity = transformers.utils.logging.get_verbosity()
    yield
    transformers.utils.logging.set_verbosity(verbosity)
    transformers.utils.logging.enable_progress_bar()
    datasets.enable_progress_bars()


@pytest.fixture(autouse=True)
def blank_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A figure takes half a second to draw: it is left blank, unless the test is marked `figures`."""
    if request.node.get_closest_marker("figures") is None:
        monkeypatch.setattr(plots, "save_figure", _save_blank)


def _save_blank(figure: Figure, path: Path, dpi: int = 130) -> None:
    plt.close(figure)
    path.write_bytes(b"")


@pytest.fixture(scope="session")
def causal_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("teachers") / "llama")


@pytest.fixture(scope="session")
def mlm_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teachers") / "bert-mlm"
    torch.manual_seed(0)
    BertForMaskedLM(bert_config()).save_pretrained(folder)
    make_tokenizer(encoder=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def classifier_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teachers") / "bert-classifier"
    torch.manual_seed(0)
    BertForSequenceClassification(bert_config(num_labels=CLASSES)).save_pretrained(folder)
    make_tokenizer(encoder=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def embedding_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teachers") / "bert-sentences"
    torch.manual_seed(0)
    EmbeddingModel(BertModel(bert_config())).save_pretrained(folder)
    make_tokenizer(encoder=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the same 120 sentences, and labels, as text.txt, text.jsonl, text.parquet and folder/."""
    root = tmp_path_factory.mktemp("corpus")
    texts = sentences(120)
    rows = Dataset.from_dict({"text": texts, "label": [index % CLASSES for index in range(len(texts))]})
    (root / "text.txt").write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    rows.to_json(root / "text.jsonl")
    rows.to_parquet(root / "text.parquet")
    rows.save_to_disk(root / "folder")
    return root
