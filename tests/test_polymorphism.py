"""Tasks and target sources answer for themselves: nobody asks which one it holds."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "tutelage"
FILES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
SOURCES = {"LiveTargets", "ExtractedTargets", "NoTargets"}
SOURCE_BLIND = (
    "training/costs.py",
    "training/feed.py",
    "training/meter.py",
    "training/objective.py",
    "training/trainer.py",
    "training/transition.py",
    "training/warm_start.py",
)


@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith("tasks/")])
def test_only_tasks_know_which_task_there_is(name: str) -> None:
    assert questions(FILES[name].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("name", SOURCE_BLIND)
def test_training_does_not_know_where_targets_come_from(name: str) -> None:
    assert names(FILES[name].read_text(encoding="utf-8")).isdisjoint(SOURCES)


def test_only_what_needs_a_teacher_in_memory_asks_for_one() -> None:
    """An extraction runs it, a plan counts its operations, and a comparison gives it to every run."""
    asking = {
        name
        for name, path in FILES.items()
        for kind in instances(path.read_text(encoding="utf-8"))
        if SOURCES & names(kind)
    }
    assert asking <= {"runs/extraction/job.py", "runs/plan.py", "reproduction/recipes/user_run.py"}


@pytest.mark.parametrize(
    "source",
    [
        'if task.name == "embedding": ...',
        'x = 1 if self.task.name != "causal_lm" else 2',
        'if source.task.name in ("causal_lm", "masked_lm"): ...',
        'if "causal_lm" == inputs.task.name: ...',
        "if isinstance(model, EmbeddingModel): ...",
        "if isinstance(model, (nn.Linear, EmbeddingModel)): ...",
        "if isinstance(task, embedding.SentenceEmbedding): ...",
        'match task.name:\n    case "embedding": ...',
        "if type(task) is CausalLM: ...",
    ],
)
def test_a_question_is_detected(source: str) -> None:
    assert len(questions(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "print(task.name)",
        "if isinstance(task, HeadTask): ...",
        'if stage.name == "output": ...',
        "task = get_task(name)",
    ],
)
def test_what_is_no_question_is_allowed(source: str) -> None:
    assert questions(source) == []


TASK_CLASSES = {
    "EmbeddingModel",
    "CausalLM",
    "MaskedLM",
    "SequenceClassification",
    "SentenceEmbedding",
    "PlainClassification",
}


def questions(source: str) -> list[str]:
    """Lines that compare a task's name, or ask for the class of a task or of an encoder."""
    found = []
    for node in ast.walk(ast.parse(source)):
        compared: list[ast.AST] = []
        if isinstance(node, ast.Compare):
            compared = [node.left, *node.comparators]
        elif isinstance(node, ast.Match):
            compared = [node.subject]
        if any(_is_task_name(part) or names(part) & TASK_CLASSES for part in compared):
            found.append(f"line {node.lineno}")  # type: ignore[attr-defined]
    return found + [f"line {kind.lineno}" for kind in instances(source) if names(kind) & TASK_CLASSES]


def _is_task_name(node: ast.AST) -> bool:
    if not isinstance(node, ast.Attribute) or node.attr != "name":
        return False
    return ast.unparse(node.value).split(".")[-1].lower().endswith("task")


def instances(source: str) -> Iterator[ast.expr]:
    """The classes that `isinstance` is asked for."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            yield node.args[1]


def names(source: str | ast.AST) -> set[str]:
    """Every name in the source, imported ones included."""
    found = set()
    for node in ast.walk(ast.parse(source) if isinstance(source, str) else source):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.alias):
            found.add(node.name)
    return found
