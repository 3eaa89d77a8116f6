"""The rows of a curriculum on disk, in the order in which a run reads them."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset

from tutelage.core.curriculum import Curriculum
from tutelage.io.store import Store
from tutelage.targets.folder import ExtractedCurriculum, StoredBatch
from tutelage.targets.manifest import Split, check_shards_exist, open_split
from tutelage.targets.maps import Widths, width_at
from tutelage.targets.source import Reading, epoch_order


class StoredRows(torch.utils.data.Dataset[Any]):
    """The training data of a run from disk, one position for each example of each optimiser step.

    Position p belongs to step p // G and so to a stage. A stage reads its own rows, each once before any comes again:

    - as the trainer would read the data with the teacher at hand, in a run with the seed, stages and steps of the extraction
      whose files are on this machine;
    - else in an order drawn from (seed, stage, pass): over all rows where the files are on this machine, and where they are
      not, shard after shard in a drawn order, each device its own shards, so that a shard is fetched once a pass."""

    def __init__(self, source: ExtractedCurriculum, curriculum: Curriculum, widths: Widths, reading: Reading):
        self.source, self.reading = source, reading
        extracted = source.stages(curriculum)
        self.splits = [f"stage_{index + 1}" for index in extracted]
        self.reads = []  # of each stage: the arguments `targets` and `output` of its batches
        for stage, index in zip(curriculum.stages, extracted, strict=True):
            mine = [width_at(widths, pair.student_place) for pair in stage.pairs]
            targets = tuple(zip(source.targets(stage, index), mine, strict=True))
            self.reads.append((targets, stage.output is not None))
        local = source.store.local is not None
        kind = _MappedRows if local else _FetchedRows
        self.tables = [kind(source.store, source.manifest.split(name)) for name in self.splits]
        counts = [stage.steps * reading.step_examples for stage in curriculum.stages]
        self.starts = np.concatenate([[0], np.cumsum(counts)])
        identity, steps = (
            source.identity,
            [[stage.steps for stage in c.stages] for c in (curriculum, source.curriculum)],
        )
        same_order = (reading.seed, reading.step_examples) == (identity.seed, identity.step_examples)
        self.planned = local and same_order and steps[0] == steps[1]
        self._kept: dict[str, tuple[Any, np.ndarray]] = {}

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def longest(self) -> int:
        return self.source.identity.longest

    def place(self, position: int) -> tuple[int, int]:
        """Stage and row of a position."""
        stage = int(np.searchsorted(self.starts, position, side="right")) - 1
        if self.planned:
            return stage, self._planned_row(stage, position)
        table = self.tables[stage]
        passes, index = divmod(position - int(self.starts[stage]), len(table))
        key = (self.reading.seed % 2**32, stage, passes)
        order = self._once("pass", key, lambda: table.order(np.random.RandomState(list(key)), self.reading))
        return stage, int(order[index])

    def _once(self, name: str, key: Any, make: Callable[[], np.ndarray]) -> np.ndarray:
        """An array that is needed many times in a row, made when its key changes."""
        if name not in self._kept or self._kept[name][0] != key:
            self._kept[name] = (key, make())
        return self._kept[name][1]

    def _planned_row(self, stage: int, position: int) -> int:
        """Row of the example that the trainer's own sampler draws at a position."""
        identity, table = self.source.identity, self.tables[stage]
        assert isinstance(table, _MappedRows), "a planned order is over rows on this machine"
        count = identity.data.rows
        epoch, index = divmod(position, count)
        order = self._once("epoch", epoch, lambda: epoch_order(count, self.reading.seed, epoch, identity.sequential))
        row_of = self._once("rows", stage, lambda: table.rows_by_example(count))
        return int(row_of[order[index]])

    def __getitems__(self, positions: Sequence[int]) -> StoredBatch:
        places = [self.place(position) for position in positions]
        stages = {stage for stage, _ in places}
        assert len(stages) == 1, "a batch never holds rows of two stages"
        stage = stages.pop()
        table = self.tables[stage].take([row for _, row in places])
        return StoredBatch(table, self.source.identity.forms[self.splits[stage]], self.source, *self.reads[stage])

    def __getitem__(self, position: int) -> dict[str, Any]:
        return {"input_ids": self.__getitems__([position]).tensors(0)["input_ids"][0]}


