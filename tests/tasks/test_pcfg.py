"""The grammars, their sampler and membership test, and the rows, masks and models made for them."""

from __future__ import annotations

import itertools
import pickle
from collections import Counter
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from tests.tasks import pcfg_membership
from tests.tasks.pcfg_membership import as_strings, is_member, pcfg_decode
from tutelage.tasks import pcfg_grammar
from tutelage.tasks.pcfg import BOS, EOS, FIRST_TERMINAL, MASK, PAD, PcfgDataset, pcfg_collator, pcfg_config
from tutelage.tasks.pcfg_grammar import Grammar, Strings, build_grammar, sample

TINY = build_grammar(levels=4, symbols=2, seed=3)
SMALL = build_grammar(levels=5)
CFG3 = build_grammar()
# ambiguous: 0 0 0 0 0 is (0 0)(0 0 0) and (0 0 0)(0 0)
AMBIGUOUS = Grammar((1, 1, 2), (np.array([[[0, 0, -1]]]), np.array([[[0, 0, -1], [0, 0, 0], [1, 0, -1]]])))


@cache
def language(grammar: Grammar, level: int = 0, symbol: int = 0) -> frozenset[tuple[int, ...]]:
    """All strings of a symbol, by expanding every rule."""
    if level == len(grammar.rules):
        return frozenset([(symbol,)])
    found = set()
    for rule in grammar.rules[level][symbol].tolist():
        parts = [language(grammar, level + 1, child) for child in rule if child >= 0]
        found |= {tuple(itertools.chain(*choice)) for choice in itertools.product(*parts)}
    return frozenset(found)


def parses(grammar: Grammar, string: list[int]) -> bool:
    """Membership by plain recursion over the split points."""

    @cache
    def derives(level: int, symbol: int, start: int, end: int) -> bool:
        if level == len(grammar.rules):
            return end == start + 1 and string[start] == symbol
        return any(covers(level + 1, rule, start, end) for rule in sides[level][symbol])

    @cache
    def covers(level: int, rule: tuple[int, ...], start: int, end: int) -> bool:
        if not rule:
            return start == end
        return any(
            derives(level, rule[0], start, cut) and covers(level, rule[1:], cut, end)
            for cut in range(start + 1, end + 1)
        )

    sides = [
        [[tuple(s for s in rule if s >= 0) for rule in rules] for rules in level.tolist()] for level in grammar.rules
    ]
    return derives(0, 0, 0, len(string))


def lists(strings: Strings) -> list[list[int]]:
    return [strings.symbols[start:end].tolist() for start, end in itertools.pairwise(strings.offsets)]


def rows_of(dataset: PcfgDataset, indices: Any) -> list[list[int]]:
    return [row["input_ids"].tolist() for row in dataset.__getitems__(list(indices))]


# ---- Grammars ----


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("levels", "symbols", "rules"), [(7, 3, 2), (4, 2, 2), (3, 6, 2), (4, 3, 12), (5, 1, 2), (2, 1, 1)]
)
def test_rules_of_a_level_are_distinct_and_use_every_symbol(levels: int, symbols: int, rules: int, seed: int) -> None:
    grammar = build_grammar(levels, symbols, seed, rules)
    assert grammar.levels == (1, *[symbols] * (levels - 1)) and grammar.terminals == symbols
    assert [table.shape for table in grammar.rules] == [(count, rules, 3) for count in grammar.levels[:-1]]
    for table in grammar.rules:
        sides = table.reshape(-1, 3).tolist()
        assert len({tuple(side) for side in sides}) == len(sides)
        assert {symbol for side in sides for symbol in side} - {-1} == set(range(symbols))


