"""Comparing methods on one system: the same data order, initial students, evaluation sets, rates and budget for all.

Public names: `compare`, `COMPARISON_FILE`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tutelage.core.curriculum import Curriculum
from tutelage.core.errors import UserError
from tutelage.io.files import write_atomically
from tutelage.reproduction.recipe import Recipe
from tutelage.reproduction.runner import MATCHES, Runner
from tutelage.reproduction.statistics import median_interval, paired_ratio, reached_at
from tutelage.reproduction.teachers import Teacher
from tutelage.reproduction.variants import Variant, candidates, parse_variant
from tutelage.reproduction.verdict import verdict
from tutelage.reproduction.workers import Workers
from tutelage.runs.distill import environment

COMPARISON_FILE = "comparison.json"


def compare(
    system: Recipe,
    output_dir: Path,
    methods: Sequence[str] | None = None,
    *,
    match: str = "samples",
    jobs: int | Workers = 1,
    command: str | None = None,
    log: Any = print,
) -> dict[str, Any]:
    """Run methods x seeds on a system and write `comparison.json`.

    Args:
        system: what is compared on.
        output_dir: the comparison's folder; one that holds the same comparison is continued.
        methods: names as `parse_variant` takes them; None is the system's own list.
        match: what every method gets as much of as one-shot: `samples`, `flops` or `seconds`.
        jobs: runs made side by side, each in a process of its own (1: here, one by one), or the processes themselves.
        command: how to make it again, for the record.
        log: called with a line of progress.

    Returns:
        What comparison.json holds.

    Raises:
        UserError: settings that cannot work, among them a target above what the teacher reaches, and a folder that holds
            another comparison.
    """
    if match not in MATCHES:
        raise UserError(f"unknown match {match!r}: use one of {', '.join(MATCHES)}")
    if isinstance(jobs, int) and jobs < 1:
        raise UserError(f"jobs must be at least 1, got {jobs}")
    if match == "seconds" and jobs != 1:
        raise UserError("seconds of runs made side by side are not those of runs alone: --match seconds needs --jobs 1")
    variants = [parse_variant(name) for name in methods] if methods else list(system.default_methods)
    _check(system, variants)
    sketched = system.sketch_teacher()
    if sketched is not None:  # what cannot work with a teacher of its shape is refused before training it
        sketch = Runner(system, Teacher(sketched, "untrained"), output_dir, match)
        for variant in variants:
            if variant.method != "progressive":  # needs the finished teacher's checkpoints
                sketch.check(variant)
    _claim(output_dir, system, match)
    log(f"teacher of {system.name}/{system.size}")
    teacher = system.make_teacher(output_dir)
    _check_target(system, teacher)
    runner = Runner(system, teacher, output_dir, match)
    result = _skeleton(system, teacher, match, command)
    if methods is None and not teacher.checkpoints and any(v.method == "progressive" for v in variants):
        log("no progressive distillation: this teacher came without checkpoints of its training")
        variants = [variant for variant in variants if variant.method != "progressive"]
    # a folder holds one comparison, whichever methods a command names: what it had stays in the report
    result["methods"] = _earlier_methods(output_dir) | {
        variant.name: {"learning_rate": None, "grid": {}, "runs": []} for variant in variants
    }
    for variant in variants:
        runner.check(variant)
    if jobs == 1:
        for variant in variants:
            _run_method(runner, variant, result, log)
    elif isinstance(jobs, int):
        with Workers(jobs) as workers:
            _run_side_by_side(workers, runner, variants, result, log)
    else:
        _run_side_by_side(jobs, runner, variants, result, log)
    result["complete"] = True
    _summarise(system, result)
    write_atomically(output_dir / COMPARISON_FILE, json.dumps(result, indent=1) + "\n")
    return result


def _run_side_by_side(
    workers: Workers, runner: Runner, variants: Sequence[Variant], result: dict[str, Any], log: Any
) -> None:
    """Every method in a thread of its own, which waits for its runs."""
    runner.submit = workers.submit
    result["environment"]["jobs"] = workers.count
    with ThreadPoolExecutor(len(variants)) as threads:
        started = [threads.submit(_run_method, runner, variant, result, log) for variant in variants]
        try:
            for done in as_completed(started):
                done.result()
        except BaseException:
            workers.stop()  # what has not begun need not begin
            raise


def _run_method(runner: Runner, variant: Variant, result: dict[str, Any], log: Any) -> None:
    """Tune a method, run it on the reported seeds, and write what there is after each."""
    best, grid = runner.tune(variant, log)
    if best is None:
        log(f"{variant.name} diverged at every learning rate tried: add smaller learning_rates")
        with runner.lock:
            result["methods"][variant.name] |= {"grid": grid, "diverged": True}
        return
    with runner.lock:
        entry: dict[str, Any] = {
            "learning_rate": best.learning_rate,
            "schedule": best.schedule,
            "grid": grid,
            "curriculum": _portable(runner.curriculum(variant, best)),
            "runs": [],
        }
        result["methods"][variant.name] = entry
    log(f"{variant.name}: learning rate {best.label}, seeds {', '.join(map(str, runner.system.seeds))}")
    for records in runner.runs(variant, best, runner.system.seeds):
        with runner.lock:
            entry["runs"] += records
            _summarise(runner.system, result)
            write_atomically(runner.root / COMPARISON_FILE, json.dumps(result, indent=1) + "\n")


def _check(system: Recipe, variants: Sequence[Variant]) -> None:
    names = [variant.name for variant in variants]
    if len(set(names)) != len(names):
        raise UserError(f"methods are repeated: {', '.join(names)}")
    seeds, tuning = system.seeds, system.tuning_seeds
    if not seeds:
        raise UserError("seeds are empty: give at least one")
    if min((*seeds, *tuning)) < 0:
        raise UserError(f"seeds must not be negative: {', '.join(map(str, (*seeds, *tuning)))}")
    if not system.learning_rates:
        raise UserError("learning_rates are empty: give at least one")
    if len(set(seeds)) != len(seeds):
        raise UserError(f"seeds are repeated: {', '.join(map(str, seeds))}")
    for name in ("tuning_seeds", "learning_rates"):
        values = getattr(system, name)
        if len(set(values)) != len(values):
            raise UserError(f"{name} are repeated: {', '.join(map(str, values))}")
    if not all(0 < rate < float("inf") for rate in system.learning_rates):
        raise UserError(f"learning_rates must be positive and finite: {', '.join(map(str, system.learning_rates))}")
    if shared := set(seeds) & set(tuning):
        raise UserError(f"seeds {sorted(shared)} are tuning seeds too: rates must not be chosen on reported seeds")
    if not tuning and any(len(candidates(v, system.learning_rates)) > 1 for v in variants):
        raise UserError(
            "tuning_seeds are empty: give some, or a single learning rate and, to progressive, a schedule "
            "(progressive:schedule=two)"
        )


def _portable(curriculum: Curriculum) -> dict[str, Any]:
    """A curriculum for the record: checkpoints by name, wherever this machine keeps them."""
    made = json.loads(curriculum.to_json())
    for stage in made["stages"]:
        if stage.get("teacher_checkpoint") is not None:
            stage["teacher_checkpoint"] = Path(stage["teacher_checkpoint"]).name
    return made


def _check_target(system: Recipe, teacher: Teacher) -> None:
    if system.target is None or system.metric not in teacher.metrics:
        return
    reaches = float(teacher.metrics[system.metric])
    if not system.reached(reaches, system.target):
        raise UserError(
            f"the target {system.metric} {system.target} is beyond the teacher, which reaches {reaches:.4f}: lower the "
            "target, or train the teacher further"
        )


def _claim(output_dir: Path, system: Recipe, match: str) -> None:
    """Refuse a folder that holds another comparison."""
    mine = {"recipe": system.name, "size": system.size, "match": match, **_settings(system)}
    mine = json.loads(json.dumps(mine, default=str))
    file = output_dir / "settings.json"
    begun = any((output_dir / name).exists() for name in ("runs", "tuning", COMPARISON_FILE))
    if file.exists() and begun:
        theirs = json.loads(file.read_text(encoding="utf-8"))
        theirs |= theirs.pop("settings", {})  # as earlier versions wrote them
        if different := [key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key)]:
            raise UserError(
                f"{str(output_dir)!r} holds another comparison (another {', '.join(sorted(different))}): choose another "
                "--output_dir"
            )
    elif file.exists():
        pass  # a comparison that was refused before its first run
    elif output_dir.exists() and any(output_dir.iterdir()):
        raise UserError(f"{str(output_dir)!r} is not empty and holds no comparison: choose another --output_dir")
    output_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(mine, indent=2, default=str) + "\n")


def _earlier_methods(output_dir: Path) -> dict[str, Any]:
    file = output_dir / COMPARISON_FILE
    return json.loads(file.read_text(encoding="utf-8"))["methods"] if file.exists() else {}


def _settings(system: Recipe) -> dict[str, Any]:
    fields = {key: list(value) if isinstance(value, tuple) else value for key, value in system.settings().items()}
    return {**fields, **system.identity(), "metric": system.metric, "target": system.target}


def _skeleton(system: Recipe, teacher: Teacher, match: str, command: str | None) -> dict[str, Any]:
    return {
        "recipe": system.name,
        "size": system.size,
        "command": command,
        "complete": False,
        "match": match,
        "budget": system.budget_samples,
        "metric": system.metric,
        "better": system.better,
        "target": system.target,
        "seeds": list(system.seeds),
        "settings": _settings(system),
        "teacher": {
            "description": teacher.description,
            **({} if teacher.samples is None else {"samples": teacher.samples, "converged_at": teacher.converged_at}),
            **teacher.metrics,
            **({} if teacher.transition is None else {"transition": teacher.transition}),
        },
        "environment": environment(),
        "methods": {},
        "ratios": {},
        "verdict": "",
    }


def _summarise(system: Recipe, result: dict[str, Any]) -> None:
    """Fill in targets, medians, ratios and the verdict from the runs."""
    metric, methods = system.metric, result["methods"]
    if system.target is None and methods.get("one_shot", {}).get("runs"):
        finals = sorted(run["final"][metric] for run in methods["one_shot"]["runs"] if "diverged" not in run)
        result["target"] = finals[len(finals) // 2] if finals else None
    target = result["target"]
    for entry in methods.values():
        for run in entry["runs"]:
            point = None
            if target is not None and "diverged" not in run:
                point = reached_at(run["curve"], metric, lambda value: system.reached(value, target))
            for cost in MATCHES:
                run[f"{cost}_to_target"] = None if point is None else point[cost]
        entry["median_samples_to_target"], entry["ci95"] = median_interval(
            [run["samples_to_target"] for run in entry["runs"]]
        )
    result["ratios"] = {}
    for over, under in ((a, b) for a in methods for b in methods if a != b and a.startswith("extraction")):
        mine = {run["seed"]: run for run in methods[over]["runs"]}
        theirs = {run["seed"]: run for run in methods[under]["runs"]}
        seeds = [seed for seed in mine if seed in theirs]
        for cost in MATCHES:
            budget = max((theirs[seed]["curve"][-1][cost] for seed in seeds), default=0)
            ratio = paired_ratio(
                [mine[seed][f"{cost}_to_target"] for seed in seeds],
                [theirs[seed][f"{cost}_to_target"] for seed in seeds],
                budget,
            )
            name = f"{over}/{under}" if cost == "samples" else f"{over}/{under} {cost}"
            result["ratios"][name] = {**ratio, "seeds": len(seeds)}
    result["verdict"] = verdict(result)
