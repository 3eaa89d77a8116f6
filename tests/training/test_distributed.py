"""Two data-parallel processes give the parameters of one."""

from __future__ import annotations

import dataclasses
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_model

from tests.launch import launch
from tests.training.conftest import llama, token_rows
from tutelage import CurriculumConfig, CurriculumTrainer
from tutelage.core.curriculum import Curriculum
from tutelage.core.errors import UserError
from tutelage.core.processes import Group
from tutelage.core.stages import HiddenStage, JointStage, OutputStage
from tutelage.tasks.language import CausalCollator
from tutelage.training.records import MetricsFile


def train(output: Path, batch: int, checkpointing: bool) -> None:
    args = CurriculumConfig(
        output_dir=str(output),
        per_device_train_batch_size=batch,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        calibration_samples=16,
        eval_with_teacher=True,
        optim="sgd",
        max_grad_norm=0.5,
        gradient_checkpointing=checkpointing,
    )
    hidden = (HiddenStage(2, 1, 2), HiddenStage(2, "final", "final"))
    stages = (*hidden, JointStage(2, [(1, 2), (2, 3)]), OutputStage(3))
    trainer = CurriculumTrainer(
        curriculum=Curriculum("own", stages, warm_start="head"),
        model=llama(2, 16, seed=2),
        teacher_model=llama(4, 24, seed=1),
        args=args,
        train_dataset=token_rows(ragged=True),
        eval_dataset=token_rows(7, seed=9),
        data_collator=CausalCollator(),
    )
    forwards: list[int] = []
    states = trainer.source._counted_states  # type: ignore[attr-defined]
    trainer.source._counted_states = lambda *given: (forwards.append(1), states(*given))[1]  # type: ignore[attr-defined]
    trainer.train()
    (output / f"forwards-{args.process_index}").write_text(str(len(forwards)))
    trainer.evaluate()
    trainer.save_model()
    started = CurriculumTrainer(
        model=llama(2, 16, seed=2 + args.process_index, head_dim=12),
        teacher_model=llama(4, 24, seed=1),
        args=dataclasses.replace(
            args, output_dir=str(output / "started"), student_init="teacher", method="joint", max_steps=2
        ),
        train_dataset=token_rows(),
        data_collator=CausalCollator(),
    )
    started.train()
    save_model(started.model, str(output / f"started-{args.process_index}.safetensors"))
    curricula = {
        "learned": Curriculum(
            "own", (JointStage(2, [(1, 2), ("final", "final")]), OutputStage(1)), projection="learned"
        ),
        "transplanted": Curriculum("own", (OutputStage(2),), warm_start="head+embedding"),
    }
    for name, curriculum in curricula.items():
        trainer = CurriculumTrainer(
            curriculum=curriculum,
            model=llama(2, 16, seed=2),
            teacher_model=llama(4, 24, seed=1),
            args=dataclasses.replace(args, output_dir=str(output / name)),
            train_dataset=token_rows(ragged=True),
            data_collator=CausalCollator(),
        )
        trainer.train()
        save_model(trainer.objective, str(output / f"{name}-{args.process_index}.safetensors"))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def trained(output: Path, processes: int, batch: int, checkpointing: bool = False) -> dict[str, torch.Tensor]:
    launch(processes, train, output, batch, checkpointing)
    return load_file(output / "model.safetensors")


def test_two_processes_equal_one(tmp_path: Path) -> None:
    one = trained(tmp_path / "one", 1, 8)
    two = trained(tmp_path / "two", 2, 4)
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    for run in ("started", "learned", "transplanted"):
        found = [
            load_file(tmp_path / f"{name}.safetensors") for name in (f"one/{run}-0", f"two/{run}-0", f"two/{run}-1")
        ]
        for name, value in found[0].items():
            torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
            assert torch.equal(found[1][name], found[2][name]), name
    # two stages and two pairs of a joint stage, twice over 16 examples each
    assert [(tmp_path / name).read_text() for name in ("one/forwards-0", "two/forwards-0", "two/forwards-1")] == [
        "16"
    ] * 3
    left, right = (MetricsFile(tmp_path / name / "metrics.jsonl").read() for name in ("one", "two"))
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a["samples"] == b["samples"]
        assert a["tokens"] == b["tokens"]
        assert b["flops"] == pytest.approx(a["flops"], rel=0.3)  # padding differs with the micro-batch
        for key in ("loss", "eval_loss", "eval_kl", "eval_accuracy"):
            if key in a:
                assert b[key] == pytest.approx(a[key], rel=1e-4), key


def test_two_processes_with_gradient_checkpointing(tmp_path: Path) -> None:
    one = trained(tmp_path / "one", 1, 8)
    two = trained(tmp_path / "two", 2, 4, checkpointing=True)
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def refused(error: type[Exception]) -> None:
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=20))

    def make() -> None:
        raise error("too few rows")

    with pytest.raises(error, match="too few rows"):
        Group.of_all("cpu").first(make)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("error", [UserError, RuntimeError])
def test_what_the_first_process_raises_reaches_the_others(error: type[Exception]) -> None:
    launch(2, refused, error)
