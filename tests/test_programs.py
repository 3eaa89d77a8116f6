"""Benchmarks, scripts and examples run on today's package: each imports, and does its work once at a tiny size."""

from __future__ import annotations

import ast
import importlib
import json
import runpy
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig

import tutelage
from tests.conftest import POSITIONS, save_llama, sentences
from tutelage.tasks.embedding import load_embedding_model

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = [
    path.relative_to(ROOT) for folder in ("benchmarks", "scripts") for path in sorted((ROOT / folder).glob("*.py"))
]


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if each program were started in its own folder."""
    for folder in ("benchmarks", "scripts"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for path in PROGRAMS:
        sys.modules.pop(path.stem, None)


def test_programs_are_found() -> None:
    assert len(PROGRAMS) >= 12


@pytest.mark.parametrize("path", PROGRAMS, ids=str)
def test_a_program_imports(path: Path) -> None:
    assert Path(str(importlib.import_module(path.stem).__file__)) == ROOT / path


def test_the_benchmark_of_speed_measures_its_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    speed: Any = importlib.import_module("speed")
    sizes = replace(importlib.import_module("speed_models").QUICK, stage_rounds=1, one_shot_rounds=1, trainer_steps=5)
    figures = [*speed.hidden_stages(sizes), speed.first_stage_and_one_shot(sizes), speed.trainer_overhead(sizes)]
    assert [row.target for row in figures] == ["≤ 1.05", "≤ 1.05", "≥ 8", "≤ 1.03"]
    assert all(0 < row.numerator < 10 and 0 < row.denominator < 10 for row in figures)
    report = speed.readme(figures, sizes, speed.machine(), "python speed.py", quick=True)
    assert report.count("| step of stage") == 2 and capsys.readouterr().out


@pytest.mark.parametrize("case", ["0", "2", "chunked", "plain"])
def test_the_benchmark_of_memory_takes_its_steps(case: str) -> None:
    memory: Any = importlib.import_module("speed_memory")
    sizes = replace(importlib.import_module("speed_models").QUICK, loss_vocabulary=1000, loss_positions=64)
    steps = memory.stage_case(sizes, int(case)) if case.isdigit() else memory.loss_case(sizes, case == "chunked")
    for step in steps:
        step()


def test_the_benchmark_of_replicas_takes_its_steps() -> None:
    replicas: Any = importlib.import_module("replicas")
    fields = importlib.import_module("tutelage.reproduction.recipes").resolve(
        "parity-mlp/laptop", {"teacher_width": 16}
    )
    for stage in replicas.STAGES.values():
        replicas.stepper(stage, 2, fields)()


def test_the_benchmark_of_extraction_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corpus: Path) -> None:
    extraction: Any = importlib.import_module("extraction")
    monkeypatch.setattr(extraction, "STUDENT", "layers=2,hidden_size=16")
    teacher = save_llama(tmp_path / "teacher", tie_word_embeddings=False)
    sizes = {"batch": 2, "length": 16, "steps": 6, "batches": 3}
    options = Namespace(teacher=str(teacher), dataset=str(corpus / "text.txt"), **sizes)
    assert {*extraction.throughput(options, tmp_path)} == {"hidden final:final", "output"}
    run, args = extraction.settings(options, str(tmp_path / "int8"))
    extraction.extract(run, args, extraction.ExtractOptions(dtype="int8"), log=lambda line: None)
    assert all(found["ratio"] > 0 for found in extraction.step(options, tmp_path / "int8").values())
    assert extraction.scale_errors(options, tmp_path / "int8")["token"] >= 0


def test_the_benchmark_of_stored_targets_compares_students(tmp_path: Path, causal_teacher: Path, corpus: Path) -> None:
    stored: Any = importlib.import_module("stored_vs_live")
    system = stored.text(Namespace(teacher=str(causal_teacher), dataset=str(corpus / "text.txt"), steps=4))
    system["run"].update(student="layers=2,hidden_size=16", max_length=POSITIONS // 2, max_samples=4)
    system["truncates"] = False
    runs = [{"live": 1.0, "stored": 1.1}, stored.pair(system, 0, tmp_path)]
    assert stored.interval(runs, "stored", "live")["mean"] != 0


@pytest.mark.parametrize(("layers", "width"), [([0, 1, 2, 3], None), ([1, 3], 16)])
def test_the_recipe_of_sentence_transformers_trains_a_student(
    tmp_path: Path, embedding_teacher: Path, corpus: Path, layers: list[int], width: int | None
) -> None:
    recipe: Any = importlib.import_module("sentence_transformers_recipe")
    text = str(corpus / "text.jsonl")
    sizes = {"tokens": 400, "every": 200, "rate": 1e-3, "batch": 8, "max_length": 16, "seed": 0, "bf16": False}
    data = {"teacher": str(embedding_teacher), "dataset": [text, text], "heldout": text, "output": tmp_path}
    points = recipe.run(Namespace(layers=layers, width=width, **sizes, **data))["curve"]
    assert [point["tokens"] // 200 for point in points] == [0, 1, 2]
    assert (points[0]["cosine"] == 1) is (width is None)  # with all its blocks the student begins as the teacher
    student = load_embedding_model(str(tmp_path))
    assert student.embedding_size == 32 and len(tutelage.find_blocks(student.encoder)) == len(layers)


def test_the_benchmark_of_students_makes_runs_and_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, embedding_teacher: Path, corpus: Path
) -> None:
    students: Any = importlib.import_module("students")
    report: Any = importlib.import_module("students_report")
    for name in ("pieces/train.jsonl", "wikipedia/heldout.jsonl"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).symlink_to(corpus / "text.jsonl")
    (tmp_path / "minilm").symlink_to(embedding_teacher)
    tiny = {"steps": 2, "batch": 4, "run": {"max_length": 16}, "evaluations": {}}
    monkeypatch.setitem(students.TEACHERS, "minilm", {**students.TEACHERS["minilm"], **tiny})
    monkeypatch.setitem(students.TEACHERS["minilm"], "students", {"2x16": "layers=2,hidden_size=16"})
    monkeypatch.setitem(students.TRIALS, "minilm", {("2x16", "joint-teacher"): ("1e-3", "2e-3")})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results" / "students").mkdir(parents=True)
    assert students.list_runs("tune", "minilm") == [
        f"minilm 2x16 joint-teacher {rate} 1000" for rate in ("1e-3", "2e-3")
    ]
    students.run(("minilm", "2x16", "joint-teacher", "1e-3", "1000"), tmp_path)
    assert students.list_runs("final", "minilm")[0] == "minilm 2x16 joint-teacher 1e-3 0"
    (made,) = students.read_results("minilm")
    for rate in ("1e-3", "2e-3"):
        run = {**made, "run": {**made["run"], "seed": "0", "rate": rate}}
        file = students.result_file("minilm", "2x16", "joint-teacher", rate, "0")
        file.write_text(json.dumps(run), encoding="utf-8")
    (tmp_path / "results" / "students" / "trials.jsonl").touch()
    assert "| joint-teacher | 1 | 1e-3 * |" in report.page("minilm")  # the best rate alone


def test_the_pages_of_students_are_those_of_their_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    report: Any = importlib.import_module("students_report")
    monkeypatch.chdir(ROOT)
    pages = sorted((ROOT / "results" / "students").glob("*/README.md"))
    assert pages
    for page in pages:
        assert report.page(page.parent.name) == page.read_text(encoding="utf-8")


def test_the_classifier_of_reviews_is_fine_tuned(tmp_path: Path, embedding_teacher: Path) -> None:
    classifier: Any = importlib.import_module("train_reviews_classifier")
    (tmp_path / "reviews").mkdir()
    (tmp_path / "minilm").symlink_to(embedding_teacher)
    rows = [json.dumps({"text": text, "label": label}) + "\n" for label, text in enumerate(sentences(2))] * 16
    for name in ("train", "heldout"):
        (tmp_path / "reviews" / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
    assert classifier.train(tmp_path, epochs=6, rate=1e-2, seed=0) == 1
    config = BertConfig.from_pretrained(tmp_path / "reviews-classifier")
    assert config.id2label == {0: "fresh", 1: "rotten"}


def test_the_long_run_from_disk_saves_and_measures(tmp_path: Path) -> None:
    long: Any = importlib.import_module("reliability_long")
    samples = long.measure(tmp_path, minutes=0.04, between=1)
    assert list((tmp_path / "run").glob("checkpoint-*/progress.json"))
    assert samples[-1]["files"] >= samples[0]["files"] > 0 and samples[-1]["resident_mb"] > 1
    line = [{"seconds": 60.0 * minute, "resident_mb": 100 + minute} for minute in range(10)]
    assert long.slope(line, "resident_mb") == pytest.approx(60)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_an_example_imports_from_the_package_alone(path: Path) -> None:
    nodes = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)]
    names = [alias.name for node in nodes if node.module == "tutelage" for alias in node.names]
    assert names and all(hasattr(tutelage, name) for name in names)


def test_the_example_of_distilling_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["distill.py", str(tmp_path / "student"), "2"])
    text = tmp_path / "short.txt"
    text.write_text(Path(tutelage.DEFAULT_EVAL_TEXT).read_text(encoding="utf-8")[:45_000], encoding="utf-8")
    for name in ("DEFAULT_TEXT", "DEFAULT_EVAL_TEXT"):
        monkeypatch.setattr(tutelage, name, str(text))
    monkeypatch.setattr(tutelage.CurriculumTrainer, "evaluate", lambda self: {})
    runpy.run_path(str(ROOT / "examples" / "distill.py"))
    assert (tmp_path / "student" / "model.safetensors").is_file()
