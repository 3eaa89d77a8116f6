"""Work that several processes share (`torch.distributed`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import distributed

from tutelage.core.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """Processes that make the same calls in the same order; the default is this process alone."""

    rank: int = 0
    size: int = 1
    device: torch.device | str = "cpu"  # where the backend adds tensors

    @classmethod
    def of_all(cls, device: torch.device | str) -> Group:
        """All processes of the run, where it has several."""
        if distributed.is_available() and distributed.is_initialized():
            return cls(distributed.get_rank(), distributed.get_world_size(), device)
        return cls()

    def mine(self, items: Sequence[T]) -> Iterator[tuple[int, T]]:
        """This process's part of `items`, with their indices: every `size`-th from its rank on."""
        for index in range(self.rank, len(items), self.size):
            yield index, items[index]

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """`values`, on the CPU, added over the processes."""
        if self.size == 1:
            return values
        total = values.clone().to(self.device)
        distributed.all_reduce(total)
        return total.cpu()

    def gather(self, value: T) -> list[T]:
        """The `value` of each process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    def first(self, make: Callable[[], T]) -> T:
        """What `make` gives the first process; the others wait for it. What it raises, all raise."""
        if self.size == 1:
            return make()
        made: list[Any] = [None, None]
        failed: Exception | None = None
        if self.rank == 0:
            try:
                made[0] = make()
            except Exception as error:
                failed = error
                made[1] = UserError(str(error)) if isinstance(error, UserError) else RuntimeError(repr(error))
        distributed.broadcast_object_list(made, src=0, device=torch.device(self.device))
        if made[1] is not None:
            raise failed or made[1]
        return made[0]
