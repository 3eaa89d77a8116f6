"""Tokenise any amount of text in bounded memory: a tokenizer holds about 150 bytes per character that it is given at once."""

import re
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from tutelage.core.errors import UserError

PIECE = 1 << 20  # characters that are tokenised at once
_AROUND = 200  # characters on each side of a cut that say whether it changes the tokens
_TRIED = 40  # places of each kind that are tried for a cut


def token_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[np.ndarray]:
    """The tokens of each text, without special tokens.

    A text of more than `PIECE` characters is cut where the tokens on both sides are those of the uncut text; UserError where
    there is no such place, as in a very long word."""
    pieces = [(number, *piece) for number, text in enumerate(texts) for piece in _pieces(text, tokenizer)]
    found = [array("q") for _ in texts]
    for group in _groups([piece for _, piece, _ in pieces]):
        _append([pieces[index] for index in group], tokenizer, found)
    return [np.array(ids, dtype=np.int64) for ids in found]


def _append(
    pieces: Sequence[tuple[int, str, int]], tokenizer: PreTrainedTokenizerBase, found: "list[array[int]]"
) -> None:
    """Append the tokens of pieces (number of the text, piece, tokens to drop) to those of their texts.

    Nothing of what the tokenizer returns may outlive the call: lists that are alive when the next pieces are tokenised keep the
    allocator from using their memory again (1.9 GB more for 50 MB of text)."""
    for (number, _, dropped), ids in zip(pieces, _encode([piece for _, piece, _ in pieces], tokenizer), strict=True):
        found[number].extend(ids[dropped:])


def truncated(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, list[Any]]:
    """What the tokenizer makes of each text, with special tokens and truncated; the end of a long text, which truncation
    drops, is not read."""
    columns: dict[str, list[Any]] = {}
    begun = [text[:PIECE] for text in texts]
    for group in _groups(begun):
        encoded = dict(tokenizer([begun[index] for index in group], truncation=True, max_length=max_length))
        for place, index in enumerate(group):
            if len(texts[index]) > PIECE and len(encoded["input_ids"][place]) < max_length:  # a text of few tokens
                again = tokenizer(texts[index], truncation=True, max_length=max_length)
                encoded = {
                    name: [*values[:place], again[name], *values[place + 1 :]] for name, values in encoded.items()
                }
        for name, values in encoded.items():
            columns.setdefault(name, []).extend(values)
    return columns


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _groups(texts: Sequence[str]) -> Iterator[list[int]]:
    """Numbers of neighbouring texts that have `PIECE` characters together, or of one that has more."""
    group: list[int] = []
    size = 0
    for number, text in enumerate(texts):
        if group and size + len(text) > PIECE:
            yield group
            group, size = [], 0
        group.append(number)
        size += len(text)
    if group:
        yield group


def _pieces(text: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, int]]:
    """Pieces of a text, and how many tokens to drop from the beginning of each."""
    start, dropped = 0, 0
    while len(text) - start > PIECE:
        end, following, then_dropped = _cut(text, start + PIECE, tokenizer)
        yield text[start:end], dropped
        start, dropped = following, then_dropped
    yield text[start:], dropped


def _cut(text: str, latest: int, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int, int]:
    """Where a piece ends, at most at `latest`; where the next one begins; and how many of its tokens to drop.

    The next one begins at the same place or after the space there, and the first token is kept or dropped: some tokenizers
    put a space before every text."""
    first = latest - PIECE // 2
    spaces = [first + match.start() for match in re.finditer(r"\s", text[first:latest])][: -_TRIED - 1 : -1]
    for place in (*spaces, *range(latest, latest - _TRIED, -1)):
        whole, before = _encode([text[place - _AROUND : place + _AROUND], text[place - _AROUND : place]], tokenizer)
        for following in (place, place + 1) if text[place] == " " else (place,):
            (after,) = _encode([text[following : place + _AROUND]], tokenizer)
            for dropped in (0, 1):
                if whole == before + after[dropped:]:
                    return place, following, dropped
    found = f"a text of {len(text):,} characters has no place before character {latest:,} where it can be cut"
    raise UserError(
        f"{found}, and at most {PIECE:,} characters are tokenised at once: divide it into several documents or lines"
    )
