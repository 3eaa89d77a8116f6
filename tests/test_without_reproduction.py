"""The product does not need the reproduction: distill, extract, plan and evaluate work with its folder deleted."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tutelage

PACKAGE = Path(tutelage.__file__).parent


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the package that has no reproduction."""
    folder = tmp_path_factory.mktemp("source")
    without = shutil.ignore_patterns("reproduction", "__pycache__")
    shutil.copytree(PACKAGE, folder / "tutelage", ignore=without)
    assert not (folder / "tutelage" / "reproduction").exists()
    return folder


def run(root: Path, *arguments: str) -> str:
    """Standard output of a command of the copied package."""
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tutelage", *arguments]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_copy_is_what_runs(root: Path) -> None:
    program = "import tutelage; print(tutelage.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", program], cwd=root, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == str(root / "tutelage" / "__init__.py"), done.stderr


def test_a_plan_is_made(root: Path) -> None:
    out = run(root, "plan")
    assert "task: causal_lm" in out
    assert "Nothing was trained." in out


def test_a_student_is_distilled_and_evaluated(root: Path, tmp_path: Path) -> None:
    options = ["--max_steps=2", "--max_samples=4", "--max_length=16", "--use_cpu", "--save_strategy=no"]
    out = run(root, "distill", *options, f"--output_dir={tmp_path / 'student'}")
    assert "budget: 2 steps" in out
    assert (tmp_path / "student" / "model.safetensors").is_file()
    model = [f"--model={tmp_path / 'student'}", f"--dataset={root / 'tutelage' / 'data' / 'austen' / 'heldout.txt'}"]
    out = run(root, "evaluate", *model, "--max_samples=4", "--max_length=16")
    assert "perplexity" in out


def test_a_curriculum_is_extracted_and_distilled_from(root: Path, tmp_path: Path) -> None:
    options = ["--max_steps=2", "--max_samples=4", "--max_length=16", "--use_cpu"]
    out = run(root, "extract", *options, f"--output_dir={tmp_path / 'curriculum'}")
    assert "extracted curriculum:" in out
    options = [f"--curriculum_dir={tmp_path / 'curriculum'}", f"--output_dir={tmp_path / 'student'}"]
    out = run(root, "distill", *options, "--save_strategy=no", "--use_cpu")
    assert "budget: 2 steps" in out
