"""Kills runs at random and continues them with the same command: is the result that of a run which nobody killed?

    python benchmarks/reliability_kill.py --cases 50 --seed 0 --output results/reliability/kill.json
    python benchmarks/reliability_kill.py --what distill compare-2 --tasks causal --cases 4
    python benchmarks/reliability_kill.py --what ranks twice

`extract`, `distill` (live teacher), `disk` (distill from an extracted curriculum), `compare-1` and `compare-2` (jobs) are each
killed `--cases` times by SIGKILL, every task of `--tasks` in turn: a third of the cases at one of the first writes, a third at
any write, a third at a training step (extraction: at a write). `compare-2` is killed after a random time, its workers with it.
Then the same command runs again, until it ends; a quarter of the cases is killed twice. Compared are the weights (or the shards
of the extraction) bit for bit, the log lines without their times, and the folder is searched for leftovers.

`ranks`: two processes under torchrun, of which one is killed: the other must end too. `twice`: a run made twice must write the
same bytes."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from reliability_faults import Faults, kill_process, leftovers, rows, untimed, weights
from reliability_models import TASKS, make_teacher, make_text

from tutelage.io.files import write_atomically
from tutelage.runs.environment import environment

COMMANDS = ("extract", "distill", "disk", "compare-1", "compare-2")
CHECKS = ("ranks", "twice")
PATIENCE = 600  # seconds that a command may take


@dataclass(frozen=True)
class Scene:
    """Teachers and data of all cases."""

    root: Path
    tasks: tuple[str, ...]
    text: Path

    @classmethod
    def make(cls, root: Path, tasks: Sequence[str]) -> Scene:
        for task in tasks:
            make_teacher(task, root / task)
        return cls(root, tuple(tasks), make_text(root / "text.jsonl"))

    def command(self, what: str, task: str, folder: Path) -> list[str]:
        """The one command of a case."""
        fixed = {"teacher": self.root / task, "student": "layers=2,hidden_size=16", "dataset": self.text}
        fixed |= {"max_length": 16, "output_dir": folder}
        train: dict[str, Any] = {"per_device_train_batch_size": 4, "calibration_samples": 8, "max_samples": 8}
        train |= {"max_steps": 12, "use_cpu": "true", "report_to": "none", "student_init": "random"}
        if what.startswith("compare"):
            fields = {"seeds": "0,1", "learning_rates": "0.001", "budget_samples": 160, "batch_size": 4}
            fields |= {"eval_every": 8, "methods": "one_shot", "jobs": what[-1]}
            return ["compare", *_flags({**fixed, **fields})]
        if what == "extract":
            return ["extract", *_flags({**fixed, **train, "method": "extraction", "shard_tokens": 100})]
        saving = {
            "save_strategy": "steps",
            "save_steps": 3,
            "save_total_limit": 1,
            "logging_steps": 2,
            "resume": "auto",
        }
        saving |= {"eval_strategy": "steps", "eval_steps": 4}
        if what == "disk":
            stored = self.root / f"curriculum-{task}"
            given = {"student": fixed["student"], "output_dir": folder, "curriculum_dir": stored}
            return ["distill", *_flags({**given, **train, **saving})]
        return ["distill", *_flags({**fixed, **train, **saving, "method": "extraction"})]


def _flags(options: dict[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in options.items()]


@dataclass
class Outcome:
    """What became of a case."""

    what: str
    task: str
    killed_at: list[str] = field(default_factory=list)  # kinds of the events, or seconds
    problem: str = ""  # empty: as if nobody had killed it


def _child(command: list[str], folder: Path, at: int | None, report: Path) -> None:
    """Run a command in this process, in a group of its own, counting events."""
    os.setsid()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    output = os.open(report.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    from tutelage.cli import main

    faults = Faults(folder, at, kill_process)
    with faults.watching():
        code = main(command)
    report.write_text(json.dumps({"code": code, "kinds": faults.kinds}))
    os._exit(0)


def start(command: list[str], folder: Path, at: int | None, report: Path) -> Any:
    """A process that runs the command."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tutelage.cli.commands", "tutelage.reproduction.runner", "reliability_faults"])
    process = context.Process(target=_child, args=(command, folder, at, report))
    report.unlink(missing_ok=True)
    process.start()
    return process


def run(
    command: list[str], folder: Path, report: Path, at: int | None = None, after: float | None = None
) -> dict[str, Any]:
    """Run a command to its end, or kill it at event `at`, or `after` so many seconds: what it reports, empty if killed."""
    process = start(command, folder, at, report)
    process.join(PATIENCE if after is None else after)
    if process.is_alive() or after is not None or not report.is_file():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with its workers
        process.join()
    found: dict[str, Any] = json.loads(report.read_text()) if report.is_file() else {}
    return found


def result_of(what: str, folder: Path) -> Any:
    """What must be the same, whatever happened on the way."""
    if what == "extract":
        files = [path for path in sorted(folder.rglob("*")) if path.suffix in (".arrow", ".safetensors")]
        return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    if what.startswith("compare"):
        found = {}
        for file in sorted(folder.rglob("run.json")):
            records = json.loads(file.read_text(encoding="utf-8"))["records"]
            for record in records:
                record["curve"] = [untimed(point) for point in record["curve"]]
            found[str(file.relative_to(folder))] = records
        return found
    return [weights(folder), rows(folder)]


def choose(kinds: list[str], case: int, draw: random.Random) -> int:
    """The event at which a case is killed."""
    steps = [number for number, kind in enumerate(kinds) if kind == "step"]
    if case % 3 == 0:
        return draw.randrange(min(12, len(kinds)))
    if case % 3 == 1 and steps:
        return draw.choice(steps)
    return draw.randrange(len(kinds))


