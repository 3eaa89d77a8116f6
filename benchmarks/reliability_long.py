"""Trains from disk for a long time, with a checkpoint a minute: does memory grow, do files pile up?

    python benchmarks/reliability_long.py --minutes 60 --output results/reliability/long.json

A tiny student trains from an extracted curriculum. Once a second the program notes resident memory, open files and the number
of files in the run's folder; the slope is that of a straight line through the second half of the minutes."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from reliability_models import make_teacher, make_text
from transformers import TrainerCallback

from tutelage.io.files import write_atomically
from tutelage.runs.environment import environment
from tutelage.runs.extraction.job import extract
from tutelage.runs.extraction.options import ExtractOptions
from tutelage.runs.inputs import RunOptions, load_inputs
from tutelage.training.config import CurriculumConfig
from tutelage.training.trainer import CurriculumTrainer

_PAGE = os.sysconf("SC_PAGE_SIZE")


class Watch(TrainerCallback):
    """Notes what the process holds, asks for a checkpoint a minute, and ends the run when the time is over."""

    def __init__(self, folder: Path, seconds: float, between: float):
        self.folder, self.seconds, self.between = folder, seconds, between
        self.began = self.saved = time.perf_counter()
        self.samples: list[dict[str, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """At most once a second."""
        now = time.perf_counter()
        if self.samples and now - self.began - self.samples[-1]["seconds"] < 1:
            return
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE
        self.samples.append(
            {
                "seconds": now - self.began,
                "step": state.global_step,
                "resident_mb": resident / 2**20,
                "open_files": len(os.listdir("/proc/self/fd")),
                "files": sum(path.is_file() for path in self.folder.rglob("*")),
            }
        )
        if now - self.saved >= self.between:
            self.saved, control.should_save = now, True
        control.should_training_stop = control.should_training_stop or now - self.began >= self.seconds


def measure(root: Path, minutes: float, between: float = 60.0, logging_steps: int = 100) -> list[dict[str, float]]:
    """Train for so many minutes, with a checkpoint every `between` seconds."""
    teacher, text = make_teacher("causal", root / "teacher"), make_text(root / "text.jsonl", 400)
    run = RunOptions(student="layers=2,hidden_size=16", dataset=str(text), max_length=16, max_samples=8)
    common: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    common |= {"student_init": "random", "calibration_samples": 8}
    stored = {**common, "max_steps": 100, "teacher_model_name_or_path": str(teacher)}
    how = ExtractOptions(all_stages=True)  # every row for every stage: the run may read them as often as it likes
    extract(run, CurriculumConfig(output_dir=str(root / "stored"), **stored), how, log=lambda line: None)
    folder = root / "run"
    common |= {"logging_steps": logging_steps, "save_steps": 10**7, "max_steps": 10**7}
    args = CurriculumConfig(output_dir=str(folder), curriculum_dir=str(root / "stored"), **common)
    inputs = load_inputs(RunOptions(student=run.student), args)
    watch = Watch(folder, 60 * minutes, between)
    rows = (inputs.train_dataset, inputs.eval_dataset)
    trainer = CurriculumTrainer(
        inputs.student, inputs.source, args, *rows, inputs.tokenizer, inputs.collator, callbacks=[watch]
    )
    trainer.train()
    return watch.samples


def slope(samples: Sequence[dict[str, float]], name: str) -> float:
    """Change of a value per hour, over the second half of the samples."""
    half = samples[len(samples) // 2 :]
    seconds, values = ([sample[key] for sample in half] for key in ("seconds", name))
    return float(np.polyfit(seconds, values, 1)[0] * 3600) if len(half) > 1 else 0.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--between", type=float, default=60, help="seconds between checkpoints")
    parser.add_argument("--logging_steps", type=int, default=100, help="the trainer keeps every log line in memory")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        samples = measure(Path(folder), options.minutes, options.between, options.logging_steps)
    last = samples[-1]
    found = {
        "minutes": round(last["seconds"] / 60, 2),
        "steps": last["step"],
        "log_lines_about": last["step"] // options.logging_steps,
        "checkpoints_about": int(last["seconds"] // options.between),
        "resident_mb": [round(sample["resident_mb"], 1) for sample in (samples[0], samples[len(samples) // 2], last)],
        "resident_mb_per_hour": round(slope(samples, "resident_mb"), 2),
        "open_files": [samples[0]["open_files"], last["open_files"]],
        "most_files": max(sample["files"] for sample in samples),
        "environment": environment(),
    }
    print(json.dumps(found, indent=1))
    if options.output is not None:
        every = max(1, len(samples) // 200)
        write_atomically(options.output, json.dumps({**found, "samples": samples[::every]}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
