"""An extracted curriculum on disk: shards written whole, a manifest written last, everything checked when read.

The folder is a `datasets.DatasetDict` saved to disk (`datasets.load_from_disk` reads it, and so does anything that reads Arrow
streams): a split for each stage, `calibration` and `evaluation`. Beside it lie `manifest.json`, the teacher's config and
tokenizer, and what a head transplant needs. While it is being made, `extraction.json` says from what, and each shard has a
receipt beside it; a shard with a receipt is whole."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, concatenate_datasets

from tutelage.core.errors import UserError
from tutelage.core.records import Record
from tutelage.io.claim import Claim, check_same
from tutelage.io.claim import claim as claim_folder
from tutelage.io.store import Store, sha256_of
from tutelage.targets.identity import ExtractionIdentity

FORMAT = 2  # 1 had no joint stages; it is read too
MANIFEST_FILE = "manifest.json"
PROGRESS_FILE = "extraction.json"


@dataclass(frozen=True)
class Shard(Record):
    file: str  # path below the folder
    rows: int
    tokens: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Split(Record):
    name: str  # of a stage, `calibration` or `evaluation`
    shards: tuple[Shard, ...]

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def tokens(self) -> int:
        """Tokens, padding left out."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)


@dataclass(frozen=True)
class Manifest(Record):
    """What an extracted curriculum was made from and what it holds."""

    identity: ExtractionIdentity  # everything that the rows depend on
    splits: tuple[Split, ...]
    files: dict[str, str]  # SHA-256 of every other file that training reads, by path below the folder
    format: int = FORMAT
    environment: dict[str, Any] = field(default_factory=dict)  # versions it was made with

    def split(self, name: str) -> Split:
        splits = {split.name: split for split in self.splits}
        if name not in splits:
            raise UserError(f"the extracted curriculum holds no {name!r}: it has {', '.join(splits)}")
        return splits[name]


class ShardWriter:
    """Writes the shards of one split, each whole or not at all; those that are there already are left alone."""

    def __init__(self, store: Store, split: str, count: int, features: Features):
        self.store, self.split, self.count, self.features = store, split, count, features

    def file(self, number: int) -> str:
        return f"{self.split}/data-{number:05d}-of-{self.count:05d}.arrow"

    def done(self, number: int) -> Shard | None:
        """A shard that was written before."""
        receipt = _receipt_of(self.file(number))
        if not self.store.exists(receipt):
            return None
        shard = Shard.from_json(self.store.read(receipt))
        return shard if is_there(self.store, shard) else None

    def write(self, number: int, batches: Iterable[Mapping[str, pa.Array]]) -> Shard:
        """Write a shard from column arrays; if that fails (the disk is full, say), what was written before stays whole."""
        schema, rows, tokens = self.features.arrow_schema, 0, 0
        with self.store.writing(self.file(number)) as path:
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as out:
                for columns in batches:
                    arrays = [columns[name].cast(schema.field(name).type) for name in schema.names]
                    out.write_batch(pa.record_batch(arrays, schema))
                    rows += len(arrays[0])
                    tokens += len(columns["input_ids"].flatten())
            with path.open("rb") as written:
                shard = Shard(self.file(number), rows, tokens, path.stat().st_size, sha256_of(written))
        self.store.write(_receipt_of(shard.file), shard.to_json())
        return shard


