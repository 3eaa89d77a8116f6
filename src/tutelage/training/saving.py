"""Checkpoints and students on disk: whole or not there.

A checkpoint is complete with its last file, progress.json, which has the SHA-256 of every other file and of itself. All files
are on the disk before it is written, and older checkpoints are deleted after that. Nothing is loaded from a checkpoint before
its files were compared with these checksums."""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_model
from torch import nn

from tutelage.core.errors import UserError, as_user_error, reason_of
from tutelage.core.records import Sealed
from tutelage.io.files import is_leftover, sync, write_atomically
from tutelage.io.store import sha256_of_file
from tutelage.targets.source import StatisticsFile
from tutelage.training.records import PROGRESS_FILE, Progress, checkpoints, complete_checkpoints

_log = logging.getLogger(__name__)
AUTO = "auto"  # of `resume_from_checkpoint`: start, or continue what is there
_WORDS: dict[str, str | bool] = {**{"false": False, "no": False, "never": False, "true": True, "yes": True}, AUTO: AUTO}
_STAGING = ".student.tmp"
_LEARNED = "learned_maps.safetensors"  # of a checkpoint; no student has it
# beginnings of the names that are loaded from a checkpoint
_LOADED = (
    *("model", "pytorch_model", "adapter_", "optimizer", "scheduler", "scaler", "rng_state", "trainer_state"),
    _LEARNED,
)


def resume_choice(asked: str | bool | None) -> str | bool:
    """What `resume_from_checkpoint` means: False, True, `auto`, or a folder."""
    return _WORDS.get(asked.lower(), asked) if isinstance(asked, str) else bool(asked)


@dataclass(frozen=True)
class _Complete(Sealed):
    """The file that completes a checkpoint."""

    progress: Progress
    files: dict[str, str]  # SHA-256 of every other file, by path below the checkpoint


# ---- Writing ----


def complete(folder: Path, progress: Progress) -> None:
    """Make a checkpoint complete: put its files on the disk, then write the last one, with their checksums."""
    files = {}
    for path in sorted(folder.rglob("*")):
        sync(path)
        if path.is_file():
            files[path.relative_to(folder).as_posix()] = sha256_of_file(path)
    sync(folder)
    write_atomically(folder / PROGRESS_FILE, json.dumps(_Complete(progress, files).to_dict()))
    sync(folder.parent)


def discard(folder: Path) -> None:
    """Delete a checkpoint, if it is there; from the first moment on it is not complete."""
    if folder.is_symlink() or not folder.is_dir():
        folder.unlink(missing_ok=True)
        return
    (folder / PROGRESS_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder)


def rotate(newest: Path, limit: int | None, best: str | None) -> None:
    """Delete the oldest complete checkpoints beside `newest`, so that `limit` are left, `newest` and the `best` among them."""
    kept = {newest.resolve(), *([] if best is None else [Path(best).resolve()])}
    found = complete_checkpoints(newest.parent)
    if limit is None or limit <= 0:
        return
    old = [folder for folder in found if folder.resolve() not in kept]
    for folder in old[: max(0, len(found) - max(limit, len(kept)))]:
        discard(folder)


def remove_leftovers(output_dir: Path) -> None:
    """Delete what a killed run left unfinished: checkpoints without their last file, and temporary files."""
    for folder in checkpoints(output_dir):
        if not (folder / PROGRESS_FILE).is_file():
            discard(folder)
    discard(output_dir / _STAGING)
    for path in filter(is_leftover, output_dir.glob("*")):
        path.unlink()


def save_learned(maps: nn.ModuleList, folder: Path) -> None:
    """Write the maps that are trained with the student, if there are any, to a checkpoint."""
    if maps:
        save_model(maps, str(folder / _LEARNED))


