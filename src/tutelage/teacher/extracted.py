"""A curriculum read back from disk: what a student trains from in the teacher's place.

Public names: `ExtractedCurriculum`, `StoredRows`, `StoredBatch`, `StoredCollator`, `epoch_order`.

A curriculum extracted at width R serves students of width r <= R: the first r columns of a random projection are the
projection to r, and the data-aware ones are sorted. It serves every increasing subset of its stages.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedTokenizerBase

from tutelage.core.curriculum import Curriculum, LayerMap
from tutelage.core.heads import OutputHead
from tutelage.teacher import rows
from tutelage.teacher.loading import load_tokenizer
from tutelage.teacher.rows import RowFormat
from tutelage.teacher.storage import Manifest, open_split, read_manifest, verify
from tutelage.teacher.targets import TargetMap, load_target_maps

TEACHER_FOLDER, TOKENIZER_FOLDER = "teacher", "tokenizer"
MAPS_FILE, HEAD_FILE = "maps.safetensors", "head.safetensors"


def epoch_order(count: int, seed: int, epoch: int, sequential: bool = False) -> Sequence[int]:
    """The order in which the trainer's sampler reads `count` examples in an epoch."""
    if sequential:
        return range(count)
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed + epoch)).tolist()
    return order


class ExtractedCurriculum:
    """A finished extraction.

    Args:
        folder: its folder.
        check: compare every file with its checksum first, which reads all of them.

    Raises:
        ValueError: unfinished, damaged, or of a newer format.
    """

    def __init__(self, folder: str | Path, check: bool = True):
        self.folder = Path(folder)
        self.manifest: Manifest = read_manifest(self.folder)
        if check:
            verify(self.folder, self.manifest)
        self.curriculum = Curriculum.from_json(self.identity["curriculum"])

    @property
    def identity(self) -> dict[str, Any]:
        """What it was made from."""
        return self.manifest.identity

    @property
    def width(self) -> int:
        """R."""
        return int(self.identity["width"])

    @property
    def teacher_blocks(self) -> int:
        """L_T."""
        return int(self.identity["teacher"]["blocks"])

    def split_of(self, index: int) -> str:
        """Name of the split of the extracted curriculum's stage `index`."""
        return f"stage_{index + 1}"

    def form(self, split: str) -> RowFormat:
        """How a split's rows are stored."""
        return RowFormat(**self.identity["forms"][split])

    def stages(self, curriculum: Curriculum) -> list[int]:
        """For each stage of `curriculum`, the index of the extracted stage that it reads.

        Raises:
            ValueError: a stage that was not extracted, or other settings than those it was extracted with.
        """
        for name in ("projection", "projection_seed", "normalize", "temperature", "top_k"):
            mine, theirs = getattr(self.curriculum, name), getattr(curriculum, name)
            if mine != theirs and (name not in ("temperature", "top_k") or self._has_output):
                raise ValueError(
                    f"the curriculum in {str(self.folder)!r} was extracted with {name}={mine}, not {theirs}: leave {name} as "
                    "it was, or extract again"
                )
        found = []
        for stage in curriculum.stages:
            for index, mine in enumerate(self.curriculum.stages):
                if mine.kind == stage.kind and mine.teacher_place == stage.teacher_place:
                    found.append(index)
                    break
            else:
                held = ", ".join(
                    str(s.teacher_place) if s.kind == "hidden" else "output" for s in self.curriculum.stages
                )
                raise ValueError(
                    f"the curriculum in {str(self.folder)!r} does not hold the stage {stage.name!r}: it has teacher places "
                    f"{held}; choose from these with layer_map, or extract again"
                )
        return found

    @property
    def _has_output(self) -> bool:
        return any(stage.kind == "output" for stage in self.curriculum.stages)

    def check_width(self, width: int) -> None:
        """Raise ValueError for a student wider than what was extracted."""
        if width > self.width and any(stage.kind == "hidden" for stage in self.curriculum.stages):
            raise ValueError(
                f"the curriculum in {str(self.folder)!r} holds projections to width {self.width}, the student is {width} wide: "
                f"extract again with --projection_dim {width}, or choose a narrower student"
            )

    def target_maps(self, curriculum: Curriculum, width: int) -> list[TargetMap | None]:
        """The map of each stage of `curriculum`, to a student of `width`."""
        mine = load_target_maps(self.folder / MAPS_FILE, self.curriculum, width, self.teacher_blocks)
        return [mine[index] for index in self.stages(curriculum)]

    @cached_property
    def head(self) -> OutputHead | None:
        """The teacher's output head; None where it was not extracted."""
        path = self.folder / HEAD_FILE
        if not path.is_file():
            return None
        tensors = load_file(path)
        weight = tensors["weight"]
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in tensors)
        linear.load_state_dict({name: value for name, value in tensors.items() if name in ("weight", "bias")})
        return OutputHead(linear.requires_grad_(False), **self.identity["head"])

    def layer_map(self, student_blocks: int) -> LayerMap:
        """Student place and teacher place of each hidden stage: as extracted, or evenly spaced where those do not fit."""
        hidden = [stage for stage in self.curriculum.stages if stage.kind == "hidden"]
        places = [stage.student_place for stage in hidden]
        if all(not isinstance(place, int) or place <= student_blocks for place in places):
            return [(stage.student_place, stage.teacher_place) for stage in hidden]  # type: ignore[misc]
        fitted: list[Any] = []
        for stage in hidden:
            place: Any = stage.student_place
            if isinstance(place, int):
                assert isinstance(stage.teacher_place, int)
                place = max(1, round(stage.teacher_place * student_blocks / self.teacher_blocks))
            fitted.append((place, stage.teacher_place))
        return fitted

    @property
    def digest(self) -> str:
        """Of what it was made from."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:16]

    def calibration(self, width: int, batch_size: int) -> list[StoredBatch]:
        """Rows of the calibration split in batches, decoded as those of the head stage."""
        split = self.manifest.split("calibration")
        table = open_split(self.folder, split).with_format("arrow")
        return [
            StoredBatch(table[start : start + batch_size], self.form("calibration"), self, width)
            for start in range(0, split.rows, batch_size)
        ]

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer that the data was encoded with."""
        return load_tokenizer(str(self.folder / TOKENIZER_FOLDER))

    @property
    def teacher_config(self) -> Path:
        """Folder with the teacher's config."""
        return self.folder / TEACHER_FOLDER

    @cached_property
    def evaluation(self) -> Dataset:
        """Held-out rows."""
        return open_split(self.folder, self.manifest.split("evaluation")).remove_columns(["example_id", "content_hash"])


