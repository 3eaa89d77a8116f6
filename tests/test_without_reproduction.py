"""The product does not need the reproduction: distill, extract, plan and evaluate work with its folder deleted."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import tutelage

PACKAGE = Path(tutelage.__file__).parent
# one process for all commands: its imports take longer than they do
PROGRAM = """
import sys
import tutelage
from tutelage.cli import main
print(tutelage.__file__)
for line in sys.stdin:
    print("#", line.split()[0], flush=True)
    code = main(line.split())
    if code != 0:
        sys.exit(code)
"""
SMALL = "--max_steps=2 --max_samples=4 --max_length=16 --use_cpu"
COMMANDS = f"""
plan
distill {SMALL} --save_strategy=no --output_dir=student
evaluate --model=student --dataset=tutelage/data/austen/heldout.txt --max_samples=4 --max_length=16
extract {SMALL} --output_dir=curriculum
distill --curriculum_dir=curriculum --output_dir=second --save_strategy=no --use_cpu
"""


def test_the_commands_work_in_a_copy_without_the_reproduction(tmp_path: Path) -> None:
    without = shutil.ignore_patterns("reproduction", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "tutelage", ignore=without)
    assert not (tmp_path / "tutelage" / "reproduction").exists()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=COMMANDS.lstrip(),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    imported, planned, distilled, evaluated, extracted, from_disk = done.stdout.split("# ")
    assert imported.strip() == str(tmp_path / "tutelage" / "__init__.py")
    assert "task: causal_lm" in planned and "Nothing was trained." in planned
    assert "budget: 2 steps" in distilled
    assert (tmp_path / "student" / "model.safetensors").is_file()
    assert "perplexity" in evaluated
    assert "extracted curriculum:" in extracted
    assert "budget: 2 steps" in from_disk
    assert (tmp_path / "second" / "model.safetensors").is_file()
