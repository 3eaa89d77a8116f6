"""Long texts are tokenised in pieces, with the tokens of the whole text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models, normalizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tests.conftest import make_tokenizer, sentences
from tutelage.core.errors import UserError
from tutelage.tasks import pieces
from tutelage.tasks.embedded import DEFAULT_EVAL_TEXT, DEFAULT_TEACHER
from tutelage.tasks.loading import load_tokenizer
from tutelage.tasks.registry import get_task
from tutelage.tasks.text import tokenize

LINES = Path(DEFAULT_EVAL_TEXT).read_text(encoding="utf-8")[:60_000]
WITHOUT_SPACES = "".join(LINES.split())


def embedded() -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(str(DEFAULT_TEACHER))
    assert tokenizer is not None
    return tokenizer


def with_prefix() -> PreTrainedTokenizerBase:
    """As Llama 2's: a space is put before every text, and spaces are part of the pairs that are merged."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"], show_progress=False)
    backend.train_from_iterator([line for line in LINES.splitlines() if line], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


@pytest.mark.parametrize(
    "text", [LINES, " ".join(LINES.split()), WITHOUT_SPACES], ids=["lines", "one line", "no spaces"]
)
@pytest.mark.parametrize("make", [embedded, with_prefix])
def test_pieces_have_the_tokens_of_the_whole_text(monkeypatch: pytest.MonkeyPatch, make: Any, text: str) -> None:
    tokenizer = make()
    whole = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    monkeypatch.setattr(pieces, "PIECE", 1000)
    short, found = pieces.token_ids(["ba", text], tokenizer)
    assert found.tolist() == whole
    assert short.tolist() == tokenizer("ba", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("task", ["causal_lm", "masked_lm", "embedding"])
def test_a_tokenizer_never_gets_more_than_a_piece(monkeypatch: pytest.MonkeyPatch, task: str) -> None:
    tokenizer, data = make_tokenizer(task != "causal_lm"), Dataset.from_dict({"text": [" ".join(sentences(400))] * 3})
    expected = tokenize(data, tokenizer, get_task(task), 16).to_list()
    given = []

    def watched(self: Any, text: Any, **settings: Any) -> Any:
        given.append(len(text) if isinstance(text, str) else sum(map(len, text)))
        return original(self, text, **settings)

    original = PreTrainedTokenizerFast.__call__
    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", watched)
    monkeypatch.setattr(pieces, "PIECE", 3000)
    assert tokenize(data, tokenizer, get_task(task), 16).to_list() == expected
    assert 1000 < max(given) <= 3000 < len(data[0]["text"])


def test_a_long_text_of_few_tokens_is_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, text = make_tokenizer(encoder=True), "ba" + " " * 3000 + "den"
    monkeypatch.setattr(pieces, "PIECE", 1000)
    found = pieces.truncated(["ba", text, "den"], tokenizer, 8)
    assert {name: list(values) for name, values in found.items()} == {
        name: list(values) for name, values in tokenizer(["ba", text, "den"], truncation=True, max_length=8).items()
    }


def test_a_long_word_that_cannot_be_cut_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE", 1000)
    monkeypatch.setattr(pieces, "_encode", lambda texts, _: [[len(text)] for text in texts])  # each text is one token
    with pytest.raises(
        UserError, match="a text of 5,000 characters has no place before character 1,000 where it can be cut"
    ):
        pieces.token_ids(["b" * 5000], make_tokenizer())
