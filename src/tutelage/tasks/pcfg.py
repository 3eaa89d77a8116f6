"""Training data and models for the synthetic language "cfg3" of `pcfg_grammar`: token ids, dataset, collators, model shapes.

A row is `<bos>`, the terminals of one string, `<eos>`; terminal t has the id FIRST_TERMINAL + t.
Shapes: N rows, T positions."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import BertConfig, GPT2Config

from tutelage.core.errors import UserError
from tutelage.core.inputs import IGNORED_LABEL
from tutelage.tasks.language import CausalCollator
from tutelage.tasks.pcfg_grammar import Grammar, check_seed, sample

PAD, MASK, BOS, EOS, FIRST_TERMINAL = range(5)


class PcfgDataset(Dataset[dict[str, torch.Tensor]]):
    """Strings of a grammar as rows `{"input_ids": (T,)}`, drawn on access.

    Row i depends only on the grammar, the seed and i: nothing is stored, and a shorter dataset is the beginning of a longer
    one. Datasets with different seeds are different streams, but a small grammar has few strings (levels=4 has some
    hundreds), so both may contain the same string. The seed is 0 to 2^64 - 1. Rows longer than `max_length` are cut to their
    first `max_length` tokens (they lose `<eos>` and are not members of the language); None cuts no row."""

    def __init__(self, grammar: Grammar, count: int, seed: int, max_length: int | None = None):
        if count < 1:
            raise UserError(f"a dataset needs a count of at least 1, got {count}")
        if max_length is not None and max_length < 3:
            raise UserError(f"max_length {max_length} is too short: <bos> and two more tokens need 3")
        check_seed(seed)
        self.grammar, self.count, self.seed, self.max_length = grammar, count, seed, max_length

    @property
    def longest(self) -> int:
        """Largest number of tokens per row."""
        longest = self.grammar.longest + 2
        return min(longest, self.max_length or longest)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        """Draw rows together, which is much faster; PyTorch's data loader calls it."""
        index_N = np.asarray(indices, dtype=np.int64)
        outside = index_N[(index_N < -self.count) | (index_N >= self.count)]
        if len(outside):
            raise IndexError(f"no row {outside[0]} in a dataset of {self.count}")
        strings = sample(self.grammar, index_N % self.count, self.seed)
        ends = strings.offsets[1:] + 2 * np.arange(1, len(strings) + 1)
        starts = np.concatenate([[0], ends[:-1]])
        tokens = np.full(len(strings.symbols) + 2 * len(strings), BOS, dtype=np.int64)
        tokens[ends - 1] = EOS
        inner = np.ones(len(tokens), dtype=bool)
        inner[starts] = inner[ends - 1] = False
        tokens[inner] = strings.symbols + FIRST_TERMINAL
        rows = torch.from_numpy(tokens).split((ends - starts).tolist())
        # each row has its own storage: otherwise a worker would send the whole batch with every row
        return [{"input_ids": row[: self.max_length].clone()} for row in rows]


def pcfg_collator(task: str, grammar: Grammar, mask_probability: float = 0.3) -> CausalCollator:
    """The data collator for a task: pads, and returns `input_ids`, `attention_mask` and `labels`, each (N, T).

    For causal models the labels are the ids (the model shifts them). For masked models each terminal is chosen with
    `mask_probability`; of the chosen terminals 80% become `<mask>`, 10% become a random terminal and 10% stay, as in BERT;
    the labels are the ids of the chosen terminals. Padding and all other positions have the label -100. The masks come from
    PyTorch's global generator, so that the trainer's seed determines them.
    Raises UserError: the task is not masked_lm or causal_lm, or the probability is not above 0 and at most 1."""
    _check_task(task)
    if not 0 < mask_probability <= 1:
        raise UserError(f"mask_probability must be above 0 and at most 1, got {mask_probability}")
    if task == "causal_lm":
        return CausalCollator(PAD, always_mask=True)
    return _MaskingCollator(grammar.terminals, mask_probability)


class _MaskingCollator(CausalCollator):
    def __init__(self, terminals: int, mask_probability: float):
        super().__init__(PAD, always_mask=True)
        self.terminals, self.mask_probability = terminals, mask_probability

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = super().__call__(rows)
        ids_NT = batch["input_ids"]
        choice_NT, fate_NT, terminal_NT = torch.rand(3, *ids_NT.shape, dtype=torch.float64)
        chosen_NT = (choice_NT < self.mask_probability) & (ids_NT >= FIRST_TERMINAL)
        random_NT = FIRST_TERMINAL + (terminal_NT * self.terminals).long()
        noised_NT = torch.where(fate_NT < 0.8, MASK, torch.where(fate_NT < 0.9, random_NT, ids_NT))
        batch["input_ids"] = torch.where(chosen_NT, noised_NT, ids_NT)
        batch["labels"] = ids_NT.masked_fill(~chosen_NT, IGNORED_LABEL)
        return batch


def pcfg_config(
    task: str, layers: int, heads: int, head_width: int, grammar: Grammar, max_length: int | None = None, **fields: Any
) -> BertConfig | GPT2Config:
    """The config of a model for a grammar: a BERT for masked_lm, a GPT-2 with tied embeddings for causal_lm, no dropout.

    The hidden states have the width heads * head_width, the feed-forward layers four times that width. The grammar determines
    the vocabulary and, if `max_length` is None, the positions: the length of its longest row. `fields` are more fields of the
    config, or different values for the fields set here. Raises UserError: an unknown task, or a size below 1."""
    _check_task(task)
    for name, value in (("layers", layers), ("heads", heads), ("head_width", head_width), ("max_length", max_length)):
        if value is not None and value < 1:
            raise UserError(f"a model needs {name} of at least 1, got {value}")
    width, positions = heads * head_width, max_length or grammar.longest + 2
    shared = {
        "vocab_size": FIRST_TERMINAL + grammar.terminals,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    if task == "masked_lm":
        shape = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "type_vocab_size": 1}
        shape |= {"intermediate_size": 4 * width, "max_position_embeddings": positions}
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return BertConfig(**{**shared, **shape, **dropout, **fields})
    shape = {"n_embd": width, "n_layer": layers, "n_head": heads, "n_inner": 4 * width, "n_positions": positions}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2Config(**{**shared, **shape, **dropout, "tie_word_embeddings": True, **fields})


def _check_task(task: str) -> None:
    if task not in ("masked_lm", "causal_lm"):
        raise UserError(f"no task {task!r} on a grammar: use masked_lm or causal_lm")
