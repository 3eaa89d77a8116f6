"""Students worth having: small students of real teachers, by every way to start and to teach them, at one budget of tokens.

    python benchmarks/students.py list tune minilm        # one line per run: TEACHER STUDENT METHOD RATE SEED
    python benchmarks/students.py run minilm 3x384 one-shot-teacher 1e-3 1000
    python benchmarks/students.py list final minilm | xargs -P 2 -L 1 python benchmarks/students.py run

`students_report.py` makes tables and curves of them.

A run writes one file under results/students, and is skipped where that is there. Rates are tuned at the full budget on seed
1000; seeds 0 to 2 are reported. With `--steps` something is tried out: a line in results/students/trials.jsonl. All runs train
in bfloat16 autocast on one thread. `--assets` is where scripts/fetch_assets.py and scripts/train_reviews_classifier.py put
teachers and texts.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tutelage.io.files import write_atomically
from tutelage.runs.distill import distill
from tutelage.runs.environment import environment
from tutelage.runs.evaluate import EvaluateOptions, evaluate
from tutelage.runs.inputs import RunOptions
from tutelage.training.config import CurriculumConfig

RESULTS = Path("results/students")
TUNING_SEED, SEEDS = 1000, (0, 1, 2)
_HEADED = {"warm_start": "head", "layer_map": "final:final"}

# what a method sets beside the budget, the rate and the seed
METHODS: dict[str, dict[str, Any]] = {
    "one-shot": {"method": "one_shot", "student_init": "random"},
    "stage-transplant": {"method": "extraction", "student_init": "random", **_HEADED},
    "one-shot-teacher": {"method": "one_shot", "student_init": "teacher"},
    "one-shot-teacher-random-basis": {"method": "one_shot", "student_init": "teacher", "residual_basis": "random"},
    "stages-teacher": {"method": "extraction", "student_init": "teacher", "stage_fraction": 0.2},
    "stages-new-teacher": {
        "method": "extraction",
        "student_init": "teacher",
        "stage_fraction": 0.2,
        "stage_trains": "new",
    },
    "joint-teacher": {"method": "joint", "student_init": "teacher"},
    "joint-teacher-uniform": {"method": "joint", "student_init": "teacher", "start_blocks": "uniform"},
    "joint-10-teacher": {"method": "joint", "student_init": "teacher", "hidden_weight": 10.0},
    "joint": {"method": "joint", "student_init": "random"},
}

TEACHERS: dict[str, dict[str, Any]] = {
    "minilm": {
        "run": {"max_length": 64, "max_samples": 1003},
        "teacher": "minilm",
        "train": "pieces/train.jsonl",
        "held_out": "wikipedia/heldout.jsonl",
        "batch": 32,
        "steps": 1860,  # 3 million tokens that are not padding
        "students": {
            "3x384": "layers=3,hidden_size=384",
            "3x192": "layers=3,hidden_size=192",
            "2x128": "layers=2,hidden_size=128",
        },
        "evaluations": {
            "lee": {"pairs": "lee/pairs.jsonl"},
            "title": {"retrieval": "wikipedia/retrieval-title.jsonl"},
            "sentence": {"retrieval": "wikipedia/retrieval-sentence.jsonl"},
        },
    },
    "smollm2": {
        "run": {"max_length": 128, "max_samples": 100},
        "teacher": "smollm2",
        "train": "pieces/articles.jsonl",
        "held_out": "wikipedia/heldout.jsonl",
        "batch": 8,
        "steps": 1000,  # 1 million tokens
        "teacher_dtype": "bfloat16",
        "students": {
            "15x576": "layers=15,hidden_size=576",
            "12x384": "layers=12,hidden_size=384",
            "12x384-untied": "layers=12,hidden_size=384,tie_word_embeddings=false",
        },
        "evaluations": {"brown": {"dataset": "brown/heldout.jsonl", "max_samples": 200}},
    },
    "reviews": {
        "run": {"max_length": 64},
        "teacher": "reviews-classifier",
        "train": "reviews/train.jsonl",
        "held_out": "reviews/heldout.jsonl",
        "batch": 32,
        "steps": 360,  # one epoch
        "students": {"2x192": "layers=2,hidden_size=192"},
        "evaluations": {},
    },
}

# the metric that runs are compared by, and its sign: greater is better
METRICS = {"minilm": ("cosine", 1), "smollm2": ("loss", -1), "reviews": ("accuracy", 1)}

# the rates that are tried, by student and method
TRIALS: dict[str, dict[tuple[str, str], tuple[str, ...]]] = {
    "minilm": {
        ("3x384", "joint-10-teacher"): ("5e-4", "1e-3"),
        ("3x384", "one-shot-teacher"): ("2.5e-4", "5e-4", "1e-3"),
        ("3x192", "joint-teacher"): ("1e-3", "2e-3", "4e-3"),
        ("3x192", "stage-transplant"): ("2e-3", "4e-3"),
        **{("3x192", method): ("1e-3", "2e-3", "4e-3") for method in ("one-shot-teacher", "one-shot")},
        ("2x128", "joint-teacher"): ("2e-3", "4e-3", "8e-3"),
    },
    "smollm2": {
        **{("12x384", method): ("1e-3",) for method in ("joint-teacher", "joint-teacher-uniform", "one-shot")},
        **{("15x576", method): ("1e-3",) for method in ("joint-teacher", "one-shot")},
    },
    "reviews": {
        **{("2x192", method): ("5e-4", "1e-3", "2e-3", "4e-3") for method in ("one-shot", "stage-transplant")},
        **{("2x192", method): ("5e-4", "1e-3", "2e-3") for method in ("one-shot-teacher", "joint-teacher")},
        ("2x192", "stages-teacher"): ("1e-3", "2e-3"),
    },
}


def pieces(assets: Path) -> None:
    """Texts of Wikipedia for training: whole in `pieces/articles.jsonl`; in `pieces/train.jsonl` each summary three times, and
    summaries and articles in pieces.

    Half of the pieces have 48 words, as much as a sequence of 64 tokens takes; the others are one to a few sentences."""
    target = assets / "pieces" / "train.jsonl"
    if target.exists():
        return
    chance, found, summaries = random.Random(0), list[str](), 0
    lines = []
    for name in ("wikipedia", "articles"):
        lines += (assets / name / "train.jsonl").read_text(encoding="utf-8").splitlines()
        summaries = summaries or len(lines)
    for line in lines:
        sentences = [part.split() for part in re.split(r"(?<=[.!?])\s+", json.loads(line)["text"])]
        while sentences:
            whole, limit = chance.random() < 0.5, chance.randint(6, 48)
            piece = sentences.pop(0)
            while sentences and (len(piece) < 48 if whole else len(piece) + len(sentences[0]) <= limit):
                piece += sentences.pop(0)
            if rest := piece[48:]:
                sentences.insert(0, rest)
            found.append(" ".join(piece[:48]))
    found += 3 * [json.loads(line)["text"] for line in lines[:summaries]]
    chance.shuffle(found)
    target.parent.mkdir(parents=True, exist_ok=True)
    chance.shuffle(lines)
    write_atomically(target.with_name("articles.jsonl"), "\n".join(lines) + "\n")
    kept = [json.dumps({"text": text}, ensure_ascii=False) for text in found if len(text.split()) > 3]
    write_atomically(target, "\n".join(kept) + "\n")


def run(
    name: tuple[str, str, str, str, str], assets: Path, steps: int | None = None, tried: dict[str, Any] | None = None
) -> None:
    """Train one student and write what came of it."""
    teacher, student, method, rate, seed = name
    settings, target = TEACHERS[teacher], result_file(*name)
    if target.exists() and not steps:
        return
    torch.set_num_threads(1)
    pieces(assets)
    folder = Path(tempfile.mkdtemp())
    options = RunOptions(
        student=settings["students"][student],
        dataset=str(assets / settings["train"]),
        eval_dataset=str(assets / settings["held_out"]),
        **settings["run"],
    )
    total = steps or settings["steps"]
    fields: dict[str, Any] = {
        "output_dir": str(folder),
        "teacher_model_name_or_path": str(assets / settings["teacher"]),
        "teacher_dtype": settings.get("teacher_dtype"),
        "learning_rate": float(rate),
        "seed": int(seed),
        "max_steps": total,
        "per_device_train_batch_size": settings["batch"],
        "train_sampling_strategy": "group_by_length",
        "bf16": True,
        "use_cpu": True,
        "save_strategy": "no",
        "eval_strategy": "steps",
        "eval_steps": max(1, total // 4),
        "logging_steps": max(1, total // 40),
        "disable_tqdm": True,
        "overwrite_output_dir": True,
    }
    args = CurriculumConfig(**{**fields, **METHODS[method], **(tried or {})})
    started = time.perf_counter()
    result = distill(options, args)
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    wanted = ("step", "tokens", "student_flops", "teacher_flops", "seconds", "stage_name", "loss")
    kept = [
        {key: value for key, value in json.loads(line).items() if key in wanted or key.startswith("eval_")}
        for line in lines
    ]
    found = {
        "run": dict(zip(("teacher", "student", "method", "rate", "seed"), name, strict=True)),
        "settings": METHODS[method],
        "curriculum": json.loads((folder / "curriculum.json").read_text(encoding="utf-8")),
        "result": json.loads(result.to_json()),
        "curve": kept,
        "evaluations": {},
        "environment": environment(),
    }
    if int(seed) != TUNING_SEED:
        for key, given in settings["evaluations"].items():
            options_of = with_assets(given, assets)
            length = settings["run"]["max_length"]
            measured = evaluate(EvaluateOptions(model=str(folder), max_length=length, batch_size=64, **options_of))
            found["evaluations"][key] = measured.metrics
    found["wall_seconds"] = round(time.perf_counter() - started, 1)
    if steps:
        line = {"run": found["run"], "steps": steps, "options": tried or {}, "metrics": result.student.metrics}
        with (RESULTS / "trials.jsonl").open("a", encoding="utf-8") as trials:
            trials.write(json.dumps(line) + "\n")
        print(line, f"{found['wall_seconds']} s", flush=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, json.dumps(found, indent=1) + "\n")
    shutil.rmtree(folder)
    print(target, result.student.metrics, f"{found['wall_seconds']} s", flush=True)


def with_assets(given: dict[str, Any], assets: Path) -> dict[str, Any]:
    """Options of an evaluation, with the files among them under `assets`."""
    return {name: str(assets / value) if "/" in str(value) else value for name, value in given.items()}


def result_file(teacher: str, student: str, method: str, rate: str, seed: str) -> Path:
    return RESULTS / teacher / student / method / f"rate-{float(rate):g}-seed-{seed}.json"


def read_results(teacher: str) -> list[dict[str, Any]]:
    """Every run of a teacher that was made."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted((RESULTS / teacher).rglob("rate-*.json"))]


