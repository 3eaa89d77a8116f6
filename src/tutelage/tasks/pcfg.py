"""Training on the synthetic language "cfg3": token ids, an endless dataset, collators and model shapes.

Public names: `Grammar`, `build_grammar`, `Strings`, `sample` (of `pcfg_grammar`), `pcfg_tokens`,
`PcfgDataset`, `pcfg_collator`, `pcfg_config`, and the token ids `PAD`, `MASK`, `BOS`, `EOS`, `FIRST_TERMINAL`.

A row is `<bos>`, the terminals of one string, `<eos>`; terminal t has the id FIRST_TERMINAL + t.

Shapes: N rows, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import BertConfig, GPT2Config

from tutelage.core.errors import UserError
from tutelage.core.inputs import IGNORED_LABEL
from tutelage.tasks.language import CausalCollator
from tutelage.tasks.pcfg_grammar import Grammar, Strings, build_grammar, hash_words, sample

__all__ = [
    "BOS",
    "EOS",
    "FIRST_TERMINAL",
    "MASK",
    "PAD",
    "Grammar",
    "PcfgDataset",
    "Strings",
    "build_grammar",
    "pcfg_collator",
    "pcfg_config",
    "pcfg_tokens",
    "sample",
]

PAD, MASK, BOS, EOS, FIRST_TERMINAL = range(5)


def pcfg_tokens(grammar: Grammar) -> dict[str, int]:
    """The vocabulary: four special tokens, then the terminals `t0`, `t1`, ..."""
    names = ("<pad>", "<mask>", "<bos>", "<eos>", *(f"t{terminal}" for terminal in range(grammar.terminals)))
    return {name: index for index, name in enumerate(names)}


class PcfgDataset(Dataset[dict[str, torch.Tensor]]):
    """Strings of a grammar as rows `{"input_ids": (T,)}`, drawn when asked for.

    Row i depends on the grammar, the seed and i alone, so nothing is kept, any order costs the same, and a shorter dataset
    is the beginning of a longer one. Datasets of different seeds are different streams; a small grammar has so few strings
    that equal ones occur in both all the same (levels=4 has some hundreds).

    Args:
        grammar: the language.
        count: rows.
        seed: 0 to 2^64 - 1.
        max_length: cut longer rows to their first `max_length` tokens (which lose `<eos>` and are not members); None keeps
            every string whole.

    Raises:
        UserError: no rows, a seed out of range, or a `max_length` that leaves nothing to predict.
    """

    def __init__(self, grammar: Grammar, count: int, seed: int, max_length: int | None = None):
        if count < 1:
            raise UserError(f"a dataset needs a count of at least 1, got {count}")
        if max_length is not None and max_length < 3:
            raise UserError(f"max_length {max_length} is too short: <bos> and two more tokens need 3")
        sample(grammar, 0, seed)  # refuses a wrong seed now, not in a worker
        self.grammar, self.count, self.seed, self.max_length = grammar, count, seed, max_length

    @property
    def longest(self) -> int:
        """Tokens that a row can have at most."""
        return min(self.grammar.longest + 2, self.max_length or self.grammar.longest + 2)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        """Rows drawn together, which is much faster than one by one; PyTorch's loader calls it."""
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
        # a cut row gets storage of its own, or a worker would send the whole batch with it
        return [{"input_ids": row[: self.max_length].clone()} for row in rows]


# ---- Collators ----


def pcfg_collator(task: str, grammar: Grammar, mask_probability: float = 0.3, seed: int | None = None) -> Any:
    """The data collator for a task: pads, and gives `input_ids`, `attention_mask` and `labels`, each (N, T).

    Causal models get the ids themselves as labels (the model shifts them). For masked models each terminal is chosen with
    `mask_probability`; of the chosen, 80% become `<mask>`, 10% a random terminal and 10% stay, as in BERT; the labels are the
    ids of the chosen. Padding and positions not chosen are labelled -100.

    Args:
        task: masked_lm or causal_lm.
        grammar: its number of terminals is used.
        mask_probability: above 0, at most 1.
        seed: None draws from PyTorch's global generator, so that the trainer's seed governs the masks. A number makes a row's
            masks depend on the seed and the row alone, whatever the batch: the same at every evaluation.

    Raises:
        UserError: an unknown task, or a probability or a seed out of range.
    """
    _check_task(task)
    if not 0 < mask_probability <= 1:
        raise UserError(f"mask_probability must be above 0 and at most 1, got {mask_probability}")
    if seed is not None and not 0 <= seed < 1 << 64:
        raise UserError(f"a seed is a whole number from 0 to 2^64 - 1, got {seed}")
    return (
        CausalCollator(PAD, always_mask=True)
        if task == "causal_lm"
        else MaskingCollator(grammar.terminals, mask_probability, seed)
    )


