"""A folder of files, on this machine or behind any fsspec URL (s3://, gs://, abfs://, ...).

A file is never read half-written: a local file is written to a temporary file, synced and renamed; an object in remote
storage appears when its upload is complete."""

import hashlib
import os
import shutil
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from tutelage.core.errors import UserError, as_user_error
from tutelage.io.files import NO_SPACE, is_leftover, new_temporary_folder, replacing, temporary_folder, writing_errors
from tutelage.io.names import check_inside, check_name

Check = Callable[[Path], None]


def sha256_of(handle: Any) -> str:
    """SHA-256 of the rest of an open binary file."""
    digest = hashlib.sha256()
    while block := handle.read(1 << 22):
        digest.update(block)
    return digest.hexdigest()


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file on this machine; empty where there is none."""
    if not path.exists():
        return ""
    with path.open("rb") as handle:
        return sha256_of(handle)


class Store:
    """Files below a folder or URL; of a folder elsewhere, `kept` fetched files stay on this machine at a time, and the oldest
    goes first. Every method raises UserError for an address that cannot be reached, a file that cannot be written, or a name
    that leads out of the folder."""

    def __init__(self, url: str | Path, kept: int = 8):
        self.url, self.kept = str(url).rstrip("/"), kept
        with self._reaching():
            self._fs, self.root = fsspec.core.url_to_fs(self.url)
        self.local = Path(self.root) if isinstance(self._fs, LocalFileSystem) else None
        self._fetched: OrderedDict[str, Path] = OrderedDict()  # what is deleted when others come
        self._folder: Path | None = None
        self._process = os.getpid()

    @property
    def fs(self) -> Any:
        """The file system. A forked process, such as a data loader's worker, has its own, and fetches its own files."""
        if self._process != os.getpid():
            self._process = os.getpid()
            self._fs, _ = fsspec.core.url_to_fs(self.url)
            self._fetched = OrderedDict()
            # inside the folder of the parent process, which deletes it
            self._folder = None if self._folder is None else new_temporary_folder(self._folder)
        return self._fs

    def __str__(self) -> str:
        return self.url

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        with as_user_error(f"could not reach {self.url!r} (check the address, your permissions and credentials)"):
            yield  # each file system has errors of its own

    def _path(self, name: str) -> str:
        check_name(name, repr(self.url))
        if self.local is not None:
            check_inside(self.local, name)
        return f"{self.root}/{name}"

    def exists(self, name: str) -> bool:
        path = self._path(name)
        with self._reaching():
            return bool(self.fs.isfile(path))

    def is_empty(self) -> bool:
        """Whether there is nothing but the temporary files of a process that was killed."""
        with self._reaching():
            return not self.fs.exists(self.root) or all(map(is_leftover, self.fs.find(self.root)))

    def clean(self) -> None:
        """Delete the temporary files that a process that was killed left behind."""
        if self.local is not None:
            for name in filter(is_leftover, self.files()):
                with writing_errors(self.local / name):
                    (self.local / name).unlink(missing_ok=True)

    def size(self, name: str) -> int:
        path = self._path(name)
        with self._reaching():
            return int(self.fs.size(path))

    def files(self, folder: str | None = None) -> list[str]:
        """Names of the files in a folder (None: this one) and below it; none if there is no folder."""
        path, start = self.root if folder is None else self._path(folder), len(self.root.rstrip("/")) + 1
        with self._reaching():
            found = self.fs.find(path) if self.fs.exists(path) else []
        names = sorted(str(each)[start:] for each in found)
        for name in names:
            check_name(name, repr(self.url))  # an object may have any key
        return names

    def read(self, name: str) -> str:
        path = self._path(name)
        with self._reaching():
            content: bytes = self.fs.cat_file(path)
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{self.url}/{name} is not UTF-8 text: {error}") from error

    def write(self, name: str, text: str) -> None:
        with self.writing(name) as temporary:
            temporary.write_bytes(text.encode())  # with the same line ends everywhere

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A temporary path to write to; the file gets its name when the block ends without an error."""
        path = self._path(name)
        if self.local is not None:
            with replacing(Path(path)) as temporary:
                yield temporary
            return
        with temporary_folder(f"{self.url}/{name}") as folder:
            yield folder / Path(name).name
            with self._reaching():
                self.fs.put_file(str(folder / Path(name).name), path)

    def remove(self, name: str) -> None:
        """Delete a file, if it is there."""
        path = self._path(name)
        if self.exists(name):
            with self._reaching():
                self.fs.rm_file(path)

    def fetch(self, name: str, check: Check | None = None, pin: bool = False) -> Path:
        """Path of a file on this machine: the file itself, or a copy that is kept for a while, or as long as this object if
        `pin`. A copy gets its name once `check` has been called with its temporary path and has raised nothing."""
        path = self._path(name)
        if self.local is not None:
            return Path(path)
        fs = self.fs  # first, since a forked process forgets what is fetched
        copy = self._copies() / name
        if not copy.exists():
            with replacing(copy) as temporary:
                with self._reaching(), writing_errors(copy, only=NO_SPACE):
                    fs.get_file(path, str(temporary))
                if check is not None:
                    check(temporary)
        if not pin:
            self._fetched[name] = copy
            self._fetched.move_to_end(name)
        while len(self._fetched) > self.kept:
            _, oldest = self._fetched.popitem(last=False)
            oldest.unlink(missing_ok=True)  # memory maps of it stay readable
        return copy

    def fetch_folder(self, folder: str, names: Iterable[str], check: Callable[[str], Check]) -> Path:
        """Path of a small folder on this machine: the folder itself, or copies of the files `names`, which stay; `check(name)`
        is that of `fetch`."""
        if self.local is not None:
            return Path(self._path(folder))
        for name in names:
            self.fetch(name, check(name), pin=True)
        return self._copies() / folder

    def _copies(self) -> Path:
        """Folder of what is fetched."""
        if self._folder is None:
            self._folder = new_temporary_folder()
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        return self._folder

    def sha256(self, name: str) -> str:
        path = self._path(name)
        with self._reaching(), self.fs.open(path, "rb") as handle:
            return sha256_of(handle)

    def __reduce__(self) -> Any:
        return Store, (self.url, self.kept)  # a copy in a different process fetches its own files