@contextmanager
def whole_files(folder: Path) -> Iterator[Path]:
    """Give a temporary folder to write to; when the block ends well, its files are on the disk and replace those in `folder`,
    each whole."""
    staging = folder / _STAGING
    discard(staging)
    staging.mkdir(parents=True)
    yield staging
    for path in sorted(staging.rglob("*")):
        target = folder / path.relative_to(staging)
        if path.is_dir():
            target.mkdir(exist_ok=True)
            continue
        sync(path)
        os.replace(path, target)
    discard(staging)
    sync(folder)


# ---- Reading ----


def find_checkpoint(asked: str | bool, output_dir: Path) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` means: a folder, the newest complete one for True and `auto`; None for
    False, and for `auto` where there is none. Its files have been compared with their checksums.

    Raises UserError where there is none, where it was not written to its end, or is damaged; for `auto`, which takes the one
    before with a warning, where all are damaged."""
    if asked is False:
        return None
    if asked in (True, AUTO):
        found = complete_checkpoints(output_dir)[::-1]
        if not found and asked is True:
            how = f"start the run with --resume {AUTO}, which continues it later"
            raise UserError(f"no complete checkpoint in {str(output_dir)!r} to resume from: {how}")
    else:
        found = [Path(str(asked))]
    for folder in found:
        if not (folder / PROGRESS_FILE).is_file():
            how = "resume from an earlier one, or with resume_from_checkpoint=True from the newest complete one"
            raise UserError(f"checkpoint {asked!r} is missing or was not written to its end: {how}")
        damage = _damage(folder)
        if damage is None:
            return folder
        if asked != AUTO or folder == found[-1]:
            raise damaged(folder, damage)
        _log.warning("checkpoint %r is damaged (%s): the one before it is used", str(folder), damage)
    return None


def read_progress(folder: Path) -> Progress:
    """The progress in a checkpoint."""
    return _read(folder).progress


def check_whole(folder: Path) -> None:
    """Raise UserError unless every file of a checkpoint has its checksum."""
    if (damage := _damage(folder)) is not None:
        raise damaged(folder, damage)


def damaged(folder: Path, what: str) -> UserError:
    """The error about a damaged checkpoint, which names the one before it."""
    older = [path for path in complete_checkpoints(folder.parent) if _step(path) < _step(folder)]
    how = (
        f"resume from {str(older[-1])!r}"
        if older
        else "start the run again with overwrite_output_dir in place of resume"
    )
    return UserError(f"checkpoint {str(folder)!r} is damaged, so {how} ({what})")


@contextmanager
def reading_checkpoint(folder: Path) -> Iterator[None]:
    """Turn what loading from a checkpoint raises into a UserError that names the one before it."""
    try:
        yield
    except UserError:
        raise
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise damaged(folder, (str(error).strip().splitlines() or [type(error).__name__])[0]) from error


def load_learned(maps: nn.ModuleList, folder: Path) -> None:
    """The inverse of `save_learned`."""
    if maps:
        maps.load_state_dict(load_file(folder / _LEARNED))


def check_statistics(file: StatisticsFile, expected: str) -> None:
    """Raise UserError where the stored statistics of a resumed run are not those that it had."""
    for path in file.places if file.read and expected else ():
        if not path.exists():
            continue
        how = f"{str(path)!r} is damaged: delete it, and it is computed again"
        with as_user_error(how, SafetensorError, ValueError, OSError):
            own = file.found() == path
        if own and sha256_of_file(path) != expected:
            raise UserError(how)


def _step(folder: Path) -> int:
    number = folder.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else 0


def _read(folder: Path) -> _Complete:
    return _Complete.from_json((folder / PROGRESS_FILE).read_text(encoding="utf-8"))


def _damage(folder: Path) -> str | None:
    """What is wrong with a complete checkpoint, in words; None where every file is as it was saved."""
    name = PROGRESS_FILE
    try:
        files = _read(folder).files
        for name, expected in files.items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if sha256_of_file(folder / name) != expected:
                return f"{name} was changed"
    except (OSError, ValueError) as error:
        return f"{name} cannot be read: {reason_of(error)}"
    there = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    added = [name for name in there if Path(name).name.startswith(_LOADED) and name not in files]
    return f"{added[0]} was added" if added else None