def test_a_grammar_is_its_seed() -> None:
    again, other = build_grammar(), build_grammar(seed=1)
    assert all(np.array_equal(a, b) for a, b in zip(CFG3.rules, again.rules, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(CFG3.rules, other.rules, strict=True))
    # a stored result means this grammar: it must never change
    assert CFG3.rules[0].tolist() == [[[0, 2, -1], [2, 1, 2]]]
    assert CFG3.rules[1].tolist() == [[[0, 0, 2], [2, 2, -1]], [[0, 0, -1], [0, 1, 2]], [[1, 0, 2], [0, 2, 1]]]


def test_both_lengths_of_rules_are_drawn_alike() -> None:
    short = [
        (table[..., 2] == -1).mean() for seed in range(40) for table in build_grammar(seed=seed, symbols=5).rules[1:]
    ]
    assert np.mean(short) == pytest.approx(
        0.5, abs=0.04
    )  # 2,000 rules; slightly under a half, as there are fewer pairs


@pytest.mark.parametrize("grammar", [TINY, AMBIGUOUS])
def test_lengths_against_enumeration(grammar: Grammar) -> None:
    lengths = [len(string) for string in language(grammar)]
    assert grammar.longest == max(lengths)
    below = np.ones(grammar.terminals)  # expected lengths, from the terminals up
    for rules in reversed(grammar.rules):
        below = np.where(rules == -1, 0, below[rules]).sum(axis=2).mean(axis=1)
    drawn = np.diff(sample(grammar, 20_000).offsets)
    assert min(lengths) <= drawn.min() and drawn.mean() == pytest.approx(below[0], abs=5 * drawn.std() / 20_000**0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"levels": 1}, "a grammar needs levels of at least 2, got 1"),
        ({"symbols": 0}, "a grammar needs symbols of at least 1, got 0"),
        ({"rules": 0}, "a grammar needs rules of at least 1, got 0"),
        ({"seed": -1}, r"a seed is a whole number from 0 to 2\^64 - 1, got -1"),
        ({"rules": 13}, "3 symbols with 13 rules each need 39 different right-hand sides, but 3 symbols make 36"),
        ({"symbols": 7}, r"the root's 2 rule\(s\) hold at most 6 symbols, level 1 has 7 to use: ask for more rules"),
        (
            {"symbols": 12, "rules": 4},
            "no draw of 300 used all 12 symbols in 4 rules: ask for more rules or fewer symbols",
        ),
    ],
)
def test_impossible_grammars(monkeypatch: pytest.MonkeyPatch, arguments: dict[str, int], message: str) -> None:
    monkeypatch.setattr(pcfg_grammar, "_COVER_ATTEMPTS", 300)
    with pytest.raises(ValueError, match=message):
        build_grammar(**arguments)


# ---- Sampling ----


def test_every_sampled_string_is_a_member() -> None:
    assert set(map(tuple, lists(sample(TINY, 2000)))) <= language(TINY)
    for grammar, count in ((SMALL, 2000), (CFG3, 100)):
        strings = sample(grammar, count, seed=5)
        assert len(strings) == count
        assert is_member(grammar, strings).all()


def test_rules_are_equally_likely_at_every_level() -> None:
    """Strings of a grammar in which every rule leaves a mark: the root's choice and each child's can be read off."""
    marks = Grammar(
        (1, 2, 4), (np.array([[[0, 0, -1], [0, 1, 1], [1, 1, -1]]]), np.arange(4).repeat(3).reshape(2, 2, 3))
    )
    count = 30_000
    strings = sample(marks, count, seed=2)
    triples = Counter(tuple(string[::3]) for string in lists(strings))
    expected = {  # what the root becomes, then one of two letters for each child
        choice: count / 3 / 2 ** len(parts)
        for parts in ([(0, 1)] * 2, [(0, 1), (2, 3), (2, 3)], [(2, 3)] * 2)
        for choice in itertools.product(*parts)
    }
    assert triples.keys() == expected.keys() and len(expected) == 16
    chi_square = sum((triples[choice] - mean) ** 2 / mean for choice, mean in expected.items())
    assert chi_square < 37.7  # 15 degrees of freedom: p = 0.001


def test_strings_of_one_seed_are_independent_of_their_neighbours() -> None:
    first = np.array([string[0] for string in lists(sample(SMALL, 20_000))])
    joint = np.zeros((3, 3))
    np.add.at(joint, (first[:-1], first[1:]), 1)
    joint /= joint.sum()
    expected = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    assert np.abs(joint - expected).max() < 0.012


def test_string_i_depends_on_the_seed_and_i_alone() -> None:
    strings = lists(sample(CFG3, 50, seed=7))
    assert lists(sample(CFG3, 20, seed=7)) == strings[:20]
    order = [49, 3, 3, 0, 17]
    assert lists(sample(CFG3, order, seed=7)) == [strings[index] for index in order]
    assert lists(sample(CFG3, np.array([31]), seed=7)) == strings[31:32]


