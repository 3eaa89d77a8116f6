"""Folders that are damaged in one place: each is refused with the file named, made again, or gives the same result.

    python benchmarks/reliability_damage.py --cases 400 --seed 0 --output results/reliability/damage.json

Teachers are tiny and random. `curricula`: finished ones are opened by `distill --curriculum_dir` and by `extract` given again,
unfinished ones by `extract`. `runs`: stopped between checkpoints, and continued by `distill --resume auto`. `comparisons`:
finished or not, with their teachers, and made again. Each has `--cases` of its own. A case follows from the seed and its number
alone: `--what runs --only NUMBER` repeats one."""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import datasets
import reliability_compare
import transformers
from damage import GOOD, Case, Subject, contents, judge
from reliability_faults import leftovers, rows, weights
from reliability_models import make_teacher, make_text

from tutelage.io.files import write_atomically
from tutelage.runs import distill as distilling
from tutelage.runs.environment import environment
from tutelage.runs.extraction.job import extract
from tutelage.runs.extraction.options import ExtractOptions
from tutelage.runs.inputs import RunOptions
from tutelage.targets.manifest import ShardWriter
from tutelage.training.config import CurriculumConfig
from tutelage.training.trainer import CurriculumTrainer

STUDENT = "layers=2,hidden_size=16"
# by method: settings, and those of an older curriculum with files of the same names. The first has an output head and
# calibration rows, the second the first weights of its student.
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "extraction": ({"student_init": "random"}, {"projection_seed": 1, "calibration_samples": 8}),
    "joint": ({"method": "joint", "student_init": "teacher"}, {"temperature": 2.0, "calibration_samples": 8}),
}


def settings(folder: Path, **fields: Any) -> CurriculumConfig:
    tiny = {"max_steps": 6, "per_device_train_batch_size": 4, "calibration_samples": 16, "use_cpu": True}
    quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    return CurriculumConfig(output_dir=str(folder), **{**tiny, **quiet, **fields})


def curricula(root: Path) -> list[Subject]:
    """Finished and unfinished curricula, and what is done with them."""
    teacher, text, subjects = make_teacher("causal", root / "teacher"), make_text(root / "text.jsonl", 120), []
    for name, (fields, older) in METHODS.items():

        def run(folder: Path, fields: dict[str, Any] = fields) -> None:
            args = settings(folder, teacher_model_name_or_path=str(teacher), **fields)
            how = ExtractOptions(dtype="float32", shard_tokens=100)
            extract(RunOptions(student=STUDENT, dataset=str(text), max_length=16), args, how, log=lambda line: None)

        def again(names: list[str], run: Callable[[Path], None] = run) -> Callable[[Path, Path], Any]:
            def attempt(copy: Path, output: Path) -> Any:
                run(copy)
                return contents(copy, names)

            return attempt

        whole, before, cut = (root / f"{name}-{part}" for part in ("whole", "older", "unfinished"))
        run(whole)
        run(before, {**fields, **older})
        cut_short(lambda run=run, cut=cut: run(cut), shards=3)
        cut_short(lambda run=run, cut=cut, all_=fields | older: run(cut.with_name(f"{cut.name}-older"), all_), shards=3)
        names = list(contents(whole))
        subjects += [
            Subject(f"{name}, finished, distill", whole, train, before),
            Subject(f"{name}, finished, extract", whole, again(names), before),
            Subject(f"{name}, unfinished, extract", cut, again(names), cut.with_name(f"{cut.name}-older")),
        ]
    return subjects


def cut_short(extraction: Callable[[], None], shards: int) -> None:
    """End an extraction after so many shards, as a kill does."""
    write, written = ShardWriter.write, []

    def some(self: ShardWriter, number: int, batches: Any) -> Any:
        if len(written) == shards:
            raise KeyboardInterrupt
        written.append(number)
        return write(self, number, batches)

    with patch.object(ShardWriter, "write", some):
        try:
            extraction()
        except KeyboardInterrupt:
            return
    raise AssertionError(f"the extraction has no more than {shards} shards")


def train(copy: Path, output: Path) -> Any:
    """The student of a curriculum."""
    with patch.object(distilling, "plot_run"):  # half a second
        distilling.distill(RunOptions(), settings(output, curriculum_dir=str(copy), calibration_samples=None))
    return contents(output, ["model.safetensors", "config.json", "tokenizer.json"])


