"""Names of files below a folder lead nowhere else; what is fetched gets its name once it is known to be right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from tutelage.core.errors import UserError
from tutelage.io.store import Store

BAD = (
    "../x",
    "a/../../x",
    "..",
    "/etc/x",
    "C:x",
    "a/C:x",
    "a\\..\\x",
    "a\0",
    "a//b",
    "./a",
    "a/",
    "",
    "a\nb",
    "a\ud800",
)


@pytest.fixture
def memory() -> Iterator[Any]:
    found = fsspec.filesystem("memory")
    found.store.clear()
    yield found
    found.store.clear()


def write(store: Store, name: str) -> None:
    store.write(name, "text")


METHODS: dict[str, Callable[[Store, str], Any]] = {
    "exists": Store.exists,
    "size": Store.size,
    "files": Store.files,
    "read": Store.read,
    "write": write,
    "remove": Store.remove,
    "fetch": Store.fetch,
    "sha256": Store.sha256,
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("far", [False, True])
def test_a_name_that_leads_out_of_its_folder_is_refused(tmp_path: Path, memory: Any, far: bool, method: str) -> None:
    (tmp_path / "x").write_text("outside")
    memory.pipe("/x", b"outside")
    store = Store("memory://C" if far else tmp_path / "C")
    for name in BAD:
        with pytest.raises(UserError, match=r"C' names a file .*: expected a relative path inside its folder"):
            METHODS[method](store, name)
    assert (tmp_path / "x").read_text() == "outside" and memory.cat("/x") == b"outside"


@pytest.mark.parametrize("method", METHODS)
def test_a_link_that_leads_out_of_its_folder_is_refused(tmp_path: Path, method: str) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "x").write_text("outside")
    (tmp_path / "C" / "inside").mkdir(parents=True)
    (tmp_path / "C" / "inside" / "x").write_text("inside")
    (tmp_path / "C" / "folder").symlink_to(tmp_path / "outside")
    (tmp_path / "C" / "file").symlink_to(tmp_path / "outside" / "x")
    (tmp_path / "C" / "mine").symlink_to(tmp_path / "C" / "inside")
    (tmp_path / "link").symlink_to(tmp_path / "C")
    for root in ("C", "link"):
        store = Store(tmp_path / root)
        for name in ("folder/x", "file"):
            with pytest.raises(
                UserError, match=r"is a link that leads out of its folder, to '.*outside/x': put a copy"
            ):
                METHODS[method](store, name)
        assert store.read("mine/x") == "inside"
    assert (tmp_path / "outside" / "x").read_text() == "outside"


def test_an_object_whose_key_leads_out_of_its_folder_is_not_fetched(memory: Any) -> None:
    memory.pipe("/C/tokenizer/a.json", b"{}")
    memory.store["/C/tokenizer/../../x"] = memory.store["/C/tokenizer/a.json"]
    with pytest.raises(UserError, match=r"'memory://C' names a file 'tokenizer/../../x': expected a relative path"):
        Store("memory://C").files("tokenizer")


def test_a_copy_gets_its_name_after_it_was_compared(memory: Any) -> None:
    memory.pipe("/C/stage/a.arrow", b"damaged")
    store, seen = Store("memory://C"), []

    def refuse(path: Path) -> None:
        seen.append((path.read_bytes(), path))
        raise UserError("damaged")

    with pytest.raises(UserError, match="damaged"):
        store.fetch("stage/a.arrow", refuse)
    ((content, temporary),) = seen
    assert content == b"damaged" and list(temporary.parent.iterdir()) == []  # neither under its name nor another
    assert store.fetch("stage/a.arrow", lambda path: None).read_bytes() == b"damaged"


def test_small_folders_stay_whole_on_this_machine(memory: Any) -> None:
    names = [f"tokenizer/{number}.json" for number in range(12)]
    for name in [*names, "tokenizer/stranger.json"]:
        memory.pipe(f"/C/{name}", name.encode())
    store = Store("memory://C", kept=2)
    folder = store.fetch_folder("tokenizer", names, lambda name: lambda path: None)
    for name in ("a", "b", "c"):
        memory.pipe(f"/C/{name}", b"")
        store.fetch(name)
    assert sorted(file.name for file in folder.iterdir()) == sorted(name.removeprefix("tokenizer/") for name in names)
    assert sorted(file.name for file in folder.parent.iterdir()) == ["b", "c", "tokenizer"]


def test_a_full_disk_of_this_machine_is_not_blamed_on_the_address(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.pipe("/C/a", b"content")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(memory), "get_file", full)
    with pytest.raises(UserError, match=r"could not write '.*tutelage-.*/a': No space left on device; free space"):
        Store("memory://C").fetch("a")


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"a.json is not UTF-8 text"):
        Store(tmp_path).read("a.json")
