"""Whether models tell the sequences of packed rows apart. Shapes: B batch, T positions."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from tutelage.core.blocks import FINAL
from tutelage.core.errors import UserError
from tutelage.core.inputs import PACKED
from tutelage.core.probe import evaluating, has_no_values, probe_ids
from tutelage.tasks.base import Batch, Task

_WRONG = 0.1  # of what reading a row as one sequence does
_ROUNDING = 1e-6  # of the states


@dataclass(frozen=True)
class PackingCheck:
    """Refuses packed rows that one of the models would read as one sequence.

    Where a batch may say that rows are packed, each model runs once on a short row of two sequences, on each of them, and on
    the row without what says that there are two. Its states must be those of each sequence alone, and those of the second one
    must not depend on the first. Batches with the same entries are not looked at again if all models are
    right; otherwise each one is, for what makes a row packed."""

    models: Sequence[nn.Module]
    task: Task
    seen: dict[frozenset[str], nn.Module | None] = field(
        default_factory=dict
    )  # the model that is wrong with such entries

    def __call__(self, batch: Batch) -> Batch:
        """`batch`; UserError where one of the models would read it wrongly."""
        entries = frozenset(key for key in (*PACKED, "attention_mask") if key in batch)
        if not entries & {*PACKED} or ("position_ids" in batch and batch["position_ids"].dim() != 2):
            return batch
        if entries not in self.seen:
            self.seen[entries] = next((model for model in self.models if not self._tells_apart(model, entries)), None)
        wrong = self.seen[entries]
        if wrong is not None and is_packed(batch):
            what = f"the rows of the data hold several sequences, which {type(wrong).__name__} reads as one where a batch has"
            raise UserError(
                f"{what} {', '.join(sorted(entries))}: causal models of transformers need position_ids that begin anew, and no "
                "attention_mask; for other models use a collator that does not pack"
            )
        return batch

    def _tells_apart(self, model: nn.Module, entries: frozenset[str]) -> bool:
        if has_no_values(model):
            return True
        if not self.task.per_position:
            return False
        ids = probe_ids(model)
        first = ids.shape[1] // 3
        other = torch.cat([ids[:, -first:], ids[:, first:]], dim=1)  # a different first sequence
        with evaluating(model):
            parts = [self._states(model, {"input_ids": part}) for part in (ids[:, :first], ids[:, first:])]
            packed, changed = (self._states(model, _packed(row, first, entries)) for row in (ids, other))
            joined, mixed = (self._states(model, {"input_ids": row}) for row in (ids, other))
        apart = torch.cat(parts, dim=1)
        return _is_small(packed - apart, joined - apart, apart) and _is_small(
            (packed - changed)[:, first:], (joined - mixed)[:, first:], apart
        )

    def _states(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        example = self.task.example(batch["input_ids"].shape[1])
        extra = {key: value for key, value in example.items() if key != "attention_mask"}
        return self.task.state_at(model, FINAL, {**extra, **batch}).float()


def _is_small(found: torch.Tensor, wrong: torch.Tensor, states: torch.Tensor) -> bool:
    return bool(found.norm() <= _WRONG * wrong.norm() + _ROUNDING * states.norm())


def is_packed(batch: Batch) -> bool:
    """Whether a row of a batch holds several sequences."""
    positions, described, numbers = (batch.get(key) for key in ("position_ids", "cu_seq_lens_q", "seq_idx"))
    found = described is not None and len(described) - 1 > len(batch["input_ids"])
    if positions is not None:
        anew = positions.diff() != 1
        if (mask := batch.get("attention_mask")) is not None:
            anew = anew & mask[:, 1:].bool() & mask[:, :-1].bool()
        found = found or bool(anew.any())
    return found or (numbers is not None and bool((numbers.diff() != 0).any()))


def _packed(ids_1T: torch.Tensor, first: int, entries: frozenset[str]) -> Batch:
    """A row of two sequences, the first one of `first` tokens, with what `entries` says of it."""
    total, device = ids_1T.shape[1], ids_1T.device
    numbers = (torch.arange(total, device=device) >= first).int()[None]
    ends = torch.tensor([0, first, total], dtype=torch.int32, device=device)
    values = {
        "position_ids": torch.arange(total, device=device)[None] - first * numbers,
        "seq_idx": numbers,
        "attention_mask": torch.ones_like(ids_1T),
        **dict.fromkeys(["cu_seq_lens_q", "cu_seq_lens_k"], ends),
        **dict.fromkeys(["max_length_q", "max_length_k"], total - first),
    }
    return {"input_ids": ids_1T, **{key: values[key] for key in entries}}