def metric_of(teacher: str, found: dict[str, Any]) -> float:
    """What runs are compared by, so that greater is better."""
    name, sign = METRICS[teacher]
    return sign * float(found["result"]["student"]["metrics"][name])


def best_rates(teacher: str) -> dict[tuple[str, str], tuple[str, bool]]:
    """For each student and method the tuned rate, and whether it is the smallest or largest that was tried."""
    tried: dict[tuple[str, str], dict[str, float]] = {}
    for found in read_results(teacher):
        if found["run"]["seed"] == str(TUNING_SEED):
            key = found["run"]["student"], found["run"]["method"]
            tried.setdefault(key, {})[found["run"]["rate"]] = metric_of(teacher, found)
    best = {key: max(rates, key=lambda rate: rates[rate]) for key, rates in tried.items()}
    edges = {key: (min(map(float, rates)), max(map(float, rates))) for key, rates in tried.items()}
    return {key: (rate, float(rate) in edges[key]) for key, rate in best.items()}


def list_runs(which: str, teacher: str) -> list[str]:
    """The runs of tuning, or those that are reported, a line each."""
    if which == "tune":
        planned = [(key, rate, TUNING_SEED) for key, rates in TRIALS[teacher].items() for rate in rates]
    else:
        planned = [(key, rate, seed) for seed in SEEDS for key, (rate, _) in best_rates(teacher).items()]
    return [f"{teacher} {student} {method} {rate} {seed}" for (student, method), rate, seed in planned]


def main() -> None:
    parser = argparse.ArgumentParser(description="Small students of real teachers.")
    parser.add_argument("action", choices=("list", "run"))
    parser.add_argument("names", nargs="+", help="list: tune or final, TEACHER; run: TEACHER STUDENT METHOD RATE SEED")
    parser.add_argument("--assets", type=Path, default=Path(".assets"))
    parser.add_argument("--steps", type=int, help="another budget, to try something out")
    parser.add_argument("--options", default="{}", help="options of tutelage distill as JSON, to try something out")
    args = parser.parse_args()
    if args.action == "list":
        print("\n".join(list_runs(*args.names)))
    else:
        run(tuple(args.names), args.assets, args.steps, json.loads(args.options))


if __name__ == "__main__":
    main()