@dataclasses.dataclass(frozen=True)
class StoredBatch:
    """Rows of one split, and how to read them."""

    table: pa.Table
    form: RowFormat
    source: ExtractedCurriculum
    width: int
    """r of the student."""

    def tensors(self, pad_id: int) -> dict[str, torch.Tensor]:
        """Model inputs, labels and targets."""
        identity = self.source.identity
        batch = rows.decode_inputs(self.table, self.form, pad_id, identity["with_mask"])
        if self.form.label == "none" and identity["causal"]:
            labels = batch["input_ids"].clone()
            if "attention_mask" in batch:
                labels[batch["attention_mask"] == 0] = rows.IGNORED_LABEL
            batch["labels"] = labels
        if self.form.kind in ("states", "pooled"):
            return batch | rows.decode_states(self.table, self.form, self.width, self.source.width)
        if self.form.kind == "top_k":
            return batch | rows.decode_outputs(self.table, int(identity["kept"]))
        return batch | rows.decode_whole(self.table)


class StoredRows(torch.utils.data.Dataset[Any]):
    """The training data of a run from disk, in the order of its optimiser steps.

    Position p belongs to step p // G, G the examples of an optimiser step over all devices, and so to a stage. A run with the
    seed, stages and steps of the extraction reads its rows in the very order in which it would read the data with the teacher
    at hand. In any other run a stage reads its rows in an order drawn from (seed, stage, pass), again where they run out.

    Args:
        source: the curriculum on disk.
        curriculum: the run's stages.
        width: of the student.
        step_examples: G.
        seed: of the order.
    """

    def __init__(self, source: ExtractedCurriculum, curriculum: Curriculum, width: int, step_examples: int, seed: int):
        self.source, self.width, self.seed = source, width, seed
        self.splits = [source.split_of(index) for index in source.stages(curriculum)]
        self.tables = [
            open_split(source.folder, source.manifest.split(name)).with_format("arrow") for name in self.splits
        ]
        counts = [stage.steps * step_examples for stage in curriculum.stages]
        self.starts = np.concatenate([[0], np.cumsum(counts)])
        self._orders: dict[tuple[int, int], np.ndarray] = {}
        self.planned = self._is_planned(curriculum, step_examples)

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return int(self.source.identity["longest"])

    def place(self, position: int) -> tuple[int, int]:
        """Stage and row of a position."""
        stage = int(np.searchsorted(self.starts, position, side="right")) - 1
        if self.planned:
            return stage, self._planned_row(stage, position)
        passes, row = divmod(position - int(self.starts[stage]), len(self.tables[stage]))
        return stage, int(self._order(stage, passes)[row])

    def _order(self, stage: int, passes: int) -> np.ndarray:
        key = (stage, passes)
        if key not in self._orders:
            self._orders = {kept: order for kept, order in self._orders.items() if kept[0] == stage}
            generator = np.random.RandomState([self.seed % 2**32, stage, passes])
            self._orders[key] = generator.permutation(len(self.tables[stage]))
        return self._orders[key]

    def _is_planned(self, curriculum: Curriculum, step_examples: int) -> bool:
        identity, extracted = self.source.identity, self.source.curriculum
        same_steps = [s.steps for s in curriculum.stages] == [s.steps for s in extracted.stages]
        return self.seed == identity["seed"] and step_examples == identity["step_examples"] and same_steps

    def _planned_row(self, stage: int, position: int) -> int:
        """Row of the example that the trainer's own sampler draws at a position."""
        identity = self.source.identity
        epoch, index = divmod(position, int(identity["data"]["rows"]))
        key = (-1, epoch)
        if key not in self._orders:
            order = epoch_order(int(identity["data"]["rows"]), self.seed, epoch, identity["sequential"])
            self._orders = {kept: order for kept, order in self._orders.items() if kept[0] != -1} | {
                key: np.array(order)
            }
        if (-2, stage) not in self._orders:
            ids = self.tables[stage].data.column("example_id").to_numpy()
            row_of = np.full(int(identity["data"]["rows"]), -1, dtype=np.int64)
            row_of[ids] = np.arange(len(ids))
            self._orders = {kept: order for kept, order in self._orders.items() if kept[0] != -2} | {
                (-2, stage): row_of
            }
        return int(self._orders[-2, stage][self._orders[key][index]])

    def __getitems__(self, positions: Sequence[int]) -> StoredBatch:
        places = [self.place(position) for position in positions]
        stages = {stage for stage, _ in places}
        assert len(stages) == 1, "a batch never holds rows of two stages"
        stage = stages.pop()
        table = self.tables[stage][[row for _, row in places]]
        return StoredBatch(table, self.source.form(self.splits[stage]), self.source, self.width)

    def __getitem__(self, position: int) -> dict[str, Any]:
        batch = self.__getitems__([position]).tensors(0)
        return {"input_ids": batch["input_ids"][0]}


class StoredCollator:
    """Decodes stored batches; other rows go to the run's own collator."""

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]], pad_id: int):
        self.collator, self.pad_id = collator, pad_id

    def __call__(self, batch: Any) -> dict[str, Any]:
        return batch.tensors(self.pad_id) if isinstance(batch, StoredBatch) else self.collator(batch)
