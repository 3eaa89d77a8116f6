"""Damage a copy of a folder in one place, use it, and judge what happened.

`Subject` says what is damaged and how it is used; `judge` makes one case of it, the same one for the same seed. A case is good
if the folder is refused and the message names the file, if the file is made again, or if the result is that of the undamaged
folder."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tutelage.core.errors import UserError
from tutelage.core.records import sealed

REFUSED, REPAIRED, WITHOUT_EFFECT = "refused, with the file named", "repaired", "without effect"
GOOD = (REFUSED, REPAIRED, WITHOUT_EFFECT)
NOT_NAMED, CHANGED, ERROR, OUTSIDE = "refused, without the file", "silently changed", "traceback", "wrote outside"
_OUTSIDE_NAMES = ("../{}", "../../{}", "/{}", "a/../../{}", "..\\{}", "C:{}", "{}\0")


@dataclass(frozen=True)
class Subject:
    """A folder that is damaged, and how it is used."""

    name: str
    folder: Path  # undamaged; it is copied
    attempt: Callable[[Path, Path], Any]  # uses a copy, with a folder for its own files; UserError refuses the copy
    older: Path | None = None  # a folder of the same kind with other content, for files that are replaced by older ones
    leave: Callable[[str], bool] = lambda name: False  # files that no case damages, by path below the folder

    def reference(self, scratch: Path) -> Any:
        """What `attempt` gives for the undamaged folder."""
        copy = _copy(self.folder, scratch / "reference")
        return self.attempt(copy, scratch / "reference-output")


@dataclass(frozen=True)
class Damage:
    """What was done to a folder."""

    kind: str
    what: str  # in words
    files: tuple[str, ...]  # by path below the folder: a refusal names one of them


@dataclass(frozen=True)
class Case:
    """A damage, and what came of it."""

    subject: str
    seed: str
    kind: str
    what: str
    verdict: str
    message: str = field(default="")  # of the refusal, or the traceback

    @property
    def good(self) -> bool:
        return self.verdict in GOOD


def judge(subject: Subject, seed: str, reference: Any, scratch: Path) -> Case:
    """Damage a copy in `scratch`, which is emptied, use it, and compare the result with `reference`."""
    shutil.rmtree(scratch, ignore_errors=True)
    copy = _copy(subject.folder, scratch / "inside" / "inside" / "copy")
    done = damage(copy, random.Random(seed), subject)
    damaged = {name: _digest(copy / name) for name in done.files}
    message = ""
    try:
        found = subject.attempt(copy, scratch / "output")
    except UserError as error:
        message = str(error)
        named = any(Path(name).name in message for name in done.files)
        verdict = REFUSED if named else NOT_NAMED
    except Exception:
        verdict, message = ERROR, traceback.format_exc()
    else:
        again = any(_digest(copy / name) != digest for name, digest in damaged.items())
        verdict = CHANGED if found != reference else (REPAIRED if again else WITHOUT_EFFECT)
    if strangers := [path for path in _files(scratch) if not path.startswith(("inside/inside/copy/", "output/"))]:
        verdict, message = OUTSIDE, ", ".join(strangers)
    return Case(subject.name, seed, done.kind, done.what, verdict, message)


def damage(folder: Path, draw: random.Random, subject: Subject) -> Damage:
    """Change one thing in a folder; what it is follows from the state of `draw`."""
    names = [name for name in _files(folder) if not subject.leave(name)]
    kinds = list(KINDS)
    draw.shuffle(kinds)
    for kind in kinds:
        if (done := KINDS[kind](folder, names, draw, subject)) is not None:
            return Damage(kind, *done)
    raise AssertionError(f"{folder} contains nothing that can be damaged")


Done = tuple[str, tuple[str, ...]] | None  # in words, and the files; None where a folder has nothing of the kind


def _one(names: list[str], draw: random.Random) -> str:
    """First a kind of file, then a file: folders have many files of few kinds."""
    kinds = sorted({_kind(name) for name in names})
    kind = draw.choice(kinds)
    return draw.choice([name for name in names if _kind(name) == kind])


def _kind(name: str) -> str:
    return re.sub(r"\d+", "0", Path(name).name)


def _flip(folder: Path, names: list[str], draw: random.Random, subject: Subject) -> Done:
    name = _one([name for name in names if (folder / name).stat().st_size], draw)
    content = bytearray((folder / name).read_bytes())
    place = draw.randrange(len(content))
    content[place] ^= 1 << draw.randrange(8)
    (folder / name).write_bytes(content)
    return f"a bit of byte {place} of {len(content)} of {name}", (name,)


def _truncate(folder: Path, names: list[str], draw: random.Random, subject: Subject) -> Done:
    name = _one([name for name in names if (folder / name).stat().st_size], draw)
    content = (folder / name).read_bytes()
    kept = draw.choice((0, draw.randrange(len(content)), len(content) - 1))
    (folder / name).write_bytes(content[:kept])
    return f"{name} ends after {kept} of {len(content)} bytes", (name,)


def _delete(folder: Path, names: list[str], draw: random.Random, subject: Subject) -> Done:
    name = _one(names, draw)
    (folder / name).unlink()
    return f"{name} is deleted", (name,)


def _older(folder: Path, names: list[str], draw: random.Random, subject: Subject) -> Done:
    older = subject.older
    common = [name for name in names if older and (older / name).is_file()]
    different = [name for name in common if older and (older / name).read_bytes() != (folder / name).read_bytes()]
    if older is None or not different:
        return None
    name = _one(different, draw)
    shutil.copy(older / name, folder / name)
    return f"{name} is an older one", (name,)


def _rename(folder: Path, names: list[str], draw: random.Random, subject: Subject) -> Done:
    name = _one(names, draw)
    new = draw.choice((f"{name}.old", f"{name}x", f"{Path(name).parent}/moved-{Path(name).name}"))
    (folder / name).rename(folder / new)
    return f"{name} is called {new}", (name, str(Path(new)))


def _swap(folder: Path, names: list[str], draw: random.Random, subject: Subject) -> Done:
    one = _one(names, draw)
    content = (folder / one).read_bytes()
    same = [name for name in names if Path(name).suffix == Path(one).suffix and (folder / name).read_bytes() != content]
    if not same:
        return None
    other = draw.choice(same)
    (folder / one).write_bytes((folder / other).read_bytes())
    (folder / other).write_bytes(content)
    return f"{one} and {other} are exchanged", (one, other)


def _edit(folder: Path, names: list[str], draw: random.Random, subject: Subject) -> Done:
    found = _some_json(folder, names, draw)
    if found is None:
        return None
    name, values = found
    places = list(_places(values))
    parent, key, path = draw.choice(places)
    if draw.random() < 0.15 and isinstance(parent, dict):
        del parent[key]
        what = f"{path} is deleted"
    else:
        new = draw.choice(_others(parent[key]))
        what = f"{path}: {json.dumps(parent[key])[:40]} is {json.dumps(new)[:40]}"
        parent[key] = new
    (folder / name).write_text(json.dumps(values, indent=1), encoding="utf-8")
    return f"in {name}, {what}", (name,)


def _lead_outside(folder: Path, names: list[str], draw: random.Random, subject: Subject) -> Done:
    """A name of a file in JSON leads out of the folder; the digest is made right, as by one who knows of it."""
    draw.shuffle(names)
    for name in (name for name in names if name.endswith(".json")):
        values = _read_json(folder / name)
        known = {part for path in _files(folder) for part in (path, Path(path).name)}
        places = [(parent, key, path) for parent, key, path in _places(values) if _named(parent, key) in known]
        if not places:
            continue
        parent, key, path = draw.choice(places)
        outside = draw.choice(_OUTSIDE_NAMES).format(_named(parent, key))
        if isinstance(parent[key], str) and parent[key] in known:
            parent[key] = outside
        else:
            parent[outside] = parent.pop(key)
        if isinstance(values, dict) and "digest" in values:
            values = sealed({key: value for key, value in values.items() if key != "digest"})
        (folder / name).write_text(json.dumps(values), encoding="utf-8")
        return f"in {name}, {path} is {outside!r}", (name,)
    return None


KINDS: dict[str, Callable[[Path, list[str], random.Random, Subject], Done]] = {
    "flip": _flip,
    "truncate": _truncate,
    "delete": _delete,
    "older": _older,
    "rename": _rename,
    "swap": _swap,
    "edit": _edit,
    "outside": _lead_outside,
}


def _some_json(folder: Path, names: list[str], draw: random.Random) -> tuple[str, Any] | None:
    """A JSON file with a value in it, and its values."""
    names = [name for name in names if name.endswith(".json") and any(_places(_read_json(folder / name)))]
    if not names:
        return None
    name = _one(names, draw)
    return name, _read_json(folder / name)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None


def _places(values: Any, path: str = "") -> Iterator[tuple[Any, Any, str]]:
    """Every value inside: what holds it, its key or number, and its path in words. Of a long list the first ones."""
    if isinstance(values, dict):
        keys: list[Any] = list(values)
    else:
        keys = list(range(min(len(values), 8))) if isinstance(values, list) else []
    for key in keys:
        yield values, key, f"{path}.{key}".lstrip(".")
        yield from _places(values[key], f"{path}.{key}")


def _others(value: Any) -> list[Any]:
    """Values of the same type, of other ranges and of other types."""
    if isinstance(value, bool):
        return [not value, str(value), None, 2]
    if isinstance(value, int | float):
        return [value + 1, value - 1, -1, 0, 2**70, value + 0.5, str(value), None, [value], float("nan"), True]
    if isinstance(value, str):
        return [f"{value}x", "", value.upper(), 5, None, [value], "\ud800", {value: value}]
    if isinstance(value, list):
        return [[], value + value, value[:-1], None, {}, "x"]
    if isinstance(value, dict):
        return [{}, {**value, "surprise": 1}, None, [], "x"]
    return [0, "x", [], False]


def _named(parent: Any, key: Any) -> Any:
    """The value if it is text, else the key."""
    return parent[key] if isinstance(parent[key], str) and len(parent[key]) < 200 and "/" not in str(key) else key


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _digest(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def contents(folder: Path, names: list[str] | None = None) -> dict[str, str | None]:
    """SHA-256 of the files in a folder (default: of all) by path below it, of JSON the values; None: not there."""
    found = {}
    for name in _files(folder) if names is None else names:
        values = _read_json(folder / name) if name.endswith(".json") and (folder / name).is_file() else None
        found[name] = _digest(folder / name) if values is None else json.dumps(values)
    return found
