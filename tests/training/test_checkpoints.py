"""Checkpoints: killed anywhere, damaged anywhere, or on a disk that is full, a run keeps what was good or says what is not."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import random
import re
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.utils.data import IterableDataset
from transformers import TrainerCallback, TrainingArguments

from tests.limits import largest_file
from tests.training.conftest import llama, make_trainer, token_rows
from tutelage import CurriculumConfig, CurriculumTrainer
from tutelage.core.errors import UserError
from tutelage.training import checks, saving
from tutelage.training.records import PROGRESS_FILE, checkpoints, complete_checkpoints

Make = Callable[..., CurriculumTrainer]
SAVED = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "max_steps": 3, "method": "joint"}
PROGRAMS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(PROGRAMS))
    yield importlib.import_module("reliability_faults")
    sys.modules.pop("reliability_faults")


def weights(trainer: CurriculumTrainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


# ---- Killed ----


def test_a_run_killed_at_any_write_continues_as_if_it_had_not_been(
    make_trainer: Make, tmp_path: Path, faults: Any
) -> None:
    settings = {**SAVED, "logging_steps": 2, "hidden_weight": 0.5}  # a log line is of steps before and after a kill
    whole = make_trainer("whole", **settings)
    with faults.Faults(tmp_path).watching() as seen:
        whole.train("auto")
    expected, kinds = (weights(whole), faults.rows(tmp_path / "whole")), seen.kinds
    assert {"open", "write", "sync", "rename", "delete", "step"} == set(kinds)
    chosen = {0, *random.Random(1).sample(range(len(kinds)), 6), len(kinds) - 1}
    for number in sorted(chosen):
        killed = faults.Faults(tmp_path, number)
        with pytest.raises(faults.Killed), killed.watching():
            make_trainer(f"run-{number}", **settings).train("auto")
        complete = complete_checkpoints(tmp_path / f"run-{number}")
        saved = kinds[:number].count("step") - 1
        assert saved < 1 or complete, f"no checkpoint is left at event {number} ({kinds[number]})"
        again = make_trainer(f"run-{number}", **settings)
        again.train("auto")
        assert same(weights(again), expected[0]), number
        assert faults.rows(tmp_path / f"run-{number}") == expected[1], number
        assert faults.leftovers(tmp_path / f"run-{number}") == [], number
        assert len(checkpoints(tmp_path / f"run-{number}")) == 1


def test_leftovers_of_a_killed_run_do_not_count_and_are_cleaned(make_trainer: Make, tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_trainer(method="one_shot", max_steps=1).train()
    (run / "checkpoint-7").mkdir(parents=True)
    (run / ".student.tmp").mkdir()
    for name in (
        "identity.json.0123456789abcdef.tmp",
        "curriculum.json.0123456789abcdef.tmp",
        "checkpoint-7/model.safetensors",
        ".student.tmp/config.json",
    ):
        (run / name).touch()
    (run / "mine.tmp").touch()
    make_trainer(method="one_shot", max_steps=1).train("auto")
    assert {path.name for path in run.iterdir()} == {"identity.json", "curriculum.json", "metrics.jsonl", "mine.tmp"}


@pytest.mark.parametrize("name", ["checkpoint-500/model.safetensors", "metrics.jsonl", "model.safetensors"])
def test_a_folder_of_something_else_stays_as_it_is(make_trainer: Make, tmp_path: Path, name: str) -> None:
    (tmp_path / "run" / name).parent.mkdir(parents=True)
    (tmp_path / "run" / name).write_text("mine")
    for asked in (None, "auto"):
        with pytest.raises(
            UserError, match=f"contains {name.partition('/')[0]}, which was not made by a run of tutelage"
        ):
            make_trainer(method="one_shot", max_steps=1).train(asked)
    assert (tmp_path / "run" / name).read_text() == "mine"


@pytest.mark.parametrize("content", [None, "{}", "{", '{"seed": "0"}'])
def test_a_run_whose_identity_is_lost_is_not_started_again(
    make_trainer: Make, tmp_path: Path, content: str | None
) -> None:
    make_trainer(method="one_shot", max_steps=1, save_strategy="no").train("auto")
    file = tmp_path / "run" / "identity.json"
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises(UserError, match=r"identity\.json.* start the run again with overwrite_output_dir|damaged"):
        make_trainer(method="one_shot", max_steps=1, save_strategy="no").train("auto")


@pytest.mark.parametrize("column", ["input_ids", "labels"])
def test_a_changed_row_makes_it_a_different_run(make_trainer: Make, column: str) -> None:
    rows = token_rows(9)["input_ids"]
    labels = [[1] * len(row) for row in rows]
    data = {"train_dataset": Dataset.from_dict({"input_ids": rows, "labels": labels}), "method": "one_shot"}
    was = make_trainer(**data).identity()
    changed = {"input_ids": [list(row) for row in rows], "labels": [list(row) for row in labels]}
    changed[column][3][0] += 1
    data["train_dataset"] = Dataset.from_dict(changed)
    now = make_trainer("other", **data).identity()
    assert [name for name in now if now[name] != was[name]] == ["data"]


def test_a_run_without_a_checkpoint_starts_again_only_as_the_same_run(make_trainer: Make) -> None:
    first = make_trainer(method="one_shot", max_steps=2)
    first.train("auto")
    again = make_trainer(method="one_shot", max_steps=2)
    again.train("auto")
    assert same(weights(first), weights(again))
    steps = [record["step"] for record in again.metrics_file.read()]
    assert steps == [1, 2, 2]
    with pytest.raises(UserError, match=r"the run in '.*run' was created with a different weight_decay\. Resume with"):
        make_trainer(method="one_shot", max_steps=2, weight_decay=0.1).train("auto")
    with pytest.raises(
        UserError, match="resume_from_checkpoint=auto continues a run, overwrite_output_dir replaces it"
    ):
        make_trainer(method="one_shot", max_steps=2, overwrite_output_dir=True).train("auto")


# ---- Damaged ----

FILES = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "config.json"]
FILES += [PROGRESS_FILE]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps with a checkpoint at each; that after the first is whole."""
    folder = tmp_path_factory.mktemp("finished")
    make_trainer.__wrapped__(folder)(**{**SAVED, "save_total_limit": 2, "max_steps": 2}).train()  # type: ignore[attr-defined]
    return folder / "run"


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", ["flipped", "older", "missing", "cut"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_of_a_checkpoint_is_named(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    file = run / "checkpoint-2" / name
    if damage == "flipped":
        flip(file)
    elif damage == "older":
        file.write_bytes((run / "checkpoint-1" / name).read_bytes())
    elif damage == "cut":
        os.truncate(file, file.stat().st_size - 1)
    else:
        file.unlink()
    if (name, damage) == (PROGRESS_FILE, "missing"):
        assert saving.find_checkpoint(True, run) == run / "checkpoint-1"
        return
    if damage == "older" and name in ("config.json", "rng_state.pth"):  # they are as they were
        assert saving.find_checkpoint(True, run) == run / "checkpoint-2"
        return
    with pytest.raises(UserError, match=r"checkpoint-2' is damaged, so resume from '.*checkpoint-1' \("):
        saving.find_checkpoint(True, run)
    assert saving.find_checkpoint("auto", run) == run / "checkpoint-1"
    assert re.search(r"checkpoint-2' is damaged \(.*\): the one before it is used", caplog.text)


