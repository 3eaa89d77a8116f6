"""Files, functions and signatures stay short enough to read."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "tutelage"
FILES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
LINES, FUNCTION_LINES, PARAMETERS = 400, 60, 7
# `CurriculumTrainer` overrides methods of `transformers.Trainer`, whose signatures are not ours to choose.
SIGNATURES_OF_TRANSFORMERS = {"training/trainer.py": {"CurriculumTrainer.__init__"}}

Function = ast.FunctionDef | ast.AsyncFunctionDef


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_short(name: str) -> None:
    lines = len(FILES[name].read_text(encoding="utf-8").splitlines())
    assert lines <= LINES, f"{name} has {lines} lines: divide it by responsibility"


@pytest.mark.parametrize("name", FILES)
def test_functions_are_short_and_take_few_parameters(name: str) -> None:
    exempt = SIGNATURES_OF_TRANSFORMERS.get(name, set())
    assert too_large(FILES[name].read_text(encoding="utf-8"), exempt) == []


@pytest.mark.parametrize("name", FILES)
def test_no_conditional_expression_is_inside_another(name: str) -> None:
    assert nested_conditionals(FILES[name].read_text(encoding="utf-8")) == []


def test_exempt_signatures_exist_and_need_their_exemption() -> None:
    for name, exempt in SIGNATURES_OF_TRANSFORMERS.items():
        found = {label for label, _ in functions(ast.parse(FILES[name].read_text(encoding="utf-8")))}
        assert exempt <= found
        for label in exempt:
            assert too_large(FILES[name].read_text(encoding="utf-8"), exempt - {label}) != [], label


def test_sizes_are_measured() -> None:
    """On source that breaks each rule once."""
    eight = "a, b, *, c, d=1, e=2, f=3, g=4, h=5"
    assert too_large(f"def f({eight}): ...") == ["f, line 1: 8 parameters"]
    assert too_large("class C:\n    def f(self, a, b, c, d, e, f, g): ...") == []
    assert too_large("class C:\n    @staticmethod\n    def f(s, a, b, c, d, e, f, g): ...") == [
        "C.f, line 3: 8 parameters"
    ]
    assert too_large("def f(*args, **kwargs): ...\n") == []
    body = "\n".join(["    pass"] * FUNCTION_LINES)
    assert too_large(f"def f():\n{body}") == ["f, line 1: 61 lines"]
    assert nested_conditionals("x = 1 if a else 2\ny = 1 if a else (2 if b else 3)") == ["line 2"]
    assert nested_conditionals("y = [1 if b else 3 for b in c] if a else 2") == ["line 1"]


def functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, Function]]:
    """Every function with its dotted name."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Function):
            yield prefix + node.name, node
        scope = isinstance(node, Function | ast.ClassDef)
        yield from functions(node, f"{prefix}{node.name}." if scope else prefix)


def too_large(source: str, exempt: set[str] = frozenset()) -> list[str]:  # type: ignore[assignment]
    """Functions that have too many lines or parameters, in words; `self` and `cls` do not count."""
    found = []
    for label, node in functions(ast.parse(source)):
        lines = node.end_lineno - node.lineno + 1  # type: ignore[operator]
        if lines > FUNCTION_LINES:
            found.append(f"{label}, line {node.lineno}: {lines} lines")
        arguments = node.args
        names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        count = len(names) - (names[:1] in (["self"], ["cls"]))
        if count > PARAMETERS and label not in exempt:
            found.append(f"{label}, line {node.lineno}: {count} parameters")
    return found


def nested_conditionals(source: str) -> list[str]:
    """Lines of conditional expressions that contain another one."""
    found = []
    for node in ast.walk(ast.parse(source)):
        inside = [child for child in ast.walk(node) if isinstance(child, ast.IfExp) and child is not node]
        if isinstance(node, ast.IfExp) and inside:
            found.append(f"line {node.lineno}")
    return found
