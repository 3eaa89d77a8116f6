"""What a run leaves behind besides weights: metrics.jsonl, the progress kept in checkpoints, and the names of its files."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tutelage.core.errors import UserError
from tutelage.core.records import Record
from tutelage.io.files import write_atomically, writing_errors

CURRICULUM_FILE = "curriculum.json"
IDENTITY_FILE = "identity.json"
TARGETS_FILE = "target_stats.safetensors"
METRICS_FILE = "metrics.jsonl"
PROGRESS_FILE = "progress.json"


def evaluation_metrics(record: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of an evaluation in what the trainer logs, without their `eval_` and without how long it took."""
    timings = ("_runtime", "_per_second", "_time")
    named = {name.removeprefix("eval_"): value for name, value in record.items() if name.startswith("eval_")}
    return {name: value for name, value in named.items() if not f"_{name}".endswith(timings)}


@dataclass
class Progress(Record):
    """Totals of a run so far, and what the next log line is made from; in the last file of each checkpoint."""

    stage: int = 0  # index of the stage the last step belonged to
    samples: int = 0  # examples the student has trained on, over all devices
    tokens: int = 0  # non-padding tokens among them
    student_flops: float = 0.0  # student forward and backward
    teacher_flops: float = 0.0  # teacher forward, calibration included
    seconds: float = 0.0  # wall-clock seconds of training, calibration included, evaluation and saving left out
    total_loss: float = 0.0  # sum of the losses of all steps up to the last log line
    loss_sum: float = 0.0  # sum of the losses of the steps since then
    parts: dict[str, float] = field(default_factory=dict)  # sums of the parts of these losses
    logged_step: int = 0  # optimiser step of the last log line
    statistics: str = ""  # SHA-256 of the statistics of the target maps, where the run stores them
    identity: dict[str, str] = field(default_factory=dict)
    """What the run trains from, and how: a resumed run must be the same one."""

    def totals(self) -> dict[str, float]:
        """What a log line says."""
        return {
            "samples": self.samples,
            "tokens": self.tokens,
            "flops": self.student_flops + self.teacher_flops,
            "student_flops": self.student_flops,
            "teacher_flops": self.teacher_flops,
            "seconds": self.seconds,
        }


class MetricsFile:
    """One JSON object a line, appended at each log."""

    def __init__(self, path: Path):
        self.path = path

    def append(self, record: dict[str, Any]) -> None:
        """Add a record; a reader sees whole lines only."""
        with writing_errors(self.path), open(self.path, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(record) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All records; a last line cut short by a kill is left out. UserError for a line that is not a record."""
        if not self.path.exists():
            return []
        found: list[dict[str, Any]] = []
        for number, line in enumerate(self.path.read_bytes().split(b"\n")[:-1], start=1):
            try:
                found.append(json.loads(line))
                found[-1]["step"]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"line {number} of {str(self.path)!r} is damaged: delete the line") from error
        return found

    def copy_to(self, folder: Path) -> None:
        """Put what was logged so far into a checkpoint."""
        if self.path.exists():
            shutil.copyfile(self.path, folder / self.path.name)

    def restore(self, folder: Path) -> None:
        """What had been logged when a checkpoint was made, and nothing after it, whatever became of the file since."""
        copy = folder / self.path.name
        write_atomically(self.path, copy.read_text(encoding="utf-8") if copy.exists() else "")


def checkpoints(output_dir: Path) -> list[Path]:
    """A run's checkpoint folders, complete or not, oldest first."""
    found = [folder for folder in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", folder.name)]
    return sorted(found, key=lambda folder: int(folder.name.removeprefix("checkpoint-")))


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """Those that were written to their end."""
    return [folder for folder in checkpoints(output_dir) if (folder / PROGRESS_FILE).is_file()]


def last_complete_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint that was written to its end, if any."""
    return next(reversed(complete_checkpoints(output_dir)), None)