def test_a_checkpoint_with_a_changed_number_or_an_added_file_is_damaged(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    newest = run / "checkpoint-2"
    assert saving.find_checkpoint(True, run) == newest
    (newest / "notes.txt").touch()
    assert saving.find_checkpoint(True, run) == newest
    (newest / "scaler.pt").touch()
    with pytest.raises(UserError, match=r"scaler\.pt was added"):
        saving.find_checkpoint(str(newest), run)
    (newest / "scaler.pt").unlink()
    content = json.loads((newest / PROGRESS_FILE).read_text())
    content["progress"]["samples"] += 1
    (newest / PROGRESS_FILE).write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"progress\.json cannot be read: it was changed"):
        saving.find_checkpoint(str(newest), run)
    flip(run / "checkpoint-1" / "optimizer.pt")
    with pytest.raises(UserError, match="checkpoint-1' is damaged, so start"):
        saving.find_checkpoint("auto", run)


def test_statistics_that_were_changed_are_not_used(make_trainer: Make, tmp_path: Path) -> None:
    settings = {**SAVED, "projection": "pca"}
    make_trainer(**settings).train()
    flip(statistics := tmp_path / "run" / "target_stats.safetensors")
    file = saving.StatisticsFile(statistics, read=True, write=True)
    progress = saving.read_progress(tmp_path / "run" / "checkpoint-3")
    with pytest.raises(UserError, match=r"target_stats\.safetensors' is damaged: delete it, and it is computed again"):
        saving.check_statistics(file, progress.statistics)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("data_seed", 5),
        ("lr_scheduler_type", "linear"),
        ("warmup_steps", 2),
        ("max_grad_norm", 0.5),
        ("adam_beta2", 0.9),
        ("optim", "sgd"),
        ("weight_decay", 0.1),
        ("train_sampling_strategy", "sequential"),
        ("ignore_data_skip", True),
        ("bf16", True),
        ("neftune_noise_alpha", 1.0),
        ("dataloader_drop_last", True),
        ("batch size", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
        ("data collator", {}),
        ("student", {}),
    ],
)
def test_an_option_that_changes_the_student_is_part_of_the_run(make_trainer: Make, name: str, value: Any) -> None:
    change = dict(value) if isinstance(value, dict) else {name: value}
    if name == "student":
        change = {"student": llama(2, 16, seed=2, num_key_value_heads=1)}
    if name == "data collator":
        change = {"data_collator": Padding(3)}
    first = make_trainer(method="one_shot", max_steps=2).identity()
    other = make_trainer("other", method="one_shot", max_steps=2, **change).identity()
    assert [key for key in first if first[key] != other[key]] == [name]
    assert first == make_trainer("third", method="one_shot", max_steps=2).identity()