def kill_cases(scene: Scene, what: str, cases: int, seed: int) -> list[Outcome]:
    """Kill and continue one command so many times."""
    draw, outcomes, known = random.Random(f"{seed}-{what}"), [], {}
    for case in range(cases):
        task = scene.tasks[case % len(scene.tasks)]
        folder, report = scene.root / f"{what}-{task}-{case}", scene.root / f"{what}-{case}.json"
        if task not in known:
            whole = scene.root / f"{what}-{task}-whole"
            began = time.perf_counter()
            ended = run(scene.command(what, task, whole), whole, report)
            if ended.get("code") != 0:
                raise SystemExit(f"{what} {task} does not end well by itself: {report.with_suffix('.log').read_text()}")
            known[task] = (result_of(what, whole), ended["kinds"], time.perf_counter() - began)
        expected, kinds, seconds = known[task]
        outcome = Outcome(what, task)
        outcomes.append(outcome)
        command = scene.command(what, task, folder)
        for _ in range(2 if case % 4 == 3 else 1):
            at, after = choose(kinds, case, draw), draw.uniform(0, seconds)
            if what == "compare-2":
                outcome.killed_at.append(f"{after:.2f} s")
                run(command, folder, report, after=after)
            else:
                outcome.killed_at.append(f"event {at} ({kinds[at]})")
                run(command, folder, report, at=at)
        ended = run(command, folder, report)
        outcome.problem = _problem(what, folder, ended, expected, report)
        print(f"{what} {task} {', '.join(outcome.killed_at)}: {outcome.problem or 'the same'}", flush=True)
        if not outcome.problem:
            shutil.rmtree(folder)
    return outcomes


def _problem(what: str, folder: Path, ended: dict[str, Any], expected: Any, report: Path) -> str:
    if ended.get("code") != 0:
        last = report.with_suffix(".log").read_text().strip().splitlines()[-1:]
        return f"it does not continue: {last}"
    if result_of(what, folder) != expected:
        return "the result differs"
    left = leftovers(folder)
    return f"leftovers: {left}" if left else ""


def ranks(scene: Scene, seed: int) -> Outcome:
    """Kill one of two processes of a run: all must end, with an exit code that is not 0."""
    outcome, folder = Outcome("ranks", scene.tasks[0]), scene.root / "ranks"
    command = [*scene.command("distill", scene.tasks[0], folder), "--max_steps=100000"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "tutelage"]
    log = scene.root / "ranks.log"
    with open(log, "w", encoding="utf-8") as handle:
        process = subprocess.Popen([*launcher, *command], stdout=handle, stderr=handle, start_new_session=True)
        deadline = time.monotonic() + PATIENCE
        while not (folder / "checkpoint-3").is_dir() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.2)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        victim = random.Random(seed).choice(children) if children else None
        outcome.killed_at.append(f"one of {len(children)} processes")
        if victim is not None:
            os.kill(int(victim), signal.SIGKILL)
        try:
            code = process.wait(120)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(process.pid, signal.SIGKILL)
    text = log.read_text(encoding="utf-8")
    if victim is None or code in (0, None) or "-9" not in text:
        outcome.problem = f"exit code {code}, and the cause is not named: {text[-300:]}"
    print(f"ranks: {outcome.problem or 'all ended, with the cause'}")
    return outcome


def twice(scene: Scene) -> list[Outcome]:
    """Make each run twice: the same bytes."""
    found = []
    for what in ("extract", "distill", "disk"):
        for task in scene.tasks:
            results = []
            for name in ("first", "second"):
                folder = scene.root / f"{name}-{what}-{task}"
                run(scene.command(what, task, folder), folder, scene.root / "twice.json")
                results.append(result_of(what, folder))
            outcome = Outcome(f"twice: {what}", task, [], "" if results[0] == results[1] else "the bytes differ")
            print(f"{outcome.what} {task}: {outcome.problem or 'the same'}", flush=True)
            found.append(outcome)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases; 1 if one of them has a problem."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", choices=[*COMMANDS, *CHECKS], default=[*COMMANDS, *CHECKS])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--cases", type=int, default=50, help="kills of each command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file for the outcomes")
    options = parser.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    began, outcomes = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as folder:
        scene = Scene.make(Path(folder), options.tasks)
        if {"disk", "twice"} & set(options.what):
            for task in scene.tasks:
                stored = scene.root / f"curriculum-{task}"
                run(scene.command("extract", task, stored), stored, scene.root / "extract.json")
        for what in options.what:
            if what == "ranks":
                outcomes.append(ranks(scene, options.seed))
            elif what == "twice":
                outcomes += twice(scene)
            else:
                outcomes += kill_cases(scene, what, options.cases, options.seed)
    bad = [outcome for outcome in outcomes if outcome.problem]
    counts = {what: sum(outcome.what == what for outcome in outcomes) for what in {o.what for o in outcomes}}
    print(f"{len(outcomes)} cases, {len(bad)} problems, {time.perf_counter() - began:.0f} s: {counts}")
    if options.output is not None:
        settings = {"seed": options.seed, "cases": counts, "tasks": options.tasks, "environment": environment()}
        problems = [vars(outcome) for outcome in bad]
        cases = [vars(outcome) for outcome in outcomes]
        write_atomically(
            options.output, json.dumps({**settings, "problems": problems, "outcomes": cases}, indent=1) + "\n"
        )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
