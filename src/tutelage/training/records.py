"""What a run leaves behind besides weights: metrics.jsonl, curriculum.json, and the progress kept in checkpoints."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from tutelage.core.errors import UserError, as_user_error
from tutelage.io.files import write_atomically, writing_errors

CURRICULUM_FILE = "curriculum.json"
TARGETS_FILE = "target_stats.safetensors"
METRICS_FILE = "metrics.jsonl"
PROGRESS_FILE = "progress.json"


def evaluation_metrics(record: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of an evaluation in what the trainer logs, without their `eval_` and without how long it took."""
    timings = ("_runtime", "_per_second", "_time")
    named = {name.removeprefix("eval_"): value for name, value in record.items() if name.startswith("eval_")}
    return {name: value for name, value in named.items() if not f"_{name}".endswith(timings)}


@dataclass
class Progress:
    """Totals of a run so far; written last into each checkpoint, which is complete only with it."""

    stage: int = 0  # index of the stage the last step belonged to
    samples: int = 0  # examples the student has trained on, over all devices
    tokens: int = 0  # non-padding tokens among them
    student_flops: float = 0.0  # student forward and backward
    teacher_flops: float = 0.0  # teacher forward, calibration included
    seconds: float = 0.0  # wall-clock seconds of training, calibration included, evaluation and saving left out
    identity: dict[str, str] = field(default_factory=dict)
    """What the run trains from, and how: a resumed run must be the same one."""

    def save(self, folder: Path) -> None:
        """Write into a checkpoint folder."""
        write_atomically(folder / PROGRESS_FILE, json.dumps(dataclasses.asdict(self)))

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

    @classmethod
    def load(cls, folder: Path) -> Progress:
        """Read from a checkpoint folder."""
        return cls(**json.loads((folder / PROGRESS_FILE).read_text(encoding="utf-8")))


@contextmanager
def reading_checkpoint(folder: Path) -> Iterator[None]:
    """Turn what reading a damaged checkpoint raises into a UserError that names the one before it."""
    complete = [path for path in checkpoints(folder.parent) if (path / PROGRESS_FILE).is_file()]
    older = complete[: complete.index(folder)] if folder in complete else []
    how = f"resume from {str(older[-1])!r}" if older else "start the run again with overwrite_output_dir"
    kinds = (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError)
    with as_user_error(f"checkpoint {str(folder)!r} is damaged, so {how}", *kinds):
        yield


class MetricsFile:
    """One JSON object a line, appended at each log."""

    def __init__(self, path: Path):
        self.path = path

    def append(self, record: dict[str, Any]) -> None:
        """Add a record; a reader sees whole lines only."""
        with writing_errors(self.path), open(self.path, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(record) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All records; a last line cut short by a kill is left out."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def keep_until(self, step: int) -> None:
        """Drop what was logged after `step`, when a run resumes from an earlier checkpoint."""
        kept = [record for record in self.read() if record["step"] <= step]
        write_atomically(self.path, "".join(json.dumps(record) + "\n" for record in kept))


def checkpoints(output_dir: Path) -> list[Path]:
    """A run's checkpoint folders, complete or not, oldest first."""
    found = [folder for folder in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", folder.name)]
    return sorted(found, key=lambda folder: int(folder.name.removeprefix("checkpoint-")))


def last_complete_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint that was written to its end, if any."""
    return next((folder for folder in reversed(checkpoints(output_dir)) if (folder / PROGRESS_FILE).is_file()), None)


def find_checkpoint(asked: str | bool | None, output_dir: Path) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` means: a folder, True for the newest complete one, else none.

    Raises UserError where there is none, or it was not written to its end."""
    if not asked:
        return None
    found = last_complete_checkpoint(output_dir) if asked is True else Path(asked)
    if found is None:
        raise UserError(f"no complete checkpoint in {str(output_dir)!r} to resume from")
    if not (found / PROGRESS_FILE).is_file():
        how = "resume from an earlier one, or with resume_from_checkpoint=True from the newest complete one"
        raise UserError(f"checkpoint {asked!r} is missing or was not written to its end: {how}")
    return found