def test_the_number_of_processes_is_part_of_the_run(make_trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(method="one_shot", max_steps=2)
    was = trainer.identity()
    monkeypatch.setattr(CurriculumConfig, "world_size", 2)
    with pytest.raises(UserError, match="the run was created with a different number of processes"):
        checks.check_same_run(was, trainer.identity(), "the run")


class Padding:
    """A collator of the user's own."""

    def __init__(self, fill: int):
        self.fill = fill

    def __call__(self, rows: Any) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([row["input_ids"] for row in rows])}


# Options of transformers that change no student, or only the rounding of one; the others are in `run_identity`.
NO_EFFECT = """
    activation_checkpointing activation_checkpointing_kwargs average_tokens_across_devices batch_eval_metrics
    bf16_full_eval dataloader_in_order dataloader_multiprocessing_context dataloader_num_workers
    dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor ddp_backend ddp_broadcast_buffers
    ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph ddp_timeout debug deepspeed disable_tqdm do_eval
    do_predict do_train enable_jit_checkpoint eval_accumulation_steps eval_delay eval_do_concat_batches eval_on_start
    eval_steps eval_strategy eval_use_gather_object fp16_full_eval gradient_checkpointing
    gradient_checkpointing_kwargs hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy hub_token
    include_for_metrics include_num_input_tokens_seen label_names label_smoothing_factor liger_kernel_config
    local_rank log_level log_level_replica log_on_each_node logging_dir logging_first_step logging_nan_inf_filter
    logging_steps logging_strategy output_dir parallelism_config per_device_eval_batch_size prediction_loss_only
    project push_to_hub report_to restore_callback_states_from_checkpoint resume_from_checkpoint run_name
    save_on_each_node save_only_model save_steps save_strategy save_total_limit skip_memory_metrics torch_compile
    torch_compile_backend torch_compile_mode torch_empty_cache_steps trackio_bucket_id trackio_space_id
    trackio_static_space_id use_cache use_cpu
"""
# In the identity under another name, or by what they lead to.
NAMED = """
    learning_rate per_device_train_batch_size gradient_accumulation_steps seed accelerator_config fsdp fsdp_config max_steps
    num_train_epochs
"""


def test_every_option_of_transformers_is_in_the_identity_or_has_no_effect() -> None:
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    others = {*NO_EFFECT.split(), *NAMED.split()}
    assert names - others - set(checks.SETTINGS) == set()
    assert not set(checks.SETTINGS) & others


def test_a_checkpoint_without_an_optimiser_is_not_resumed_from(make_trainer: Make) -> None:
    settings = {
        **SAVED,
        "max_steps": 3,
        "save_steps": 2,
        "save_total_limit": 4,
        "save_only_model": True,
        "method": "one_shot",
    }
    (trainer := make_trainer(**settings)).train()
    with pytest.raises(UserError, match="has no state of the optimiser"):
        make_trainer(**settings).train(str(trainer.folder / "checkpoint-2"))


# ---- Steps ----


def test_a_batch_larger_than_the_data_is_refused_where_it_would_be_dropped(make_trainer: Make) -> None:
    with pytest.raises(UserError, match="has 3 rows, fewer than a batch of 4 examples, and dataloader_drop_last"):
        make_trainer(train_dataset=token_rows(3), dataloader_drop_last=True)
    make_trainer(train_dataset=token_rows(4), dataloader_drop_last=True)


