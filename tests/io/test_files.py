"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import make_tokenizer
from tests.limits import largest_file
from tutelage.core.errors import UserError
from tutelage.io import files
from tutelage.io.claim import Claim, claim
from tutelage.io.files import alone, is_leftover, replacing, temporary_folder, write_atomically, writing_errors
from tutelage.io.store import Store

NUMBERS = Claim("numbers.json", {"numbers": 3}, "numbers")


def killed(*_: object, **__: object) -> None:
    raise SystemExit("killed")


def leave_half(path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Be killed in a write to `path`; the names of what is left."""
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", killed)
        patch.setattr(files.Path, "unlink", killed)  # a process that is killed cleans up nothing
        with pytest.raises(SystemExit):
            write_atomically(path, "half")
    return [file.name for file in path.parent.iterdir()]


def test_a_link_in_the_place_of_a_temporary_file_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").write_text("kept")
    for name in ("a.json.tmp", f"a.json.{'0' * 16}.tmp"):
        (tmp_path / name).symlink_to(tmp_path / "mine")
    write_atomically(tmp_path / "a.json", "new")
    assert ((tmp_path / "mine").read_text(), (tmp_path / "a.json").read_text()) == ("kept", "new")
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: "0" * 16)  # whoever put it there has guessed the name
    with pytest.raises(UserError, match=r"could not write '.*a.json': File exists"):
        write_atomically(tmp_path / "a.json", "other")
    assert ((tmp_path / "mine").read_text(), (tmp_path / "a.json").read_text()) == ("kept", "new")


def test_a_file_and_its_folder_are_synced_before_and_after_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, bool]] = []
    monkeypatch.setattr(files, "sync", lambda path: seen.append((path.name, (tmp_path / "a.json").exists())))
    write_atomically(tmp_path / "a.json", "new")
    (temporary, before), folder = seen
    assert is_leftover(temporary) and not before and folder == (tmp_path.name, True)


def test_what_a_killed_process_left_half_written_does_not_count_as_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (left,) = leave_half(tmp_path / "numbers.json", monkeypatch)
    assert is_leftover(left)
    store = Store(tmp_path)
    assert store.is_empty()
    assert claim(store, NUMBERS) is False
    assert os.listdir(tmp_path) == ["numbers.json"]
    leave_half(tmp_path / "more.json", monkeypatch)
    assert claim(store, NUMBERS) is True
    assert os.listdir(tmp_path) == ["numbers.json"]


def test_files_of_somebody_else_are_not_cleaned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_half(tmp_path / "numbers.json", monkeypatch)
    (tmp_path / "draft.tmp").write_text("mine")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UserError, match=r"is not empty and does not contain numbers.*\(there is no numbers.json\)"):
        claim(Store(tmp_path), NUMBERS)
    assert sorted(os.listdir(tmp_path)) == before


def test_a_write_that_fails_leaves_the_last_good_file_and_nothing_else(tmp_path: Path) -> None:
    path, big = tmp_path / "a.safetensors", torch.zeros(10_000)
    save_file({"a": torch.ones(2)}, path)
    before = path.read_bytes()
    with (
        largest_file(4096),
        pytest.raises(UserError, match=r"could not write '.*a.safetensors': .*File too large"),
        replacing(path) as temporary,
    ):
        save_file({"a": big}, temporary)
    with largest_file(4096), pytest.raises(UserError, match=r"could not write '.*a.safetensors': File too large; free"):
        write_atomically(path, "x" * 10_000)
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("function", ["replace", "fsync", "open"])
def test_an_error_of_the_disk_is_one_line_with_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, function: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    write_atomically(tmp_path / "a.json", "old")
    with monkeypatch.context() as patch:
        patch.setattr(files.os, function, fail)
        free = "free space there, or " if number in files.NO_SPACE else ""
        with pytest.raises(
            UserError, match=rf"could not write '.*a.json': {os.strerror(number)}; {free}choose a different folder"
        ):
            write_atomically(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


def test_errors_of_libraries_that_write_name_the_path(tmp_path: Path) -> None:
    with (
        largest_file(1024),
        pytest.raises(UserError, match=r"could not write 'tokenizer' by way of '.*': .*os error 27"),
        temporary_folder("tokenizer") as folder,
    ):
        make_tokenizer().save_pretrained(folder)
    with pytest.raises(UserError, match=r"could not write 'w': .*iostream error"), writing_errors("w"):
        raise RuntimeError("basic_ios::clear: iostream error")  # torch.save on a disk that is full
    with pytest.raises(UserError, match=r"could not write 'weights': .*PytorchStreamWriter"), writing_errors("weights"):
        raise RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file data/0")
    with pytest.raises(RuntimeError, match="shape"), writing_errors("weights"):
        raise RuntimeError("shape mismatch")


def test_a_temporary_folder_that_cannot_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.tempfile, "tempdir", str(tmp_path / "none"))
    with (
        pytest.raises(UserError, match=r"could not make a temporary folder: .*none.*; free space there, or set TMPDIR"),
        temporary_folder("C"),
    ):
        pass


def test_one_process_works_in_a_folder(tmp_path: Path) -> None:
    pytest.importorskip("fcntl", reason="folders are locked on Unix")
    folder = tmp_path / "new"
    with alone(folder, "training"):
        with (
            pytest.raises(UserError, match=r"another process is training in '.*new': wait until"),
            alone(folder, "training"),
        ):
            pass
        assert not list(folder.iterdir())
    with alone(folder, "training"):
        pass
