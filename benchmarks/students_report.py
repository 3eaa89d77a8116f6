"""What the runs of students.py came to: a page with a table and curves for each teacher, in results/students/TEACHER.

    python benchmarks/students_report.py sizes minilm     # measures the teacher itself, and the speed of teacher and students
    python benchmarks/students_report.py report minilm

Measure sizes while nothing else runs. Seconds of training are those of a machine on which two or three processes ran.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from students import (
    METHODS,
    METRICS,
    RESULTS,
    SEEDS,
    TEACHERS,
    TRIALS,
    TUNING_SEED,
    best_rates,
    metric_of,
    read_results,
    with_assets,
)

from tutelage import CurriculumConfig, RunOptions, distill
from tutelage.io.files import write_atomically
from tutelage.runs.environment import environment
from tutelage.runs.evaluate import EvaluateOptions, evaluate
from tutelage.runs.plots import COLORS, save_figure

# columns of the tables: heading, and the metric that it shows
COLUMNS = {
    "minilm": {
        "cosine": "cosine",
        "Spearman": "similarity_spearman",
        "Lee": "lee: pairs_spearman",
        "title MRR": "title: mrr",
        "sentence MRR": "sentence: mrr",
        "sentence recall@1": "sentence: recall_at_1",
        "sentence recall@10": "sentence: recall_at_10",
    },
    "smollm2": {"loss": "loss", "KL": "kl", "perplexity": "perplexity", "Brown loss": "brown: loss"},
    "reviews": {"accuracy": "accuracy", "loss": "loss", "agreement": "agreement"},
}
SPENT = {"tokens": "tokens", "TFLOPs": "TFLOPs", "seconds": "seconds"}


def sizes(teacher: str, assets: Path) -> None:
    """Measure the teacher on the tests of its students, and size and speed of teacher and students."""
    settings = TEACHERS[teacher]
    torch.set_num_threads(1)
    length, path = settings["run"]["max_length"], str(assets / settings["teacher"])
    held_out = {"dataset": settings["held_out"], "max_samples": settings["run"].get("max_samples")}
    held_out = with_assets(held_out, assets)
    found: dict[str, Any] = {"teacher": {}, "students": {}, "environment": environment()}
    alone = {} if METRICS[teacher][0] == "cosine" else {"": held_out}  # a cosine is one to the teacher
    tests = {name: with_assets(given, assets) for name, given in settings["evaluations"].items()}
    for name, fields in {**alone, **tests}.items():
        metrics = evaluate(EvaluateOptions(model=path, max_length=length, batch_size=64, **fields)).metrics
        found["teacher"] |= {f"{name}: {key}" if name else key: value for key, value in metrics.items()}
    for student, preset in settings["students"].items():
        with tempfile.TemporaryDirectory() as folder:
            args = CurriculumConfig(folder, teacher_model_name_or_path=path, student_init="random", method="one_shot")
            args.max_steps, args.save_strategy, args.use_cpu = 1, "no", True  # type: ignore[assignment]
            options = RunOptions(student=preset, dataset=held_out["dataset"], max_length=length, max_samples=8)
            distill(options, args)
            speed = {**held_out, "max_samples": 256, "measure_speed": True}
            metrics = evaluate(EvaluateOptions(model=folder, teacher=path, max_length=length, **speed)).metrics
        kept = ("parameters", "megabytes", "_per_second", "speedup")
        found["students"][student] = {key: value for key, value in metrics.items() if key.endswith(kept)}
    write_atomically(RESULTS / teacher / "sizes.json", json.dumps(found, indent=1) + "\n")


def groups_of(teacher: str) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The reported runs at the best rate by student and method, in the order of `METHODS`; where there are none, the best
    tuning run."""
    rates = best_rates(teacher)
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    tuning: dict[tuple[str, str], dict[str, Any]] = {}
    for run in read_results(teacher):
        key = run["run"]["student"], run["run"]["method"]
        best = rates.get(key, (run["run"]["rate"], True))[0]
        if int(run["run"]["seed"]) in SEEDS and float(run["run"]["rate"]) == float(best):
            found.setdefault(key, []).append(run)
        elif key not in tuning or metric_of(teacher, run) > metric_of(teacher, tuning[key]):
            tuning[key] = run
    found |= {key: [run] for key, run in tuning.items() if key not in found}
    students, methods = list(TEACHERS[teacher]["students"]), list(METHODS)
    return dict(sorted(found.items(), key=lambda item: (students.index(item[0][0]), methods.index(item[0][1]))))


