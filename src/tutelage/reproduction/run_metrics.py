"""Whether the metrics of an unfinished run are those that it wrote: they are the part of its results before a checkpoint.

`NoteMetrics` notes their digest at each checkpoint, and `are_whole` compares it before the run is resumed."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from tutelage.core.errors import UserError
from tutelage.core.records import Record
from tutelage.reproduction.sealed import read_sealed, write_sealed
from tutelage.training.records import METRICS_FILE, MetricsFile, evaluation_metrics

NOTE_FILE = "metrics.note.json"


@dataclass(frozen=True)
class _Note(Record):
    """The beginning of a file."""

    bytes: int
    sha256: str


class NoteMetrics(TrainerCallback):
    """Notes what a run's metrics are when it has saved a checkpoint."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir)
        content = (folder / METRICS_FILE).read_bytes()
        write_sealed(folder / NOTE_FILE, _Note(len(content), hashlib.sha256(content).hexdigest()))


def are_whole(folder: Path, steps: Sequence[int]) -> bool:
    """Whether the metrics of a run have the evaluations at all of these steps, and begin as they were noted last."""
    try:
        records = MetricsFile(folder / METRICS_FILE).read()
        evaluated = {record["step"] for record in records if evaluation_metrics(record)}
        if not (folder / NOTE_FILE).exists():  # killed after the checkpoint and before the note
            return evaluated >= set(steps)
        note = read_sealed(folder / NOTE_FILE, _Note)
        beginning = (folder / METRICS_FILE).read_bytes()[: note.bytes]
    except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return evaluated >= set(steps) and hashlib.sha256(beginning).hexdigest() == note.sha256
