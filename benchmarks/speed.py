"""Speed and memory of tutelage's training step, as ratios measured within one run.

    python benchmarks/speed.py            # about 5 minutes on 2 quiet cores
    python benchmarks/speed.py --quick    # smoke run, tiny models: its figures mean nothing

Models are Llamas with random weights: nothing is downloaded. The two sides of a ratio alternate (A B, B A, ...) and each
counts with its median, so that a drift of the machine meets both alike.

*Memory* is the growth of resident memory in one training step, on the CPU, in a process of its own for each case: the
high-water mark of the step (`ru_maxrss`) less what was resident before it, after a step on one short row has made the
optimiser's state and loaded the libraries. Every tensor above 64 KiB is mapped by itself (`MALLOC_MMAP_THRESHOLD_`), so
freed memory is returned at once; ballast fills what the set-up had needed and given back, which would hide the step's.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from datasets import Dataset
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

import tutelage
from tutelage import CurriculumConfig, CurriculumTrainer
from tutelage.core.curriculum import Curriculum, HiddenStage, extraction
from tutelage.core.heads import OutputHead
from tutelage.core.losses import output_loss
from tutelage.targets.live import LiveTargets, TargetMap, calibrate
from tutelage.tasks.language import CausalCollator
from tutelage.tasks.registry import get_task
from tutelage.training.objective import StageObjective
from tutelage.training.transition import StageSwitch

ROOT = Path(__file__).resolve().parent.parent
LEARNING_RATE = 1e-4
WARM_UP = 3  # untimed steps before each measurement


@dataclass(frozen=True)
class Sizes:
    """What is measured, and how often."""

    teacher_blocks: int = 12
    student_blocks: int = 6
    teacher_width: int = 256
    student_width: int = 128
    vocabulary: int = 32_000
    batch: int = 8
    length: int = 128
    stage_rounds: int = 20
    one_shot_rounds: int = 10
    trainer_steps: int = 100
    loss_vocabulary: int = 150_000
    loss_positions: int = 2048
    loss_width: int = 256


QUICK = Sizes(4, 2, 64, 32, 1000, 2, 32, 3, 2, 10, 20_000, 1024, 64)


@dataclass(frozen=True)
class Figure:
    """One measured ratio against its target."""

    name: str
    ratio: float
    target: str
    met: bool
    numerator: float
    denominator: float
    unit: str


def figure(name: str, top: float, bottom: float, unit: str, *, most: float = 0.0, least: float = 0.0) -> Figure:
    """A ratio that should be at most `most`, or at least `least`."""
    ratio = top / bottom
    target, met = (f"≤ {most:g}", ratio <= most) if most else (f"≥ {least:g}", ratio >= least)
    print(f"  {name}: {ratio:.3f} (target {target})", flush=True)
    return Figure(name, ratio, target, met, top, bottom, unit)


# ---- Models and steps ----


def llama(sizes: Sizes, blocks: int, width: int, seed: int) -> LlamaForCausalLM:
    """A Llama with random weights and untied embeddings."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2 * sizes.length,
    )
    return LlamaForCausalLM(config)


def token_rows(sizes: Sizes, count: int) -> list[dict[str, list[int]]]:
    """Blocks of random tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, sizes.vocabulary, (count * sizes.batch, sizes.length), generator=generator).tolist()
    return [{"input_ids": row} for row in ids]


def token_batch(sizes: Sizes) -> dict[str, torch.Tensor]:
    """One batch of random tokens."""
    return CausalCollator()(token_rows(sizes, 1))


def optimizer_of(module: nn.Module) -> torch.optim.Optimizer:
    """transformers' default optimiser, over the parameters that train."""
    return torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=LEARNING_RATE, fused=True)


def step_of(loss: Callable[[], torch.Tensor], optimizer: torch.optim.Optimizer) -> Callable[[], float]:
    """One training step that tells its loss."""

    def step() -> float:
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(value.detach())

    return step


def make_objective(sizes: Sizes, curriculum: Curriculum | None = None) -> tuple[StageObjective, StageSwitch]:
    """Objective and switch of a curriculum (the pair's extraction), calibrated, as the trainer makes them."""
    student = llama(sizes, sizes.student_blocks, sizes.student_width, seed=1)
    teacher = LiveTargets(llama(sizes, sizes.teacher_blocks, sizes.teacher_width, seed=2))
    curriculum = curriculum or extraction(sizes.student_blocks, sizes.teacher_blocks, steps=20 * sizes.student_blocks)
    maps = calibrate(teacher, curriculum, [token_batch(sizes)], sizes.student_width)
    objective = StageObjective(student.train(), teacher, curriculum, get_task("causal_lm"), maps)
    return objective, StageSwitch(objective)


