"""An extracted curriculum on disk: shards written whole, a manifest written last, everything checked when read.

Public names: `Manifest`, `Split`, `Shard`, `ShardWriter`, `finish`, `read_manifest`, `check_shards_exist`, `open_split`,
`verify`, `MANIFEST_FILE`, `FORMAT`.

The folder is a `datasets.DatasetDict` saved to disk (`datasets.load_from_disk` reads it, and so does anything that reads Arrow
streams): a split for each stage, `calibration` and `evaluation`. Beside it lie `manifest.json`, the teacher's config and
tokenizer, and what a head transplant needs. While it is being made, `extraction.json` says from what, and each shard has a
receipt beside it; a shard with a receipt is whole.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, concatenate_datasets

from tutelage.teacher.store import Store, sha256_of

FORMAT = 1
MANIFEST_FILE = "manifest.json"
PROGRESS_FILE = "extraction.json"


@dataclass(frozen=True)
class Shard:
    """A file of rows."""

    file: str
    """Path below the curriculum's folder."""
    rows: int
    tokens: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """The rows of a stage, or of calibration or evaluation."""

    name: str
    shards: tuple[Shard, ...]

    @property
    def rows(self) -> int:
        """Examples."""
        return sum(shard.rows for shard in self.shards)

    @property
    def tokens(self) -> int:
        """Tokens, padding left out."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Bytes on disk."""
        return sum(shard.bytes for shard in self.shards)


@dataclass(frozen=True)
class Manifest:
    """What a curriculum was made from and what it holds."""

    identity: dict[str, Any]
    """Everything the rows depend on: teacher, tokenizer, data, curriculum, projection width, dtype."""
    splits: tuple[Split, ...]
    files: dict[str, str]
    """SHA-256 of every other file that training reads, by path below the folder."""
    format: int = FORMAT
    environment: dict[str, Any] = field(default_factory=dict)
    """Versions it was made with."""

    def split(self, name: str) -> Split:
        """A split by name."""
        for split in self.splits:
            if split.name == name:
                return split
        raise ValueError(f"the curriculum holds no {name!r}: it has {', '.join(split.name for split in self.splits)}")

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """The inverse of `dataclasses.asdict` and JSON."""
        fields = json.loads(text)
        splits = tuple(Split(s["name"], tuple(Shard(**shard) for shard in s["shards"])) for s in fields.pop("splits"))
        return cls(splits=splits, **fields)


# ---- Writing ----


class ShardWriter:
    """Writes the shards of one split, each whole or not at all; those that are there already are left alone."""

    def __init__(self, store: Store, split: str, count: int, features: Features):
        self.store, self.split, self.count, self.features = store, split, count, features

    def file(self, number: int) -> str:
        """Path of a shard below the root."""
        return f"{self.split}/data-{number:05d}-of-{self.count:05d}.arrow"

    def receipt(self, number: int) -> str:
        """What says that a shard is whole."""
        return f"{self.file(number)}.receipt.json"

    def done(self, number: int) -> Shard | None:
        """A shard that was written before."""
        if not self.store.exists(self.receipt(number)):
            return None
        return Shard(**json.loads(self.store.read(self.receipt(number))))

    def write(self, number: int, batches: Iterable[Mapping[str, pa.Array]]) -> Shard:
        """Write a shard from column arrays.

        Raises:
            OSError: the disk is full, say; what was written before stays whole.
        """
        schema, rows, tokens = self.features.arrow_schema, 0, 0
        with self.store.writing(self.file(number)) as path:
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as out:
                for columns in batches:
                    arrays = [columns[name].cast(schema.field(name).type) for name in schema.names]
                    batch = pa.record_batch(arrays, schema)
                    out.write_batch(batch)
                    rows += batch.num_rows
                    tokens += len(columns["input_ids"].flatten())
            with path.open("rb") as written:
                shard = Shard(self.file(number), rows, tokens, path.stat().st_size, sha256_of(written))
        self.store.write(self.receipt(number), json.dumps(dataclasses.asdict(shard)))
        return shard


