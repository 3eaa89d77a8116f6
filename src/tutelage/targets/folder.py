"""An extracted curriculum read back from disk.

A curriculum extracted at width R serves students of width r <= R: the first r columns of a random projection are the
projection to r, and the data-aware ones are sorted. It serves every increasing subset of its stages."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedTokenizerBase

from tutelage.core.curriculum import RESIDUAL, Curriculum
from tutelage.core.errors import UserError
from tutelage.core.heads import OutputHead
from tutelage.core.projection import LEARNED
from tutelage.core.stages import LayerMap, Stage
from tutelage.io.files import is_leftover
from tutelage.io.store import Check, Store
from tutelage.targets import rows
from tutelage.targets.identity import ExtractionIdentity
from tutelage.targets.manifest import Manifest, check_shards_exist, comparing, open_split, read_manifest, verify
from tutelage.targets.maps import Maps, Widths, load_target_maps, width_at
from tutelage.targets.rows import RowFormat
from tutelage.tasks.loading import load_tokenizer

TEACHER_FOLDER, TOKENIZER_FOLDER, STUDENT_FOLDER = "teacher", "tokenizer", "student"
OF_THE_START = ("projection", "student_init", "residual_basis", "start_blocks")  # what residual targets decide
STATISTICS_FILE, HEAD_FILE = "target_stats.safetensors", "head.safetensors"


# Settings that need what no extraction stores.
_NOT_STORED = {
    "projection": (LEARNED, "the teacher's own states"),
    "output_loss": ("mse", "all logits of the teacher"),
    "output_positions": ("all", "the teacher's outputs at positions without a label"),
}


def check_storable(settings: object) -> None:
    """Raise UserError where settings of a run or a curriculum need what no extracted curriculum contains."""
    for name, (value, what) in _NOT_STORED.items():
        if getattr(settings, name) == value:
            found = f"{name}={value!r} needs {what}, which an extracted curriculum does not contain"
            raise UserError(f"{found}: train with the teacher itself, or leave {name} out")


def stray_files(store: Store, known: Collection[str]) -> list[str]:
    """Files that libraries would read with those of the teacher's config, the tokenizer or the student, but that no extraction
    wrote; hidden and temporary ones are left out."""
    folders = (TEACHER_FOLDER, TOKENIZER_FOLDER, STUDENT_FOLDER)
    found = [name for folder in folders for name in store.files(folder)]
    return [name for name in found if not (name in known or is_leftover(name) or Path(name).name.startswith("."))]


def _reads(stage: Stage) -> list[str]:
    """What the rows of a stage hold: places of the teacher, and its output."""
    return [*(str(pair.teacher_place) for pair in stage.pairs), *(["output"] if stage.output is not None else [])]


class ExtractedCurriculum:
    """A finished extraction, in a folder or behind any fsspec URL; `check` compares every file with its checksum first, which
    reads all of them. Without it a file is compared when it is opened, but for the shards of stages on this machine. Raises
    UserError: unfinished, damaged, or of a newer format."""

    def __init__(self, folder: str | Path, check: bool = True):
        self.store = Store(folder)
        self.manifest: Manifest = read_manifest(self.store)
        self.identity: ExtractionIdentity = self.manifest.identity
        self.curriculum = self.identity.curriculum
        self._verified: set[str] = set()  # files on this machine that were compared with their checksums
        if check:
            self.check()

    def check(self, shards: bool = True) -> None:
        """UserError if a file is missing or differs from its checksum; without `shards`, only the small ones are compared."""
        names = self.manifest.checksums if shards else self.manifest.files
        self._verify(names)
        self._check_strays()

    def _verify(self, names: Iterable[str]) -> None:
        """Compare files on this machine, or behind the URL, with their checksums, each once."""
        new = {name: self.manifest.checksums[name] for name in names if name not in self._verified}
        verify(self.store, new)
        if self.store.local is not None:  # what is fetched later may differ
            self._verified |= new.keys()

    def _check_strays(self) -> None:
        if self.store.local is not None and (stray := stray_files(self.store, self.manifest.files)):
            raise UserError(
                f"{stray[0]} of the extracted curriculum {str(self.store)!r} is not in its manifest, but would be read: "
                "delete it"
            )

    def _file(self, name: str) -> Path:
        """A file on this machine, compared with its checksum before it is opened."""
        if name not in self.manifest.files:
            raise UserError(
                f"the manifest of the extracted curriculum {str(self.store)!r} lists no {name}: extract again"
            )
        if self.store.local is not None:
            self._verify([name])
        return self.store.fetch(name, self._comparing(name))

    def _folder(self, folder: str) -> Path:
        """A small folder on this machine; all that is in it is compared with its checksum."""
        names = [name for name in self.manifest.files if name.startswith(f"{folder}/")]
        if self.store.local is not None:
            self._verify(names)
            self._check_strays()
        return self.store.fetch_folder(folder, names, self._comparing)

    def _comparing(self, name: str) -> Check:
        return comparing(self.store, name, self.manifest.files[name])

    def _rows(self, name: str) -> Dataset:
        """A small split, compared with its checksums before it is opened."""
        split = self.manifest.split(name)
        if self.store.local is not None:
            check_shards_exist(self.store, split)
            self._verify(shard.file for shard in split.shards)
        return open_split(self.store, split)

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of `Curriculum` that a run from this folder must have."""
        names = ["projection", "projection_seed", "normalize"] if self.curriculum.hidden_stages else []
        if names and self.curriculum.projection == RESIDUAL:
            names += OF_THE_START[1:]
        if any(stage.output is not None for stage in self.curriculum.stages):
            names += ["temperature", "top_k"]
        return {name: getattr(self.curriculum, name) for name in names}

    def stages(self, curriculum: Curriculum) -> list[int]:
        """For each stage of `curriculum`, the index of the extracted stage that it reads; UserError for a stage that was not
        extracted, and for other settings than those it was extracted with."""
        for name, extracted in self.settings.items():
            if name in OF_THE_START and self.curriculum.projection == RESIDUAL and not curriculum.hidden_stages:
                continue
            asked = getattr(curriculum, name)
            if extracted != asked:
                raise UserError(
                    f"the extracted curriculum in {str(self.store)!r} was made with {name}={extracted}, not {asked}: leave "
                    f"{name} out, or extract again"
                )
        stored = [_reads(stage) for stage in self.curriculum.stages]
        found = []
        for stage in curriculum.stages:
            fitting = [index for index, parts in enumerate(stored) if set(_reads(stage)) <= set(parts)]
            if not fitting:
                has = ", ".join(" + ".join(parts) for parts in stored)
                raise UserError(
                    f"the extracted curriculum in {str(self.store)!r} does not hold the stage {stage.name!r}: it has teacher "
                    f"places {has}; choose from these with layer_map, or extract again"
                )
            found.append(fitting[0])
        return found

    def targets(self, stage: Stage, index: int) -> list[int]:
        """The numbers, in the rows of extracted stage `index`, of the hidden targets that `stage` reads."""
        places = [pair.teacher_place for pair in self.curriculum.stages[index].pairs]
        return [places.index(pair.teacher_place) for pair in stage.pairs]

    def target_maps(self, curriculum: Curriculum, widths: Widths) -> Maps:
        """The maps of `curriculum`, to a student of these widths."""
        blocks, indices = self.identity.teacher.blocks, self.stages(curriculum)
        numbers = [
            self.curriculum.pair_numbers[index][target]
            for stage, index in zip(curriculum.stages, indices, strict=True)
            for target in self.targets(stage, index)
        ]
        as_extracted = dict.fromkeys(self.curriculum.places("student"), self.identity.width)
        for pair, number in zip(curriculum.hidden_stages, numbers, strict=True):
            extracted = self.curriculum.hidden_stages[number]
            as_extracted[extracted.student_place] = width_at(widths, pair.student_place)
        stored = load_target_maps(self._file(STATISTICS_FILE), self.curriculum, as_extracted, blocks)
        return [stored[number] for number in numbers]

    @cached_property
    def head(self) -> OutputHead | None:
        """The teacher's output head; None where it was not extracted."""
        if HEAD_FILE not in self.manifest.files:
            return None
        tensors = load_file(self._file(HEAD_FILE))
        outputs, width = tensors["weight"].shape
        linear = nn.Linear(width, outputs, bias="bias" in tensors)
        linear.load_state_dict({name: value for name, value in tensors.items() if name in ("weight", "bias")})
        assert self.identity.head is not None
        return OutputHead(linear.requires_grad_(False), **dataclasses.asdict(self.identity.head))

    def layer_map(self, student_blocks: int) -> LayerMap:
        """Student place and teacher place of each hidden stage: as extracted; where those do not fit, evenly spaced, and of
        stages that fall on one student block the deepest."""
        hidden = self.curriculum.hidden_stages
        places = [stage.student_place for stage in hidden]
        if all(not isinstance(place, int) or place <= student_blocks for place in places):
            return [(stage.student_place, stage.teacher_place) for stage in hidden]
        fitted: dict[Any, Any] = {}
        for stage in hidden:
            place: Any = stage.student_place
            if isinstance(place, int):
                place = max(1, round(int(stage.teacher_place) * student_blocks / self.identity.teacher.blocks))
            fitted[place] = stage.teacher_place
        return list(fitted.items())

    def calibration(self, width: int, batch_size: int) -> list[StoredBatch]:
        """Rows of the calibration split in batches, decoded as those of the head stage."""
        form = self.identity.forms["calibration"]
        table = self._rows("calibration").with_format("arrow")
        starts = range(0, len(table), batch_size)
        return [StoredBatch(table[start : start + batch_size], form, self, ((0, width),)) for start in starts]

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer that the data was encoded with."""
        return load_tokenizer(str(self._folder(TOKENIZER_FOLDER)))

    @property
    def teacher_config(self) -> Path:
        """Folder with the teacher's config."""
        return self._folder(TEACHER_FOLDER)

    @property
    def student(self) -> Path:
        """Folder with the student that was extracted for: its config, and its weights where they come from the teacher."""
        return self._folder(STUDENT_FOLDER)

    @cached_property
    def evaluation(self) -> Dataset:
        return self._rows("evaluation").remove_columns(["example_id", "content_hash"])


@dataclasses.dataclass(frozen=True)
class StoredBatch:
    """Rows of one split, and how to read them."""

    table: pa.Table
    form: RowFormat
    source: ExtractedCurriculum
    targets: tuple[tuple[int, int], ...]  # of each hidden target that is read: its number in the rows, r of the student
    output: bool = False  # whether the output is read

    def tensors(self, pad_id: int) -> dict[str, torch.Tensor]:
        """Model inputs, labels and targets."""
        identity = self.source.identity
        batch = rows.decode_inputs(self.table, self.form, pad_id, identity.with_mask)
        if self.form.label == "none" and identity.causal:
            batch["labels"] = batch["input_ids"].clone()
            if "attention_mask" in batch:
                batch["labels"][batch["attention_mask"] == 0] = rows.IGNORED_LABEL
        for mine, (number, width) in enumerate(self.targets):
            found = rows.decode_states(self.table, self.form, width, identity.width, number)
            batch |= {rows.numbered(name, mine): value for name, value in found.items()}
        if not self.output:
            return batch
        if self.form.content == "top_k":
            return batch | rows.decode_outputs(self.table, identity.kept)
        return batch | rows.decode_whole(self.table)
