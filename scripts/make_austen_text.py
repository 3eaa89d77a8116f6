"""Build the embedded Jane Austen text from the R package `janeaustenr`.

    python scripts/make_austen_text.py PATH [--output_dir DIR]

PATH is a Debian package `r-cran-janeaustenr_*.deb`, or the unpacked R library folder `janeaustenr`.
The novels are R character vectors, one element per printed line, kept in R's lazy-load database: an
index `data/Rdata.rdx` and the values in `data/Rdata.rdb`. Only the few R types met there are read.

Each novel is cut at the last paragraph boundary before its final 8% of lines; the first parts make
`train.txt` and the last parts `heldout.txt`, so both hold all six novels and share no paragraph.
Notes by later editors are left out.
"""

from __future__ import annotations

import argparse
import io
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

DEFAULT_OUTPUT = Path(__file__).resolve().parent.parent / "src" / "tutelage" / "data" / "austen"
INDEX, VALUES = "janeaustenr/data/Rdata.rdx", "janeaustenr/data/Rdata.rdb"
# Variable in the R package -> first line that the novel must have (checked) in order of publication.
NOVELS = {
    "sensesensibility": "SENSE AND SENSIBILITY",
    "prideprejudice": "PRIDE AND PREJUDICE",
    "mansfieldpark": "MANSFIELD PARK",
    "emma": "EMMA",
    "northangerabbey": "NORTHANGER ABBEY",
    "persuasion": "PERSUASION",
}
HELDOUT_FRACTION = 0.08
EDITORS_REMARK = "[At this point in the first and second editions"  # one line, in SENSE AND SENSIBILITY
EDITORS_NOTE = "A NOTE ON THE TEXT"  # to the end of NORTHANGER ABBEY


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the embedded Jane Austen text.")
    parser.add_argument("path", type=Path, help="a janeaustenr .deb, or the unpacked R library folder")
    parser.add_argument("--output_dir", type=Path, default=DEFAULT_OUTPUT, help="where the two files go")
    args = parser.parse_args()

    index, values = read_package(args.path)
    train: list[str] = []
    heldout: list[str] = []
    for name, lines in read_novels(index, values).items():
        cut = heldout_start(lines)
        train.append(tidy(lines[:cut]))
        heldout.append(tidy(lines[cut:]))
        print(f"{name:17s} {len(lines):6,d} lines, held out from line {cut:6,d}; starts with {lines[0]!r}")

    args.output_dir.mkdir(parents=True, exist_ok=True)
    for file_name, parts in (("train.txt", train), ("heldout.txt", heldout)):
        text = "\n\n\n".join(parts) + "\n"
        (args.output_dir / file_name).write_text(text, encoding="utf-8", newline="\n")
        print(f"{file_name}: {len(text.encode()):,d} bytes, {len(text.split()):,d} words")


def read_novels(index: bytes, values: bytes) -> dict[str, list[str]]:
    """The lines of each novel, in the order of `NOVELS`."""
    variables = RReader(zlib.decompress(index, wbits=zlib.MAX_WBITS | 32)).read_file()["variables"]
    novels = {}
    for name, title in NOVELS.items():
        if name not in variables:
            raise ValueError(f"no novel {name!r} in the package: it has {sorted(variables)}")
        position, length = variables[name]
        chunk = values[position : position + length]
        (size,) = struct.unpack(">i", chunk[:4])
        stream = zlib.decompress(chunk[4:])
        assert len(stream) == size, f"{name}: {len(stream)} bytes where the index says {size}"
        lines = [line.rstrip() for line in RReader(stream).read_file()]
        if not lines[0].upper().startswith(title):
            raise ValueError(f"{name} starts with {lines[0]!r}, where {title!r} was expected")
        novels[name] = without_editors(lines)
    return novels


def without_editors(lines: list[str]) -> list[str]:
    """The author's lines: no remark by a later editor, no blank lines at the end."""
    end = lines.index(EDITORS_NOTE) if EDITORS_NOTE in lines else len(lines)
    while not lines[end - 1]:
        end -= 1
    return [line for line in lines[:end] if not line.startswith(EDITORS_REMARK)]


