"""Where a result was made: versions and machine."""

import os
import platform
import sys

import datasets
import torch
import transformers

from tutelage import __version__


def environment() -> dict[str, str | int]:
    """Versions and machine, for results."""
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    return {
        "tutelage": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "datasets": datasets.__version__,
        "python": platform.python_version(),
        "machine": f"{device} ({platform.machine()})",
        "threads": torch.get_num_threads(),
    }


def quiet_unless_terminal(asked: bool | None = False) -> bool:
    """Turn progress bars off where that is asked for or nobody watches; returns whether they are off."""
    quiet = bool(asked) or ("TUTELAGE_PROGRESS" not in os.environ and not sys.stderr.isatty())
    if quiet:
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    return quiet
