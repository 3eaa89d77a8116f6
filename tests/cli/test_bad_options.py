"""Bad values of single options: exit code 2 and one line on stderr, whatever the command and the option."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from tests.cli.conftest import budget
from tests.conftest import llama_config, save_llama
from tutelage.cli import main
from tutelage.core.errors import UserError
from tutelage.runs.evaluate import EvaluateOptions
from tutelage.runs.extraction.options import ExtractOptions
from tutelage.runs.inputs import RunOptions
from tutelage.training.config import CurriculumConfig

BEST = {
    "load_best_model_at_end": "true",
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
}
EPOCHS = {"max_steps": -1}

# command, options, what the line says
CASES: list[tuple[str, dict[str, Any], str]] = [
    ("distill", {"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1, got 0"),
    ("distill", {"gradient_accumulation_steps": -1}, "gradient_accumulation_steps must be at least 1, got -1"),
    ("distill", {"num_train_epochs": "nan", **EPOCHS}, "num_train_epochs must be positive and finite, got nan"),
    ("distill", {"num_train_epochs": "inf", **EPOCHS}, "num_train_epochs must be positive and finite, got inf"),
    ("distill", {"num_train_epochs": 0, **EPOCHS}, "num_train_epochs must be positive and finite, got 0"),
    ("distill", {"seed": 2**33}, "seed must be a number from 0 to 4294967295"),
    ("distill", {"seed": -1}, "seed must be a number from 0 to 4294967295, got -1"),
    ("extract", {"data_seed": -5}, "data_seed must be a number from 0 to 4294967295, got -5"),
    ("plan", {"projection_seed": 2**70}, "projection_seed must be a number from 0 to 4294967295"),
    ("distill", {"output_dir": ""}, "output_dir is empty: give a value, or leave it out"),
    ("distill", {"output_dir": "{files}/file/out"}, "is inside a file"),
    ("extract", {"output_dir": "{files}/file/out"}, "could not write"),
    ("extract", {"output_dir": "{files}/file"}, "File exists; choose a different folder"),
    ("distill", {"output_dir": "/proc/nowhere/out"}, "could not write '/proc/nowhere/out'"),
    ("extract", {"output_dir": "nonsense://bucket/C"}, "could not reach 'nonsense://bucket/C'"),
    ("distill", {"dataset": "{files}/junk"}, "could not read dataset folder"),
    ("extract", {"dataset": "{files}/junk"}, "could not read dataset folder"),
    ("evaluate", {"dataset": "{files}/junk"}, "could not read dataset folder"),
    ("distill", {"dataset": "{files}/cut.parquet"}, "could not read"),
    ("distill", {"dataset": "nonsense://bucket/text.txt"}, "could not reach 'nonsense://bucket'"),
    ("distill", {"teacher": "{files}/broken"}, "could not load teacher"),
    ("extract", {"teacher": "{files}/broken"}, "could not load teacher"),
    ("evaluate", {"model": "{files}/broken"}, "could not load model"),
    ("plan", {"teacher": "{files}/broken-config"}, "could not read the config of teacher"),
    ("evaluate", {"model": "{files}/wrong-config"}, "could not read the config of model|could not load model"),
    ("distill", {"teacher": "{files}/broken-tokenizer"}, "could not read the tokenizer in"),
    ("plan", {"config": "{files}/latin.yaml"}, "is not valid YAML"),
    ("extract", {"config": "{files}/list.yaml"}, "must be a mapping of options"),
    ("evaluate", {"config": "{files}/none.yaml"}, "no config file"),
    ("plan", {"tokens": "1M", "projection": "learned"}, "projection='learned' needs the teacher's own states"),
    ("plan", {"max_length": -3}, "max_length must be at least 1, got -3"),
    ("evaluate", {"max_length": 0}, "max_length must be at least 1, got 0"),
    ("plan", {"max_length": 100_000}, "max_length 100000 is longer than the model's 64 positions: lower it"),
    ("distill", {"max_samples": 0}, "max_samples must be at least 1, got 0"),
    ("evaluate", {"max_samples": -1}, "max_samples must be at least 1, got -1"),
    ("distill", {"mlm_probability": 2}, "mlm_probability must be a number from 0 to 1, got 2"),
    ("evaluate", {"mlm_probability": 0}, "mlm_probability must be positive and finite, got 0"),
    ("plan", {"mlm_probability": "nan"}, "mlm_probability must be positive and finite, got nan"),
    ("distill", {"eval_fraction": 5}, "eval_fraction must be a number from 0 to 1, got 5"),
    ("extract", {"eval_fraction": "nan"}, "eval_fraction must be a number from 0 to 1, got nan"),
    ("plan", {"student": "layers=0"}, "num_hidden_layers must be a positive whole number, got 0"),
    ("plan", {"student": "layers=2,head_dim=7"}, "each head has 7 values, but rotary position embeddings need"),
    ("plan", {"student": "layers=2,hidden_size=["}, "cannot read 'hidden_size=['"),
    ("plan", {"student": "layers=2,vocab_size=x"}, "vocab_size=x cannot be used|could not build the llama student"),
    ("distill", {"student": "{files}/unknown.json"}, "cannot be used: Unrecognized model identifier"),
    ("extract", {"dtype": "int9"}, "unknown dtype 'int9': use one of int8, float16, float32"),
    ("extract", {"devices": 0}, "devices must be at least 1, got 0"),
    ("distill", {"report_to": "wandb"}, "report_to names 'wandb', which is not installed"),
    ("distill", {"report_to": "nonsense"}, "nonsense is not supported"),
    ("distill", {"optim": "nonsense"}, "argument --optim: invalid choice: 'nonsense'"),
    ("distill", {"optim": "galore_adamw"}, "the optimiser cannot be made: You need to install `galore_torch`"),
    ("distill", {"adam_beta1": 1}, "the optimiser cannot be made: Invalid beta parameter"),
    ("distill", {"lr_scheduler_type": "nonsense"}, "nonsense is not a valid SchedulerType"),
    ("distill", {"lr_scheduler_kwargs": '{"a": 1}'}, "lr_scheduler_type cannot be used with these lr_scheduler_kwargs"),
    (
        "distill",
        {"metric_for_best_model": "bleu", **BEST},
        "metric_for_best_model 'bleu' is not a metric of the evaluation",
    ),
    ("distill", {"max_steps": -(10**30)}, "max_steps must be at least 1, or -1 for num_train_epochs"),
    ("plan", {"max_steps": 0}, "max_steps must be at least 1, or -1 for num_train_epochs, got 0"),
    ("distill", {"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1, got 0"),
    ("plan", {"per_device_train_batch_size": -2}, "per_device_train_batch_size must be at least 1, got -2"),
    ("distill", {"per_device_eval_batch_size": 0}, "per_device_eval_batch_size must be at least 1, got 0"),
    ("evaluate", {"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ("distill", {"calibration_samples": 0}, "calibration_samples must be at least 1, got 0"),
    ("distill", {"warmup_steps": -1}, "warmup_steps must be a number from 0 up, got -1"),
    ("distill", {"weight_decay": "nan"}, "weight_decay must be a number from 0 up, got nan"),
    ("distill", {"dataloader_num_workers": -1}, "dataloader_num_workers must be a number from 0 to 1024, got -1"),
    ("distill", {"text_column": "body"}, "the dataset has no column 'body'"),
    ("evaluate", {"text_column": "body"}, "the dataset has no column 'body'"),
    ("distill", {"dataset_split": "nowhere"}, "has no split 'nowhere'"),
    ("evaluate", {"dataset_split": "nowhere"}, "has no split 'nowhere'"),
    ("extract", {"blocks": "z"}, "'z' is not a list of blocks of LlamaForCausalLM"),
    ("extract", {"method": "osmosis"}, "unknown method 'osmosis'"),
    ("evaluate", {"task": "translation"}, "unknown task 'translation'"),
    ("plan", {"task": "classification"}, "a plan needs a model that reads tokens"),
    ("distill", {"teacher_device_map": "nonsense"}, "could not load teacher"),
    ("distill", {"teacher_dtype": "int8"}, "could not load teacher"),
    ("distill", {"curriculum_dir": "{files}/junk"}, "no manifest.json"),
    ("inspect", {"folder": "{files}/junk"}, "no manifest.json"),
    ("inspect", {"folder": "nonsense://bucket"}, "could not reach 'nonsense://bucket'"),
    ("plan", {"curriculum_dir": "nowhere"}, "give teacher and student in place of curriculum_dir"),
    ("plan", {"num_train_epochs": 1, "max_steps": -1}, "give max_steps in place of num_train_epochs"),
    ("plan", {"tokens": "many"}, "cannot read 'many' as a count"),
    ("distill", {"student": ""}, "student is empty: give a value, or leave it out"),
    ("evaluate", {"teacher": " "}, "teacher is empty: give a value, or leave it out"),
    ("extract", {"stages": ""}, "stages is empty: give a value, or leave it out"),
    ("evaluate", {"blocks": "z"}, "blocks is of the teacher, but no teacher was given: give --teacher"),
    ("plan", {"student": "layers=2,layers=3"}, "has num_hidden_layers twice: leave one of them out"),
    ("plan", {"student": "layers=2,num_hidden_layers=3"}, "has num_hidden_layers twice: leave one of them out"),
    ("plan", {"student": "layers=2,hidden_size=2001-99-99"}, "cannot read 'hidden_size=2001-99-99'"),
    ("plan", {"student": "layers=10000000"}, "num_hidden_layers must be at most 10000, got 10000000"),
    ("plan", {"student": "hidden_size=999999999"}, "hidden_size must be at most 131072, got 999999999"),
    ("plan", {"student": "{files}/deep.json"}, "has num_hidden_layers=10000000: models of at most 10000 can be built"),
    ("plan", {"teacher": "{files}/deep"}, "has num_hidden_layers=10000000: models of at most 10000 can be built"),
    ("plan", {"teacher": "t" * 300}, "no file or folder can have a name of 300 characters"),
    ("distill", {"save_steps": -1}, "save_steps must be positive and finite, got -1.0"),
    ("distill", {"logging_steps": "inf"}, "logging_steps must be positive and finite, got inf"),
    ("distill", {"eval_steps": "nan"}, "eval_steps must be positive and finite, got nan"),
    ("distill", {"adam_beta1": "nan"}, "adam_beta1 must be a number from 0 to 1, got nan"),
    ("distill", {"label_weight": "nan"}, "label_weight must be a number from 0 to 1, got nan"),
    ("distill", {"save_total_limit": -1}, "save_total_limit must be a number from 0 up, got -1"),
    ("distill", {"ddp_timeout": 0}, "ddp_timeout must be at least 1, got 0"),
    ("distill", {"num_stages": 0}, "num_stages must be at least 1, got 0"),
    ("distill", {"stage_steps": -1}, "stage_steps must be at least 1, got -1"),
    ("extract", {"top_k": 0}, "top_k must be at least 1, got 0"),
    ("extract", {"max_steps": 10**20}, "max_steps must be at most 2147483647"),
    ("extract", {"num_train_epochs": 1e30, **EPOCHS}, "optimiser steps of num_train_epochs must be a number from 1 to"),
    ("distill", {"per_device_train_batch_size": 10**20}, "must be a number from 1 to 2147483647, got 1000000"),
    ("extract", {"projection_dim": 999999999}, "projection_dim must be a number from 1 to 131072, got 999999999"),
    ("distill", {"learning_rate": 1e30}, "the loss of the trained student on held-out data is nan|the loss is nan"),
    ("distill", {"output_dir": "s3://bucket/run"}, "is a URL: a student is written to a folder on this machine"),
    ("distill", {"use_liger_kernel": "true"}, "use_liger_kernel needs liger-kernel, which is not installed"),
    ("distill", {"lr_scheduler_kwargs": "x"}, "lr_scheduler_kwargs must be a mapping as JSON"),
    ("distill", {"torch_compile_mode": "x"}, "torch_compile cannot have the backend 'inductor' and the mode 'x'"),
    ("distill", {"dataloader_persistent_workers": "true"}, "dataloader_persistent_workers is for worker processes"),
    ("plan", {"config": "{files}/merge.yaml"}, "merges another mapping with '<<': write every option once"),
    ("plan", {"config": "{files}/twice.yaml"}, "has twice 'max_steps': write every option once"),
    ("plan", {"config": "{files}/nested.yaml"}, "has lists or mappings too deep inside each other"),
    ("plan", {"config": "{files}/keys.yaml"}, "must be a mapping of options"),
    ("plan", {"config": "{files}/lists.yaml"}, "layer_map must be one value or a list of values"),
    ("plan", {"config": "{files}/date.yaml"}, "Object of type date is not JSON serializable"),
    ("inspect", {"folder": ""}, "the folder is empty text: name one"),
    ("report", {"folder": ""}, "the folder is empty: give a value"),
    ("diagnose", {"dataset": ""}, "dataset is empty: give a value, or leave it out"),
    ("diagnose", {"max_length": 0}, "max_length must be at least 1, got 0"),
    ("distill", {"save_only_model": "true", "resume": "auto"}, "with save_only_model a checkpoint has nothing"),
    ("distill", {"metric_for_best_model": "foo", "eval_strategy": "no"}, "metric_for_best_model needs evaluations"),
    ("compare", {"variant": "--"}, "'--variant=--' has no value: give one, or leave the option out"),
    ("distill", {"output_dir": "--"}, "'--output_dir=--' has no value: give one, or leave the option out"),
    ("report", {"folder": "f" * 300}, "f/scaling.json': File name too long; give a different path"),
    ("distill", {"output_dir": "o" * 300}, "o/curriculum.json': File name too long; give a different path"),
    ("distill", {"dataset": "d" * 300}, "d': File name too long; give a different path"),
    ("compare", {"output_dir": ""}, "output_dir is empty: give a value, or leave it out"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files that cannot be used."""
    root = tmp_path_factory.mktemp("files")
    (root / "file").touch()
    Dataset.from_dict({"text": ["ba"]}).save_to_disk(root / "junk")
    (root / "junk" / "state.json").write_text("{")
    (root / "cut.parquet").write_bytes(b"PAR1")
    (root / "latin.yaml").write_bytes(b"method: na\xefve\n")
    (root / "list.yaml").write_text("- one_shot\n")
    deep = llama_config().to_dict() | {"num_hidden_layers": 10**7}
    (root / "deep").mkdir()
    for name in ("deep.json", "deep/config.json"):
        (root / name).write_text(json.dumps(deep))
    (root / "merge.yaml").write_text("<<: {max_steps: 2}\n")
    (root / "twice.yaml").write_text("max_steps: 2\nmax_steps: 3\n")
    (root / "nested.yaml").write_text("layer_map: " + "[" * 1000 + "]" * 1000)
    (root / "keys.yaml").write_text("1: 2\n")
    (root / "lists.yaml").write_text("layer_map: [[1, 2]]\n")
    (root / "date.yaml").write_text("teacher_quantization: {a: 2001-01-01}\n")
    (root / "unknown.json").write_text('{"model_type": "nothing"}')
    teacher = save_llama(root / "broken")
    for name in ("broken-config", "wrong-config", "broken-tokenizer"):
        shutil.copytree(teacher, root / name)
    weights = teacher / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    config = root / "wrong-config" / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 4', '"num_hidden_layers": "four"'))
    (root / "broken-config" / "config.json").write_text("{")
    (root / "broken-tokenizer" / "tokenizer.json").write_text("{")
    return root


