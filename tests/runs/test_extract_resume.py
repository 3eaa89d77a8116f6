"""Interrupted extractions, lost and damaged files, and folders that contain something else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.runs.conftest import files_of, no_space_left, train
from tutelage.cli import main
from tutelage.core.errors import UserError
from tutelage.targets import live
from tutelage.targets import manifest as storage


def test_an_interrupted_extraction_resumes_with_the_missing_shards(
    extracted: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = extracted("whole")
    written: list[int] = []
    original = storage.ShardWriter.write

    def full(self: Any, number: int, batches: Any) -> Any:
        if len(written) == 2:
            batches = no_space_left()
        written.append(number)
        return original(self, number, batches)

    monkeypatch.setattr(storage.ShardWriter, "write", full)
    with pytest.raises(
        UserError, match=r"could not write .*arrow.*: No space left on device; free space there, or choose"
    ):
        extracted("cut")
    with pytest.raises(ValueError, match="is unfinished: run the same `tutelage extract` again"):
        train(tmp_path / "student", tmp_path / "cut")
    monkeypatch.setattr(storage.ShardWriter, "write", lambda *a: written.append(a[1]) or original(*a))
    assert not (tmp_path / "student").exists()
    written.clear()
    extracted("cut")
    assert len(written) == len(files_of(whole)) - 2  # only the missing ones
    assert files_of(tmp_path / "cut") == files_of(whole)
    assert not list((tmp_path / "cut").rglob("*.receipt.json")) and not list((tmp_path / "cut").rglob("*.tmp"))
    before = len(written)
    extracted("cut")  # a finished one is left alone
    assert len(written) == before


def test_lost_shards_are_made_again(extracted: Callable[..., Path]) -> None:
    folder = extracted()
    before = files_of(folder)
    shards = sorted(folder.glob("stage_*/*.arrow"))
    manifest = (folder / "manifest.json").read_text()
    shards[0].unlink()
    shards[2].write_bytes(shards[2].read_bytes()[:-1])
    extracted()
    assert files_of(folder) == before
    assert json.loads((folder / "manifest.json").read_text())["splits"] == json.loads(manifest)["splits"]
    assert not list(folder.rglob("*.receipt.json"))


def test_statistics_are_made_once(extracted: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = extracted()
    next(folder.glob("stage_2/*.arrow")).unlink()

    def again(*_: Any, **__: Any) -> Any:
        raise AssertionError("shards of one curriculum have one set of statistics")

    monkeypatch.setattr(live, "calibrate", again)
    extracted()


def test_names_of_files_do_not_matter(
    extracted: Callable[..., Path], corpus: Path, tmp_path: Path, causal_teacher: Path
) -> None:
    folder = extracted()
    shutil.copy(corpus / "text.jsonl", tmp_path / "renamed.jsonl")
    shutil.copytree(causal_teacher, tmp_path / "moved")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    extracted(teacher=tmp_path / "moved", run={"dataset": str(tmp_path / "renamed.jsonl")})
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize(
    ("changed", "different"), [({"mlm_probability": 0.05}, "mlm_probability"), ({"max_samples": 2}, "evaluation")]
)
def test_an_extraction_with_different_rows_is_refused(
    extracted: Callable[..., Path], teachers: dict[str, Path], changed: dict[str, Any], different: str
) -> None:
    teacher = teachers["masked_lm"]
    extracted(teacher=teacher, run={"mlm_probability": 0.6})
    with pytest.raises(
        ValueError, match=f"contains an extracted curriculum with a different {different}: give the orig"
    ):
        extracted(teacher=teacher, run={"mlm_probability": 0.6, **changed})


def test_a_folder_with_different_contents_is_refused(extracted: Callable[..., Path], tmp_path: Path) -> None:
    extracted()
    with pytest.raises(ValueError, match="contains an extracted curriculum with a different curriculum"):
        extracted(projection_seed=3)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and does not contain an extracted curriculum"):
        extracted("notes")


def spoil(folder: Path, what: str) -> None:
    shard = next(iter(sorted((folder / "stage_1").glob("*.arrow"))))
    content = bytearray(shard.read_bytes())
    if what == "damaged":
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    elif what == "cut":
        shard.write_bytes(content[:-8])
    elif what == "missing":
        shard.unlink()
    elif what == "newer":
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    elif what == "no manifest":
        (folder / "manifest.json").unlink()
    elif what == "not JSON":
        (folder / "manifest.json").write_text("{")
    elif what == "maps":
        (folder / "target_stats.safetensors").write_bytes(b"nothing")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("damaged", r"stage_1/data-00000.*is damaged \(its checksum"),
        ("cut", r"stage_1/data-00000.*is damaged"),
        ("missing", r"stage_1/data-00000.*is missing: copy it there"),
        ("newer", "has format 99, this version reads up to 3: upgrade"),
        ("no manifest", "no extracted curriculum in .* .no manifest.json.: make one with `tutelage extract`"),
        ("not JSON", "is not the manifest of an extracted curriculum"),
        ("maps", "target_stats.safetensors.*is damaged"),
    ],
)
def test_a_damaged_curriculum_is_refused(
    extracted: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str, message: str
) -> None:
    folder = extracted()
    spoil(folder, what)
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "student", folder)
    assert not (tmp_path / "student").exists()
    assert main(["inspect", str(folder)]) == 2
    assert "tutelage inspect:" in capsys.readouterr().err


@pytest.mark.parametrize("version", [1, 2])
def test_a_curriculum_of_an_older_format_trains_the_same_student(
    extracted: Callable[..., Path], tmp_path: Path, version: int
) -> None:
    """Both lack the digest and the checksums of the files of `datasets`, 1 also what rows of joint stages are described by."""
    folder = extracted()
    new = train(tmp_path / "new", folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["digest"]
    newer = ("state.json", "dataset_info.json", "dataset_dict.json")
    all_files = manifest["files"]
    manifest["files"] = {name: value for name, value in all_files.items() if not name.endswith(newer)}
    if version == 1:
        for form in manifest["identity"]["forms"].values():
            del form["beside"]
    edited = {**manifest, "format": version, "files": all_files}  # not how an older version wrote it
    (folder / "manifest.json").write_text(json.dumps(edited))
    with pytest.raises(ValueError, match="it was changed: its digest is missing"):
        train(tmp_path / "edited", folder)
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": version}))
    old = train(tmp_path / "old", folder)
    assert old.student.metrics["loss"] == new.student.metrics["loss"]
