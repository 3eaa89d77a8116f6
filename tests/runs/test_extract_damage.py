"""Curricula that were damaged, edited or made by a stranger: refused before anything is opened, or made again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.limits import largest_file
from tests.runs.conftest import no_space_left, settings, texts, train
from tutelage.core.errors import UserError
from tutelage.core.records import sealed
from tutelage.io import files
from tutelage.runs.extraction.job import extract
from tutelage.runs.extraction.options import ExtractOptions
from tutelage.runs.extraction.progress import FILES_FILE
from tutelage.targets import folder as opening
from tutelage.targets import live
from tutelage.targets.folder import ExtractedCurriculum
from tutelage.targets.manifest import MANIFEST_FILE, ShardWriter

Extracted = Callable[..., Path]
# with an output head and calibration rows; with the first weights of the student
METHODS: dict[str, dict[str, Any]] = {"extraction": {}, "joint": {"method": "joint", "student_init": "teacher"}}


@pytest.fixture(scope="module")
def wholes(corpus: Path, causal_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished extraction by each method; they are only read."""
    root, how = tmp_path_factory.mktemp("wholes"), ExtractOptions(dtype="float32", shard_tokens=200)
    for name, fields in METHODS.items():
        extract(texts(corpus), settings(root / name, causal_teacher, **fields), how, log=lambda line: None)
    return {name: root / name for name in METHODS}