class MaskingCollator(CausalCollator):
    """Pads, and masks terminals as BERT does (80/10/10)."""

    def __init__(self, terminals: int, mask_probability: float, seed: int | None = None):
        super().__init__(PAD, always_mask=True)
        self.terminals, self.mask_probability, self.seed = terminals, mask_probability, seed

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = super().__call__(rows)
        ids_NT = batch["input_ids"]
        choice_NT, fate_NT, terminal_NT = self._uniform(ids_NT, batch["attention_mask"])
        chosen_NT = (choice_NT < self.mask_probability) & (ids_NT >= FIRST_TERMINAL)
        random_NT = FIRST_TERMINAL + (terminal_NT * self.terminals).long()
        noised_NT = torch.where(fate_NT < 0.8, MASK, torch.where(fate_NT < 0.9, random_NT, ids_NT))
        batch["input_ids"] = torch.where(chosen_NT, noised_NT, ids_NT)
        batch["labels"] = ids_NT.masked_fill(~chosen_NT, IGNORED_LABEL)
        return batch

    def _uniform(self, ids_NT: torch.Tensor, real_NT: torch.Tensor) -> torch.Tensor:
        """Three uniform numbers in [0, 1) for each position, (3, N, T)."""
        if self.seed is None:
            return torch.rand(3, *ids_NT.shape, dtype=torch.float64)
        place_T = np.arange(ids_NT.shape[1])
        content_NT = hash_words(ids_NT.numpy().astype(np.uint64), place_T) * real_NT.numpy().astype(np.uint64)
        keys_N = hash_words(np.array([self.seed], dtype=np.uint64), 0) + content_NT.sum(axis=1)
        words = hash_words(hash_words(keys_N, 0)[:, None], 3 * place_T + np.arange(3)[:, None, None])
        return torch.from_numpy((words >> np.uint64(11)) * 2.0**-53)


# ---- Models ----


def pcfg_config(
    task: str, layers: int, heads: int, head_width: int, grammar: Grammar, max_length: int | None = None, **fields: Any
) -> BertConfig | GPT2Config:
    """The config of a model for a grammar: a BERT for masked_lm, a GPT-2 with tied embeddings for causal_lm.

    No dropout; the feed-forward layers are four times as wide as the hidden states, heads * head_width.

    Args:
        task: masked_lm or causal_lm.
        layers: blocks.
        heads: attention heads of a block.
        head_width: width of a head.
        grammar: gives the vocabulary and the longest row.
        max_length: positions; None takes what the grammar's longest string needs.
        fields: more fields of the config, or other values for those set here.

    Raises:
        UserError: an unknown task, or a size below 1.
    """
    _check_task(task)
    for name, value in (("layers", layers), ("heads", heads), ("head_width", head_width), ("max_length", max_length)):
        if value is not None and value < 1:
            raise UserError(f"a model needs {name} of at least 1, got {value}")
    width = heads * head_width
    shared = {"vocab_size": len(pcfg_tokens(grammar)), "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    positions = max_length or grammar.longest + 2
    if task == "masked_lm":
        bert = {
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "intermediate_size": 4 * width,
            "max_position_embeddings": positions,
            "type_vocab_size": 1,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        }
        return BertConfig(**{**shared, **bert, **fields})
    gpt = {
        "n_embd": width,
        "n_layer": layers,
        "n_head": heads,
        "n_inner": 4 * width,
        "n_positions": positions,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "tie_word_embeddings": True,
    }
    return GPT2Config(**{**shared, **gpt, **fields})


def _check_task(task: str) -> None:
    if task not in ("masked_lm", "causal_lm"):
        raise UserError(f"no task {task!r} on a grammar: use masked_lm or causal_lm")
