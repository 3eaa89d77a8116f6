"""The synthetic language "cfg3": its grammars and a sampler. NumPy only.

The family is that of Allen-Zhu and Li, "Physics of Language Models: Part 1" (arXiv:2305.13673). Symbols belong to levels:
level 0 is the root, the last level has the terminals. A rule rewrites a symbol to 2 or 3 symbols of the next level; the rules
of a symbol are equally likely. The grammars are our own draws with the same statistics, not those of the paper.
Shapes: N strings, M symbols of all strings one after the other, S symbols of a level, R rules of a symbol."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tutelage.core.errors import UserError

LONGEST_RULE = 3
NONE = -1  # fills the third place of a rule of two symbols
_COVER_ATTEMPTS = 10_000


@dataclass(frozen=True, eq=False)
class Grammar:
    """A grammar whose symbols belong to levels; the symbols of each level are numbered from 0."""

    levels: tuple[int, ...]  # symbols of each level: 1 for the root; the last are the terminals
    rules: tuple[
        np.ndarray, ...
    ]  # per level above, (S, R, 3): the symbols that replace symbol s; -1 fills a short rule

    @property
    def terminals(self) -> int:
        """Number of terminals."""
        return self.levels[-1]

    @property
    def longest(self) -> int:
        """Length of the longest string."""
        below = np.ones(self.terminals, dtype=np.int64)
        for rules in reversed(self.rules):
            below = np.where(rules == NONE, 0, below[rules]).sum(axis=2).max(axis=1)
        return int(below[0])


def build_grammar(levels: int = 7, symbols: int = 3, seed: int = 0, rules: int = 2) -> Grammar:
    """Draw a grammar; the defaults have the shape of cfg3, with strings of 127 to 579 symbols, 283 on average.

    Rules have 2 or 3 symbols with equal probability. Within a level the right-hand sides are different, and every symbol of
    the next level occurs in one of them. NumPy's frozen legacy generator (MT19937) draws the same on every machine.

    Args:
        levels: number of levels with root and terminals; a string has 2^(levels-1) to 3^(levels-1) symbols.
        symbols: number of symbols per level below the root.
        seed: 0 to 2^64 - 1.
        rules: number of rules per symbol; UserError if there are not so many right-hand sides, or if they cannot use all
            symbols."""
    for name, value, least in (("levels", levels, 2), ("symbols", symbols, 1), ("rules", rules, 1)):
        if value < least:
            raise UserError(f"a grammar needs {name} of at least {least}, got {value}")
    if levels > 12:
        raise UserError(f"a grammar needs levels of at most 12, got {levels}: strings have up to 3^(levels-1) symbols")
    check_seed(seed)
    counts = (1, *[symbols] * (levels - 1))
    largest, available = max(counts[:-1]), symbols**2 + symbols**3
    if largest * rules > available:
        raise UserError(
            f"{largest} symbols with {rules} rules each need {largest * rules} different right-hand sides, but {symbols} "
            f"symbols make {available} of length 2 or 3: ask for fewer rules or more symbols"
        )
    if LONGEST_RULE * rules < symbols:
        found = f"the root's {rules} rule(s) hold at most {LONGEST_RULE * rules} symbols, level 1 has {symbols} to use"
        raise UserError(f"{found}: ask for more rules or fewer symbols")
    draw = np.random.RandomState([0xCF63, seed & 0xFFFFFFFF, seed >> 32])
    return Grammar(counts, tuple(_draw_level(draw, parents, rules, symbols) for parents in counts[:-1]))


def _draw_level(draw: np.random.RandomState, parents: int, rules: int, symbols: int) -> np.ndarray:
    """Distinct rules for one level that use every symbol of the next, (parents, rules, 3)."""
    for _ in range(_COVER_ATTEMPTS):
        sides: dict[tuple[int, ...], None] = {}  # an ordered set
        while len(sides) < parents * rules:
            side = draw.randint(symbols, size=2 + draw.randint(2)).tolist()
            sides[(*side, NONE)[:LONGEST_RULE]] = None
        table = np.array(list(sides)).reshape(parents, rules, LONGEST_RULE)
        if len(np.setdiff1d(np.arange(symbols), table)) == 0:
            return table
    found = f"no draw of {_COVER_ATTEMPTS} used all {symbols} symbols in {parents * rules} rules: ask for more rules or"
    raise UserError(f"{found} fewer symbols")


@dataclass(frozen=True, eq=False)
class Strings:
    """Strings of different lengths, one after the other."""

    symbols: np.ndarray  # terminals of all strings, (M,)
    offsets: np.ndarray  # start of each string, then the end of the last string, (N + 1,)

    def __len__(self) -> int:
        return len(self.offsets) - 1


def sample(grammar: Grammar, strings: int | Sequence[int] | np.ndarray, seed: int = 0) -> Strings:
    """Draw strings, all at once, level by level.

    String i of a seed depends only on (seed, i): the rule of a node is a hash of the seed, the number of the string, and the
    level and place of the node (SplitMix64, integer arithmetic only). The strings are therefore the same in any order, on
    every machine and with every version of NumPy.

    `strings` is the number of strings, counted from string 0, or the numbers of the wanted strings; the seed is 0 to
    2^64 - 1. Raises UserError: a negative count or number, or a seed out of range."""
    check_seed(seed)
    if (lowest := np.min(strings, initial=0)) < 0:
        raise UserError(f"strings are counted and numbered from 0, got {lowest}")
    numbers = np.arange(strings) if isinstance(strings, int | np.integer) else np.asarray(strings, dtype=np.int64)
    keys_N = hash_words(hash_words(np.array([seed], dtype=np.uint64), 0), numbers)
    symbols_M = np.zeros(len(numbers), dtype=np.int64)
    offsets = np.arange(len(numbers) + 1)
    for level, rules in enumerate(grammar.rules):
        place_M = np.arange(len(symbols_M)) - np.repeat(offsets[:-1], np.diff(offsets))
        word_M = hash_words(np.repeat(keys_N, np.diff(offsets)), place_M.astype(np.uint64) + np.uint64(level << 32))
        rule_M = (word_M >> np.uint64(32)) * np.uint64(rules.shape[1]) >> np.uint64(32)
        row_M = symbols_M * rules.shape[1] + rule_M.astype(np.int64)
        children = rules.reshape(-1, LONGEST_RULE)[row_M]
        kept = children != NONE
        ends_M = np.cumsum(kept.sum(axis=1))
        offsets = np.concatenate([[0], ends_M])[offsets]
        symbols_M = children[kept]
    return Strings(symbols_M, offsets)


def hash_words(keys: np.ndarray, counters: np.ndarray | int) -> np.ndarray:
    """Word number `counters` of the SplitMix64 streams that start at `keys`: uint64, broadcast."""
    words = keys + (np.asarray(counters, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def check_seed(seed: int) -> None:
    """Raise UserError for a seed outside 0 to 2^64 - 1."""
    if not 0 <= seed < 1 << 64:
        raise UserError(f"a seed is a whole number from 0 to 2^64 - 1, got {seed}")
