"""Kills comparisons, and their workers, and continues them with the same command.

    python benchmarks/reliability_compare.py --kills 50 --seed 0 --output results/reliability/compare.json

A case starts a comparison in a process of its own, with one or two jobs, and sends SIGKILL, SIGTERM or SIGINT at a random time
to it, or SIGKILL to one of its workers; the same command, given again, must end with the same comparison.json, but for seconds,
and leave nothing behind. What `reliability_damage.py` does to comparisons is made here too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

from tutelage.io.files import write_atomically
from tutelage.reproduction.compare import compare
from tutelage.reproduction.recipes import resolve
from tutelage.reproduction.results import COMPARISON_FILE
from tutelage.runs.environment import environment
from tutelage.training.trainer import CurriculumTrainer

METHODS = ("extraction", "one_shot")
FIELDS: dict[str, Any] = {
    **{"d": 6, "k": 2, "teacher_width": 64, "student_width": 16, "seeds": (0, 1), "tuning_seeds": (1000,)},
    **{
        "learning_rates": (0.1, 0.3),
        "trials": 2,
        "batch_size": 16,
        "budget_samples": 960,
        "eval_every": 16,
        "eval_samples": 64,
    },
    **{"stage_samples": 320, "target": 0.99, "teacher_max_samples": 32_000, "teacher_checkpoint_every": 320},
}
# of the kill cases: runs that take seconds, so that kills fall into them
LONGER = {"d": 10, "k": 3, "budget_samples": 48_000, "eval_every": 320, "target": 1.0, "teacher_max_samples": 400_000}
LEFTOVERS = ("*.tmp", "*.unfinished", "checkpoint-*", ".lock")
RUN, CACHE = "comparison", "cache"


@dataclass(frozen=True)
class Outcome:
    """How a case ended."""

    case: int
    what: str  # what was done
    where: str  # to which process
    ended: str  # `continued`; anything else is a failure
    detail: str = ""

    @property
    def good(self) -> bool:
        return self.ended == "continued"


# ---- Comparisons in this process ----


def make(world: Path) -> None:
    """Make the comparison of a world, which is a folder for it and for its teachers, or resume it."""
    with mock.patch.dict(os.environ, TUTELAGE_CACHE=str(world / CACHE)):
        compare(resolve("parity-mlp/smoke", FIELDS), world / RUN, METHODS, log=lambda line: None)


def make_unfinished(world: Path) -> None:
    """Interrupt the comparison of a world in the second method's reported run, between two checkpoints."""
    step = CurriculumTrainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "/runs/one_shot" in self.args.output_dir and self.state.global_step == 50:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with mock.patch.object(CurriculumTrainer, "training_step", training_step), contextlib.suppress(KeyboardInterrupt):
        make(world)


def result_of(world: Path) -> tuple[Any, list[str]]:
    """Results without what a clock or a machine says, and what was left behind."""
    values = json.loads((world / RUN / COMPARISON_FILE).read_text(encoding="utf-8"))
    found = (path for pattern in LEFTOVERS for path in world.rglob(pattern))
    return _timeless(values), sorted(str(path.relative_to(world)) for path in found)


def _timeless(values: Any) -> Any:
    if isinstance(values, list):
        return [
            _timeless(value) for value in values if not (isinstance(value, dict) and value.get("cost") == "seconds")
        ]
    if isinstance(values, dict):
        skipped = ("seconds", "environment", "digest", "command")
        return {name: _timeless(value) for name, value in values.items() if name not in skipped}
    return values


# ---- Kills ----


def command(world: Path, jobs: int) -> list[str]:
    fields = {**FIELDS, **LONGER}
    flags = [f"--{name}={value}" for name, value in fields.items() if not isinstance(value, tuple)]
    for name, value in fields.items():
        if isinstance(value, tuple):
            flags += [f"--{name}", *map(str, value)]
    words = ["compare", "parity-mlp/smoke", *flags, "--methods", *METHODS, "--jobs", str(jobs)]
    return [sys.executable, "-m", "tutelage", *words, "--output_dir", str(world / RUN)]


def start(world: Path, jobs: int) -> subprocess.Popen[str]:
    variables = {**os.environ, "TUTELAGE_CACHE": str(world / CACHE), "OMP_NUM_THREADS": "1"}
    streams: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command(world, jobs), env=variables, start_new_session=True, **streams)


def kill_case(expected: Any, length: float, case: int, seed: int) -> Outcome:
    """Send a signal at a random time of a comparison that takes `length` seconds, then give its command again."""
    chance = random.Random(f"kill {seed} {case}")
    jobs = chance.choice((1, 2))
    number = chance.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
    whom = chance.choice(("command", "worker")) if jobs > 1 else "command"
    number = signal.SIGKILL if whom == "worker" else number
    moment = chance.uniform(0, 1.1 * length)
    what, where = f"{number.name} after {moment:.1f} s", f"{whom}, {jobs} jobs"
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder)
        process = start(world, jobs)
        time.sleep(moment)
        others = descendants(process)
        workers = [each for each in others if each.ppid() != process.pid]
        if whom == "command" and process.poll() is None:
            # Ctrl-C in a terminal reaches all processes
            os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
        elif whom == "worker" and workers:
            chance.choice(workers).send_signal(number)
        _, said = process.communicate()
        codes = (0,) if whom == "worker" else (0, -number, 128 + number)
        if process.returncode not in codes or "Traceback" in said:
            return Outcome(case, what, where, f"exit code {process.returncode}", said[-500:])
        _, orphans = psutil.wait_procs(others, timeout=20)
        if orphans:
            return Outcome(case, what, where, "orphans", str(orphans))
        again = start(world, jobs)
        _, said = again.communicate()
        if again.returncode:
            return Outcome(case, what, where, f"exit code {again.returncode} of the second command", said[-500:])
        found, left = result_of(world)
        ended = "continued" if found == expected else "a different result"
        return Outcome(case, what, where, "leftovers" if left else ended, ", ".join(left))


def descendants(process: subprocess.Popen[str]) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def kill_cases(kills: int, seed: int, folder: Path) -> Iterator[Outcome]:
    begun = time.monotonic()
    process = start(folder / "whole", 1)
    _, said = process.communicate()
    if process.returncode:
        raise SystemExit(said)
    (expected, _), length = result_of(folder / "whole"), time.monotonic() - begun
    shutil.rmtree(folder / "whole")
    for case in range(kills):
        yield kill_case(expected, length, case, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        for outcome in kill_cases(options.kills, options.seed, Path(folder)):
            outcomes.append(outcome)
            print(f"{outcome.what} to {outcome.where}: {outcome.ended} {outcome.detail}", flush=True)
    counts = Counter(f"{outcome.what.split()[0]} to {outcome.where}: {outcome.ended}" for outcome in outcomes)
    failures = [asdict(outcome) for outcome in outcomes if not outcome.good]
    print(json.dumps(counts, indent=1))
    if options.output is not None:
        words = shlex.join(["python", "benchmarks/reliability_compare.py", *sys.argv[1:]])
        report = {"command": words, "outcomes": counts, "failures": failures, "environment": environment()}
        write_atomically(options.output, json.dumps(report, indent=1) + "\n")
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