def heldout_start(lines: list[str]) -> int:
    """First line after the last blank line that precedes the final `HELDOUT_FRACTION` of the lines."""
    cut = len(lines) - round(HELDOUT_FRACTION * len(lines))
    while lines[cut - 1]:
        cut -= 1
    return cut


def tidy(lines: list[str]) -> str:
    """Join the lines; drop blank ones at both ends."""
    return "\n".join(lines).strip("\n")


def read_package(path: Path) -> tuple[bytes, bytes]:
    """The bytes of the index and of the values, from a .deb or from a folder."""
    if path.is_dir():
        data = path / "data"
        return (data / "Rdata.rdx").read_bytes(), (data / "Rdata.rdb").read_bytes()
    found: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(deb_payload(path.read_bytes()))) as archive:
        for member in archive:
            for wanted in (INDEX, VALUES):
                stream = archive.extractfile(member) if member.name.endswith(wanted) else None
                if stream is not None:
                    found[wanted] = stream.read()
    if len(found) != 2:
        raise ValueError(f"{path} holds {sorted(found)}, where {INDEX} and {VALUES} are needed")
    return found[INDEX], found[VALUES]


def deb_payload(archive: bytes) -> bytes:
    """The `data.tar.*` member of a Debian package, which is an `ar` archive."""
    if not archive.startswith(b"!<arch>\n"):
        raise ValueError("not a Debian package: it does not start with '!<arch>'")
    position = 8
    while position < len(archive):
        header = archive[position : position + 60]
        size = int(header[48:58])
        if header[:16].startswith(b"data.tar"):
            return archive[position + 60 : position + 60 + size]
        position += 60 + size + size % 2
    raise ValueError("the Debian package has no data.tar member")


class RReader:
    """Reads one value of R's binary (XDR) serialisation: lists, vectors and strings, no closures."""

    def __init__(self, stream: bytes) -> None:
        self.stream = io.BytesIO(stream)
        self.references: list[Any] = []
        self.readers: dict[int, Callable[[int], Any]] = {
            1: self._symbol,
            2: self._pairlist,
            9: self._string,
            10: lambda _: self._array("i"),
            13: lambda _: self._array("i"),
            14: lambda _: self._array("d"),
            16: lambda _: [self._value() for _ in range(self._int())],
            19: lambda _: [self._value() for _ in range(self._int())],
            254: lambda _: None,  # NULL
            255: lambda flags: self.references[(flags >> 8) - 1],
        }

    def read_file(self) -> Any:
        """The value after the file header. A named list comes back as a dictionary."""
        if self.stream.read(2) != b"X\n":
            raise ValueError("not an R serialisation in XDR format")
        version, _writer, _reader = self._int(), self._int(), self._int()
        if version == 3:  # the native encoding follows
            self.stream.read(self._int())
        return self._value()

    def _value(self) -> Any:
        flags = self._int()
        kind = flags & 0xFF
        if kind not in self.readers:
            raise ValueError(f"R type {kind} is not supported: only lists, vectors and strings are")
        value = self.readers[kind](flags)
        if flags & 0x200 and kind not in (2, 9):  # attributes follow; a pairlist reads its own
            names = self._value().get("names")
            if names is not None:
                return dict(zip(names, value, strict=True))
        return value

    def _int(self) -> int:
        return int(struct.unpack(">i", self.stream.read(4))[0])

    def _array(self, code: str) -> list[Any]:
        array = f">{self._int()}{code}"
        return list(struct.unpack(array, self.stream.read(struct.calcsize(array))))

    def _string(self, flags: int) -> str | None:
        length = self._int()
        encoding = "latin-1" if flags & (1 << 14) else "utf-8"
        return None if length < 0 else self.stream.read(length).decode(encoding)

    def _symbol(self, _flags: int) -> str:
        self.references.append(self._value())
        return str(self.references[-1])

    def _pairlist(self, flags: int) -> dict[Any, Any]:
        if flags & 0x200:
            self._value()
        tag = self._value() if flags & 0x400 else None
        first = {tag: self._value()}
        return first | (self._value() or {})


if __name__ == "__main__":
    main()