def finish(store: Store, manifest: Manifest, features: Mapping[str, Features]) -> None:
    """Make the folder a dataset on disk and write the manifest; receipts go."""
    for split in manifest.splits:
        state: dict[str, Any] = {
            "_data_files": [{"filename": Path(shard.file).name} for shard in split.shards],
            "_fingerprint": hashlib.sha256("".join(s.sha256 for s in split.shards).encode()).hexdigest()[:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": split.name,
        }
        info = {
            "features": features[split.name].to_dict(),
            "description": "",
            "citation": "",
            "homepage": "",
            "license": "",
        }
        store.write(f"{split.name}/state.json", json.dumps(state, indent=2))
        store.write(f"{split.name}/dataset_info.json", json.dumps(info, indent=2))
    store.write("dataset_dict.json", json.dumps({"splits": [split.name for split in manifest.splits]}))
    store.write(MANIFEST_FILE, json.dumps(dataclasses.asdict(manifest), indent=1) + "\n")
    for split in manifest.splits:
        for shard in split.shards:
            store.remove(f"{shard.file}.receipt.json")
    store.remove(PROGRESS_FILE)


def claim(store: Store, identity: Mapping[str, Any]) -> bool:
    """Make a folder this extraction's, or find it unfinished by the same one; True where it is finished already.

    Raises:
        ValueError: the folder holds another extraction, or something else.
    """
    mine = json.loads(json.dumps(identity))
    if store.exists(MANIFEST_FILE):
        theirs, finished = read_manifest(store).identity, True
    elif store.exists(PROGRESS_FILE):
        theirs, finished = json.loads(store.read(PROGRESS_FILE)), False
    elif not store.is_empty():
        raise ValueError(f"{str(store)!r} is not empty and holds no curriculum: choose another --output_dir")
    else:
        store.write(PROGRESS_FILE, json.dumps(mine, indent=1))
        return False
    if different := [key for key in mine if mine[key] != theirs.get(key)]:
        raise ValueError(
            f"{str(store)!r} holds the curriculum of another extraction (another {', '.join(different)}): "
            "give what it began with, or choose another --output_dir"
        )
    return finished


# ---- Reading ----


def read_manifest(store: Store) -> Manifest:
    """The manifest of a finished curriculum.

    Raises:
        ValueError: there is none, it is unfinished, or its format is newer than this version reads.
    """
    if not store.exists(MANIFEST_FILE):
        if store.exists(PROGRESS_FILE):
            raise ValueError(
                f"the extraction in {str(store)!r} is unfinished: run the same `tutelage extract` again, it goes on with the "
                "missing shards"
            )
        raise ValueError(f"{str(store)!r} holds no curriculum (no {MANIFEST_FILE}): make one with `tutelage extract`")
    try:
        text = store.read(MANIFEST_FILE)
        version = json.loads(text)["format"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{store}/{MANIFEST_FILE} is not a curriculum's manifest: {error}") from error
    if version > FORMAT:
        raise ValueError(
            f"the curriculum in {str(store)!r} has format {version}, this version reads up to {FORMAT}: upgrade tutelage"
        )
    return Manifest.from_json(text)


def check_shards_exist(store: Store, split: Split) -> None:
    """Raise ValueError where a shard is missing."""
    for shard in split.shards:
        if not store.exists(shard.file):
            raise ValueError(
                f"shard {shard.file} of the curriculum {str(store)!r} is missing: copy it there, or extract again"
            )


def open_split(store: Store, split: Split) -> Dataset:
    """A split's rows, memory-mapped.

    Raises:
        ValueError: a shard is missing or of another size than the manifest says.
    """
    check_shards_exist(store, split)
    for shard in split.shards:
        if store.size(shard.file) != shard.bytes:
            raise ValueError(
                f"shard {shard.file} of the curriculum {str(store)!r} is damaged: it has {store.size(shard.file):,} bytes, the "
                f"manifest says {shard.bytes:,}; copy it again, or extract again"
            )
    return concatenate_datasets([Dataset.from_file(str(store.fetch(shard.file))) for shard in split.shards])


def verify(store: Store, manifest: Manifest) -> None:
    """Raise ValueError where a file's checksum is not the manifest's."""
    known = {shard.file: shard.sha256 for split in manifest.splits for shard in split.shards} | manifest.files
    for name, expected in known.items():
        if not store.exists(name):
            raise ValueError(f"{name} of the curriculum {str(store)!r} is missing: copy it there, or extract again")
        if store.sha256(name) != expected:
            raise ValueError(
                f"{name} of the curriculum {str(store)!r} is damaged (its checksum is not the manifest's): copy it again, or "
                "extract again"
            )
