"""Running the command line inside the test process."""

from __future__ import annotations

import contextlib
import io
from typing import Any

from tutelage.cli import main

LENGTH, BATCH, STEPS = 16, 4, 8


def run(*arguments: Any) -> str:
    """Standard output of a command that succeeds and says nothing on stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    assert (code, err.getvalue()) == (0, "")
    return out.getvalue()


def budget(**changes: Any) -> list[str]:
    """Flags of a run of a few tiny steps."""
    flags = {
        "max_steps": STEPS,
        "max_length": LENGTH,
        "per_device_train_batch_size": BATCH,
        "logging_steps": 2,
        "save_strategy": "no",
        "calibration_samples": 8,
        "max_samples": 6,
        "use_cpu": "true",
        "warm_start": "none",
    }
    return [f"--{name}={value}" for name, value in {**flags, **changes}.items()]
