"""An extracted curriculum on disk: shards written whole, a manifest written last, everything checked when read.

The folder is a `datasets.DatasetDict` saved to disk (`datasets.load_from_disk` reads it, and so does anything that reads Arrow
streams): a split for each stage, `calibration` and `evaluation`. Beside it lie `manifest.json`, the teacher's config and
tokenizer, the student, and what a head transplant needs. While it is being made, `extraction.json` says from what,
`extraction.files.json` what the other files are (`tutelage.runs.extraction.progress`), and each shard has a receipt beside it;
a shard that is as its receipt says is whole."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, concatenate_datasets

from tutelage.core.errors import UserError, as_user_error, check_range
from tutelage.core.records import Record, Sealed
from tutelage.io.claim import Claim, check_same
from tutelage.io.claim import claim as claim_folder
from tutelage.io.names import check_name
from tutelage.io.store import Check, Store, sha256_of_file
from tutelage.targets.identity import ExtractionIdentity

FORMAT = 3  # 2 had no digest and no checksums of the files of `datasets`, 1 no joint stages; both are read too
MANIFEST_FILE = "manifest.json"
PROGRESS_FILE = "extraction.json"
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Shard(Record):
    file: str  # path below the folder
    rows: int
    tokens: int
    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        check_files({self.file: self.sha256})
        for name in ("rows", "tokens", "bytes"):
            check_range(f"{name} of {self.file}", getattr(self, name), 0, 2**53)


@dataclass(frozen=True)
class Receipt(Sealed):
    """Beside a shard of an unfinished extraction."""

    shard: Shard


@dataclass(frozen=True)
class Split(Record):
    name: str  # of a stage, `calibration` or `evaluation`
    shards: tuple[Shard, ...]

    def __post_init__(self) -> None:
        if stray := [shard.file for shard in self.shards if shard.file.rpartition("/")[0] != self.name]:
            raise UserError(f"split {self.name!r} has the shard {stray[0]!r}, which is not in its folder")

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
class Manifest(Sealed):
    """What an extracted curriculum was made from and what it holds."""

    identity: ExtractionIdentity  # everything that the rows depend on
    splits: tuple[Split, ...]
    files: dict[str, str]  # SHA-256 of every other file, by path below the folder
    format: int = FORMAT
    environment: dict[str, Any] = field(default_factory=dict)  # versions it was made with

    def __post_init__(self) -> None:
        check_range("format", self.format, 1, FORMAT)
        check_files(self.files)
        found = [split.name for split in self.splits]
        if sorted(found) != sorted(self.identity.splits):
            raise UserError(f"it has the splits {', '.join(found)}, not {', '.join(self.identity.splits)}")

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Manifest":
        if isinstance(fields, Mapping) and fields.get("format") in (1, 2) and "digest" not in fields:
            if "dataset_dict.json" in (fields.get("files") or ()):  # which only newer formats list
                raise UserError("it was changed: its digest is missing")
            return super(Sealed, cls).from_dict(fields)
        return super().from_dict(fields)

    @property
    def checksums(self) -> dict[str, str]:
        """SHA-256 of every file, by path below the folder."""
        return {**self.files, **{shard.file: shard.sha256 for split in self.splits for shard in split.shards}}

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

    def done(self, number: int, check: bool = True) -> Shard | None:
        """A shard that was written before; with `check`, if its file still has its checksum. None: it is to be made."""
        receipt = receipt_of(self.file(number))
        if not self.store.exists(receipt):
            return None
        try:
            shard = Receipt.from_json(self.store.read(receipt)).shard
        except UserError:
            return None  # damaged
        return shard if shard.file == self.file(number) and is_there(self.store, shard, check) else None

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
            shard = Shard(self.file(number), rows, tokens, path.stat().st_size, sha256_of_file(path))
        write_receipt(self.store, shard)
        return shard


def receipt_of(file: str) -> str:
    return f"{file}.receipt.json"


def write_receipt(store: Store, shard: Shard) -> None:
    store.write(receipt_of(shard.file), Receipt(shard).to_json())


def is_there(store: Store, shard: Shard, check: bool) -> bool:
    """Whether a shard's file is there, with the size that it was written with; with `check`, also with its checksum."""
    same_size = store.exists(shard.file) and store.size(shard.file) == shard.bytes
    return same_size and (not check or store.sha256(shard.file) == shard.sha256)


def check_files(checksums: Mapping[str, str]) -> None:
    """Raise UserError for a name that leads out of the folder, or for a checksum that is not one of SHA-256."""
    for name, checksum in checksums.items():
        check_name(name, "it")
        if not _SHA256.fullmatch(checksum):
            raise UserError(f"the checksum of {name} is {checksum[:80]!r}, not the 64 digits of a SHA-256")