def test_seeds_give_different_strings() -> None:
    drawn = [{tuple(string) for string in lists(sample(CFG3, 500, seed))} for seed in (0, 1, 2, 2**64 - 1)]
    assert len(set.union(*drawn)) == 2000


def test_the_stream_never_changes() -> None:
    """SplitMix64's published first words for seed 1234567, and a string."""
    words = pcfg_grammar.hash_words(np.array([1234567], dtype=np.uint64), np.arange(3))
    assert words.tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert lists(sample(build_grammar(levels=3), 2)) == [[0, 0, 2, 1, 0, 2], [2, 2, 1, 0, 2]]


def test_no_strings_and_wrong_numbers() -> None:
    assert len(sample(CFG3, 0)) == 0 == len(is_member(CFG3, sample(CFG3, [])))
    with pytest.raises(ValueError, match="strings are counted and numbered from 0, got -1"):
        sample(CFG3, -1)
    with pytest.raises(ValueError, match="strings are counted and numbered from 0, got -4"):
        sample(CFG3, [2, -4])
    with pytest.raises(ValueError, match=r"from 0 to 2\^64 - 1, got 18446744073709551616"):
        sample(CFG3, 1, seed=2**64)


def test_strings_from_sequences() -> None:
    strings = as_strings([[0, 1], [], np.array([2])])
    assert lists(strings) == [[0, 1], [], [2]] and as_strings(strings) is strings
    with pytest.raises(TypeError, match=r"must be sequences of whole numbers, got float64 with 1 dimension\(s\)"):
        as_strings([[0.5]])


# ---- Membership ----


@pytest.mark.parametrize("grammar", [build_grammar(3, 2, seed=1), build_grammar(3, 2, seed=2), AMBIGUOUS])
def test_membership_of_all_short_strings(grammar: Grammar) -> None:
    strings = [string for length in range(11) for string in itertools.product((0, 1), repeat=length)]
    members = {string for string, member in zip(strings, is_member(grammar, strings), strict=True) if member}
    assert members == language(grammar)  # no string of theirs has more than 9 symbols
    assert 2 < len(members) < len(strings) // 10


def test_membership_after_one_change() -> None:
    strings = [list(string) for string in sorted(language(TINY))]
    changed = [[*string[:i], 1 - string[i], *string[i + 1 :]] for string in strings for i in range(len(string))]
    dropped = [string[:i] + string[i + 1 :] for string in strings for i in range(len(string))]
    for others in (changed, dropped):
        others = others[:4000]
        expected = [tuple(string) in language(TINY) for string in others]
        assert is_member(TINY, others).tolist() == expected
        assert 0 < sum(expected) < len(others)


@pytest.mark.parametrize("grammar", [SMALL, build_grammar(levels=4, rules=6, seed=1)])
def test_membership_against_plain_recursion(grammar: Grammar) -> None:
    draw = np.random.RandomState(0)
    strings = lists(sample(grammar, 30, seed=1))
    for string in strings[10:]:
        string[draw.randint(len(string))] = draw.randint(3)
    expected = [parses(grammar, string) for string in strings]
    assert is_member(grammar, strings).tolist() == expected
    assert 10 < sum(expected) < 30


def test_wrong_lengths_and_symbols() -> None:
    (good,) = lists(sample(CFG3, 1))
    wrong = [[], good[:-1], good[1:], [*good, good[0]], good + good, [good[0]], [3, *good[1:]], [*good[:-1], -1]]
    assert is_member(CFG3, [good, *wrong, good]).tolist() == [True, *[False] * len(wrong), True]


def test_neighbours_do_not_join() -> None:
    """A string cut in two is no member, though its halves lie side by side."""
    strings = [part for string in lists(sample(SMALL, 50)) for part in (string[:20], string[20:], string)]
    assert is_member(SMALL, strings).tolist() == [False, False, True] * 50