def test_a_run_whose_data_end_too_early_does_not_end_well(make_trainer: Make) -> None:
    data = iter([{"input_ids": row} for row in token_rows(8)["input_ids"]])

    class Once(IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[Any]:
            return data

    trainer = make_trainer(train_dataset=Once(), method="one_shot", max_steps=4)
    trainer.feed = make_trainer("other", method="one_shot").feed  # the calibration would read the rows
    with pytest.raises(UserError, match="the run made 2 of its 4 steps, then the training data had no more batches"):
        trainer.train()


def test_a_run_that_a_callback_stops_ends_well(make_trainer: Make) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 2

    assert make_trainer(method="one_shot", callbacks=[Stop()]).train().global_step == 2


# ---- Log lines ----


def test_log_lines_and_the_mean_loss_do_not_show_a_resume(make_trainer: Make, tmp_path: Path, faults: Any) -> None:
    settings = {**SAVED, "logging_steps": 4, "save_steps": 3, "max_steps": 10, "save_total_limit": 9}
    settings |= {"eval_strategy": "steps", "eval_steps": 3, "eval_on_start": True}
    whole = make_trainer("whole", **settings).train()
    again = make_trainer("again", **settings)
    again.train(str(tmp_path / "whole" / "checkpoint-6"))
    lines = faults.rows(tmp_path / "whole")
    assert faults.rows(tmp_path / "again") == lines  # also in a different folder: those before the checkpoint are in it
    losses = [line for line in lines if "loss" in line]
    assert len(losses) == 2 and all("hidden_loss" in line for line in losses)
    ended = make_trainer("whole", **settings).train(resume_from_checkpoint=True)
    assert ended.training_loss == whole.training_loss == lines[-1]["train_loss"]
    assert faults.rows(tmp_path / "whole") == lines


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_log_lines_that_were_damaged_come_back_from_the_checkpoint(
    make_trainer: Make, tmp_path: Path, faults: Any, damage: str
) -> None:
    settings = {**SAVED, "logging_steps": 1, "max_steps": 4}
    with faults.Faults(tmp_path).watching() as seen:
        make_trainer("whole", **settings).train()
    last_step = max(number for number, kind in enumerate(seen.kinds) if kind == "step")
    with pytest.raises(faults.Killed), faults.Faults(tmp_path, last_step).watching():
        make_trainer("run", **settings).train("auto")
    file = tmp_path / "run" / "metrics.jsonl"
    assert complete_checkpoints(tmp_path / "run")
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        os.truncate(file, 10)
    else:
        flip(file)
    make_trainer("run", **settings).train("auto")
    assert faults.rows(tmp_path / "run") == faults.rows(tmp_path / "whole")


def test_a_run_whose_curriculum_file_is_lost_goes_on_from_its_checkpoint(make_trainer: Make, tmp_path: Path) -> None:
    make_trainer("run", **SAVED).train()
    before = (tmp_path / "run" / "curriculum.json").read_text()
    (tmp_path / "run" / "curriculum.json").unlink()
    with pytest.raises(UserError, match="already contains a run"):
        make_trainer("run", **SAVED).train()
    make_trainer("run", **SAVED).train("auto")
    assert (tmp_path / "run" / "curriculum.json").read_text() == before


def test_a_damaged_log_line_is_named(make_trainer: Make, tmp_path: Path) -> None:
    trainer = make_trainer(method="one_shot", max_steps=2)
    trainer.train()
    content = trainer.metrics_file.path.read_text().splitlines(keepends=True)
    trainer.metrics_file.path.write_text("".join([content[0], "{\n", *content[1:]]))
    with pytest.raises(UserError, match=r"line 2 of '.*metrics\.jsonl' is damaged"):
        trainer.metrics_file.read()


# ---- A full disk ----


@pytest.mark.parametrize("size", [20, 4_000, 15_000, 30_000])
def test_a_file_that_cannot_be_written_is_one_error_and_the_last_checkpoint_stays(
    make_trainer: Make, tmp_path: Path, size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {**SAVED, "method": "one_shot", "max_steps": 2}

    class Full(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    trainer = make_trainer(callbacks=[Full()], **settings)
    with largest_file(-1), pytest.raises(UserError, match=r"could not write '.*': .*; free space there, or choose"):
        trainer.train()
    assert saving.find_checkpoint("auto", tmp_path / "run") == tmp_path / "run" / "checkpoint-1"
    again = make_trainer(**settings)
    again.train("auto")
    assert again.state.global_step == 2
