"""Every way to run a step gives the parameters that a plain loop gives.

{compiled, not} x {1, 2 processes} x {accumulation 1, 2} x {ragged, packed} x {float32, bfloat16 autocast} x
{map-style, iterable}, on two tiny models. A compiled run takes seconds: half of these are made, with every combination of
any five of the six other settings. The runs of a group, of one kind of compiling and of processes, are made together in new
processes: compiling leaves its marks on the whole process, and graphs are shared."""

from __future__ import annotations

import itertools
import os
import shutil
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from tests.launch import launch
from tests.training.conftest import VOCAB, llama, token_rows
from tutelage import CurriculumConfig, CurriculumTrainer, RandomProjection
from tutelage.tasks.language import CausalCollator

STEPS, BATCH, RATE = 4, 4, 0.05  # two steps of the hidden stage 1:1, then two of the output stage
WIDTH, TEACHER_WIDTH = 16, 24
MODELS = ("llama", "bert")


@dataclass(frozen=True)
class Cell:
    model: str
    compiled: bool
    processes: int
    accumulation: int
    ragged: bool
    half: bool
    iterable: bool

    @property
    def rows_per_step(self) -> int:
        return BATCH * self.accumulation * self.processes

    @property
    def is_in_half(self) -> bool:
        """Whether it is in the half that has every combination of any five settings."""
        choices = (
            self.model == "bert",
            self.processes == 2,
            self.accumulation == 2,
            self.ragged,
            self.half,
            self.iterable,
        )
        return sum(choices) % 2 == 0

    @property
    def traced(self) -> tuple[str, bool, bool]:
        """What the graphs of a compiled run depend on."""
        return self.model, self.ragged, self.half

    @property
    def name(self) -> str:
        """For the test, and for the file of the run's parameters."""
        words = [
            self.model,
            "compiled" if self.compiled else "eager",
            f"{self.processes}proc",
            f"accumulation{self.accumulation}",
            "ragged" if self.ragged else "packed",
            "bf16" if self.half else "float32",
            "iterable" if self.iterable else "map",
        ]
        return "-".join(words)


FLAGS = (False, True)
CELLS = [
    cell
    for cell in itertools.starmap(Cell, itertools.product(MODELS, FLAGS, (1, 2), (1, 2), FLAGS, FLAGS, FLAGS))
    if not cell.compiled or cell.is_in_half
]


def network(name: str, layers: int, width: int, seed: int) -> nn.Module:
    if name == "llama":
        return llama(layers, width, seed)
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": 2 * width}
    dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(vocab_size=VOCAB, num_attention_heads=2, max_position_embeddings=32, **sizes, **dropouts)
    config.initializer_range = 0.2
    return BertForMaskedLM(config)


def rows_of(model: str, ragged: bool) -> Dataset:
    rows = token_rows(STEPS * BATCH * 4, ragged=ragged)
    if model == "llama":
        return rows
    keep = torch.Generator().manual_seed(5)  # a masked model learns from every third token or so

    def labels(row: dict[str, Any]) -> dict[str, Any]:
        drawn = torch.rand(len(row["input_ids"]), generator=keep).tolist()
        return {"labels": [i if u < 0.4 else -100 for i, u in zip(row["input_ids"], drawn, strict=True)]}

    return rows.map(labels)


def run(cell: Cell, output: Path) -> dict[str, torch.Tensor]:
    """The student's parameters after a run of `CurriculumTrainer`."""
    rows: Any = rows_of(cell.model, cell.ragged)
    args = CurriculumConfig(
        output_dir=str(output),
        max_steps=STEPS,
        stage_steps=[2],
        layer_map="1:1",
        normalize="none",
        warm_start="none",
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=cell.accumulation,
        train_sampling_strategy="sequential",
        learning_rate=RATE,
        lr_scheduler_type="constant",
        warmup_steps=0,
        optim="sgd",
        max_grad_norm=0.0,
        bf16=cell.half,
        torch_compile=cell.compiled,
        torch_compile_backend="eager" if cell.compiled else None,  # the graphs of the compiler, without its code
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        calibration_samples=2,
        # rows of a stream are dispatched by one process, which takes rows of one length alone
        accelerator_config={"dispatch_batches": False} if cell.iterable else None,
    )
    student, teacher = network(cell.model, 2, WIDTH, 2), network(cell.model, 2, TEACHER_WIDTH, 1)
    if cell.iterable:
        rows = rows.to_iterable_dataset()
    trainer = CurriculumTrainer(student, teacher, args, rows, data_collator=CausalCollator())
    trainer.train()
    assert trainer.state.global_step == STEPS
    return {name: value.clone() for name, value in student.state_dict().items()}


