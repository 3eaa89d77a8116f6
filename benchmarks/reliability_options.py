"""Lie to every command: a table of bad values, random options (hypothesis), and lines of 50 MB.

    python benchmarks/reliability_options.py --output results/reliability/options.json

A value that cannot work must end with exit code 2 and exactly one line on standard error; one that can, with a run that is
right. Never a traceback. `--cases 50 --examples 50 --megabytes 5` is a short version; `--seed` chooses the cases.
"""

import argparse
import functools
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import hypothesis
from hypothesis import HealthCheck
from hypothesis import strategies as st
from reliability_options_cases import RECIPE, SOUND, Case, cases
from reliability_options_world import Outcome, World, bounded_memory, make_world, remove, run, trained

from tutelage.cli import main as tutelage
from tutelage.io.files import write_atomically
from tutelage.runs.environment import environment

GIGABYTES = 6.0  # address space that a command may ask for
SECONDS = 120.0  # of a command of the table
FUZZ_SECONDS = 20.0


# ---- The table ----


def try_case(case: Case, world: World) -> str | None:
    """What is wrong with the way a case ends; None if nothing is."""
    out = world.fresh()
    with bounded_memory(GIGABYTES):
        found = run(case.arguments(str(world), str(out)), SECONDS)
    try:
        return None if _as_expected(case, found, out) else _ending(found)
    finally:
        remove(out)


def _as_expected(case: Case, found: Outcome, out: Path) -> bool:
    if case.ends == "refused" or (case.ends == "either" and found.refused):
        return found.refused
    return found.ran and bool(found.output) and (case.command != "distill" or trained(out, 2))


def _ending(found: Outcome) -> str:
    lines = found.error.strip().splitlines() or [""]
    return f"exit code {found.code}, {len(lines)} lines on standard error: {lines[-2:]}"


# ---- Random options ----


class _Parser(BaseException):
    """The parser of a command, on its way out of it."""


# options that reach beyond this process (other machines, processes, debuggers), compile for minutes or change PyTorch for good
_LEFT_OUT = re.compile(
    "push_to_hub|hub_|trackio|report_to|deepspeed|fsdp|torch_compile|num_workers|jobs|full_determinism|debug|accelerator|"
    "parallelism|local_rank|ddp_backend|auto_find|help|tf32|log_level"
)
_TEXTS = (
    "",
    " ",
    "x",
    "-",
    "--",
    "é",
    "😀",
    "a\nb",
    "\udcff",
    "a\0b",
    "$x$",
    "a" * 300,
    "../x",
    "..",
    "~",
    "[",
    "{}",
    "{",
)
_PATHS = (
    "causal_lm",
    "masked_lm",
    "embedding",
    "deep",
    "deep.json",
    "text.txt",
    "text.jsonl",
    "text.parquet",
    "short.txt",
)
_NUMBERS = ("0", "-1", "1", "2", "nan", "inf", "-inf", "0.5", "1e30", "1e-30", "9" * 30, "1" * 5000, "0x10", "1_0", "٣")