class _MappedRows:  # on this machine, memory-mapped
    def __init__(self, store: Store, split: Split):
        self.data = open_split(store, split).with_format("arrow")

    def __len__(self) -> int:
        return len(self.data)

    def take(self, rows: list[int]) -> pa.Table:
        return self.data[rows]

    def rows_by_example(self, count: int) -> np.ndarray:
        """The row of each of `count` examples; -1 for those without one."""
        found = np.full(count, -1, dtype=np.int64)
        found[self.data.data.column("example_id").to_numpy()] = np.arange(len(self))
        return found

    def order(self, generator: np.random.RandomState, reading: Reading) -> np.ndarray:
        return generator.permutation(len(self))


class _FetchedRows:
    """Rows of a split behind a URL: a shard is fetched when one of its rows is needed, and checked then."""

    def __init__(self, store: Store, split: Split):
        self.store, self.split = store, split
        check_shards_exist(store, split)
        rows = [shard.rows for shard in split.shards]
        self.ends = np.cumsum(rows)
        self.starts = self.ends - rows
        self._open: OrderedDict[int, Dataset] = OrderedDict()

    def __len__(self) -> int:
        return int(self.ends[-1])

    def _shard(self, number: int) -> Dataset:
        if number not in self._open:
            while len(self._open) >= self.store.kept:
                self._open.popitem(last=False)
            shard = self.split.shards[number]
            self._open[number] = open_split(self.store, Split(self.split.name, (shard,))).with_format("arrow")
        self._open.move_to_end(number)
        return self._open[number]

    def take(self, rows: list[int]) -> pa.Table:
        numbers = np.searchsorted(self.ends, rows, side="right")
        parts = [self._shard(int(n))[[int(row - self.starts[n])]] for n, row in zip(numbers, rows, strict=True)]
        return pa.concat_tables(parts)

    def order(self, generator: np.random.RandomState, reading: Reading) -> np.ndarray:
        """Of a pass: shards in a drawn order, dealt to the devices; a device's micro-batches come from its own shards."""
        shards = generator.permutation(len(self.split.shards))

        def rows_of(numbers: Iterable[int]) -> np.ndarray:
            parts = [self.starts[n] + generator.permutation(self.split.shards[n].rows) for n in numbers]
            return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

        streams = _evened([rows_of(shards[device :: reading.devices]) for device in range(reading.devices)])
        size = reading.batch_size
        turns = range(0, max(len(stream) for stream in streams), size)
        return np.concatenate([stream[start : start + size] for start in turns for stream in streams]).astype(np.int64)


def _evened(streams: list[np.ndarray]) -> list[np.ndarray]:
    """The streams with the ends of the longer ones given to the shorter ones."""
    total = sum(len(stream) for stream in streams)
    wanted = [total // len(streams) + (index < total % len(streams)) for index in range(len(streams))]
    spare = np.concatenate([stream[size:] for stream, size in zip(streams, wanted, strict=True)])
    evened = []
    for stream, size in zip(streams, wanted, strict=True):
        missing = max(0, size - len(stream))
        evened.append(np.concatenate([stream[:size], spare[:missing]]))
        spare = spare[missing:]
    return evened


def collate(collator: Callable[[Any], dict[str, Any]], pad_id: int, batch: Any) -> dict[str, Any]:
    """Decodes stored batches; other rows go to the run's own collator."""
    return batch.tensors(pad_id) if isinstance(batch, StoredBatch) else collator(batch)
