"""What the package carries: a small teacher and text, so that `tutelage distill` works offline with no arguments."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.cli.conftest import run
from tutelage.core.curriculum import Curriculum
from tutelage.tasks.embedded import DEFAULT_EVAL_TEXT, DEFAULT_TEACHER, DEFAULT_TEXT
from tutelage.tasks.registry import detect_task
from tutelage.tasks.text import read_dataset

TEACHER = Path(DEFAULT_TEACHER)


def test_the_teachers_files() -> None:
    """Config, safetensors and tokenizer, and nothing else: no pickle, no optimiser state."""
    assert {file.name for file in TEACHER.iterdir()} <= {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (TEACHER / "model.safetensors").stat().st_size < 8e6
    assert sum(file.stat().st_size for file in TEACHER.iterdir()) < 8e6


def test_the_teacher_is_a_small_causal_transformer() -> None:
    task = detect_task(DEFAULT_TEACHER)
    assert task.name == "causal_lm"
    model = task.load(DEFAULT_TEACHER)
    assert 1e6 < sum(parameter.numel() for parameter in model.parameters()) < 2e6
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    with safe_open(TEACHER / "model.safetensors", "pt") as handle:
        assert set(handle.keys()) <= set(model.state_dict())


def test_the_tokenizer_is_the_teachers() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    config = json.loads((TEACHER / "config.json").read_text(encoding="utf-8"))
    assert len(tokenizer) == config["vocab_size"] <= 4096
    text = "It is a truth universally acknowledged, that a single man… naïve “Emma” ☃"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_the_teacher_has_learnt_english() -> None:
    """It finds held-out prose far likelier than the same words in another order, and than chance."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(TEACHER).eval(), AutoTokenizer.from_pretrained(TEACHER)
    text = Path(DEFAULT_EVAL_TEXT).read_text(encoding="utf-8")[20_000:22_000]
    losses = []
    for version in (text, " ".join(reversed(text.split()))):
        ids = tokenizer(version, return_tensors="pt", add_special_tokens=False)["input_ids"][:, :256]
        with torch.no_grad():
            losses.append(model(input_ids=ids, labels=ids).loss.item())
    uniform = torch.tensor(float(model.config.vocab_size)).log().item()
    assert losses[0] + 1 < losses[1] < uniform + 1
    assert losses[0] < 0.7 * uniform


@pytest.mark.parametrize(("file", "megabytes"), [(DEFAULT_TEXT, 3), (DEFAULT_EVAL_TEXT, 0.3)])
def test_the_texts_are_utf8(file: str, megabytes: float) -> None:
    assert len(Path(file).read_text(encoding="utf-8")) > megabytes * 1e6
    assert len(read_dataset(file)) > 1000


def test_the_held_out_text_is_no_training_text() -> None:
    train = Path(DEFAULT_TEXT).read_text(encoding="utf-8")
    held_out = Path(DEFAULT_EVAL_TEXT).read_text(encoding="utf-8")
    paragraphs = [part for part in held_out.split("\n\n") if len(part) > 200]
    assert len(paragraphs) > 100
    assert not any(part in train for part in paragraphs)


def test_distill_with_no_arguments_but_a_shorter_budget(tmp_path: Path) -> None:
    printed = run(
        "distill",
        "--output_dir",
        tmp_path,
        "--max_steps",
        6,
        "--max_samples",
        4,
        "--per_device_train_batch_size",
        4,
        "--use_cpu",
        "true",
    )
    assert "student" in printed
    assert "budget: 6 steps" in printed
    curriculum = Curriculum.from_json((tmp_path / "curriculum.json").read_text())
    assert (curriculum.method, curriculum.student_init) == ("joint", "teacher")
    student = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == student.config.vocab_size
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["student"]["parameters"] < result["teacher"]["parameters"]
    assert result["teacher"]["metrics"]["loss"] < result["student"]["metrics"]["loss"]


def test_plan_with_no_arguments() -> None:
    planned = json.loads(run("plan", "--json"))
    assert planned["teacher"]["name"] == DEFAULT_TEACHER
    assert 1 < planned["flops"] / planned["one_shot_flops"] < 1.02  # hidden states and output from one forward
    assert planned["start"]["blocks"] == [1, 4]