def enter(objective: StageObjective, switch: StageSwitch, index: int, batch: dict[str, Any]) -> None:
    """Put everything in the state of stage `index`."""
    switch.enter(index, True, lambda: {name: value[:1] for name, value in batch.items()})
    switch.set_trainable(switch.trainable)
    objective.zero_grad()


def tutelage_step(objective: StageObjective, batch: dict[str, Any]) -> Callable[[], float]:
    """What the trainer runs in the current stage."""
    return step_of(lambda: objective(**batch)["loss"], optimizer_of(objective.student))


def truncated(model: LlamaForCausalLM, blocks: int) -> nn.Module:
    """A copy of the network that has only its first blocks, and no final norm or head."""
    base = copy.deepcopy(model.model)
    base.layers = base.layers[:blocks]
    base.norm = nn.Identity()
    return base


def plain_step(
    student: LlamaForCausalLM,
    teacher: LlamaForCausalLM,
    stage: HiddenStage,
    target_map: TargetMap,
    batch: dict[str, Any],
) -> Callable[[], float]:
    """The same hidden stage as a hand-written loop over physically truncated copies of both networks."""
    assert isinstance(stage.student_place, int) and isinstance(stage.teacher_place, int)
    short_student = truncated(student, stage.student_place).train()
    short_teacher = truncated(teacher, stage.teacher_place).eval()
    mean, scale = target_map.standardizer.mean, target_map.standardizer.scale
    matrix = target_map.projection.matrix()

    def loss() -> torch.Tensor:
        with torch.no_grad():
            hidden = short_teacher(input_ids=batch["input_ids"], use_cache=False).last_hidden_state
            target = (hidden - mean) / scale @ matrix
        state = short_student(input_ids=batch["input_ids"], use_cache=False).last_hidden_state
        return F.mse_loss(state, target)

    return step_of(loss, optimizer_of(short_student))