def test_small_memory_gives_the_same_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    grammar = build_grammar(levels=4, rules=6, seed=1)
    strings = as_strings(
        [string[: len(string) - index % 2] for index, string in enumerate(lists(sample(grammar, 200)))]
    )
    expected = is_member(grammar, strings)
    monkeypatch.setattr(pcfg_membership, "_TOKENS_AT_ONCE", 64)
    monkeypatch.setattr(pcfg_membership, "_PAIRS_AT_ONCE", 7)
    assert is_member(grammar, strings).tolist() == expected.tolist()
    assert 100 <= expected.sum() < 200


# ---- Rows ----


def test_vocabulary() -> None:
    assert (PAD, MASK, BOS, EOS, FIRST_TERMINAL) == (0, 1, 2, 3, 4)
    assert pcfg_config("causal_lm", 1, 1, 8, CFG3).vocab_size == 4 + 3


def test_rows_are_the_sampled_strings() -> None:
    dataset = PcfgDataset(SMALL, 5000, seed=3)
    strings = lists(sample(SMALL, 5000, seed=3))
    assert len(dataset) == 5000
    for index in (0, 1, 4095, 4096, 4999, -1):
        row = dataset[index]["input_ids"]
        assert row.dtype == torch.int64
        assert row.tolist() == [BOS, *(FIRST_TERMINAL + symbol for symbol in strings[index]), EOS]
        assert len(row) <= dataset.longest == SMALL.longest + 2


def test_rows_do_not_depend_on_how_they_are_fetched() -> None:
    dataset = PcfgDataset(SMALL, 300, seed=3)
    one_by_one = [row["input_ids"].tolist() for row in dataset]  # type: ignore[attr-defined]
    assert len(one_by_one) == 300
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0)).tolist()
    assert rows_of(dataset, order) == [one_by_one[index] for index in order]
    assert rows_of(PcfgDataset(SMALL, 10**9, seed=3), range(300)) == one_by_one
    assert rows_of(pickle.loads(pickle.dumps(dataset)), range(300)) == one_by_one
    assert not {tuple(row) for row in one_by_one} & {
        tuple(row) for row in rows_of(PcfgDataset(SMALL, 300, 4), range(300))
    }


