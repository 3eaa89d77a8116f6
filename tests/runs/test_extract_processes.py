"""Extraction and training on the command line and in several processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.launch import launch
from tests.runs.conftest import STUDENT, files_of, settings, texts, train
from tutelage.cli import main
from tutelage.io.store import Store
from tutelage.runs.extraction.job import extract
from tutelage.targets import manifest as storage


def tutelage_command(*arguments: str) -> None:
    assert main(arguments) == 0


def test_extract_inspect_and_distill_on_the_command_line(
    corpus: Path, causal_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, data = str(tmp_path / "C"), str(corpus / "text.jsonl")
    small = ["--max_length", "16", "--max_steps", "4", "--per_device_train_batch_size", "4", "--use_cpu", "true"]
    teacher = ["--teacher", str(causal_teacher), "--dataset", data, "--student", STUDENT, "--student_init", "random"]
    assert main(["extract", *teacher, "--output_dir", folder, *small]) == 0
    assert "stage_2       output" in capsys.readouterr().out
    assert main(["inspect", folder]) == 0
    assert "checksums: all as in the manifest" in capsys.readouterr().out
    assert main(["inspect", folder, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["identity"]["width"] == 16
    student = ["--curriculum_dir", folder, "--student", "layers=1,hidden_size=8", "--use_cpu", "true"]
    assert main(["distill", *student, "--output_dir", str(tmp_path / "S"), "--per_device_train_batch_size", "4"]) == 0
    assert (tmp_path / "S" / "model.safetensors").is_file() and (tmp_path / "S" / "tokenizer.json").is_file()
    alone = ["distill", "--curriculum_dir", folder, "--output_dir", str(tmp_path / "T"), "--use_cpu", "true"]
    assert main(alone) == 0  # the student that it was extracted for
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "T").config.hidden_size == 16


def test_one_and_three_processes_write_the_same_curriculum(corpus: Path, causal_teacher: Path, tmp_path: Path) -> None:
    found = []
    for processes in (1, 3):
        folder = tmp_path / f"by-{processes}"
        options = ["--teacher", str(causal_teacher), "--dataset", str(corpus / "text.jsonl"), "--student", STUDENT]
        options += ["--max_length", "16", "--num_train_epochs", "1", "--per_device_train_batch_size", "4"]
        options += ["--student_init", "random"]
        options += ["--use_cpu", "true", "--dtype", "float32", "--shard_tokens", "200", "--output_dir", str(folder)]
        launch(processes, tutelage_command, "extract", *options)
        found.append(files_of(folder))
        assert len([name for name in found[-1] if name.startswith("stage_2")]) > 2
        assert storage.read_manifest(Store(folder)).identity.seed == 42
    assert found[0] == found[1]


STORED = ("extraction", "joint", "one_shot")
SGD: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.02, "max_steps": 6}


def students(root: Path, teacher: Path, corpus: Path, processes: int) -> None:
    """A student of every method, live and from disk, on 8 examples a step."""
    settings = {**SGD, "per_device_train_batch_size": 8 // processes}
    checkpoints = {"progressive": {"teacher_checkpoints": [str(teacher)]}}
    for method in (*STORED, "progressive", "scratch"):
        folder, own = root / f"{method}-{processes}", checkpoints.get(method, {})
        train(folder, None, texts(corpus), teacher=teacher, method=method, **settings, **own)
    for method in STORED:
        train(root / f"stored-{method}-{processes}", root / f"curriculum-{method}", method=method, **settings)


def test_two_processes_equal_one_for_every_method(corpus: Path, causal_teacher: Path, tmp_path: Path) -> None:
    for method in STORED:
        args = settings(tmp_path / f"curriculum-{method}", causal_teacher, method=method, **SGD)
        args.per_device_train_batch_size = 8
        extract(texts(corpus), args, log=lambda line: None)
    for processes in (1, 2):
        launch(processes, students, tmp_path, causal_teacher, corpus, processes)
    moved = set()
    for name in (*STORED, "progressive", "scratch", *(f"stored-{method}" for method in STORED)):
        one, two = (load_file(tmp_path / f"{name}-{processes}" / "model.safetensors") for processes in (1, 2))
        for key in one:
            torch.testing.assert_close(two[key], one[key], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        moved.add(round(sum(float(value.norm()) for value in one.values()), 3))
    assert len(moved) >= 4  # the methods train different students
