"""An extracted curriculum on disk: shards written whole, a manifest written last, everything checked when read.

Public names: `Manifest`, `Split`, `Shard`, `ShardWriter`, `finish`, `read_manifest`, `open_split`, `verify`, `MANIFEST_FILE`,
`FORMAT`.

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

from tutelage.core.files import replacing, write_atomically

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

    def __init__(self, root: Path, split: str, count: int, features: Features):
        self.root, self.split, self.count, self.features = root, split, count, features
        (root / split).mkdir(parents=True, exist_ok=True)

    def file(self, number: int) -> str:
        """Path of a shard below the root."""
        return f"{self.split}/data-{number:05d}-of-{self.count:05d}.arrow"

    def receipt(self, number: int) -> Path:
        """What says that a shard is whole."""
        return self.root / f"{self.file(number)}.receipt.json"

    def done(self, number: int) -> Shard | None:
        """A shard that was written before."""
        if not self.receipt(number).exists():
            return None
        return Shard(**json.loads(self.receipt(number).read_text(encoding="utf-8")))

    def write(self, number: int, batches: Iterable[Mapping[str, pa.Array]]) -> Shard:
        """Write a shard from column arrays.

        Raises:
            OSError: the disk is full, say; what was written before stays whole.
        """
        schema, path = self.features.arrow_schema, self.root / self.file(number)
        rows = tokens = 0
        with (
            replacing(path) as temporary,
            pa.OSFile(str(temporary), "wb") as sink,
            pa.ipc.new_stream(sink, schema) as out,
        ):
            for columns in batches:
                batch = pa.record_batch([columns[name].cast(schema.field(name).type) for name in schema.names], schema)
                out.write_batch(batch)
                rows += batch.num_rows
                tokens += len(columns["input_ids"].flatten())
        shard = Shard(self.file(number), rows, tokens, path.stat().st_size, file_hash(path))
        write_atomically(self.receipt(number), json.dumps(dataclasses.asdict(shard)))
        return shard


def finish(root: Path, manifest: Manifest, features: Mapping[str, Features]) -> None:
    """Make the folder a dataset on disk and write the manifest; receipts go."""
    for split in manifest.splits:
        folder = root / split.name
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
        write_atomically(folder / "state.json", json.dumps(state, indent=2))
        write_atomically(folder / "dataset_info.json", json.dumps(info, indent=2))
    write_atomically(root / "dataset_dict.json", json.dumps({"splits": [split.name for split in manifest.splits]}))
    write_atomically(root / MANIFEST_FILE, json.dumps(dataclasses.asdict(manifest), indent=1) + "\n")
    for split in manifest.splits:
        for receipt in (root / split.name).glob("*.receipt.json"):
            receipt.unlink()
    (root / PROGRESS_FILE).unlink(missing_ok=True)


def claim(root: Path, identity: Mapping[str, Any]) -> bool:
    """Make a folder this extraction's, or find it unfinished by the same one; True where it is finished already.

    Raises:
        ValueError: the folder holds another extraction, or something else.
    """
    mine = json.loads(json.dumps(identity))
    if (root / MANIFEST_FILE).exists():
        theirs, finished = read_manifest(root).identity, True
    elif (root / PROGRESS_FILE).exists():
        theirs, finished = json.loads((root / PROGRESS_FILE).read_text(encoding="utf-8")), False
    elif root.exists() and any(root.iterdir()):
        raise ValueError(f"{str(root)!r} is not empty and holds no curriculum: choose another --output_dir")
    else:
        root.mkdir(parents=True, exist_ok=True)
        write_atomically(root / PROGRESS_FILE, json.dumps(mine, indent=1))
        return False
    if different := [key for key in mine if mine[key] != theirs.get(key)]:
        raise ValueError(
            f"{str(root)!r} holds the curriculum of another extraction (another {', '.join(different)}): "
            "give what it began with, or choose another --output_dir"
        )
    return finished


# ---- Reading ----


def read_manifest(root: Path) -> Manifest:
    """The manifest of a finished curriculum.

    Raises:
        ValueError: there is none, it is unfinished, or its format is newer than this version reads.
    """
    path = root / MANIFEST_FILE
    if not path.is_file():
        if (root / PROGRESS_FILE).is_file():
            raise ValueError(
                f"the extraction in {str(root)!r} is unfinished: run the same `tutelage extract` again, it goes on with the "
                "missing shards"
            )
        raise ValueError(f"{str(root)!r} holds no curriculum (no {MANIFEST_FILE}): make one with `tutelage extract`")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        version = found["format"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a curriculum's manifest: {error}") from error
    if version > FORMAT:
        raise ValueError(
            f"the curriculum in {str(root)!r} has format {version}, this version reads up to {FORMAT}: upgrade tutelage"
        )
    return Manifest.from_json(path.read_text(encoding="utf-8"))


def open_split(root: Path, split: Split) -> Dataset:
    """A split's rows, memory-mapped.

    Raises:
        ValueError: a shard is missing or of another size than the manifest says.
    """
    for shard in split.shards:
        path = root / shard.file
        if not path.is_file():
            raise ValueError(
                f"shard {shard.file} of the curriculum {str(root)!r} is missing: copy it there, or extract again"
            )
        if path.stat().st_size != shard.bytes:
            raise ValueError(
                f"shard {shard.file} of the curriculum {str(root)!r} is damaged: it has {path.stat().st_size:,} bytes, the "
                f"manifest says {shard.bytes:,}; copy it again, or extract again"
            )
    return concatenate_datasets([Dataset.from_file(str(root / shard.file)) for shard in split.shards])


def verify(root: Path, manifest: Manifest) -> None:
    """Raise ValueError where a file's checksum is not the manifest's."""
    known = {shard.file: shard.sha256 for split in manifest.splits for shard in split.shards} | manifest.files
    for name, expected in known.items():
        path = root / name
        if not path.is_file():
            raise ValueError(f"{name} of the curriculum {str(root)!r} is missing: copy it there, or extract again")
        if file_hash(path) != expected:
            raise ValueError(
                f"{name} of the curriculum {str(root)!r} is damaged (its checksum is not the manifest's): copy it again, or "
                "extract again"
            )


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