def test_long_rows_are_cut() -> None:
    whole, cut = PcfgDataset(SMALL, 50, 0), PcfgDataset(SMALL, 50, 0, max_length=40)
    assert rows_of(cut, range(50)) == [row[:40] for row in rows_of(whole, range(50))]
    assert cut.longest == 40 and PcfgDataset(SMALL, 1, 0, max_length=500).longest == SMALL.longest + 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0}, "a dataset needs a count of at least 1, got 0"),
        ({"seed": -3}, "a seed is a whole number .* got -3"),
        ({"max_length": 2}, "max_length 2 is too short: <bos> and two more tokens need 3"),
    ],
)
def test_impossible_datasets(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PcfgDataset(**{"grammar": SMALL, "count": 5, "seed": 0, **arguments})


def test_rows_outside() -> None:
    for index in (5, -6):
        with pytest.raises(IndexError, match=f"no row {index} in a dataset of 5"):
            PcfgDataset(SMALL, 5, 0).__getitems__([0, index])


def test_rows_can_be_judged() -> None:
    rows = pcfg_collator("causal_lm", SMALL)(PcfgDataset(SMALL, 20, 0).__getitems__(range(20)))
    strings = pcfg_decode(rows["input_ids"])
    assert lists(strings) == lists(sample(SMALL, 20)) and is_member(SMALL, strings).all()
    # no <bos>; a special token inside; tokens after <eos> do not count; nothing
    odd = torch.tensor([[4, 5, EOS, 4], [BOS, 4, MASK, 6], [BOS, 4, BOS, EOS], [BOS, EOS, 5, EOS]])
    assert lists(pcfg_decode(odd)) == [[0, 1], [0, MASK - 4, 2], [0, BOS - 4], []]


# ---- Collators ----


def test_causal_batches() -> None:
    rows = [{"input_ids": torch.tensor([BOS, 4, 5, 6, EOS])}, {"input_ids": [BOS, 5, EOS]}]
    batch = pcfg_collator("causal_lm", SMALL)(rows)
    assert batch["input_ids"].tolist() == [[BOS, 4, 5, 6, EOS], [BOS, 5, EOS, PAD, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[BOS, 4, 5, 6, EOS], [BOS, 5, EOS, -100, -100]]


@pytest.mark.parametrize("probability", [0.3, 0.6])
def test_masked_fractions(probability: float) -> None:
    torch.manual_seed(0)
    rows = PcfgDataset(SMALL, 2000, seed=1).__getitems__(range(2000))
    batch = pcfg_collator("masked_lm", SMALL, probability)(rows)
    original = torch.nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    inputs, labels = batch["input_ids"], batch["labels"]
    chosen, terminal = labels != -100, original >= FIRST_TERMINAL
    assert torch.equal(inputs[~chosen], original[~chosen]) and torch.equal(labels[chosen], original[chosen])
    assert torch.equal(batch["attention_mask"], (original != PAD).long())
    assert terminal[chosen].all()
    assert chosen[terminal].float().mean().item() == pytest.approx(probability, abs=0.01)  # about 90,000 terminals
    masked, changed = (inputs == MASK)[chosen], (inputs != original)[chosen]
    assert masked.float().mean().item() == pytest.approx(0.8, abs=0.01)
    # a random terminal of three is the old one in a third of the cases
    assert (changed & ~masked).float().mean().item() == pytest.approx(0.1 * 2 / 3, abs=0.008)
    put = inputs[chosen][changed & ~masked]
    assert put.min() == FIRST_TERMINAL and put.max() == FIRST_TERMINAL + 2
    # where in the row says nothing about being chosen
    by_place = chosen[:, 1:20].float().mean(dim=0)
    assert (by_place - probability).abs().max() < 0.05


def test_masks_follow_the_global_generator() -> None:
    rows = PcfgDataset(SMALL, 8, seed=1).__getitems__(range(8))
    collate = pcfg_collator("masked_lm", SMALL)
    torch.manual_seed(1)
    first, second = collate(rows), collate(rows)
    torch.manual_seed(1)
    assert torch.equal(collate(rows)["input_ids"], first["input_ids"])
    assert not torch.equal(second["labels"], first["labels"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "embedding"}, "no task 'embedding' on a grammar: use masked_lm or causal_lm"),
        ({"mask_probability": 0.0}, "mask_probability must be above 0 and at most 1, got 0.0"),
        ({"mask_probability": 1.5}, "mask_probability must be above 0 and at most 1, got 1.5"),
    ],
)
def test_impossible_collators(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pcfg_collator(**{"task": "masked_lm", "grammar": SMALL, **arguments})


# ---- Models ----


@pytest.mark.parametrize(("task", "model"), [("masked_lm", AutoModelForMaskedLM), ("causal_lm", AutoModelForCausalLM)])
def test_models_take_batches(task: str, model: Any) -> None:
    torch.manual_seed(0)
    dataset = PcfgDataset(SMALL, 64, seed=0)
    config = pcfg_config(task, 2, 4, 8, SMALL, initializer_range=0.05)
    assert (config.num_hidden_layers, config.num_attention_heads, config.hidden_size) == (2, 4, 32)
    assert config.vocab_size == 7 and config.max_position_embeddings == dataset.longest
    assert config.initializer_range == 0.05
    built = model.from_config(config).train()
    (batch,) = DataLoader(dataset, 64, collate_fn=pcfg_collator(task, SMALL))
    first, second = built(**batch), built(**batch)
    assert torch.equal(first.logits, second.logits)  # no dropout
    assert first.loss.item() == pytest.approx(np.log(7), abs=0.3)
    widths = {
        parameter.shape for name, parameter in built.named_parameters() if "intermediate" in name or "c_fc" in name
    }
    assert any(128 in shape for shape in widths)
    assert built.get_output_embeddings().weight is built.get_input_embeddings().weight


def test_impossible_models() -> None:
    with pytest.raises(ValueError, match="a model needs heads of at least 1, got 0"):
        pcfg_config("masked_lm", 2, 0, 8, SMALL)
    with pytest.raises(ValueError, match="no task 'lm' on a grammar: use masked_lm or causal_lm"):
        pcfg_config("lm", 2, 1, 8, SMALL)
    assert pcfg_config("causal_lm", 2, 1, 8, SMALL, max_length=33).n_positions == 33
