"""Distil real teachers by every method at one equal token budget, with one learning-rate grid for all, and report.

    python scripts/fetch_assets.py && python scripts/convert_smollm2.py
    python benchmarks/real_teachers.py minilm     # sentence encoder, Wikipedia summaries
    python benchmarks/real_teachers.py smollm2    # causal language model, Wikipedia summaries
    python benchmarks/real_teachers.py same_width # the embedded teacher, a student of its width

Each run is one `tutelage distill` command. The grid is searched on seed 0; each method's best rate then runs on
the further seeds. Finished runs are kept in --work_dir, so that a stopped benchmark goes on where it was. Writes
results/NAME/{results.json,README.md,curves.png}.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tutelage.runs.plots import plot_comparison
from tutelage.training.records import MetricsFile

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Benchmark:
    """A teacher, its data and budget, and the methods to compare."""

    flags: dict[str, str]
    methods: dict[str, dict[str, str]]
    learning_rates: tuple[str, ...]
    metric: str
    better: str
    label: str
    columns: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)


WIKIPEDIA = {
    "dataset": "{assets}/wikipedia/train.jsonl",
    "eval_dataset": "{assets}/wikipedia/heldout.jsonl",
    "eval_strategy": "steps",
    "save_strategy": "no",
}
PAPER = {"warm_start": "none", "normalize": "none"}
HEAD_STAGE = {"method": "extraction", "layer_map": "final:final"}

BENCHMARKS = {
    "minilm": Benchmark(
        flags={
            "teacher_model_name_or_path": "{assets}/minilm",
            "student": "layers=3,hidden_size=192",
            **WIKIPEDIA,
            "eval_samples": "300",
            "max_length": "64",
            "per_device_train_batch_size": "16",
            "max_steps": "300",
            "eval_steps": "60",
        },
        methods={
            "one_shot": {"method": "one_shot"},
            "extraction (paper: 3 uniform stages)": {"method": "extraction", **PAPER},
            "extraction (3 uniform stages, standardised)": {"method": "extraction", "warm_start": "none"},
            "extraction (head stage)": {**HEAD_STAGE, "warm_start": "none"},
            "extraction (head stage, warm_start=head)": {**HEAD_STAGE, "warm_start": "head"},
            "extraction (head stage, warm_start=head, projection=pca)": {
                **HEAD_STAGE,
                "warm_start": "head",
                "projection": "pca",
            },
        },
        learning_rates=("3e-4", "1e-3", "3e-3"),
        seeds=(0,),
        metric="cosine",
        better="higher",
        label="held-out cosine to the teacher",
        columns=("cosine", "similarity_pearson", "similarity_spearman"),
    ),
    "smollm2": Benchmark(
        flags={
            "teacher_model_name_or_path": "{assets}/smollm2",
            "student": "layers=4,hidden_size=192,tie_word_embeddings=false",
            **WIKIPEDIA,
            "eval_samples": "40",
            "max_length": "128",
            "per_device_train_batch_size": "4",
            "max_steps": "80",
            "calibration_samples": "32",
            "eval_steps": "20",
        },
        methods={
            "one_shot": {"method": "one_shot"},
            "extraction (paper: 4 uniform stages)": {"method": "extraction", **PAPER},
            "extraction (4 uniform stages, standardised)": {"method": "extraction", "warm_start": "none"},
            "extraction (head stage)": {**HEAD_STAGE, "warm_start": "none"},
            "extraction (head stage, warm_start=head)": {**HEAD_STAGE, "warm_start": "head"},
            "extraction (head stage, warm_start=head, projection=logits)": {
                **HEAD_STAGE,
                "warm_start": "head",
                "projection": "logits",
            },
        },
        learning_rates=("1e-3", "3e-3", "6e-3"),
        metric="loss",
        better="lower",
        label="held-out loss (nats a token)",
        columns=("loss", "perplexity", "accuracy", "kl", "agreement"),
    ),
    # a student as wide as its teacher, where the inverse of a gaussian projection is at its worst
    "same_width": Benchmark(
        flags={
            "student": "layers=2",
            "eval_samples": "64",
            "eval_strategy": "steps",
            "save_strategy": "no",
            "max_steps": "200",
            "eval_steps": "40",
        },
        methods={
            "one_shot": {"method": "one_shot"},
            "extraction (paper: 2 uniform stages)": {"method": "extraction", **PAPER},
            "extraction (2 uniform stages, standardised)": {"method": "extraction", "warm_start": "none"},
            "extraction (head stage)": {**HEAD_STAGE, "warm_start": "none"},
            "extraction (head stage, warm_start=head)": {**HEAD_STAGE, "warm_start": "head"},
            "extraction (head stage, warm_start=head, projection=logits)": {
                **HEAD_STAGE,
                "warm_start": "head",
                "projection": "logits",
            },
        },
        learning_rates=("1e-3", "2e-3", "4e-3"),
        seeds=(0,),
        metric="loss",
        better="lower",
        label="held-out loss (nats a token)",
        columns=("loss", "perplexity", "accuracy", "kl", "agreement"),
    ),
}


def main() -> None:
    """Run or continue one benchmark and write its report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(BENCHMARKS))
    parser.add_argument("--assets", type=Path, default=ROOT / ".assets")
    parser.add_argument("--work_dir", type=Path, help="where runs are kept; default: benchmark-runs/NAME")
    parser.add_argument("--max_steps", help="another budget than the benchmark's")
    options = parser.parse_args()
    benchmark = BENCHMARKS[options.name]
    work_dir = options.work_dir or ROOT / "benchmark-runs" / options.name
    table = {}
    for method in benchmark.methods:
        grid = {
            rate: _run(benchmark, method, rate, 0, work_dir, options)["student"] for rate in benchmark.learning_rates
        }
        sign = 1 if benchmark.better == "lower" else -1
        best = min(grid, key=lambda rate: sign * grid[rate][benchmark.metric])
        runs = [_run(benchmark, method, best, seed, work_dir, options) for seed in benchmark.seeds]
        table[method] = {
            "flags": benchmark.methods[method],
            "learning_rate": best,
            "grid": {rate: figures[benchmark.metric] for rate, figures in grid.items()},
            "runs": [{"seed": run["seed"], **run["student"], "budget": run["budget"]} for run in runs],
        }
    _report(options.name, benchmark, table, work_dir, runs[0])


