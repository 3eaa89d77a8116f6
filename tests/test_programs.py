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

import numpy as np
import pytest
import torch
from transformers import BertConfig

import tutelage
from tests.conftest import POSITIONS, save_llama, sentences
from tutelage.runs.inputs import load_inputs
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
    system = {**stored.austen(4), "teacher": str(causal_teacher), "truncates": False}
    system["args"]["per_device_train_batch_size"] = 8
    system["run"] = {"student": "layers=2,hidden_size=16", "dataset": str(corpus / "text.txt"), "max_samples": 4}
    system["run"]["max_length"] = POSITIONS // 2
    runs = [{"live": 1.0, "stored": 1.1}, stored.pair(system, 0, tmp_path)]
    assert stored.difference(runs, "stored", "live")["mean"] != 0


@pytest.fixture
def assets(tmp_path: Path, embedding_teacher: Path, corpus: Path) -> Path:
    """A tiny teacher where MiniLM is expected, with held-out texts and the tests of its students."""
    folder, texts = tmp_path / "assets", sentences(40)
    pairs = [
        {"sentence1": texts[row], "sentence2": texts[row + 1], "score": float((7 * row) % 11)} for row in range(20)
    ]
    queries = [{"query": " ".join(text.split()[:3]), "document": text} for text in texts]
    files = {
        "lee/pairs.jsonl": pairs,
        **{f"wikipedia/retrieval-{kind}.jsonl": queries for kind in ("title", "sentence")},
    }
    for name, rows in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "wikipedia" / "heldout.jsonl").symlink_to(corpus / "text.jsonl")
    (folder / "minilm").symlink_to(embedding_teacher)
    return folder


@pytest.mark.parametrize(("layers", "width"), [([0, 1, 2, 3], None), ([1, 3], 16)])
def test_the_recipe_of_sentence_transformers_trains_and_measures_a_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, assets: Path, layers: list[int], width: int | None
) -> None:
    recipe: Any = importlib.import_module("sentence_transformers_recipe")
    record, text = tmp_path / "record", str(assets / "wikipedia" / "heldout.jsonl")
    line = f"recipe --teacher {assets}/minilm --dataset {text} {text} --heldout {text} --tokens 400 --every 200 --rate 1e-3 "
    line += f"--batch 8 --max_length 16 --seed 1000 --layers {' '.join(map(str, layers))} --assets {assets} "
    line += f"--record {record} --output {tmp_path / 'student'}" + (f" --width {width}" if width else "")
    monkeypatch.setattr(sys, "argv", line.split())
    recipe.main()
    (file,) = record.glob("*.json")
    assert file.name.endswith("-rate-1e-3-batch-8-seed-1000.json")
    found = json.loads(file.read_text(encoding="utf-8"))
    points, held_out = found["curve"], found["evaluations"]["held-out"]
    assert [point["tokens"] // 200 for point in points] == [0, 1, 2]
    assert (points[0]["cosine"] == 1) is (width is None)  # with all its blocks the student begins as the teacher
    assert held_out["cosine"] == pytest.approx(points[-1]["cosine"], abs=1e-4) and held_out["speedup"] > 0
    assert {*found["evaluations"]} == {"held-out", "lee", "title", "sentence"} and found["seed"] == "tuning seed"
    student = load_embedding_model(str(tmp_path / "student"))
    assert student.embedding_size == 32 and len(tutelage.find_blocks(student.encoder)) == len(layers)
    monkeypatch.setattr(recipe, "run", lambda args: pytest.fail("this run was made before"))
    recipe.main()
    assert f"| {held_out['cosine']:.3f} |" in (record / "README.md").read_text(encoding="utf-8")


def test_the_page_of_the_recipe_is_that_of_its_runs() -> None:
    recipe: Any = importlib.import_module("sentence_transformers_recipe")
    folder = ROOT / "results" / "students" / "sentence-transformers"
    assert recipe.page(folder) == (folder / "README.md").read_text(encoding="utf-8")


class StaticWords:
    """A static model as model2vec has them, with random vectors."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.embedding = np.random.default_rng(0).normal(size=(len(tokenizer), 8)).astype(np.float32)

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]

    def encode(self, texts: list[str], **kwargs: Any) -> Any:
        return np.stack([self.embedding[row].mean(0) for row in self.tokenize(texts)])


def test_the_benchmark_of_static_models_measures(monkeypatch: pytest.MonkeyPatch, assets: Path) -> None:
    static: Any = importlib.import_module("model2vec_static")
    monkeypatch.setattr(static, "distilled", lambda *given: StaticWords(static.load_tokenizer(str(assets / "minilm"))))
    short, long = static.run(assets, (8,), (5, 64))
    assert {*static.COLUMNS.values()} <= {*short["metrics"]} and 0.3 < long["metrics"]["title: mrr"] < 1
    assert short["metrics"]["title: mrr"] == 1  # three words and two special tokens: queries and documents are the same
    result = {"command": "", "environment": {"model2vec": 1, "machine": 1, "torch": 1, "transformers": 1}}
    assert static.report({**result, "runs": [short, long]}).count("| 8 |") == 2


@pytest.mark.parametrize("rival", ["ours", "theirs"])
def test_one_shot_by_trl_gives_the_student_of_ours(
    monkeypatch: pytest.MonkeyPatch, causal_teacher: Path, corpus: Path, rival: str
) -> None:
    if rival == "theirs":
        pytest.importorskip("trl")
    trl: Any = importlib.import_module("trl_one_shot")
    text = str(corpus / "text.txt")
    options = tutelage.RunOptions("layers=2,hidden_size=16", text, text, max_length=16)
    args = tutelage.CurriculumConfig(teacher_model_name_or_path=str(causal_teacher), **trl.ONE_SHOT)
    fields = {"max_steps": 4, "per_device_train_batch_size": 4, "lr_scheduler_type": "cosine", "warmup_steps": 0.1}
    monkeypatch.setattr(trl, "embedded", lambda seed: (load_inputs(options, args), fields))
    monkeypatch.setattr(trl, "theirs", getattr(trl, rival))
    run = trl.pair("embedded", 0, 1e-2, again=True)
    for name in ("loss", "kl", "first_training_loss"):
        assert run["ours"][name] == pytest.approx(run["trl"][name], rel=1e-5)
        assert run["ours"][name] == pytest.approx(run["ours_in_chunks"][name], rel=1e-5)
    result = {"command": "", "system": "tiny", "environment": {**dict.fromkeys(("machine", "threads", "torch"), 1)}}
    result["environment"] |= {"transformers": 1, "trl": 1}
    assert "| 0.01 | 1 |" in trl.report({**result, "runs": [run]})


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
    students: Any = importlib.import_module("students")
    pages = [ROOT / "results" / "students" / teacher / "README.md" for teacher in students.TEACHERS]
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