def values_of(runs: list[dict[str, Any]], name: str) -> list[float]:
    """One metric of each run that has it."""
    found = []
    for run in runs:
        budget = run["result"]["budget"]
        metrics = {**run["result"]["student"]["metrics"], "tokens": budget["tokens"], "seconds": budget["seconds"]}
        metrics["TFLOPs"] = (budget["student_flops"] + budget["teacher_flops"]) / 1e12
        for test, measured in run["evaluations"].items():
            metrics |= {f"{test}: {key}": value for key, value in measured.items()}
        found += [float(metrics[name])] if name in metrics else []
    return found


def cell(values: list[float]) -> str:
    """Mean and range."""
    if not values:
        return ""
    mean = statistics.mean(values)
    if mean >= 100:
        return f"{mean:,.0f}"
    spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
    return f"{mean:.3f}{spread}"


def report(teacher: str) -> None:
    """Write the page of a teacher and draw its curves."""
    write_atomically(RESULTS / teacher / "README.md", page(teacher))
    groups = groups_of(teacher)
    for student in TEACHERS[teacher]["students"]:
        if runs := {method: found for (name, method), found in groups.items() if name == student}:
            curves(teacher, student, runs)


def page(teacher: str) -> str:
    """Tables of all runs of a teacher, as Markdown."""
    groups, rates, columns = groups_of(teacher), best_rates(teacher), {**COLUMNS[teacher], **SPENT}
    lines = [
        f"# {teacher}: small students of one teacher",
        "",
        f"Made by `python benchmarks/students_report.py report {teacher}` from the runs of `benchmarks/students.py`. "
        + machine(read_results(teacher)),
        "",
        "Mean over seeds, and in brackets the lowest and highest. *Rate*: the best on another seed at the full",
        "budget; \\* marks the smallest or largest one that was tried. *Tuning seed*: the reported seeds were not run.",
        "Seconds: with two or three processes on the machine; compare TFLOPs.",
    ]
    file = RESULTS / teacher / "sizes.json"
    measured = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"teacher": {}, "students": {}}
    for student in TEACHERS[teacher]["students"]:
        runs = {method: found for (name, method), found in groups.items() if name == student}
        if not runs:
            continue
        lines += ["", f"## {student}", ""]
        lines += [f"| method | seeds | rate | {' | '.join(columns)} |", "|---" * (len(columns) + 3) + "|"]
        for method, found in runs.items():
            rate, edge = rates.get((student, method), (found[0]["run"]["rate"], True))
            cells = [cell(values_of(found, name)) for name in columns.values()]
            seeds = "tuning seed" if found[0]["run"]["seed"] == str(TUNING_SEED) else len(found)
            lines.append(f"| {method} | {seeds} | {rate}{' *' * edge} | {' | '.join(cells)} |")
        if theirs := measured["teacher"]:
            cells = ["" if name not in theirs else f"{theirs[name]:.3f}" for name in columns.values()]
            lines.append(f"| the teacher itself | | | {' | '.join(cells)} |")
        if size := measured["students"].get(student):
            lines += ["", size_line(size)]
        lines += ["", f"![curves](curves-{student}.png)"]
    lines += ["", *rate_table(teacher), *trial_tables(teacher)]
    return "\n".join(lines) + "\n"


def size_line(size: dict[str, float]) -> str:
    """Size and speed of a student against its teacher's."""
    each = next(key for key in size if key.endswith("_per_second") and not key.startswith("teacher_"))
    what = f"{size['parameters'] / 1e6:.1f}M parameters, {size['megabytes']:.1f} MB (teacher: "
    what += f"{size['teacher_parameters'] / 1e6:.1f}M, {size['teacher_megabytes']:.1f} MB); "
    rates = f"{size[each]:.0f} {each.replace('_', ' ').replace('per second', 'a second')} on one core"
    return f"{what}{rates} (teacher: {size['teacher_' + each]:.0f}), {size['speedup']:.1f} times as fast."