def claim(store: Store, identity: ExtractionIdentity) -> bool:
    """Make a folder this extraction's, or find it unfinished by the same one; True where it is finished already. UserError if
    the folder holds a different extraction, or something else. One process calls it, before any writes to the folder."""
    whose = Claim(PROGRESS_FILE, identity.unnamed(), "an extracted curriculum")
    if not store.exists(MANIFEST_FILE):
        if not store.exists(PROGRESS_FILE) and not store.is_empty():
            found = (
                f"is not empty and does not contain {whose.what} (it has neither {MANIFEST_FILE} nor {PROGRESS_FILE})"
            )
            raise UserError(f"{str(store)!r} {found}: copy what is missing again, or choose a different --output_dir")
        claim_folder(store, whose)
        return False
    check_same(store, replace(whose, record=MANIFEST_FILE), read_manifest(store).identity.unnamed())
    store.clean()
    return True


def read_manifest(store: Store) -> Manifest:
    """The manifest; UserError if there is none, it is unfinished, damaged or edited, or of a newer format."""
    if not store.exists(MANIFEST_FILE):
        if store.exists(PROGRESS_FILE):
            raise UserError(
                f"the extraction in {str(store)!r} is unfinished: run the same `tutelage extract` again to write the "
                "missing shards"
            )
        raise UserError(f"no extracted curriculum in '{store}' (no {MANIFEST_FILE}): make one with `tutelage extract`")
    text = store.read(MANIFEST_FILE)
    if (version := _format_of(text)) > FORMAT:
        raise UserError(
            f"the extracted curriculum in {str(store)!r} has format {version}, this version reads up to {FORMAT}: upgrade "
            "tutelage"
        )
    try:
        return Manifest.from_json(text)
    except UserError as error:
        raise UserError(
            f"{store}/{MANIFEST_FILE} is not the manifest of an extracted curriculum, or is damaged ({error}): copy it again, "
            "or extract again to a different folder"
        ) from error


def _format_of(text: str) -> int:
    """The format that a manifest says it has; 0 where it does not."""
    try:
        return int(json.loads(text)["format"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return 0


def check_shards_exist(store: Store, split: Split) -> None:
    for shard in split.shards:
        _check_exists(store, shard.file)


def _check_exists(store: Store, name: str) -> None:
    if not store.exists(name):
        found = f"{name} of the extracted curriculum '{store}' is missing"
        raise UserError(f"{found}: copy it there, or extract again ({MANIFEST_FILE} lists it)")


def open_split(store: Store, split: Split) -> Dataset:
    """A split's rows, memory-mapped; UserError for a shard that is missing, has a different size than in the manifest, or, if
    it is fetched, a different checksum."""
    check_shards_exist(store, split)
    parts = []
    for shard in split.shards:
        if (size := store.size(shard.file)) != shard.bytes:
            raise UserError(
                f"shard {shard.file} of the extracted curriculum {str(store)!r} is damaged: it has {size:,} bytes, "
                f"{MANIFEST_FILE} says {shard.bytes:,}; copy it again, or extract again"
            )
        path = store.fetch(shard.file, comparing(store, shard.file, shard.sha256))
        with as_user_error(
            f"could not read {path}"
        ):  # bytes that are not Arrow, with a checksum that was made for them
            rows = Dataset.from_file(str(path))
        if len(rows) != shard.rows:
            found = f"shard {shard.file} of the extracted curriculum {str(store)!r} has {len(rows):,} rows"
            raise UserError(f"{found}, {MANIFEST_FILE} says {shard.rows:,}: copy it again, or extract again")
        parts.append(rows)
    return concatenate_datasets(parts)


def verify(store: Store, checksums: Mapping[str, str]) -> None:
    """Raise UserError where a file, by path below the folder, is missing or its checksum is not the manifest's."""
    for name, expected in checksums.items():
        _check_exists(store, name)
        _compare(store, name, store.sha256(name), expected)


def comparing(store: Store, name: str, expected: str) -> Check:
    """Compares a fetched file with its checksum in the manifest."""

    def compare(path: Path) -> None:
        _compare(store, name, sha256_of_file(path), expected)

    return compare


def _compare(store: Store, name: str, found: str, expected: str) -> None:
    if found != expected:
        raise UserError(
            f"{name} of the extracted curriculum {str(store)!r} is damaged (its checksum is not the manifest's), or "
            f"{MANIFEST_FILE} is: copy it again, or extract again"
        )