@pytest.fixture
def folder(wholes: dict[str, Path], tmp_path: Path) -> Path:
    """A finished extraction, where `extracted()` finds it."""
    return Path(shutil.copytree(wholes["extraction"], tmp_path / "C"))


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a curriculum by name."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    found = bytearray(path.read_bytes())
    found[len(found) // 2] ^= 1
    path.write_bytes(found)


def edit(path: Path, change: Callable[[Any], None], seal: bool = False) -> None:
    """Change the values of a JSON file; with `seal`, as one who knows of its digest."""
    values = json.loads(path.read_text())
    change(values)
    if seal:
        values = sealed({name: value for name, value in values.items() if name != "digest"})
    path.write_text(json.dumps(values))


def interrupted(extracted: Extracted, monkeypatch: pytest.MonkeyPatch, shards: int = 2, **fields: Any) -> Path:
    """An extraction that ended after so many shards."""
    written: list[int] = []
    write = ShardWriter.write

    def some(self: ShardWriter, number: int, batches: Any) -> Any:
        written.append(number)
        return write(self, number, batches if len(written) <= shards else no_space_left())

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", some)
        with pytest.raises(UserError, match="No space left on device") as error:
            extracted("cut", **fields)
    return Path(str(error.value).split("'")[1]).parents[1]


@pytest.mark.parametrize("method", METHODS)
def test_every_file_has_a_checksum_that_is_compared(wholes: dict[str, Path], tmp_path: Path, method: str) -> None:
    folder = Path(shutil.copytree(wholes[method], tmp_path / "C"))
    before = content(folder)
    known = ExtractedCurriculum(folder).manifest.checksums
    assert before.keys() - known.keys() == {MANIFEST_FILE} and not known.keys() - before.keys()
    for name in before:
        flip(folder / name)
        with pytest.raises(UserError, match=f"{name} "):
            ExtractedCurriculum(folder)
        (folder / name).write_bytes(before[name])


@pytest.mark.parametrize("method", METHODS)
def test_extracting_again_makes_every_damaged_file_again(
    extracted: Extracted, wholes: dict[str, Path], tmp_path: Path, method: str
) -> None:
    folder = Path(shutil.copytree(wholes[method], tmp_path / "C"))
    before = content(folder)
    names = sorted(before.keys() - {MANIFEST_FILE})
    for number, name in enumerate(names):
        if number % 3 == 0:
            flip(folder / name)
        elif number % 3 == 1:
            (folder / name).unlink()
        else:
            shutil.copy(folder / names[number - 2], folder / name)
    (folder / "tokenizer" / "added_tokens.json").write_text("{}")
    extracted(**METHODS[method])
    assert content(folder) == before


def test_a_file_that_nobody_extracted_is_not_opened(folder: Path) -> None:
    (folder / "tokenizer" / "chat_template.jinja").write_text("stranger")
    (folder / "tokenizer" / ".DS_Store").write_text("of a file manager")
    with pytest.raises(
        UserError, match=r"tokenizer/chat_template.jinja of .* is not in its manifest, but would be read"
    ):
        ExtractedCurriculum(folder)
    (folder / "tokenizer" / "chat_template.jinja").unlink()
    ExtractedCurriculum(folder)


@pytest.mark.parametrize(
    ("damaged", "open_it"),
    [
        ("tokenizer/tokenizer.json", lambda found: found.tokenizer),
        ("teacher/config.json", lambda found: found.teacher_config),
        ("student/config.json", lambda found: found.student),
        ("evaluation/data-00000-of-00001.arrow", lambda found: found.evaluation),
        ("calibration/data-00000-of-00001.arrow", lambda found: found.calibration(16, 4)),
        ("head.safetensors", lambda found: found.head),
        ("target_stats.safetensors", lambda found: found.target_maps(found.curriculum, 16)),
    ],
)
def test_small_files_are_compared_before_they_are_opened(
    folder: Path, bucket: Any, monkeypatch: pytest.MonkeyPatch, damaged: str, open_it: Callable[[Any], Any]
) -> None:
    """Here and behind a URL, also where nobody asked for a check."""

    def opened(*_: Any, **__: Any) -> None:
        raise AssertionError("it was opened")

    flip(folder / damaged)
    for name, found in content(folder).items():
        bucket.pipe(f"/far/{name}", found)
    for name in ("load_tokenizer", "load_file", "load_target_maps"):
        monkeypatch.setattr(opening, name, opened)
    for where in (folder, "memory://far"):
        with pytest.raises(UserError, match=rf"{damaged} of the extracted curriculum .* is damaged \(its checksum"):
            open_it(ExtractedCurriculum(where, check=False))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("identity seed", 43),
        ("identity step_examples", 8),
        ("identity curriculum stages 0 steps", 3),
        ("identity teacher blocks", 3),
        ("identity head scale", 2.0),
        ("identity forms stage_1 dtype", "float16"),
        ("splits 0 shards 0 rows", 1),
        ("environment torch", "1.0"),
        ("format", 2),
    ],
)
def test_an_edited_manifest_is_refused(
    extracted: Extracted, folder: Path, tmp_path: Path, path: str, value: Any
) -> None:
    def change(values: Any) -> None:
        *first, last = [int(part) if part.isdigit() else part for part in path.split()]
        for part in first:
            values = values[part]
        assert values[last] != value
        values[last] = value

    edit(folder / MANIFEST_FILE, change)
    with pytest.raises(UserError, match=r"manifest.json .* is damaged \(it was changed: its digest is not that of its"):
        train(tmp_path / "student", folder)
    with pytest.raises(UserError, match=r"manifest.json .* is damaged \(it was changed"):
        extracted()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"seed": -1}, "seed must be a number from 0 to 4294967295, got -1"),
        ({"mlm_probability": 2.0}, "mlm_probability must be a number from 0 to 1, got 2.0"),
        ({"batch_size": True}, "identity.batch_size is true, not a number"),
        ({"longest": "16"}, 'identity.longest is "16", not a whole number'),
        ({"forms": {}}, "forms does not say how the rows of stage_1 are stored"),
        ({"surprise": 1}, "identity.surprise is not a field that is known"),
    ],
)
def test_a_manifest_with_values_that_no_extraction_has_is_refused(
    folder: Path, change: dict[str, Any], message: str
) -> None:
    """Also with the right digest."""
    edit(folder / MANIFEST_FILE, lambda values: values["identity"].update(change), seal=True)
    with pytest.raises(
        UserError, match=rf"manifest.json .*{message}.*: copy it again, or extract again to a different"
    ):
        ExtractedCurriculum(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda v: v["files"].update({"head.safetensors": "abc"}),
            "the checksum of head.safetensors is 'abc', not the 64 dig",
        ),
        (
            lambda v: v["splits"].pop(),
            "it has the splits stage_1, .*calibration, not stage_1, .*calibration, evaluation",
        ),
        (lambda v: v.update(format=0), "format must be a number from 1 to 3, got 0"),
        (lambda v: v["splits"][0]["shards"][0].update(rows=-1), "rows of stage_1/data.* must be a number from 0 to"),
        (
            lambda v: v["identity"]["forms"]["stage_1"].update(content="all"),
            "unknown content 'all': use one of states, pooled",
        ),
        (lambda v: v["identity"]["teacher"].update(blocks=0), "blocks must be at least 1, got 0"),
        (lambda v: v["identity"]["head"].update(scale=0), "scale must be positive and finite, got 0"),
    ],
)
def test_a_manifest_that_cannot_be_is_refused(folder: Path, change: Callable[[Any], Any], message: str) -> None:
    edit(folder / MANIFEST_FILE, change, seal=True)
    with pytest.raises(UserError, match=f"manifest.json .*{message}"):
        ExtractedCurriculum(folder)


