"""Two data-parallel processes give the parameters of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = """
import os
import sys
import torch
from tests.training.conftest import llama, token_rows
from tutelage import CurriculumConfig, CurriculumTrainer
from tutelage.tasks.language import CausalCollator

output, batch, checkpointing = sys.argv[1], int(sys.argv[2]), len(sys.argv) > 3
args = CurriculumConfig(
    output_dir=output, max_steps=7, per_device_train_batch_size=batch, learning_rate=1e-2, logging_steps=1,
    save_strategy="no", disable_tqdm=True, use_cpu=True, calibration_samples=8, eval_with_teacher=True,
    layer_map="1:2,final:final", stage_steps=[2, 2], warm_start="head", optim="sgd", max_grad_norm=0.5,
    gradient_checkpointing=checkpointing,
)
trainer = CurriculumTrainer(
    model=llama(2, 16, seed=2), teacher_model=llama(4, 24, seed=1), args=args,
    train_dataset=token_rows(ragged=True), eval_dataset=token_rows(7, seed=9), data_collator=CausalCollator(),
)
trainer.train()
trainer.evaluate()
trainer.save_model()
sys.stdout.flush()
if torch.distributed.is_initialized():
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # gloo's threads now and then abort an interpreter that winds down
"""


def _train(output: Path, processes: int, batch: int, *flags: str) -> dict[str, torch.Tensor]:
    script = output.parent / "train.py"
    script.write_text(SCRIPT)
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, str(script), str(output), str(batch), *flags]
    if processes > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        command = [*launcher, "--standalone", *command[1:]]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(output / "model.safetensors")


def test_two_processes_equal_one(tmp_path: Path) -> None:
    from tutelage.training.records import MetricsFile

    one = _train(tmp_path / "one", 1, 8)
    two = _train(tmp_path / "two", 2, 4)
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
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
    one = _train(tmp_path / "one", 1, 8)
    two = _train(tmp_path / "two", 2, 4, "checkpointing")
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
