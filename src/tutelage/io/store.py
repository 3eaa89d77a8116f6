"""A folder of files, on this machine or behind any fsspec URL (s3://, gs://, abfs://, ...).

A file is never read half-written: a local file is written to a temporary file, synced and renamed; an object in remote
storage appears when its upload is complete."""

import hashlib
import os
import shutil
import tempfile
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from tutelage.core.errors import as_user_error
from tutelage.io.files import replacing, writing_errors


def sha256_of(handle: Any) -> str:
    """SHA-256 of the rest of an open binary file."""
    digest = hashlib.sha256()
    while block := handle.read(1 << 22):
        digest.update(block)
    return digest.hexdigest()


class Store:
    """Files below a folder or URL; of a folder elsewhere, `kept` fetched files stay on this machine at a time, and the oldest
    goes first. Every method raises UserError for an address that cannot be reached, or a file that cannot be written."""

    def __init__(self, url: str | Path, kept: int = 8):
        self.url, self.kept = str(url).rstrip("/"), kept
        with self._reaching():
            self._fs, self.root = fsspec.core.url_to_fs(self.url)
        self.local = Path(self.root) if isinstance(self._fs, LocalFileSystem) else None
        self._fetched: OrderedDict[str, Path] = OrderedDict()
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
            self._folder = None if self._folder is None else Path(tempfile.mkdtemp(dir=self._folder))
        return self._fs

    def __str__(self) -> str:
        return self.url

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        with as_user_error(f"could not reach {self.url!r} (check the address, your permissions and credentials)"):
            yield  # each file system has errors of its own

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def exists(self, name: str) -> bool:
        with self._reaching():
            return bool(self.fs.isfile(self._path(name)))

    def is_empty(self) -> bool:
        with self._reaching():
            return not (self.fs.exists(self.root) and self.fs.find(self.root))

    def size(self, name: str) -> int:
        with self._reaching():
            return int(self.fs.size(self._path(name)))

    def files(self, folder: str) -> list[str]:
        """Names of the files in a folder and below it; none if there is no folder."""
        start = len(self.root.rstrip("/")) + 1
        with self._reaching():
            if not self.fs.exists(self._path(folder)):
                return []
            return sorted(str(path)[start:] for path in self.fs.find(self._path(folder)))

    def read(self, name: str) -> str:
        with self._reaching():
            content: bytes = self.fs.cat_file(self._path(name))
        return content.decode("utf-8")

    def write(self, name: str, text: str) -> None:
        with self.writing(name) as temporary:
            temporary.write_text(text, encoding="utf-8")

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A temporary path to write to; the file gets its name when the block ends without an error."""
        if self.local is not None:
            with replacing(self.local / name) as temporary:
                yield temporary
            return
        with writing_errors(f"{self.url}/{name}"), tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder) / Path(name).name
            yield temporary
            with self._reaching():
                self.fs.put_file(str(temporary), self._path(name))

    def remove(self, name: str) -> None:
        """Delete a file, if it is there."""
        if self.exists(name):
            with self._reaching():
                self.fs.rm_file(self._path(name))

    def fetch(self, name: str) -> Path:
        """Path of a file on this machine: the file itself, or a copy that is kept for a while."""
        if self.local is not None:
            return self.local / name
        fs = self.fs  # first, since a forked process forgets what is fetched
        if name in self._fetched:
            self._fetched.move_to_end(name)
            return self._fetched[name]
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="tutelage-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        path = self._folder / name
        with replacing(path) as temporary, self._reaching():
            fs.get_file(self._path(name), str(temporary))
        self._fetched[name] = path
        while len(self._fetched) > self.kept:
            _, oldest = self._fetched.popitem(last=False)
            oldest.unlink(missing_ok=True)  # memory maps of it stay readable
        return path

    def fetch_folder(self, folder: str) -> Path:
        """Path of a small folder on this machine: the folder itself, or a copy."""
        names = self.files(folder)
        paths = [self.fetch(name) for name in names]
        if not paths:
            return Path(self.root) / folder
        return paths[0].parents[len(Path(names[0]).relative_to(folder).parts) - 1]

    def sha256(self, name: str) -> str:
        with self._reaching(), self.fs.open(self._path(name), "rb") as handle:
            return sha256_of(handle)

    def __reduce__(self) -> Any:
        return Store, (self.url, self.kept)  # a copy in a different process fetches its own files