@functools.cache
def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser that a command makes for its options."""

    def caught(self: Any, *_: Any, **__: Any) -> None:
        raise _Parser(self)

    with mock.patch.object(argparse.ArgumentParser, "parse_known_args", caught):
        try:
            tutelage([command])
        except _Parser as found:
            parser: argparse.ArgumentParser = found.args[0]
            return parser
    raise AssertionError(f"{command} has no parser")


def _values(action: argparse.Action, world: World) -> st.SearchStrategy[str]:
    """Texts for an option: of its own type, and hostile ones."""
    paths = st.sampled_from([*(f"{world}/{name}" for name in _PATHS), "/nowhere", "/proc/nowhere/x"])
    hostile = st.one_of(st.sampled_from(_TEXTS), st.sampled_from(_NUMBERS), st.text(max_size=8))
    if action.choices is not None:
        return st.one_of(st.sampled_from([str(choice) for choice in action.choices]), hostile)
    if action.type is int:
        return st.one_of(st.integers().map(str), st.integers(-2, 70).map(str), hostile)
    if action.type is float:
        return st.one_of(st.floats().map(str), st.floats(0, 1).map(str), hostile)
    if getattr(action.type, "__name__", "") == "string_to_bool":
        return st.one_of(st.sampled_from(["true", "false", "1", "no", "maybe"]), hostile)
    if "output_dir" in action.dest or action.dest == "folder":
        return st.sampled_from(
            ["", " ", "a\nb", "$x$", "a" * 300, "\udcff", "../x", f"{world}/file", "/proc/nowhere/x", "s3://b/c"]
        )
    return st.one_of(paths, hostile)


def command_lines(world: World) -> st.SearchStrategy[tuple[str, tuple[str, ...]]]:
    """A command with one to three random options of its parser, which come after sound ones."""

    def of(command: str) -> st.SearchStrategy[tuple[str, tuple[str, ...]]]:
        actions = [action for action in parser_of(command)._actions if not _LEFT_OUT.search(action.dest)]

        def flag(action: argparse.Action) -> st.SearchStrategy[str]:
            values = _values(action, world)
            if not action.option_strings:
                return values
            return st.builds("{}={}".format, st.sampled_from(action.option_strings), values)

        unknown = st.builds("--{}={}".format, st.text("abxyz_", min_size=1, max_size=6), st.sampled_from(_TEXTS))
        words = st.sampled_from([*actions, None]).flatmap(lambda action: unknown if action is None else flag(action))
        return st.tuples(st.just(command), st.lists(words, min_size=1, max_size=3).map(tuple))

    return st.sampled_from(sorted(SOUND)).flatmap(of)


def fuzz(world: World, examples: int, seed: int | None = None) -> dict[str, int]:
    """How many random command lines were refused, ran, or were still at work when their time was over; AssertionError for the
    smallest one that ended otherwise. Without a seed the command lines are always the same."""
    counts = {"refused": 0, "ran": 0, "long": 0}

    def check(line: tuple[str, tuple[str, ...]]) -> None:
        command, words = line
        out = world.fresh()
        sound = RECIPE.get(command, SOUND[command]) if command == "compare" else SOUND[command]
        arguments = Case(command, "", sound=sound).arguments(str(world), str(out))
        with bounded_memory(GIGABYTES):
            found = run([*arguments, *words], FUZZ_SECONDS)
        remove(out)
        counts["refused" if found.code == 2 else "long" if found.code == -1 else "ran"] += 1
        assert "Traceback" not in found.error, (line, found.error[-2000:])
        assert found.code in (0, 2, -1), (line, found)
        assert found.code != 2 or found.refused or _only_progress(found), (line, found)

    settings = hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=seed is None,
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    test = settings(hypothesis.given(command_lines(world))(check))
    (test if seed is None else hypothesis.seed(seed)(test))()
    return counts


def _only_progress(found: Outcome) -> bool:
    """Whether a command that was at work before it found the mistake says so in its last line alone."""
    *before, last = found.error.splitlines()
    return last.startswith("tutelage") and not any(line.startswith("tutelage") for line in before)


# ---- A long line ----


def long_line(world: World, megabytes: int, suffix: str, task: str) -> dict[str, Any]:
    """Peak memory and time of reading and tokenising a file with one line of so many megabytes, in a process of its own."""
    file = world.root / f"long{suffix}"
    words = (world.root / "text.txt").read_text(encoding="utf-8").replace("\n", " ")
    body = (words * (megabytes * 10**6 // len(words) + 1))[: megabytes * 10**6]
    file.write_text(body + "\n" if suffix == ".txt" else json.dumps({"text": body}) + "\n", encoding="utf-8")
    code = (
        "import resource, sys; from tutelage.tasks.text import read_dataset, tokenize; "
        "from tutelage.tasks.loading import load_tokenizer; from tutelage.tasks.registry import get_task; "
        "from tutelage.tasks.embedded import DEFAULT_TEACHER; tokenizer = load_tokenizer(DEFAULT_TEACHER); "
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; "
        "rows = tokenize(read_dataset(sys.argv[1]), tokenizer, get_task(sys.argv[2]), 256); "
        "print(len(rows), before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, str(file), task], capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    file.unlink()
    assert done.returncode == 0, done.stderr
    rows, before, peak = map(int, done.stdout.split())
    sizes = {"gigabytes_before": before / 1e6, "gigabytes_peak": peak / 1e6}
    return {"file": f"{megabytes} MB {suffix}", "task": task, "rows": rows, **sizes, "seconds": seconds}


# ---- All of it ----


def chosen(count: int | None, seed: int) -> Sequence[Case]:
    """All cases, or so many of them."""
    every = cases()
    return every if count is None else random.Random(seed).sample(every, min(count, len(every)))


def main() -> None:
    """Try everything, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="file of the results; default: none is written")
    parser.add_argument("--cases", type=int, help="cases of the table; default: all")
    parser.add_argument("--examples", type=int, default=2000, help="random command lines")
    parser.add_argument("--megabytes", type=int, default=50, help="length of the long line; 0 leaves it out")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    output = None if options.output is None else options.output.absolute()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "a" / "b" / "c"  # so that `..` stays inside
        place.mkdir(parents=True)
        os.chdir(place)
        datasets.config.HF_DATASETS_CACHE = Path(folder) / "cache"
        datasets.disable_progress_bars()
        world = make_world(Path(folder) / "world")
        table = chosen(options.cases, options.seed)
        wrong = {}
        for number, case in enumerate(table, 1):
            if (problem := try_case(case, world)) is not None:
                wrong[case.name] = problem
                print(f"WRONG {case.name}: {problem}", flush=True)
            if number % 50 == 0:
                print(f"{number} of {len(table)} cases, {len(wrong)} wrong", flush=True)
        random_lines = fuzz(world, options.examples, options.seed)
        print(f"random command lines: {random_lines}", flush=True)
        kinds = [(".txt", "causal_lm"), (".jsonl", "causal_lm"), (".jsonl", "embedding")]
        lines = [long_line(world, options.megabytes, *kind) for kind in kinds if options.megabytes]
        os.chdir("/")
    ends = {ends: sum(case.ends == ends for case in table) for ends in ("refused", "runs", "either")}
    commands = {name: sum(case.command == name for case in table) for name in SOUND}
    result = {
        "command": "python benchmarks/reliability_options.py --output results/reliability/options.json",
        "seed": options.seed,
        "environment": environment(),
        "table": {"cases": len(table), "expected": ends, "commands": commands, "wrong": wrong},
        "random": random_lines,
        "long_lines": lines,
        "gigabytes_peak_of_this_process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }
    print(json.dumps({key: result[key] for key in ("table", "random", "long_lines")}, indent=1))
    if output is not None:
        write_atomically(output, json.dumps(result, indent=1) + "\n")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
