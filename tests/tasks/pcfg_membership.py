"""Whether a grammar derives a string, and strings back from rows: the references that the PCFG tests compare with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tutelage.tasks.pcfg import BOS, EOS, FIRST_TERMINAL, PAD
from tutelage.tasks.pcfg_grammar import NONE, Grammar, Strings

_TOKENS_AT_ONCE, _PAIRS_AT_ONCE = 1 << 17, 1 << 22  # bound the memory of the membership test


def pcfg_decode(input_ids_NT: torch.Tensor) -> Strings:
    """The strings in rows of token ids, as `is_member` takes them: what follows a leading `<bos>`, up to `<eos>` or `<pad>`.

    Other special tokens stay, as negative symbols, so that a string that contains one is not a member.
    """
    ids_NT = input_ids_NT.cpu().numpy()
    ended_NT = np.logical_or.accumulate((ids_NT == EOS) | (ids_NT == PAD), axis=1)
    kept_NT = ~ended_NT
    kept_NT[:, 0] &= ids_NT[:, 0] != BOS
    return Strings(ids_NT[kept_NT] - FIRST_TERMINAL, np.cumsum([0, *kept_NT.sum(axis=1)]))


def as_strings(strings: Strings | Sequence[Sequence[int] | np.ndarray]) -> Strings:
    """The same strings in this form."""
    if isinstance(strings, Strings):
        return strings
    offsets = np.cumsum([0, *map(len, strings)])
    symbols = np.concatenate([np.asarray(string) for string in strings if len(string)] or [np.zeros(0, np.int64)])
    if symbols.ndim != 1 or symbols.dtype.kind not in "iu":
        raise TypeError(
            f"strings must be sequences of whole numbers, got {symbols.dtype} with {symbols.ndim} dimension(s)"
        )
    return Strings(symbols, offsets)


def is_member(grammar: Grammar, strings: Strings | Sequence[Sequence[int] | np.ndarray]) -> np.ndarray:
    """Whether the grammar derives each string, (N,) booleans; exact.

    The dynamic programme of Cocke, Younger and Kasami, kept sparse: from the terminals up, each symbol's list of the spans
    that it derives, in all strings together; a rule joins the spans that touch. Symbols that are not terminals are in no
    span, so a string that contains one is not a member. Time grows with the number of spans: half a second for 1,000 strings
    of the default grammar, half a minute per string where every pair and triple of symbols is a rule.

    Args:
        grammar: the language.
        strings: of terminals, numbered from 0.
    """
    given = as_strings(strings)
    members = np.zeros(len(given), dtype=bool)
    first = 0
    while first < len(given):
        limit = given.offsets[first] + _TOKENS_AT_ONCE
        last = max(int(np.searchsorted(given.offsets, limit, side="right")) - 1, first + 1)
        offsets = given.offsets[first : last + 1]
        members[first:last] = _parse(grammar, given.symbols[offsets[0] : offsets[-1]], offsets - offsets[0])
        first = last
    return members


def _parse(grammar: Grammar, symbols_M: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    count = len(offsets) - 1
    # A string of n symbols has n + 1 borders between them; no span can cross into the next string.
    border_M = np.arange(len(symbols_M)) + np.repeat(np.arange(count), np.diff(offsets))
    spans = [_span(border_M[symbols_M == symbol], 1) for symbol in range(grammar.terminals)]
    for level_rules in reversed(grammar.rules):
        spans = [
            np.unique(np.concatenate([_derive(spans, rule[rule != NONE]) for rule in symbol_rules]))
            for symbol_rules in level_rules
        ]
    return np.isin(_span(offsets[:-1] + np.arange(count), np.diff(offsets)), spans[0])


def _span(start: np.ndarray, length: np.ndarray | int) -> np.ndarray:
    """Spans as integers that sort by their start: start in the upper half, end in the lower."""
    return start.astype(np.int64) << 32 | (start + length)


def _derive(spans: list[np.ndarray], side: np.ndarray) -> np.ndarray:
    """The spans that a rule's right-hand side covers."""
    joined = spans[side[0]]
    for symbol in side[1:]:
        joined = _join(joined, spans[symbol])
    return joined


def _join(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The spans made of one of `left` and one of `right` that starts where it ends; `right` sorted, all without doubles."""
    starts, ends = right >> 32, left & 0xFFFFFFFF
    low = np.searchsorted(starts, ends, side="left")
    matches = np.searchsorted(starts, ends, side="right") - low
    total = np.cumsum(matches)
    cuts = np.searchsorted(total, np.arange(_PAIRS_AT_ONCE, total[-1] if len(total) else 0, _PAIRS_AT_ONCE))
    pieces = []
    for part in np.split(np.arange(len(left)), cuts):
        repeats = matches[part]
        place = np.arange(repeats.sum()) - np.repeat(np.cumsum(repeats) - repeats, repeats)
        partner = right[np.repeat(low[part], repeats) + place]
        pieces.append(np.unique((np.repeat(left[part], repeats) >> 32) << 32 | partner & 0xFFFFFFFF))
    return pieces[0] if len(pieces) == 1 else np.unique(np.concatenate(pieces))