@pytest.mark.parametrize(
    ("command", "options", "message"), CASES, ids=[f"{c}-{'-'.join(map(str, o.items()))}"[:60] for c, o, _ in CASES]
)
def test_a_bad_option_is_one_line_with_exit_code_2(
    command: str,
    options: dict[str, Any],
    message: str,
    files: Path,
    causal_teacher: Path,
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = {name: str(value).replace("{files}", str(files)) for name, value in options.items()}
    known: dict[str, Any] = {"teacher": causal_teacher, "student": "layers=2,hidden_size=16"}
    known |= dict(flag.removeprefix("--").split("=") for flag in budget(max_steps=4))
    if command in ("distill", "extract"):
        known |= {"dataset": corpus / "text.txt", "output_dir": tmp_path / "out"}
    if command == "evaluate":
        known = {"model": causal_teacher, "dataset": corpus / "text.txt", "max_length": 16, "max_samples": 4}
    if command in ("inspect", "report", "diagnose", "compare"):
        known = {}
    folder = [options.pop("folder")] if "folder" in options else []
    assert main([command, *folder, *(f"--{name}={value}" for name, value in {**known, **options}.items())]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith(f"tutelage {command}: ")
    # which library finds the mistake first depends on the version of transformers
    assert any(part in line for part in message.split("|"))


@pytest.mark.parametrize("word", ["--teacher=\udcff", "--student=a\0b"])
def test_a_word_that_no_file_can_have_as_its_name_is_refused(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", word]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"tutelage: {word!r} is not text that UTF-8 and file names can hold: correct it"


@pytest.mark.parametrize(
    ("command", "options"),
    [("distill", {"save_total_limit": 0}), ("extract", {"devices": 2**31 - 1}), ("distill", {"top_k": 10**6})],
)
def test_a_large_or_small_value_that_can_work_works(
    command: str, options: dict[str, Any], causal_teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    known = {"teacher": causal_teacher, "student": "layers=2,hidden_size=16", "dataset": corpus / "text.txt"}
    given = {**known, "output_dir": tmp_path / "out", **options}
    assert main([command, *(f"--{name}={value}" for name, value in given.items()), *budget(max_steps=2)]) == 0


def test_python_gets_the_errors_of_the_command_line() -> None:
    for make, message in (
        (lambda: CurriculumConfig(top_k=0), "top_k must be at least 1, got 0"),
        (lambda: CurriculumConfig(learning_rate="fast"), "learning_rate must be a number, got 'fast'"),
        (lambda: CurriculumConfig(temperature="high"), "temperature must be a number, got 'high'"),
        (lambda: RunOptions(dataset="\udcff"), "which has characters that no file can hold: correct it"),
        (lambda: RunOptions(student=""), "student is empty: give a value, or leave it out"),
        (lambda: ExtractOptions(devices=0), "devices must be at least 1, got 0"),
        (lambda: EvaluateOptions(blocks="z"), "blocks is of the teacher, but no teacher was given"),
    ):
        with pytest.raises(UserError, match=message):
            make()
    assert CurriculumConfig(stage_steps=3).stage_steps == [3]  # type: ignore[arg-type]


@pytest.mark.parametrize("command", ["distill", "plan"])
def test_a_student_larger_than_its_teacher_gets_a_warning_with_both_numbers(
    command: str, causal_teacher: Path, corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    known: dict[str, Any] = {
        "teacher": causal_teacher,
        "student": "layers=4,intermediate_size=128",
        "method": "one_shot",
    }
    if command == "distill":
        known |= {"dataset": corpus / "text.txt", "output_dir": tmp_path / "out"}
    assert main([command, *(f"--{name}={value}" for name, value in known.items()), *budget(max_steps=1)]) == 0
    assert "The student has more parameters (68,256) than its teacher (43,680): it will be neither" in caplog.text