def machine(runs: list[dict[str, Any]]) -> str:
    """Where runs were made."""
    made = {
        ", ".join(f"{key} {value}" for key, value in run["environment"].items() if not isinstance(value, dict))
        for run in runs
    }
    return "Environment: " + "; or ".join(sorted(made)) + "."


def rate_table(teacher: str) -> list[str]:
    """How each rate did on the tuning seed."""
    name, _ = METRICS[teacher]
    found: dict[tuple[str, str], dict[float, float]] = {}
    for run in read_results(teacher):
        if int(run["run"]["seed"]) == TUNING_SEED:
            key = run["run"]["student"], run["run"]["method"]
            found.setdefault(key, {})[float(run["run"]["rate"])] = run["result"]["student"]["metrics"][name]
    lines = [
        f"## Rates: {name} on seed {TUNING_SEED}, full budget",
        "",
        "| student | method | rates |",
        "|---|---|---|",
    ]
    for key in (key for key in TRIALS[teacher] if key in found):
        told = ", ".join(f"{rate:g}: {value:.4f}" for rate, value in sorted(found[key].items()))
        lines.append(f"| {key[0]} | {key[1]} | {told} |")
    return lines


def trial_tables(teacher: str) -> list[str]:
    """What students and methods come to at a small budget: a table for each budget at which several were tried."""
    name, sign = METRICS[teacher]
    found: dict[int, dict[tuple[str, str, str], dict[float, float]]] = {}
    for line in (RESULTS / "trials.jsonl").read_text(encoding="utf-8").splitlines():
        trial = json.loads(line)
        run, options = trial["run"], ", ".join(f"{key}={value}" for key, value in sorted(trial["options"].items()))
        if run["teacher"] == teacher:
            rates = found.setdefault(trial["steps"], {}).setdefault((run["student"], run["method"], options), {})
            rates[float(run["rate"])] = trial["metrics"][name]
    lines = []
    for steps, tried in sorted(found.items()):
        if len(tried) < 2:
            continue
        lines += ["", f"## Short runs: {name} after {steps} steps, seed {TUNING_SEED}", ""]
        lines += ["| student | method | options | best | rates |", "|---|---|---|---|---|"]
        methods = list(METHODS)
        for (student, method, options), rates in sorted(
            tried.items(), key=lambda item: (item[0][0], methods.index(item[0][1]), item[0][2])
        ):
            best = sign * max(sign * value for value in rates.values())
            told = ", ".join(f"{rate:g}: {value:.4f}" for rate, value in sorted(rates.items()))
            lines.append(f"| {student} | {method} | {options} | {best:.4f} | {told} |")
    return lines


def curves(teacher: str, student: str, groups: dict[str, list[dict[str, Any]]]) -> None:
    """The metric against tokens and against FLOPs, a line for each method: the mean over its seeds."""
    name, _ = METRICS[teacher]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    for number, (method, runs) in enumerate(groups.items()):
        points: dict[int, list[tuple[float, float, float]]] = {}
        for run in runs:
            for line in run["curve"]:
                if f"eval_{name}" in line:
                    flops = line["student_flops"] + line["teacher_flops"]
                    points.setdefault(line["step"], []).append((line["tokens"], flops, line[f"eval_{name}"]))
        means = [
            [statistics.mean(column) for column in zip(*found, strict=True)] for _, found in sorted(points.items())
        ]
        for axis, column in zip(axes, (0, 1), strict=True):
            axis.plot([m[column] for m in means], [m[2] for m in means], "o-", color=COLORS[number], label=method)
    for axis, what in zip(axes, ("training tokens", "training FLOPs, teacher included"), strict=True):
        axis.set(xlabel=what, ylabel=f"held-out {name}" if axis is axes[0] else "")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    figure.suptitle(f"{teacher} to {student}: mean over seeds")
    save_figure(figure, RESULTS / teacher / f"curves-{student}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description="Tables and curves of the students of real teachers.")
    parser.add_argument("action", choices=("sizes", "report"))
    parser.add_argument("teacher", choices=tuple(TEACHERS))
    parser.add_argument("--assets", type=Path, default=Path(".assets"))
    args = parser.parse_args()
    if args.action == "sizes":
        sizes(args.teacher, args.assets)
    else:
        report(args.teacher)


if __name__ == "__main__":
    main()