def _folder(method: str, rate: str, seed: int, work_dir: Path) -> Path:
    name = "".join(letter if letter.isalnum() else "-" for letter in method)
    return work_dir / f"{name}_{rate}_{seed}"


def _run(benchmark: Benchmark, method: str, rate: str, seed: int, work_dir: Path, options: argparse.Namespace) -> dict:
    folder = _folder(method, rate, seed, work_dir)
    result = folder / "result.json"
    if not result.exists():
        flags = {**benchmark.flags, **benchmark.methods[method], "learning_rate": rate, "seed": str(seed)}
        if options.max_steps:
            flags["max_steps"] = options.max_steps
        command = [sys.executable, "-m", "tutelage", "distill", "--output_dir", str(folder)]
        command += ["--overwrite_output_dir", "true"]
        for key, value in flags.items():
            command += [f"--{key}", value.format(assets=options.assets)]
        print(" ".join(command[1:]), flush=True)
        subprocess.run(command, check=True)
    return json.loads(result.read_text(encoding="utf-8"))


def _report(name: str, benchmark: Benchmark, table: dict, work_dir: Path, example: dict) -> None:
    folder = ROOT / "results" / name
    folder.mkdir(parents=True, exist_ok=True)
    command = f"python benchmarks/real_teachers.py {name}"
    settings = {key: value.format(assets=".assets") for key, value in benchmark.flags.items()}
    results = {
        "command": command,
        "settings": settings,
        "teacher": example["teacher"],
        "environment": example["environment"],
        "methods": table,
    }
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    curves = {
        method: MetricsFile(_folder(method, entry["learning_rate"], 0, work_dir) / "metrics.jsonl").read()
        for method, entry in table.items()
    }
    plot_comparison(curves, folder / "curves.png", f"{name}, seed 0", f"eval_{benchmark.metric}", benchmark.label)
    header = ["method", *benchmark.columns, "learning rate", "tokens", "FLOPs", "seconds"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for method, entry in table.items():
        cells = [method]
        for column in benchmark.columns:
            values = [run[column] for run in entry["runs"]]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        budget = entry["runs"][0]["budget"]
        flops = budget["student_flops"] + budget["teacher_flops"]
        cells += [entry["learning_rate"], f"{budget['tokens']:,}", f"{flops:.3g}", f"{budget['seconds']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    grid = [
        "| method | " + " | ".join(benchmark.learning_rates) + " |",
        "|---|" + "---|" * len(benchmark.learning_rates),
    ]
    for method, entry in table.items():
        grid.append(f"| {method} | " + " | ".join(f"{value:.3f}" for value in entry["grid"].values()) + " |")
    environment = example["environment"]
    text = "\n".join(
        [
            f"# {name}: methods at one token budget",
            "",
            f"Made by `{command}` ({benchmark.better} {benchmark.metric} is better). Seeds: "
            f"{', '.join(map(str, benchmark.seeds))}; mean ± standard deviation over seeds. "
            f"Machine: {environment['machine']}, {environment['threads']} thread(s), torch {environment['torch']}, "
            f"transformers {environment['transformers']}. Teacher on the same held-out set: "
            f"{ {key: round(value, 3) for key, value in example['teacher'].items()} }.",
            "",
            *lines,
            "",
            f"Held-out {benchmark.metric} over the learning-rate grid, the same for all, seed 0:",
            "",
            *grid,
            "",
            "![curves](curves.png)",
            "",
            "Settings: " + ", ".join(f"`{key}={value}`" for key, value in settings.items()),
            "",
        ]
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
