"""An unfinished extraction: which of its files are whole, and how it becomes a finished one and back.

Beside the shards and their receipts, `extraction.files.json` has the checksums of all other files."""

import hashlib
import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Features

from tutelage.core.errors import UserError
from tutelage.core.records import Sealed
from tutelage.io.store import Store, sha256_of_file
from tutelage.runs.environment import environment
from tutelage.targets.folder import STATISTICS_FILE, STUDENT_FOLDER, stray_files
from tutelage.targets.identity import ExtractionIdentity
from tutelage.targets.manifest import (
    MANIFEST_FILE,
    PROGRESS_FILE,
    Manifest,
    Split,
    check_files,
    is_there,
    receipt_of,
    write_receipt,
)

FILES_FILE = "extraction.files.json"


@dataclass(frozen=True)
class SharedFiles(Sealed):
    """SHA-256 of the files that are no shards, by path below the folder."""

    start: dict[str, str]  # student and statistics, which every shard depends on
    others: dict[str, str]  # configs, tokenizer, output head, which no shard depends on

    def __post_init__(self) -> None:
        check_files(self.all)

    @property
    def all(self) -> dict[str, str]:
        return self.start | self.others


def read_shared(store: Store) -> SharedFiles | None:
    """What was written before; None where nothing was, or its record is damaged."""
    if not store.exists(FILES_FILE):
        return None
    try:
        return SharedFiles.from_json(store.read(FILES_FILE))
    except UserError:
        return None


def write_shared(store: Store, shared: SharedFiles) -> None:
    """Record what was written, and remove what else is in its folders: a run would read it too."""
    for name in stray_files(store, shared.all):
        store.remove(name)
    store.write(FILES_FILE, shared.to_json())


def damaged(store: Store, checksums: Mapping[str, str]) -> list[str]:
    """Files that are missing, or not as they were written."""
    return [name for name, sha256 in checksums.items() if not store.exists(name) or store.sha256(name) != sha256]


def put_folder(store: Store, folder: Path) -> dict[str, str]:
    """Copy every file below a folder; the checksums by name."""
    found = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder).as_posix()
        found[name] = sha256_of_file(file)
        with store.writing(name) as path:
            shutil.copyfile(file, path)
    return found


def forget_shards(store: Store) -> None:
    """Make every shard one that is to be made."""
    for name in _receipts(store):
        store.remove(name)


def reopen(store: Store, manifest: Manifest, check: bool) -> list[str]:
    """Make a finished extraction with damaged files an unfinished one; these files, none where all are whole.

    Without `check`, only the sizes of shards are compared."""
    shards = [shard for split in manifest.splits for shard in split.shards]
    kept = [shard for shard in shards if is_there(store, shard, check)]
    found = [shard.file for shard in shards if shard not in kept]
    found += [*damaged(store, manifest.files), *stray_files(store, manifest.files)]
    if not found:
        _tidy(store)
        return []
    for shard in kept:
        write_receipt(store, shard)
    start = {name: sha256 for name, sha256 in manifest.files.items() if _of_start(name)}
    others = {name: sha256 for name, sha256 in manifest.files.items() if not _of_start(name)}
    store.write(FILES_FILE, SharedFiles(start, others).to_json())
    store.write(PROGRESS_FILE, json.dumps(manifest.identity.unnamed(), indent=1))
    store.remove(MANIFEST_FILE)
    return found


def finish(
    store: Store, identity: ExtractionIdentity, splits: Sequence[Split], features: Mapping[str, Features]
) -> None:
    """Make the folder a dataset on disk and write the manifest; receipts go. UserError if a file is no longer as it was
    written."""
    shared = read_shared(store)
    if shared is None or (lost := damaged(store, shared.all)):
        name = FILES_FILE if shared is None else lost[0]
        raise UserError(f"{name} in {str(store)!r} was changed during the extraction: run the same command again")
    texts = {"dataset_dict.json": json.dumps({"splits": [split.name for split in splits]})}
    for split in splits:
        texts |= _dataset_files(split, features[split.name])
    for name, text in texts.items():
        store.write(name, text)
    files = shared.all | {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    manifest = Manifest(identity, tuple(splits), files, environment=environment())
    store.write(MANIFEST_FILE, manifest.to_json() + "\n")
    _tidy(store)


def _dataset_files(split: Split, features: Features) -> dict[str, str]:
    """What `datasets` keeps beside the shards of a split."""
    state: dict[str, Any] = {
        "_data_files": [{"filename": Path(shard.file).name} for shard in split.shards],
        "_fingerprint": hashlib.sha256("".join(s.sha256 for s in split.shards).encode()).hexdigest()[:16],
        **{"_format_columns": None, "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False},
        "_split": split.name,
    }
    unused = dict.fromkeys(("description", "citation", "homepage", "license"), "")
    info = {"features": features.to_dict(), **unused}
    return {
        f"{split.name}/state.json": json.dumps(state, indent=2),
        f"{split.name}/dataset_info.json": json.dumps(info, indent=2),
    }


def _tidy(store: Store) -> None:
    """Remove what only an unfinished extraction has."""
    for name in [*_receipts(store), FILES_FILE, PROGRESS_FILE]:
        store.remove(name)


def _receipts(store: Store) -> Collection[str]:
    return [name for name in store.files() if name.endswith(receipt_of(".arrow"))]


def _of_start(name: str) -> bool:
    return name == STATISTICS_FILE or name.startswith(f"{STUDENT_FOLDER}/")
