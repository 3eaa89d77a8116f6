"""One vocabulary on every command and in YAML, defaults for what is not given, and the exit codes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from tests.cli.conftest import budget, run
from tutelage.cli import commands, main
from tutelage.core.errors import UserError
from tutelage.runs.inputs import RunOptions
from tutelage.tasks.embedded import DEFAULT_EVAL_TEXT, DEFAULT_TEACHER, DEFAULT_TEXT
from tutelage.training.config import CurriculumConfig

STUDENT = "layers=2,hidden_size=16"
COMMANDS = ("plan", "distill", "extract", "inspect", "evaluate")
SCREEN = 24
TWICE = "teacher: a\nteacher_model_name_or_path: b"


# ---- Names ----


def test_teacher_is_the_name_of_the_teacher_on_the_command_line(
    causal_teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    for name in ("teacher", "teacher_model_name_or_path"):
        flags = (f"--{name}", causal_teacher, "--student", STUDENT, "--dataset", corpus / "text.txt")
        run("distill", *flags, "--output_dir", tmp_path / name, *budget(max_steps=4))
        assert json.loads((tmp_path / name / "result.json").read_text())["names"]["teacher"] == str(causal_teacher)


@pytest.mark.parametrize("name", ["teacher", "teacher_model_name_or_path"])
def test_teacher_is_the_name_of_the_teacher_in_yaml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, causal_teacher: Path
) -> None:
    given: list[tuple[str | None, str | None, float]] = []

    def plan(run: RunOptions, args: CurriculumConfig) -> None:
        given.append((args.teacher_model_name_or_path, run.student, args.max_steps))
        raise UserError("enough")

    monkeypatch.setattr(commands, "plan", plan)
    (tmp_path / "run.yaml").write_text(f"{name}: {causal_teacher}\nstudent: {STUDENT}\nmax_steps: 8\n")
    command = ["plan", "--config", str(tmp_path / "run.yaml")]
    assert main(command) == 2
    assert main([*command, "--teacher", DEFAULT_TEACHER, "--student", "layers=2"]) == 2  # a flag overrides the file
    assert given == [(str(causal_teacher), STUDENT, 8), (DEFAULT_TEACHER, "layers=2", 8)]


def test_evaluate_takes_the_names_of_the_other_commands(causal_teacher: Path, corpus: Path, tmp_path: Path) -> None:
    plain = ("--model", causal_teacher, "--dataset", corpus / "text.txt", "--max_length", 16, "--max_samples", 3)
    alias = ("--student", causal_teacher, "--eval_dataset", corpus / "text.txt", "--max_length", 16, "--max_samples", 3)
    (tmp_path / "eval.yaml").write_text(
        f"student: {causal_teacher}\neval_dataset: {corpus / 'text.txt'}\nmax_length: 16\nmax_samples: 3\n"
    )
    found = run("evaluate", *plain, "--json")
    assert found == run("evaluate", *alias, "--json") == run("evaluate", "--config", tmp_path / "eval.yaml", "--json")
    assert json.loads(found)["sequences"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["distill", "--eval_samples", "3"], r"unknown option '--eval_samples' (it is called 'max_samples' now)"),
        (["distill", "--layer_map", "head:head"], "the place before the output head is called 'final', not 'head'"),
        (["plan", "--layer_map", "1:2,head:head"], "the place before the output head is called 'final', not 'head'"),
        (["plan", "--projection", "head"], "the projection 'head' is called 'logits'"),
        (["distill", "--projection", "head"], "the projection 'head' is called 'logits'"),
        (
            ["extract", "--stages", "2", "head", "--projection_dim", "8"],
            "each deeper than the one before, final at most",
        ),
        (["evaluate", "--split", "test"], "unknown option '--split' (it is called 'dataset_split' now)"),
        (["compare", "--eval_samples", "3"], "unknown option 'eval_samples' (it is called 'max_samples' now)"),
        (["evaluate", "--mask_probability", "0.2"], "(it is called 'mlm_probability' now)"),
    ],
)
def test_old_spellings_name_the_new_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    where = [f"--output_dir={tmp_path / 'out'}"] if arguments[0] in ("distill", "extract") else []
    assert main([*arguments, *where]) == 2
    assert message in capsys.readouterr().err


def test_an_old_spelling_in_yaml_names_the_new_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text("eval_samples: 3\n")
    assert main(["distill", "--config", str(tmp_path / "run.yaml")]) == 2
    assert "unknown option 'eval_samples' (it is called 'max_samples' now)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "text", "message"),
    [
        ("distill", "max_steps: [1, 2]", "max_steps takes one value, not the list [1, 2]"),
        ("distill", TWICE, "teacher and teacher_model_name_or_path are the same option: leave one out"),
        ("compare", TWICE, "teacher and teacher_model_name_or_path are the same option: leave one out"),
        ("evaluate", "model: a\nstudent: b", "model and student are the same option: leave one out"),
        ("compare", "seeds: a", "cannot read seeds='a': it must be whole numbers separated by commas"),
        ("inspect", "quick: maybe", "quick"),
    ],
)
def test_yaml_that_cannot_be_read_is_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, text: str, message: str
) -> None:
    (tmp_path / "run.yaml").write_text(text)
    assert main([command, "--config", str(tmp_path / "run.yaml")]) == 2
    assert message in capsys.readouterr().err


# ---- Help ----


@pytest.mark.parametrize("command", COMMANDS)
def test_help_begins_with_one_screen_that_people_use(command: str) -> None:
    printed = run(command, "--help")
    first, _, rest = printed.partition("\n\nMore options:")
    main_options = first.split("\n\nOptions of transformers")[0].splitlines()
    assert len(main_options) <= SCREEN
    assert main_options[0].startswith(f"usage: tutelage {command}")
    assert any(line.startswith(f"  tutelage {command} ") for line in main_options)  # an example
    if command in ("plan", "distill", "extract"):
        own, _, theirs = rest.partition(
            "Options of transformers.TrainingArguments, with the meaning that they have there:"
        )
        for name in ("--teacher", "--student", "--max_length", "--max_steps"):
            assert any(line.startswith(f"  {name} ") for line in main_options), name
        assert "--projection_seed" in own
        for name in ("--weight_decay", "--seed", "--adam_beta1"):
            assert name in theirs and name not in own, name


@pytest.mark.parametrize("command", ["compare", "report", "diagnose"])
def test_help_of_the_reproduction_has_the_form_of_the_others(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    usage, *rest = capsys.readouterr().out.splitlines()
    assert usage.startswith(f"usage: tutelage {command} [") and usage.endswith("] [options]")
    assert any(line.startswith(f"  tutelage {command} ") for line in rest[:6])  # an example


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_the_example_exists(command: str) -> None:
    printed = run(command, "--help")
    example = next(line for line in printed.splitlines() if line.startswith(f"  tutelage {command} "))
    for word in example.split():
        if word.startswith("--"):
            assert printed.count(word) > 1, word


# ---- Defaults ----


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_plan_without_arguments_is_of_the_embedded_teacher(in_tmp: Path) -> None:
    planned = json.loads(run("plan", "--json"))
    assert planned["teacher"]["name"] == DEFAULT_TEACHER
    assert (sum(stage["steps"] for stage in planned["stages"]), planned["steps_assumed"]) == (
        200,
        False,
    )  # as in distill
    named = run("plan", "--dataset", DEFAULT_EVAL_TEXT)
    assert "1,000 steps (assumed: give --max_steps)" in named
    assert re.search(r"its residual basis keeps \d\d\.\d% of the mean square of the teacher's states", named)
    assert not list(in_tmp.iterdir())


def test_evaluate_without_arguments_is_of_the_embedded_teacher(in_tmp: Path) -> None:
    found = json.loads(run("evaluate", "--max_samples", 4, "--json"))
    assert (found["model"], found["dataset"], found["teacher"]) == (DEFAULT_TEACHER, DEFAULT_EVAL_TEXT, None)
    assert found["sequences"] == 4
    assert 1 < found["metrics"]["loss"] < 6
    assert not list(in_tmp.iterdir())


def test_extract_inspect_and_distill_without_naming_a_model(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ("--max_steps", "6", "--per_device_train_batch_size", "4", "--max_length", "32", "--max_samples", "4")
    assert main(["extract", *small, "--calibration_samples", "24", "--use_cpu", "true"]) == 0
    assert "extracted curriculum: extracted-curriculum" in capsys.readouterr().out
    manifest = json.loads(run("inspect", "--json"))
    assert manifest["identity"]["teacher"]["name"] == Path(DEFAULT_TEACHER).name
    assert manifest["identity"]["data"]["name"] == Path(DEFAULT_TEXT).name
    assert "checksums: all as in the manifest" in run("inspect")
    run("distill", "--curriculum_dir", "extracted-curriculum", "--use_cpu", "true", "--save_strategy", "no")
    student = AutoModelForCausalLM.from_pretrained("tutelage-output").config
    expected = AutoConfig.from_pretrained("extracted-curriculum/student")
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"):
        assert getattr(student, name) == getattr(expected, name), name
    result = json.loads((in_tmp / "tutelage-output" / "result.json").read_text())
    assert result["budget"]["steps"] == 6
    assert result["names"]["student"] == manifest["identity"]["student"]


def test_distill_from_a_curriculum_alone_trains_the_student_it_was_extracted_for(
    causal_teacher: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ("--teacher", causal_teacher, "--student", STUDENT, "--dataset", corpus / "text.txt")
    assert main([str(word) for word in ("extract", *data, "--output_dir", tmp_path / "C", *budget())]) == 0
    capsys.readouterr()
    run("distill", "--curriculum_dir", tmp_path / "C", "--output_dir", tmp_path / "S", "--use_cpu", "true")
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "S")
    assert (student.config.num_hidden_layers, student.config.hidden_size) == (2, 16)
    result = json.loads((tmp_path / "S" / "result.json").read_text())
    assert (result["names"]["student"], result["names"]["dataset"]) == (STUDENT, "text.txt")
    assert (result["budget"]["steps"], result["budget"]["samples"]) == (8, 8 * 4)
    assert (tmp_path / "S" / "tokenizer.json").is_file()


# ---- Exit codes ----


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unexpected_exception_keeps_its_traceback(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("an invariant of ours is broken")

    for name in ("plan", "distill", "extract", "evaluate", "ExtractedCurriculum"):
        monkeypatch.setattr(commands, name, broken)
    where = [f"--output_dir={tmp_path / 'out'}"] if command in ("distill", "extract") else []
    assert main([command, *where]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert "RuntimeError: an invariant of ours is broken" in lines
    assert lines[-1] == f"tutelage {command}: this is a bug of tutelage; please report it with the lines above"


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (ValueError("not a UserError"), 1)])
def test_exit_codes_of_other_exceptions(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int
) -> None:
    def raising(*_: Any) -> None:
        raise error

    run_command: Callable[..., None] = raising
    monkeypatch.setattr(commands, "run_command", run_command)
    assert main(["plan"]) == code
    assert ("Traceback" in capsys.readouterr().err) == (code == 1)