def run_group(folder: Path, compiled: bool, processes: int) -> None:
    """All cells of a group, in this process and its siblings; the first one keeps the parameters, or what went wrong."""
    torch._dynamo.config.optimize_ddp = False  # it traces each network anew, where graphs are shared here
    first = int(os.environ.get("RANK", "0")) == 0
    cells = [cell for cell in CELLS if (cell.compiled, cell.processes) == (compiled, processes)]
    traced: Any = None
    for cell in sorted(cells, key=lambda cell: cell.traced):  # runs that share graphs together
        if compiled and cell.traced != traced:
            traced = cell.traced
            torch._dynamo.reset()
            torch._dynamo.config.assume_static_by_default = not cell.ragged  # one graph for all lengths from the start
        try:
            found = run(cell, folder / "output" / cell.name)
            breaks = torch._dynamo.utils.counters["graph_break"]
            assert processes > 1 or not breaks, breaks  # DistributedDataParallel has some of its own
        except Exception:
            if first:
                (folder / f"{cell.name}.error").write_text(traceback.format_exc(), encoding="utf-8")
        else:
            if first:
                save_file(found, folder / f"{cell.name}.safetensors")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool, int], Path]:
    """Folder with the parameters of all runs of a group, made when one of pytest's workers first asks for it."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared

    @cache
    def made(compiled: bool, processes: int) -> Path:
        folder = shared / f"matrix-{compiled}-{processes}"
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                folder.mkdir()
                launch(processes, run_group, folder, compiled, processes)
                shutil.rmtree(folder / "output")
        return folder

    return made


@cache
def reference(model: str, ragged: bool, half: bool, size: int) -> dict[str, torch.Tensor]:
    """The student's parameters after a plain loop over whole steps of `size` rows."""
    student, teacher = network(model, 2, WIDTH, 2).train(), network(model, 2, TEACHER_WIDTH, 1).eval()
    rows, optimizer = rows_of(model, ragged), torch.optim.SGD(student.parameters(), lr=RATE)
    matrix = RandomProjection(TEACHER_WIDTH, WIDTH, (0, 1)).matrix()
    for step in range(STEPS):
        batch = CausalCollator(always_mask=True)(list(rows.select(range(step * size, (step + 1) * size))))
        labels = batch.pop("labels")
        with torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
            mine = student(**batch, output_hidden_states=True)
            with torch.no_grad():
                theirs = teacher(**batch, output_hidden_states=True)
                target = theirs.hidden_states[1].float() @ matrix
        mask = batch["attention_mask"].bool()
        if step < 2:
            loss = F.mse_loss(mine.hidden_states[1].float()[mask], target[mask])
        else:
            logits, teacher_logits = mine.logits, theirs.logits
            if model == "llama":  # position t predicts token t + 1
                labels, logits, teacher_logits = labels[:, 1:], logits[:, :-1], teacher_logits[:, :-1]
            log_q, log_p = (values.float()[labels != -100].log_softmax(-1) for values in (logits, teacher_logits))
            loss = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: value.detach() for name, value in student.state_dict().items()}


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_a_run_gives_the_parameters_of_a_plain_loop(cell: Cell, group: Callable[[bool, int], Path]) -> None:
    folder = group(cell.compiled, cell.processes)
    assert not (error := folder / f"{cell.name}.error").exists(), error.read_text(encoding="utf-8")
    found = load_file(folder / f"{cell.name}.safetensors")
    expected, start = (
        reference(cell.model, cell.ragged, cell.half, cell.rows_per_step),
        network(cell.model, 2, WIDTH, 2).state_dict(),
    )
    names = [name for name in found if expected[name].is_floating_point()]
    moved, difference = (
        torch.cat([(left[name] - right[name]).flatten() for name in names]).norm()
        for left, right in ((expected, start), (found, expected))
    )
    assert moved > 0.05
    assert difference < (0.02 if cell.half else 1e-5) * moved