def test_a_file_that_the_manifest_does_not_list_is_not_opened(folder: Path) -> None:
    edit(folder / MANIFEST_FILE, lambda values: values["files"].pop("target_stats.safetensors"), seal=True)
    found = ExtractedCurriculum(folder)
    with pytest.raises(
        UserError, match=r"the manifest of the extracted curriculum .* lists no target_stats.safetensors"
    ):
        found.target_maps(found.curriculum, 16)


def test_a_file_that_changes_during_the_extraction_is_noticed_at_its_end(
    extracted: Extracted, wholes: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = ShardWriter.write

    def spoil(self: ShardWriter, number: int, batches: Any) -> Any:
        (tmp_path / "cut" / "head.safetensors").unlink(missing_ok=True)
        return write(self, number, batches)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", spoil)
        with pytest.raises(UserError, match=r"head.safetensors in .* was changed during the extraction: run the same"):
            extracted("cut")
    assert content(extracted("cut")) == content(wholes["extraction"])


def test_a_folder_without_its_records_is_refused(extracted: Extracted, folder: Path) -> None:
    (folder / MANIFEST_FILE).unlink()
    with pytest.raises(
        UserError, match=r"does not contain an extracted .*neither manifest.json nor extraction.json.: copy"
    ):
        extracted()


@pytest.mark.parametrize(
    "name", ["../out", "/tmp/out", "stage_1/../../out", "stage_1\\..\\out", "C:out", "evaluation/x"]
)
@pytest.mark.parametrize("far", [False, True])
def test_a_manifest_names_no_file_outside_its_folder(
    folder: Path, bucket: Any, tmp_path: Path, name: str, far: bool
) -> None:
    def rename(values: Any) -> None:
        values["splits"][0]["shards"][0]["file"] = name
        values["files"][name] = "0" * 64

    edit(folder / MANIFEST_FILE, rename, seal=True)
    for file, found in content(folder).items():
        bucket.pipe(f"/far/{file}", found)
    with pytest.raises(
        UserError, match=r"manifest.json .*(it names a file .*: expected a relative path|not in its folder)"
    ):
        train(tmp_path / "student", "memory://far" if far else folder)
    assert not (tmp_path / "out").exists() and not Path("/tmp/out").exists()


def test_a_shard_behind_a_url_is_compared_before_it_gets_its_name(folder: Path, bucket: Any) -> None:
    flip(folder / "stage_1" / sorted(os.listdir(folder / "stage_1"))[0])
    for name, found in content(folder).items():
        bucket.pipe(f"/far/{name}", found)
    found = ExtractedCurriculum("memory://far", check=False)
    with pytest.raises(UserError, match=r"stage_1/.* is damaged \(its checksum"):
        opening.open_split(found.store, found.manifest.split("stage_1"))
    assert not [path for path in found.store._copies().rglob("*") if path.is_file()]


def test_a_kill_in_the_first_write_does_not_spoil_the_folder(
    extracted: Extracted, wholes: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", killed)
        patch.setattr(files.Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            extracted("cut")
    (left,) = (tmp_path / "cut").iterdir()
    assert files.is_leftover(left)
    assert content(extracted("cut")) == content(wholes["extraction"])


@pytest.mark.parametrize(
    "spoil",
    [
        "shard",
        "receipt",
        "receipt of another",
        "statistics",
        "student",
        "tokenizer",
        "record of the files",
        "stray file",
    ],
)
def test_an_unfinished_extraction_notices_damage_when_it_goes_on(
    extracted: Extracted, wholes: dict[str, Path], monkeypatch: pytest.MonkeyPatch, spoil: str
) -> None:
    folder = interrupted(extracted, monkeypatch, **METHODS["joint"])
    one, two = sorted((folder / "stage_1").glob("*.arrow"))
    receipts = [file.with_name(f"{file.name}.receipt.json") for file in (one, two)]
    if spoil == "receipt of another":
        shutil.copy(receipts[1], receipts[0])
    elif spoil == "receipt":
        edit(receipts[0], lambda values: values["shard"].update(rows=1))
    elif spoil == "stray file":
        (folder / "tokenizer" / "added_tokens.json").write_text('{"stranger": 5}')
    else:
        names = {"statistics": "target_stats.safetensors", "student": "student/model.safetensors"}
        names |= {"shard": str(one), "tokenizer": "tokenizer/tokenizer.json", "record of the files": FILES_FILE}
        flip(folder / names[spoil])
    extracted("cut", **METHODS["joint"])
    assert content(folder) == content(wholes["joint"])


def test_shards_that_were_made_with_other_statistics_are_made_again(
    extracted: Extracted, wholes: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that are computed again differ: on a different machine, say."""
    calibrate = live.calibrate

    def otherwise(states: Any, curriculum: Any, batches: Any, *rest: Any) -> Any:
        return calibrate(states, curriculum, [batches[0], batches[1]], *rest)

    with monkeypatch.context() as patch:
        patch.setattr(live, "calibrate", otherwise)
        folder = interrupted(extracted, patch)
    flip(folder / "target_stats.safetensors")
    extracted("cut")
    assert content(folder) == content(wholes["extraction"])


def test_what_only_an_unfinished_extraction_has_is_removed_from_a_finished_one(
    extracted: Extracted, folder: Path
) -> None:
    """A kill just after the manifest was written leaves it behind."""
    before = content(folder)
    for name in ("extraction.json", FILES_FILE, "stage_1/data-00000-of-00002.arrow.receipt.json"):
        (folder / name).write_text("{}")
    extracted()
    assert content(folder) == before


@pytest.mark.parametrize(
    ("size", "what"),
    [
        (200, r"cut/extraction.json': File too large; free space there, or choose a different folder"),
        (3_000, r"cut/target_stats.safetensors': .*os error 27.*; free space there, or choose a different folder"),
        (10_000, r"cut' by way of '.*': .*os error 27.*; free space there, or set TMPDIR to a different folder"),
        (30_000, r"cut/stage_2/data-.*arrow': .*File too large"),
    ],
)
def test_an_extraction_on_a_full_disk_is_one_line_and_resumes(
    extracted: Extracted, wholes: dict[str, Path], size: int, what: str
) -> None:
    with largest_file(size), pytest.raises(UserError, match=f"could not write '.*{what}") as error:
        extracted("cut")
    assert len(str(error.value).splitlines()) == 1
    assert content(extracted("cut")) == content(wholes["extraction"])