def runs(root: Path) -> list[Subject]:
    """Runs that were stopped between checkpoints; of an older one with other settings are the files that replace theirs."""
    text, subjects = make_text(root / "text.jsonl", 120), []
    for task, method in (("causal", "extraction"), ("classifier", "joint")):
        teacher = make_teacher(task, root / task)

        def run(folder: Path, teacher: Path = teacher, method: str = method, **fields: Any) -> None:
            saving = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "resume_from_checkpoint": "auto"}
            common = {"teacher_model_name_or_path": str(teacher), "method": method, "student_init": "random"}
            args = settings(folder, **{**saving, **common, "calibration_samples": 8, **fields})
            data = RunOptions(student=STUDENT, dataset=str(text), max_length=16, max_samples=8)
            with patch.object(distilling, "plot_run"):
                distilling.distill(data, args)

        def go_on(copy: Path, output: Path, run: Callable[..., None] = run) -> Any:
            run(copy)
            return weights(copy), rows(copy), leftovers(copy)

        cut, older = root / f"{task}-cut", root / f"{task}-older"
        stop_at(5, lambda run=run, cut=cut: run(cut))
        stop_at(5, lambda run=run, older=older: run(older, seed=1))
        subjects.append(Subject(f"{task} run, unfinished", cut, go_on, older))
    return subjects


def stop_at(step: int, run: Callable[[], None]) -> None:
    """End a run before a step, as a kill does."""
    training_step = CurriculumTrainer.training_step

    def stopping(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return training_step(self, *args, **kwargs)

    with patch.object(CurriculumTrainer, "training_step", stopping):
        try:
            run()
        except KeyboardInterrupt:
            return
    raise AssertionError(f"the run has no step {step + 1}")


def comparisons(root: Path) -> list[Subject]:
    """A finished and an unfinished comparison, with their teachers."""
    finished, unfinished = root / "finished", root / "unfinished"
    reliability_compare.make(finished)
    shutil.copytree(finished / reliability_compare.CACHE, unfinished / reliability_compare.CACHE)
    reliability_compare.make_unfinished(unfinished)

    def again(copy: Path, output: Path) -> Any:
        reliability_compare.make(copy)
        return reliability_compare.result_of(copy)

    def is_lock(name: str) -> bool:
        return name.endswith(".lock")

    return [Subject(f"{folder.name} comparison", folder, again, leave=is_lock) for folder in (finished, unfinished)]


def run_cases(subjects: Sequence[Subject], numbers: Iterable[int], seed: int, scratch: Path) -> list[Case]:
    """The cases of these numbers, which are dealt to the subjects."""
    references: dict[str, Any] = {}
    found = []
    for number in numbers:
        subject = subjects[number % len(subjects)]
        if subject.name not in references:
            references[subject.name] = subject.reference(scratch / "references" / str(number % len(subjects)))
        found.append(judge(subject, f"{seed}/{number}", references[subject.name], scratch / "case"))
    return found


FAMILIES = {"curricula": curricula, "runs": runs, "comparisons": comparisons}


def main() -> None:
    """Run, print the counts and the cases that are not good, and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--cases", type=int, default=400, help="of each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="number of the one case to repeat")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    numbers = range(options.cases) if options.only is None else [options.only]
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.disable(logging.WARNING)  # of what is made again
    warnings.simplefilter("ignore")
    found: list[Case] = []
    for what in options.what:
        with tempfile.TemporaryDirectory() as temporary:
            root = Path(temporary)
            with patch.object(datasets.config, "HF_DATASETS_CACHE", root / "cache"):
                found += run_cases(FAMILIES[what](root), numbers, options.seed, root / "cases")
    bad = [case for case in found if not case.good]
    for case in bad:
        print(f"{case.verdict}: {case.subject}, seed {case.seed}, {case.kind}: {case.what}\n    {case.message}")
    counts = Counter((case.subject, case.kind, case.verdict) for case in found)
    table = [{"subject": s, "kind": k, "verdict": v, "cases": count} for (s, k, v), count in sorted(counts.items())]
    totals = Counter(case.verdict for case in found)
    print(", ".join(f"{totals[verdict]} {verdict}" for verdict in (*GOOD, *sorted(totals.keys() - set(GOOD)))))
    if options.output is not None:
        command = shlex.join(["python", "benchmarks/reliability_damage.py", *sys.argv[1:]])
        result = {"command": command, "environment": environment(), "verdicts": dict(totals), "cases": table}
        write_atomically(options.output, json.dumps({**result, "bad": [asdict(case) for case in bad]}, indent=1) + "\n")
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main()
