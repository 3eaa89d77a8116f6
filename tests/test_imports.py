"""Every module imports, and none of them needs an optional dependency to do so."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import tutelage

OPTIONAL = ("gguf", "peft", "plotly", "sentence_transformers")
PACKAGE = Path(tutelage.__file__).parent
# From the files: pkgutil.walk_packages skips what lies under a package that does not import.
MODULES = [
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__main__.py"  # importing it would run the command line
]


def test_modules_are_found() -> None:
    assert {"tutelage", "tutelage.core"} <= set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_module_imports(name: str) -> None:
    assert importlib.import_module(name).__name__ == name


def test_optional_dependencies_are_optional() -> None:
    program = (
        "import importlib, json, sys\n"
        "optional, modules = json.loads(sys.argv[1])\n"
        "sys.modules.update(dict.fromkeys(optional))\n"  # None: importing it raises ModuleNotFoundError
        "for name in modules:\n"
        "    importlib.import_module(name)\n"
    )
    command = [sys.executable, "-c", program, json.dumps([OPTIONAL, MODULES])]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
