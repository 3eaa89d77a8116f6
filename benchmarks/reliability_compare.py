"""Damages and kills comparisons, and checks that their results are refused, repaired or the same.

    python benchmarks/reliability_compare.py --cases 400 --kills 50 --seed 0     # writes results/reliability/compare.json

A damage case takes a copy of a comparison, finished or not, damages one of its files (or one of its teacher's), and gives the
command again. It must end in one of three ways: it is *refused* by an error that names the file; it is *repaired*, which is
said; or the damage is *without effect*. In the last two, comparison.json must be that of the undamaged comparison, but for
seconds. A kill case starts the command in a process of its own, with one or two jobs, and sends a signal at a random time to
it or to one of its workers; the same command, given again, must end with the same comparison.json and leave nothing behind.
Each case draws from its own random stream, so one case can be repeated: `--only 17`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

from tutelage.core.errors import UserError
from tutelage.io.files import write_atomically
from tutelage.reproduction.compare import compare
from tutelage.reproduction.recipes import resolve
from tutelage.reproduction.results import COMPARISON_FILE
from tutelage.runs.environment import environment
from tutelage.training.trainer import CurriculumTrainer

METHODS = ("extraction", "one_shot")
FIELDS: dict[str, Any] = {
    **{"d": 6, "k": 2, "teacher_width": 64, "student_width": 16, "seeds": (0, 1), "tuning_seeds": (1000,)},
    **{"learning_rates": (0.1, 0.3), "batch_size": 16, "budget_samples": 960, "eval_every": 16, "eval_samples": 64},
    **{"stage_samples": 320, "target": 0.99, "teacher_max_samples": 32_000, "teacher_checkpoint_every": 320},
}
# of the kill cases: runs that take seconds, so that kills fall into them
LONGER = {"d": 10, "k": 3, "budget_samples": 48_000, "eval_every": 320, "target": 1.0, "teacher_max_samples": 400_000}
LEFTOVERS = ("*.tmp", "*.unfinished", "checkpoint-*", "*.note.json", ".lock")
RUN, CACHE = "comparison", "cache"


@dataclass(frozen=True)
class Outcome:
    """How a case ended."""

    case: int
    what: str  # what was done
    where: str  # to which file or process
    ended: str  # `refused`, `repaired`, `no effect`, `continued`; anything else is a failure
    detail: str = ""

    @property
    def good(self) -> bool:
        return self.ended in ("refused", "repaired", "no effect", "continued")


def timeless(values: Any) -> Any:
    """The values of comparison.json without what a clock or a machine says."""
    if isinstance(values, list):
        return [timeless(value) for value in values if not (isinstance(value, dict) and value.get("cost") == "seconds")]
    if isinstance(values, dict):
        skipped = ("seconds", "environment", "digest", "command")
        return {name: timeless(value) for name, value in values.items() if name not in skipped}
    return values


def result_of(world: Path) -> Any:
    return timeless(json.loads((world / RUN / COMPARISON_FILE).read_text(encoding="utf-8")))


def make(world: Path) -> None:
    """Make the comparison of a world, or resume it."""
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


# ---- Damage ----


def flip(path: Path, chance: random.Random) -> None:
    """Change one bit of one byte."""
    content = bytearray(path.read_bytes())
    if content:
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, chance: random.Random) -> None:
    os.truncate(path, chance.randrange(max(1, path.stat().st_size)))


def delete(path: Path, chance: random.Random) -> None:
    path.unlink()


def swap(path: Path, chance: random.Random) -> None:
    """Exchange the file with another one of the same name."""
    world = next(parent for parent in path.parents if {RUN, CACHE} <= {each.name for each in parent.iterdir()})
    others = sorted(other for other in world.rglob(path.name) if other != path)
    if not others:
        flip(path, chance)
        return
    other = chance.choice(others)
    mine, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(mine)


def edit(path: Path, chance: random.Random) -> None:
    """Change one value of a JSON file."""
    if path.suffix != ".json":
        flip(path, chance)
        return
    values = json.loads(path.read_text(encoding="utf-8"))
    places = list(leaves(values))
    if places:
        holder, key = chance.choice(places)
        holder[key] = other_value(holder[key], chance)
    path.write_text(json.dumps(values), encoding="utf-8")


def leaves(values: Any) -> Iterator[tuple[Any, Any]]:
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        if isinstance(value, dict | list):
            yield from leaves(value)
        else:
            yield values, key


def other_value(value: Any, chance: random.Random) -> Any:
    others = [None, "x", -1, 0, 1e30, float("nan"), True, []]
    if isinstance(value, int | float):
        others += [value + 1, value * 1.01, -value - 1]
    return chance.choice([other for other in others if other is not value and other != value])


DAMAGES: tuple[Callable[[Path, random.Random], None], ...] = (flip, truncate, delete, swap, edit)


def damage_case(worlds: dict[str, Path], expected: Any, case: int, seed: int, checkpoints: bool = True) -> Outcome:
    """Damage a file of a copy of a world, and make its comparison again."""
    chance = random.Random(f"damage {seed} {case}")
    name = chance.choice(sorted(worlds))
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder) / "world"
        shutil.copytree(worlds[name], world)
        files = sorted(path for path in world.rglob("*") if path.is_file() and not path.name.endswith(".lock"))
        files = [file for file in files if checkpoints or "checkpoint-" not in file.parent.name]
        # a comparison has many files of few kinds: first the kind, then the file
        kind = chance.choice(sorted({file.name for file in files}))
        file = chance.choice([file for file in files if file.name == kind])
        damage = chance.choice(DAMAGES)
        damage(file, chance)
        ended, detail = judged(world, file, expected)
        return Outcome(case, damage.__name__, f"{name}: {file.relative_to(world)}", ended, detail)


def judged(world: Path, file: Path, expected: Any) -> tuple[str, str]:
    """How the comparison of a damaged world ends."""
    with heard() as lines:
        try:
            make(world)
        except UserError as error:
            named = file.name in str(error) or str(file.parent) in str(error)
            return ("refused" if named else "refused without the file's name"), str(error)
        except Exception as error:
            return "failed", f"{type(error).__name__}: {error}"
    if result_of(world) != expected:
        return "a different result", "; ".join(lines)
    if left := leftovers(world):
        return "leftovers", ", ".join(left)
    return ("repaired" if lines else "no effect"), "; ".join(lines)


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """What the package says meanwhile, which is not printed."""
    lines: list[str] = []
    handler, logger = logging.Handler(), logging.getLogger("tutelage")
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    spoken, logger.propagate = logger.propagate, False
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.propagate = spoken


def leftovers(world: Path) -> list[str]:
    found = (path for pattern in LEFTOVERS for path in world.rglob(pattern))
    return sorted(str(path.relative_to(world)) for path in found)


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
        if again.returncode or result_of(world) != expected:
            return Outcome(case, what, where, f"exit code {again.returncode}, or a different result", said[-500:])
        left = leftovers(world)
        return Outcome(case, what, where, "leftovers" if left else "continued", ", ".join(left))


def descendants(process: subprocess.Popen[str]) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


# ---- The program ----


def worlds_below(folder: Path) -> tuple[dict[str, Path], Any]:
    """A finished and an unfinished comparison, and what comes out of them."""
    worlds = {"finished": folder / "finished", "unfinished": folder / "unfinished"}
    make(worlds["finished"])
    shutil.copytree(worlds["finished"] / CACHE, worlds["unfinished"] / CACHE)
    make_unfinished(worlds["unfinished"])
    return worlds, result_of(worlds["finished"])


def damage_cases(options: argparse.Namespace, folder: Path) -> Iterator[Outcome]:
    worlds, expected = worlds_below(folder)
    for case in range(options.cases) if options.only is None else [options.only]:
        yield damage_case(worlds, expected, case, options.seed)


def kill_cases(options: argparse.Namespace, folder: Path) -> Iterator[Outcome]:
    begun = time.monotonic()
    process = start(folder / "whole", 1)
    _, said = process.communicate()
    if process.returncode:
        raise SystemExit(said)
    expected, length = result_of(folder / "whole"), time.monotonic() - begun
    for case in range(options.kills):
        yield kill_case(expected, length, case, options.seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=400, help="damage cases")
    parser.add_argument("--kills", type=int, default=50, help="kill cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="this damage case alone; nothing is written")
    parser.add_argument("--output", type=Path, default=Path("results/reliability/compare.json"))
    options = parser.parse_args()
    options.kills = options.kills if options.only is None else 0
    outcomes: dict[str, list[Outcome]] = {"damage": [], "kill": []}
    for name, cases in (("damage", damage_cases), ("kill", kill_cases)):
        if not (options.cases if name == "damage" else options.kills):
            continue
        with tempfile.TemporaryDirectory() as folder:
            for outcome in cases(options, Path(folder)):
                outcomes[name].append(outcome)
                if options.only is not None or not outcome.good:
                    print(outcome, flush=True)
    counts = {name: dict(Counter(outcome.ended for outcome in found)) for name, found in outcomes.items()}
    failures = [asdict(outcome) for found in outcomes.values() for outcome in found if not outcome.good]
    print(json.dumps(counts))
    if options.only is None:
        words = shlex.join(["python", "benchmarks/reliability_compare.py", *sys.argv[1:]])
        report = {"command": words, "outcomes": counts, "failures": failures, "environment": environment()}
        write_atomically(options.output, json.dumps(report, indent=1) + "\n")
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
