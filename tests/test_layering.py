"""An import may only point down the rooms: core < io < tasks < targets < training < runs < reproduction < cli."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "tutelage"
ROOMS = ("core", "io", "tasks", "targets", "training", "runs", "reproduction", "cli")  # from the bottom
DOORS = {"tutelage", "tutelage.__main__"}  # the package's front doors: outside the rooms, may import any
CORE_THIRD_PARTIES = {"torch", "numpy"}

MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    path = MODULES[module]
    is_package = path.name == "__init__.py"
    assert violations(module, path.read_text(encoding="utf-8"), is_package=is_package) == []


def test_every_room_is_read() -> None:
    found = {room_of(module) for module in MODULES}
    existing = {room for room in ROOMS if (PACKAGE / room).is_dir() or (PACKAGE / f"{room}.py").is_file()}
    assert existing == found - {None}
    assert "core" in existing


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_says_what_lives_there(room: str) -> None:
    docstring = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8")))
    assert docstring is not None
    assert len(docstring.splitlines()) >= 2, f"{room}/__init__.py: say what lives there and what does not"


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("tutelage.core.blocks", "import tutelage.training", "core imports training"),
        ("tutelage.core.blocks", "from tutelage import targets", "core imports targets"),
        ("tutelage.core.blocks", "from ..targets.live import Live", "core imports targets"),
        ("tutelage.core.blocks", "from .. import cli", "core imports cli"),
        ("tutelage.core.blocks", "def late():\n    import tutelage.tasks.text", "core imports tasks"),
        ("tutelage.core.blocks", "from transformers import Trainer", "core imports transformers"),
        ("tutelage.core.blocks", "import datasets.arrow_dataset", "core imports datasets"),
        ("tutelage.tasks", "from tutelage.targets.live import LiveTargets", "tasks imports targets"),
        ("tutelage.tasks.text", "from tutelage.training import CurriculumTrainer", "tasks imports training"),
        ("tutelage.training.trainer", "from tutelage.runs import distill", "training imports runs"),
        ("tutelage.io.store", "from tutelage.targets import manifest", "io imports targets"),
        ("tutelage.tasks.base", "from tutelage.training.config import CurriculumConfig", "tasks imports training"),
        (
            "tutelage.targets.source",
            "from tutelage.training.objective import StageObjective",
            "targets imports training",
        ),
        ("tutelage.runs.distill", "from tutelage.reproduction.compare import compare", "runs imports reproduction"),
        ("tutelage.runs.extraction.job", "from ...reproduction import recipes", "runs imports reproduction"),
        ("tutelage.reproduction.compare", "from tutelage.cli import main", "reproduction imports cli"),
        ("tutelage.cli", "from tutelage import CurriculumTrainer", "cli imports tutelage.CurriculumTrainer"),
        ("tutelage.utils", "import torch", "tutelage.utils lies in no room"),
    ],
)
def test_an_arrow_up_is_detected(module: str, source: str, expected: str) -> None:
    (found,) = violations(module, source)
    assert expected in found


@pytest.mark.parametrize(
    ("module", "source", "is_package"),
    [
        ("tutelage.core.blocks", "import math\nimport numpy as np\nimport torch.nn.functional as F", False),
        ("tutelage.core", "from .blocks import find_blocks\nfrom tutelage.core import blocks", True),
        ("tutelage.targets.live", "from tutelage.core.blocks import find_blocks\nimport transformers", False),
        ("tutelage.tasks.text", "from ..core import blocks\nfrom ..io import files", False),
        ("tutelage.training.trainer", "from tutelage.tasks import text\nfrom . import config", False),
        ("tutelage.cli.main", "from tutelage import __version__, runs, training", False),
        ("tutelage", "from tutelage.training import CurriculumTrainer", True),
    ],
)
def test_an_arrow_down_is_allowed(module: str, source: str, is_package: bool) -> None:
    assert violations(module, source, is_package=is_package) == []


def violations(module: str, source: str, *, is_package: bool = False) -> list[str]:
    """What is wrong with the imports of `module`, in words; empty if nothing is."""
    if module in DOORS:
        return []
    room = room_of(module)
    if room is None:
        return [f"{module} lies in no room: put it in one of {', '.join(ROOMS)}"]
    found = []
    for line, name in imported_names(module, source, is_package):
        top, _, rest = name.partition(".")
        target = room_of(name)
        if top == "tutelage":
            up = target is not None and ROOMS.index(target) > ROOMS.index(room)
            if up or (target is None and rest != "__version__"):
                found.append(f"{module}, line {line}: {room} imports {target or name}; arrows may only point down")
        elif room == "core" and top not in CORE_THIRD_PARTIES and top not in sys.stdlib_module_names:
            found.append(f"{module}, line {line}: core imports {top}; it may use {sorted(CORE_THIRD_PARTIES)} only")
    return found


def imported_names(module: str, source: str, is_package: bool) -> list[tuple[int, str]]:
    """Line and absolute name of everything that `source` imports, wherever in it the import stands."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            names += [(node.lineno, f"{origin}.{alias.name}") for alias in node.names]
    return names


def room_of(module: str) -> str | None:
    """The room that a dotted name under `tutelage` lies in."""
    parts = module.split(".")
    return parts[1] if parts[0] == "tutelage" and len(parts) > 1 and parts[1] in ROOMS else None
