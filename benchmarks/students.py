"""Students worth having: small students of real teachers, by every way to start and to teach them, at one budget of tokens.

    python benchmarks/students.py list tune minilm        # one line per run: TEACHER STUDENT METHOD RATE SEED
    python benchmarks/students.py run minilm 3x384 one-shot-teacher 1e-3 1000
    python benchmarks/students.py list final minilm | xargs -P 2 -L 1 python benchmarks/students.py run
    python benchmarks/students.py report minilm            # tables and curves in results/students/minilm

A run writes one file under results/students, and is skipped where that is there. Rates are tuned at the full budget on seed
1000; seeds 0 to 2 are reported. All runs train in bfloat16 autocast on one thread. `--assets` is where scripts/fetch_assets.py
and scripts/train_reviews_classifier.py put teachers and texts.
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
    "joint-0.1-teacher": {"method": "joint", "student_init": "teacher", "hidden_weight": 0.1},
    "joint": {"method": "joint", "student_init": "random"},
}

TEACHERS: dict[str, dict[str, Any]] = {
    "minilm": {
        "run": {"max_length": 64, "max_samples": 1003},
        "teacher": "minilm",
        "train": "pieces/train.jsonl",
        "held_out": "wikipedia/heldout.jsonl",
        "batch": 32,
        "steps": 2750,  # 3 million tokens that are not padding
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
        "metric": ("cosine", "higher"),
    }
}


def pieces(assets: Path) -> None:
    """Summaries and articles of Wikipedia in pieces of one to a few sentences, at most 48 words: `pieces/train.jsonl`."""
    target = assets / "pieces" / "train.jsonl"
    if target.exists():
        return
    chance, found = random.Random(0), []
    for name in ("wikipedia", "articles"):
        for line in (assets / name / "train.jsonl").read_text(encoding="utf-8").splitlines():
            piece: list[str] = []
            limit = chance.randint(6, 48)
            for sentence in re.split(r"(?<=[.!?])\s+", json.loads(line)["text"]):
                words = sentence.split()
                if piece and len(piece) + len(words) > limit:
                    found.append(" ".join(piece))
                    piece, limit = [], chance.randint(6, 48)
                piece += words[: 48 - len(piece)]
            found.append(" ".join(piece))
    chance.shuffle(found)
    target.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in found if len(text.split()) > 3]
    write_atomically(target, "\n".join(lines) + "\n")


def run(name: tuple[str, str, str, str, str], assets: Path, steps: int | None) -> None:
    """Train one student and write what came of it."""
    teacher, student, method, rate, seed = name
    settings, target = TEACHERS[teacher], result_file(*name)
    if target.exists():
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
    args = CurriculumConfig(
        output_dir=str(folder),
        teacher_model_name_or_path=str(assets / settings["teacher"]),
        learning_rate=float(rate),
        seed=int(seed),
        max_steps=total,
        per_device_train_batch_size=settings["batch"],
        warmup_steps=0.1,
        train_sampling_strategy="group_by_length",
        bf16=True,
        use_cpu=True,
        save_strategy="no",
        eval_strategy="steps",
        eval_steps=max(1, total // 4),
        logging_steps=max(1, total // 40),
        disable_tqdm=True,
        overwrite_output_dir=True,
        **METHODS[method],
    )
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
            files = {option: str(assets / file) for option, file in given.items()}
            length = settings["run"]["max_length"]
            measured = evaluate(EvaluateOptions(model=str(folder), max_length=length, batch_size=64, **files))
            found["evaluations"][key] = measured.metrics
    found["wall_seconds"] = round(time.perf_counter() - started, 1)
    if steps:  # tried out, not kept
        print(name, result.student.metrics, f"{found['wall_seconds']} s", flush=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, json.dumps(found, indent=1) + "\n")
    shutil.rmtree(folder)
    print(target, result.student.metrics, f"{found['wall_seconds']} s", flush=True)


def result_file(teacher: str, student: str, method: str, rate: str, seed: str) -> Path:
    return RESULTS / teacher / student / method / f"rate-{float(rate):g}-seed-{seed}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description="Small students of real teachers.")
    parser.add_argument("action", choices=("run",))
    parser.add_argument("names", nargs="+", metavar="TEACHER STUDENT METHOD RATE SEED")
    parser.add_argument("--assets", type=Path, default=Path(".assets"))
    parser.add_argument("--steps", type=int, help="another budget, to try something out")
    args = parser.parse_args()
    run(tuple(args.names), args.assets, args.steps)


if __name__ == "__main__":
    main()