def seconds(action: Callable[[], Any]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def alternate(first: Callable[[], Any], second: Callable[[], Any], rounds: int) -> tuple[float, float]:
    """Median seconds of each of two actions, taken by turns."""
    for _ in range(WARM_UP):
        first()
        second()
    times: tuple[list[float], list[float]] = ([], [])
    gc.collect()
    for number in range(rounds):
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            times[side].append(seconds((first, second)[side]))
    return statistics.median(times[0]), statistics.median(times[1])


# ---- What is measured ----


def hidden_stages(sizes: Sizes) -> list[Figure]:
    """Each hidden stage over the hand-written loop; both must give the same loss."""
    figures = []
    batch = token_batch(sizes)
    objective, switch = make_objective(sizes)
    assert objective.teacher is not None
    for index, stage in enumerate(objective.curriculum.stages):
        target_map = objective.maps[index]
        if target_map is None:
            continue
        enter(objective, switch, index, batch)
        plain = plain_step(objective.student, objective.teacher.model, stage, target_map, batch)  # type: ignore[arg-type]
        ours = tutelage_step(objective, batch)
        losses = ours(), plain()
        if abs(losses[0] - losses[1]) > 1e-4 * losses[1]:
            raise RuntimeError(f"the two sides of stage {index + 1} differ: losses {losses[0]} and {losses[1]}")
        top, bottom = alternate(ours, plain, sizes.stage_rounds)
        figures.append(figure(f"step of stage {stage.name} / hand-written loop", top, bottom, "s", most=1.15))
    return figures


def first_stage_and_one_shot(sizes: Sizes) -> Figure:
    """A one-shot step over a step of the first stage; two students, so that each has its own trainable set."""
    batch = token_batch(sizes)
    steps = []
    for index in (-1, 0):
        objective, switch = make_objective(sizes)
        enter(objective, switch, index % len(objective.curriculum.stages), batch)
        steps.append(tutelage_step(objective, batch))
    top, bottom = alternate(steps[0], steps[1], sizes.one_shot_rounds)
    return figure(f"one-shot step / first-stage step, vocabulary {sizes.vocabulary:,}", top, bottom, "s", least=8.0)


class _Turns(TrainerCallback):
    """Times the trainer's steps, data loading included, and after each of them one bare step."""

    def __init__(self, bare: Callable[[int], None]) -> None:
        self.bare = bare
        self.times: tuple[list[float], list[float]] = ([], [])
        self.start: float | None = None

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """The trainer's step ends; the next one starts when the bare one is over."""
        now = time.perf_counter()
        if self.start is not None:
            self.times[0].append(now - self.start)
        self.times[1].append(seconds(lambda: self.bare(len(self.times[1]))))
        self.start = time.perf_counter()


def trainer_overhead(sizes: Sizes) -> Figure:
    """`CurriculumTrainer.train()` over a bare loop of an equal objective, with its batches, clipping and optimiser."""
    count = sizes.trainer_steps
    rows = token_rows(sizes, count)
    batches = [CausalCollator()(rows[i * sizes.batch : (i + 1) * sizes.batch]) for i in range(count)]
    # the second stage: a short step, where overhead shows, but above 50 ms
    teacher_place = 2 * sizes.teacher_blocks // sizes.student_blocks
    stage = HiddenStage(count, student_place=2, teacher_place=teacher_place)
    curriculum = Curriculum("extraction", (stage,))
    objective, switch = make_objective(sizes, curriculum)
    enter(objective, switch, 0, batches[0])
    optimizer = optimizer_of(objective.student)
    parameters = [p for p in objective.student.parameters() if p.requires_grad]

    def bare(number: int) -> None:
        objective(**batches[number])["loss"].backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    turns = _Turns(bare)
    with tempfile.TemporaryDirectory() as folder:
        settings = CurriculumConfig(
            output_dir=folder,
            max_steps=count,
            per_device_train_batch_size=sizes.batch,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            logging_steps=10 * count,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            calibration_samples=sizes.batch,
        )
        trainer = CurriculumTrainer(
            model=llama(sizes, sizes.student_blocks, sizes.student_width, seed=1),
            teacher_model=llama(sizes, sizes.teacher_blocks, sizes.teacher_width, seed=2),
            args=settings,
            train_dataset=Dataset.from_list(rows),
            data_collator=CausalCollator(),
            callbacks=[turns],
            curriculum=curriculum,
        )
        trainer.train()
    top, bottom = (statistics.median(times[WARM_UP:]) for times in turns.times)
    return figure(f"CurriculumTrainer / bare loop, {1000 * bottom:.0f} ms a step", top, bottom, "s", most=1.05)


# ---- Memory ----


def resident() -> int:
    """Bytes of memory resident now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def high_water() -> int:
    """Most bytes that were ever resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def stage_case(sizes: Sizes, index: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A training step of a stage on one short row, and the same on a batch."""
    batch = token_batch(sizes)
    row = {name: value[:1, :8].contiguous() for name, value in batch.items()}
    objective, switch = make_objective(sizes)
    enter(objective, switch, index, row)
    optimizer = optimizer_of(objective.student)
    small = step_of(lambda: objective(**row)["loss"], optimizer)
    return small, step_of(lambda: objective(**batch)["loss"], optimizer)


def loss_case(sizes: Sizes, chunked: bool) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Forward and backward of the output loss on a few positions, and the same on all."""
    generator = torch.Generator().manual_seed(0)
    heads = [nn.Linear(sizes.loss_width, sizes.loss_vocabulary, bias=False) for _ in range(2)]
    states = [torch.randn(sizes.loss_positions, sizes.loss_width, generator=generator) for _ in range(2)]
    student_head, teacher_head = heads[0], heads[1].requires_grad_(False)
    hidden = states[0].requires_grad_()

    def run(count: int) -> None:
        if chunked:
            loss = output_loss(hidden[:count], OutputHead(student_head), states[1][:count], OutputHead(teacher_head))
        else:
            with torch.no_grad():
                log_p = F.log_softmax(teacher_head(states[1][:count]), dim=-1)
            log_q = F.log_softmax(student_head(hidden[:count]), dim=-1)
            loss = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
        loss.backward()
        student_head.zero_grad()
        hidden.grad = None

    return lambda: run(4), lambda: run(sizes.loss_positions)


def memory_worker(case: str, sizes: Sizes) -> int:
    """Growth of resident memory in one step of `case`: a stage's index, `chunked` or `plain`."""
    small, full = stage_case(sizes, int(case)) if case.isdigit() else loss_case(sizes, case == "chunked")
    small()
    gc.collect()
    # memory that the set-up had and gave back would hide the step's: take it, so that the high-water mark is now
    ballast = torch.ones(max(0, high_water() - resident()) + 2**20, dtype=torch.uint8)
    before = resident()
    full()
    peak = high_water()
    del ballast
    if peak <= before:
        raise RuntimeError(f"memory case {case}: the step's growth could not be seen")
    return peak - before


def memory_of(case: str, quick: bool) -> int:
    """`memory_worker` in a process of its own."""
    command = [sys.executable, __file__, "--memory_case", case, *(["--quick"] if quick else [])]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.split()[-1])


def memory(sizes: Sizes, quick: bool) -> list[Figure]:
    """Hidden stages over a one-shot step, and the chunked output loss over the plain one."""
    stages = extraction(sizes.student_blocks, sizes.teacher_blocks, steps=20 * sizes.student_blocks).stages
    one_shot = memory_of(str(len(stages) - 1), quick)
    figures = [
        figure(
            f"peak memory of stage {stage.name} / one-shot", memory_of(str(index), quick), one_shot, "byte", most=1.0
        )
        for index, stage in enumerate(stages[:-1])
    ]
    name = f"peak memory of the output loss, chunked / full logits, vocabulary {sizes.loss_vocabulary:,}"
    figures.append(figure(name, memory_of("chunked", quick), memory_of("plain", quick), "byte", most=1.0))
    return figures


# ---- Report ----


def machine() -> dict[str, Any]:
    """Where and with what this ran."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_at_start": os.getloadavg()[0],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tutelage": tutelage.__version__,
    }


def table(figures: list[Figure]) -> str:
    """Markdown: what, both sides, ratio, target, met?"""

    def show(value: float, unit: str) -> str:
        return f"{1000 * value:.1f} ms" if unit == "s" else f"{value / 2**20:.0f} MiB"

    lines = ["| what | sides | measured | target | met? |", "| --- | --- | --- | --- | --- |"]
    for row in figures:
        sides = f"{show(row.numerator, row.unit)} / {show(row.denominator, row.unit)}"
        lines.append(f"| {row.name} | {sides} | {row.ratio:.3f} | {row.target} | {'yes' if row.met else '**no**'} |")
    return "\n".join(lines)


def readme(figures: list[Figure], sizes: Sizes, where: dict[str, Any], command: str, quick: bool) -> str:
    """The report as Markdown."""
    smoke = "**A smoke run (`--quick`): these figures mean nothing.**\n\n" if quick else ""
    return f"""# Speed and memory of a training step

{smoke}`{command}`

Student of {sizes.student_blocks} blocks and width {sizes.student_width}, teacher of {sizes.teacher_blocks} and
{sizes.teacher_width} (Llama shape, random weights), vocabulary {sizes.vocabulary:,}, batch {sizes.batch} x {sizes.length}.
{where["cpu"]}, {where["cores"]} cores, {where["threads"]} threads; torch {where["torch"]}, transformers
{where["transformers"]}, Python {where["python"]}.

{table(figures)}

Times are medians of a training step (forward, backward, optimiser), the two sides taken by turns. The hand-written loop
trains copies of both networks that were cut off at the stage's blocks; both sides are checked to give the same loss. The
trainer's bare loop has an equal objective, batches, gradient clipping and optimiser; start-up of
`train()` is not counted. Memory is the growth of resident
memory within one step on the CPU (high-water mark less what was resident before), each case in its own process: the
loss at {sizes.loss_positions} positions of width {sizes.loss_width}, forward and backward.
"""


def main() -> None:
    """Measure everything and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "speed", help="folder of the report")
    parser.add_argument("--memory_case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = QUICK if options.quick else Sizes()
    if options.memory_case is not None:
        print(memory_worker(options.memory_case, sizes))
        return
    where, start = machine(), time.perf_counter()
    command = shlex.join(["python", *sys.argv])
    figures = hidden_stages(sizes)
    figures.append(first_stage_and_one_shot(sizes))
    figures.append(trainer_overhead(sizes))
    figures += memory(sizes, options.quick)
    elapsed = time.perf_counter() - start
    print(f"\n{table(figures)}\n\n{elapsed:.0f} s")
    options.output.mkdir(parents=True, exist_ok=True)
    results = {
        "command": command,
        "quick": options.quick,
        "seconds": elapsed,
        "machine": where,
        "sizes": asdict(sizes),
        "figures": [asdict(row) for row in figures],
    }
    text = json.dumps(results, indent=2, ensure_ascii=False) + "\n"
    (options.output / "results.json").write_text(text, encoding="utf-8")
    report = readme(figures, sizes, where, command, options.quick)
    (options.output / "README.md").write_text(report, encoding="utf-8")


if __name__ == "__main__":
    main()
