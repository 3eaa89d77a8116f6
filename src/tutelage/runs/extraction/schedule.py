"""Which rows a stage reads, and how they are divided into shards.

The data is divided among the stages as training with the same settings divides it: the rows of a stage are those that the
steps of the stage would read, in that order."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tutelage.core.curriculum import Curriculum
from tutelage.targets.source import Reading, epoch_order

Batches = list[list[int]]
"""Examples of the batches of a shard."""


@dataclass(frozen=True)
class Schedule:
    """The order in which a run reads its training rows."""

    curriculum: Curriculum
    rows: int  # training examples
    reading: Reading
    sequential: bool = False
    all_stages: bool = False  # every stage reads every row

    def examples(self, index: int) -> list[int]:
        """Rows that stage `index` reads, in the order it reads them, each once."""
        if self.all_stages:
            return self.order(0)
        stages, size = self.curriculum.stages, self.reading.step_examples
        start = sum(stage.steps for stage in stages[:index]) * size
        stop = start + stages[index].steps * size
        seen: dict[int, None] = {}
        for epoch in range(start // self.rows, math.ceil(stop / self.rows)):
            before = epoch * self.rows
            seen.update(dict.fromkeys(self.order(epoch)[max(0, start - before) : stop - before]))
            if len(seen) == self.rows:
                break
        return list(seen)

    def order(self, epoch: int) -> list[int]:
        """The order in which the trainer's sampler reads the data in an epoch."""
        return epoch_order(self.rows, self.reading.seed, epoch, self.sequential).tolist()


def plan_shards(examples: Sequence[int], lengths: Sequence[int], batch_size: int, shard_tokens: int) -> list[Batches]:
    """Examples in batches, batches in shards of about `shard_tokens` tokens; `lengths` are the tokens of each example."""
    shards: list[Batches] = [[]]
    tokens = 0
    for start in range(0, len(examples), batch_size):
        batch = sum(lengths[start : start + batch_size])
        if shards[-1] and tokens + batch > shard_tokens:
            shards.append([])
            tokens = 0
        shards[-1].append(list(examples[start : start + batch_size]))
        tokens += batch
    return shards