def finish(store: Store, manifest: Manifest, features: Mapping[str, Features]) -> None:
    """Make the folder a dataset on disk and write the manifest; receipts go."""
    for split in manifest.splits:
        state: dict[str, Any] = {
            "_data_files": [{"filename": Path(shard.file).name} for shard in split.shards],
            "_fingerprint": hashlib.sha256("".join(s.sha256 for s in split.shards).encode()).hexdigest()[:16],
            **{"_format_columns": None, "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False},
            "_split": split.name,
        }
        unused = dict.fromkeys(("description", "citation", "homepage", "license"), "")
        info = {"features": features[split.name].to_dict(), **unused}
        store.write(f"{split.name}/state.json", json.dumps(state, indent=2))
        store.write(f"{split.name}/dataset_info.json", json.dumps(info, indent=2))
    store.write("dataset_dict.json", json.dumps({"splits": [split.name for split in manifest.splits]}))
    store.write(MANIFEST_FILE, manifest.to_json() + "\n")
    for file in [shard.file for split in manifest.splits for shard in split.shards]:
        store.remove(_receipt_of(file))
    store.remove(PROGRESS_FILE)


def is_there(store: Store, shard: Shard) -> bool:
    """Whether a shard's file is there, of the size it was written with."""
    return store.exists(shard.file) and store.size(shard.file) == shard.bytes


def reopen(store: Store, manifest: Manifest) -> bool:
    """Make a finished extraction that has lost shards an unfinished one; False where it has lost none."""
    shards = [shard for split in manifest.splits for shard in split.shards]
    kept = [shard for shard in shards if is_there(store, shard)]
    if len(kept) == len(shards):
        return False
    for shard in kept:
        store.write(_receipt_of(shard.file), shard.to_json())
    store.write(PROGRESS_FILE, json.dumps(manifest.identity.unnamed(), indent=1))
    store.remove(MANIFEST_FILE)
    return True


def _receipt_of(file: str) -> str:
    return f"{file}.receipt.json"


def claim(store: Store, identity: ExtractionIdentity) -> bool:
    """Make a folder this extraction's, or find it unfinished by the same one; True where it is finished already. UserError if
    the folder holds a different extraction, or something else."""
    whose = Claim(PROGRESS_FILE, identity.unnamed(), "an extracted curriculum")
    if not store.exists(MANIFEST_FILE):
        claim_folder(store, whose)
        return False
    check_same(store, whose, read_manifest(store).identity.unnamed())
    return True


def read_manifest(store: Store) -> Manifest:
    """The manifest; UserError if there is none, it is unfinished, or its format is newer than this version reads."""
    if not store.exists(MANIFEST_FILE):
        if store.exists(PROGRESS_FILE):
            raise UserError(
                f"the extraction in {str(store)!r} is unfinished: run the same `tutelage extract` again to write the "
                "missing shards"
            )
        raise UserError(f"no extracted curriculum in '{store}' (no {MANIFEST_FILE}): make one with `tutelage extract`")
    try:
        text = store.read(MANIFEST_FILE)
        version = int(json.loads(text)["format"])
        if version <= FORMAT:
            return Manifest.from_json(text)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{store}/{MANIFEST_FILE} is not the manifest of an extracted curriculum ({type(error).__name__}: {error}): "
            "copy it again"
        ) from error
    raise UserError(
        f"the extracted curriculum in {str(store)!r} has format {version}, this version reads up to {FORMAT}: upgrade "
        "tutelage"
    )


def check_shards_exist(store: Store, split: Split) -> None:
    for shard in split.shards:
        _check_exists(store, shard.file)


def _check_exists(store: Store, name: str) -> None:
    if not store.exists(name):
        raise UserError(f"{name} of the extracted curriculum '{store}' is missing: copy it there, or extract again")


def open_split(store: Store, split: Split) -> Dataset:
    """A split's rows, memory-mapped; UserError for a shard that is missing, has a different size than in the manifest, or, if
    it was fetched, a different checksum."""
    check_shards_exist(store, split)
    parts = []
    for shard in split.shards:
        if (size := store.size(shard.file)) != shard.bytes:
            raise UserError(
                f"shard {shard.file} of the extracted curriculum {str(store)!r} is damaged: it has {size:,} bytes, the "
                f"manifest says {shard.bytes:,}; copy it again, or extract again"
            )
        path = store.fetch(shard.file)
        if store.local is None:
            with path.open("rb") as fetched:
                _compare(store, shard.file, sha256_of(fetched), shard.sha256)
        parts.append(Dataset.from_file(str(path)))
    return concatenate_datasets(parts)


def verify(store: Store, manifest: Manifest, shards: bool = True) -> None:
    """Raise UserError where a file's checksum is not the manifest's; without `shards`, of the small shared files alone."""
    of_shards = {shard.file: shard.sha256 for split in manifest.splits for shard in split.shards} if shards else {}
    for name, expected in (manifest.files | of_shards).items():
        _check_exists(store, name)
        _compare(store, name, store.sha256(name), expected)


def _compare(store: Store, name: str, found: str, expected: str) -> None:
    if found != expected:
        raise UserError(
            f"{name} of the extracted curriculum {str(store)!r} is damaged (its checksum is not the manifest's): copy it "
            "again, or delete it and extract again"
        )
