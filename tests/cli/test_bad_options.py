"""Bad values of single options: exit code 2 and one line on stderr, whatever the command and the option."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from tests.cli.conftest import budget
from tests.conftest import save_llama
from tutelage.cli import main

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
    ("extract", {"output_dir": "{files}/file"}, "is not empty and does not contain an extracted curriculum"),
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
    if command == "inspect":
        known = {}
    folder = [options.pop("folder")] if "folder" in options else []
    assert main([command, *folder, *(f"--{name}={value}" for name, value in {**known, **options}.items())]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith(f"tutelage {command}: ")
    # which library finds the mistake first depends on the version of transformers
    assert any(part in line for part in message.split("|"))
