"""Tiny models, data and folders for the reliability programs, made from seeds, and commands that run in this process."""

import contextlib
import io
import itertools
import json
import os
import random
import resource
import shutil
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
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

from tutelage.cli import main
from tutelage.tasks.embedding import EmbeddingModel

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<eos>")
WORDS = tuple(first + last for first in "bdfgklmnprst" for last in ("a", "en", "ik", "o", "ul", "ys"))
VOCABULARY, POSITIONS, CLASSES = len(SPECIAL) + len(WORDS), 64, 3
STUDENT = "layers=2,hidden_size=16"
_SIZES = {
    **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4},
    **{"num_attention_heads": 4, "max_position_embeddings": POSITIONS, "initializer_range": 0.2},
}


_TEXTS = {
    "short.txt": "ba den\n" * 4,  # less than one block
    "few.txt": "ba den ba\n" * 19,  # whose last part is
    "run.yaml": "method: one_shot\nmax_steps: 2\n",
    "merge.yaml": "<<: {max_steps: 2}\n",
    "twice.yaml": "max_steps: 2\nmax_steps: 3\n",
    "nested.yaml": "layer_map: " + "[" * 2000 + "]" * 2000,
    "keys.yaml": "1: 2\n",
    "list.yaml": "- one_shot\n",
    "date.yaml": "teacher_quantization: {a: 2001-01-01}\n",
}


def make_tokenizer(encoder: bool) -> PreTrainedTokenizerFast:
    """One id per word; an encoder's tokenizer puts [CLS] and [SEP] around a sequence, the other knows `<eos>`."""
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate((*SPECIAL, *WORDS))}, unk_token="[UNK]"))
    backend.pre_tokenizer = WhitespaceSplit()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
    if encoder:
        single = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
        backend.post_processor = single
        names |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    else:
        names["eos_token"] = "<eos>"
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=POSITIONS, **names)


def sentences(count: int, seed: int = 0) -> list[str]:
    """Random sentences of 6 to 12 words."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(6, 12))) for _ in range(count)]


@dataclass(frozen=True)
class World:
    """A folder with a teacher of each task (`causal_lm`, `masked_lm`, `sequence_classification`, `embedding`), data, and files
    that cannot be used."""

    root: Path

    def __str__(self) -> str:
        return str(self.root)

    def fresh(self) -> Path:
        """An output folder that is not there yet."""
        return next(path for n in itertools.count() if not (path := self.root / f"out-{n}").exists())


def make_world(root: Path) -> World:
    """Everything that the cases name, in `root`."""
    torch.manual_seed(0)
    llama = LlamaConfig(**_SIZES, num_key_value_heads=2, pad_token_id=0, bos_token_id=None, eos_token_id=5)
    bert = BertConfig(**_SIZES)
    models = {
        "causal_lm": LlamaForCausalLM(llama),
        "masked_lm": BertForMaskedLM(bert),
        "sequence_classification": BertForSequenceClassification(BertConfig(**_SIZES, num_labels=CLASSES)),
        "embedding": EmbeddingModel(BertModel(bert)),
    }
    for name, model in models.items():
        model.save_pretrained(root / name)
        make_tokenizer(name != "causal_lm").save_pretrained(root / name)
    texts = sentences(120)
    (root / "text.txt").write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    rows = Dataset.from_dict({"text": texts, "label": [index % CLASSES for index in range(len(texts))]})
    rows.to_json(root / "text.jsonl")
    rows.to_parquet(root / "text.parquet")
    rows.save_to_disk(root / "folder")
    pairs = [{"sentence1": a, "sentence2": b, "score": n} for n, (a, b) in enumerate(itertools.pairwise(texts[:8]))]
    Dataset.from_list(pairs).to_json(root / "pairs.jsonl")
    queries = [{"query": text.split()[0], "document": text} for text in texts[:8]]
    Dataset.from_list(queries).to_json(root / "retrieval.jsonl")
    (root / "file").touch()
    (root / "empty").mkdir()
    (root / "deep").mkdir()
    deep = llama.to_dict() | {"num_hidden_layers": 10**7}
    for name, text in {**_TEXTS, "deep/config.json": json.dumps(deep), "deep.json": json.dumps(deep)}.items():
        (root / name).write_text(text, encoding="utf-8")
    return World(root)


# ---- Commands ----


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    error: str  # what it wrote to standard error
    output: str

    @property
    def refused(self) -> bool:
        """Exit code 2 and exactly one line, which begins with the command."""
        one = self.error.endswith("\n") and len(self.error.splitlines()) == 1 and self.error.startswith("tutelage")
        return self.code == 2 and one and not self.output

    @property
    def ran(self) -> bool:
        return self.code == 0 and "Traceback" not in self.error


class OutOfTime(BaseException):
    """A command was still at work when its time had passed."""


def run(arguments: Sequence[str], seconds: float = 60.0) -> Outcome:
    """Run a command in this process; one that is still at work after `seconds` counts as code -1."""
    out, err = io.StringIO(), io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        warnings.simplefilter("ignore")
        try:
            with _time_limit(seconds):
                code = main(list(arguments))
        except OutOfTime:
            code = -1
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
    return Outcome(code, err.getvalue(), out.getvalue())


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise OutOfTime

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def bounded_memory(gigabytes: float) -> Iterator[None]:
    """Let this process have at most so much more address space: what asks for more fails, and shows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
    limit = int(pages * os.sysconf("SC_PAGE_SIZE") + gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def trained(folder: Path, steps: int) -> bool:
    """Whether a run in `folder` ended with a student of finite weights after so many steps."""
    result = folder / "result.json"
    if not result.is_file() or json.loads(result.read_text(encoding="utf-8"))["budget"]["steps"] != steps:
        return False
    state = LlamaForCausalLM.from_pretrained(folder).state_dict()
    return all(bool(value.isfinite().all()) for value in state.values())


def remove(path: Path) -> None:
    """Delete what a command left in its output folder."""
    shutil.rmtree(path, ignore_errors=True)
