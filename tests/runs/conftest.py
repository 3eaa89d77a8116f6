"""Extractions and runs from them, a few tiny steps long."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from tutelage.runs.distill import distill
from tutelage.runs.extraction.job import extract
from tutelage.runs.extraction.options import ExtractOptions
from tutelage.runs.inputs import RunOptions
from tutelage.runs.results import RunResult
from tutelage.training.config import CurriculumConfig

STUDENT = "layers=2,hidden_size=16"
TEACHERS = ("causal_lm", "masked_lm", "sequence_classification", "embedding")


def settings(folder: Path, teacher: Path | None, **fields: Any) -> CurriculumConfig:
    defaults = {
        "max_steps": 8,
        "student_init": "random",  # for stages, and students of several shapes from one extraction
        "per_device_train_batch_size": 4,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "calibration_samples": 16,
        "report_to": "none",
        "disable_tqdm": True,
        "teacher_model_name_or_path": None if teacher is None else str(teacher),
    }
    return CurriculumConfig(output_dir=str(folder), **{**defaults, **fields})


def texts(corpus: Path, **fields: Any) -> RunOptions:
    defaults = {"student": STUDENT, "dataset": str(corpus / "text.jsonl"), "max_length": 16}
    return RunOptions(**{**defaults, **fields})


def train(folder: Path, curriculum: Path | str | None, run: RunOptions | None = None, **fields: Any) -> RunResult:
    teacher = fields.pop("teacher", None)
    args = settings(folder, teacher, curriculum_dir=None if curriculum is None else str(curriculum), **fields)
    return distill(run or RunOptions(student=STUDENT), args)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.arrow"))}


def no_space_left() -> Iterator[Any]:
    """Rows that no disk has space for."""
    raise OSError(28, "No space left on device")
    yield


@pytest.fixture
def teachers(
    causal_teacher: Path, mlm_teacher: Path, classifier_teacher: Path, embedding_teacher: Path
) -> dict[str, Path]:
    return dict(zip(TEACHERS, (causal_teacher, mlm_teacher, classifier_teacher, embedding_teacher), strict=True))


@pytest.fixture
def extracted(corpus: Path, causal_teacher: Path, tmp_path: Path) -> Callable[..., Path]:
    """The folder of a finished extraction."""

    def make(name: str = "C", teacher: Path = causal_teacher, run: dict[str, Any] | None = None, **fields: Any) -> Path:
        stored = {
            key: fields.pop(key)
            for key in ("projection_dim", "dtype", "shard_tokens", "all_stages", "stages")
            if key in fields
        }
        how = ExtractOptions(**{"dtype": "float32", "shard_tokens": 200, **stored})
        extract(texts(corpus, **(run or {})), settings(tmp_path / name, teacher, **fields), how, log=lambda line: None)
        return tmp_path / name

    return make


@pytest.fixture
def bucket() -> Iterator[Any]:
    """An object store in memory."""
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    yield memory
    memory.store.clear()
