"""Speed and memory of tutelage's training step, as ratios measured within one run.

    python benchmarks/speed.py            # about 10 minutes on 2 quiet cores, half of them in torch.compile
    python benchmarks/speed.py --quick    # smoke run, tiny models: its numbers mean nothing

Models are Llamas with random weights: nothing is downloaded. The two sides of a ratio alternate (A B, B A, ...) and each
counts with its median, so that a drift of the machine meets both alike. Student and teacher run as the trainer runs them,
through the views of `StageTransition.make_views`.

*Compiled* ratios have `torch.compile` on both sides: of the objective, as the trainer compiles it with `torch_compile`, and of
the hand-written loss.

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
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
import transformers
from datasets import Dataset
from speed_memory import memory_of
from speed_models import (
    LEARNING_RATE,
    QUICK,
    Sizes,
    enter,
    llama,
    make_objective,
    optimizer_of,
    step_of,
    token_batch,
    token_rows,
    tutelage_step,
)
from torch import nn
from transformers import LlamaForCausalLM, TrainerCallback

import tutelage
from tutelage import CurriculumConfig, CurriculumTrainer
from tutelage.core.curriculum import Curriculum, extraction
from tutelage.core.stages import HiddenStage
from tutelage.targets.live import LiveTargets
from tutelage.targets.maps import TargetMap
from tutelage.tasks.language import CausalCollator

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 3  # untimed steps before each measurement


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
    compiles: bool = False,
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

    return step_of(torch.compile(loss) if compiles else loss, optimizer_of(short_student))


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


def hidden_stages(sizes: Sizes, compiles: bool = False) -> list[Figure]:
    """Each hidden stage (compiled: some of them) over the hand-written loop; both must give the same loss."""
    figures = []
    batch = token_batch(sizes)
    objective, transition = make_objective(sizes)
    source = objective.source
    assert isinstance(source, LiveTargets)
    for index, stage in enumerate(objective.curriculum.stages):
        if not isinstance(stage, HiddenStage) or (compiles and index not in sizes.compiled_stages):
            continue
        target_map = source.maps[source.pair_numbers[index][0]]
        enter(objective, transition, index, batch)
        student, teacher = cast(LlamaForCausalLM, objective.student), cast(LlamaForCausalLM, source.model)
        plain = plain_step(student, teacher, stage, target_map, batch, compiles)
        ours = tutelage_step(objective, batch, compiles)
        losses = ours(), plain()
        if abs(losses[0] - losses[1]) > 1e-4 * losses[1]:
            raise RuntimeError(f"the two sides of stage {index + 1} differ: losses {losses[0]} and {losses[1]}")
        top, bottom = alternate(ours, plain, sizes.stage_rounds)
        how = "compiled step" if compiles else "step"
        figures.append(figure(f"{how} of stage {stage.name} / hand-written loop", top, bottom, "s", most=1.05))
    return figures


def first_stage_and_one_shot(sizes: Sizes) -> Figure:
    """A one-shot step over a step of the first stage; two students, so that each has its own trainable set."""
    batch = token_batch(sizes)
    steps = []
    for index in (-1, 0):
        objective, transition = make_objective(sizes)
        enter(objective, transition, index % len(objective.curriculum.stages), batch)
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


def trainer_overhead(sizes: Sizes, compiles: bool = False) -> Figure:
    """`CurriculumTrainer.train()` over a bare loop of an equal objective, with its batches, clipping and optimiser."""
    count = sizes.trainer_steps
    rows = token_rows(sizes, count)
    batches = [CausalCollator()(rows[i * sizes.batch : (i + 1) * sizes.batch]) for i in range(count)]
    # the second stage: a short step, where overhead shows, of about 100 ms
    teacher_place = 2 * sizes.teacher_blocks // sizes.student_blocks
    stage = HiddenStage(count, student_place=2, teacher_place=teacher_place)
    curriculum = Curriculum("extraction", (stage,))
    objective, transition = make_objective(sizes, curriculum)
    enter(objective, transition, 0, batches[0])
    optimizer, run = optimizer_of(objective.student), torch.compile(objective) if compiles else objective
    parameters = [p for p in objective.student.parameters() if p.requires_grad]

    def bare(number: int) -> None:
        run(**batches[number])["loss"].backward()
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
            torch_compile=compiles,
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
    how = "compiled, " if compiles else ""
    return figure(f"CurriculumTrainer / bare loop, {how}{1000 * bottom:.0f} ms per step", top, bottom, "s", most=1.03)


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
    smoke = "**A smoke run (`--quick`): these numbers mean nothing.**\n\n" if quick else ""
    return f"""# Speed and memory of a training step

{smoke}`{command}`

Student of {sizes.student_blocks} blocks and width {sizes.student_width}, teacher of {sizes.teacher_blocks} and
{sizes.teacher_width} (Llama shape, random weights), vocabulary {sizes.vocabulary:,}, batch {sizes.batch} x {sizes.length}.
{where["cpu"]}, {where["cores"]} cores, {where["threads"]} threads; torch {where["torch"]}, transformers
{where["transformers"]}, Python {where["python"]}.

{table(figures)}

Times are medians of a training step (forward, backward, optimiser), the two sides taken by turns. The hand-written loop
trains copies of both networks that were cut off at the stage's blocks; both sides are checked to give the same loss. Where it
says compiled, `torch.compile` was used on both sides, and the time of compiling is not counted. The trainer's bare loop has an
equal objective, batches, gradient clipping and optimiser; start-up of `train()` is not counted. Memory is the growth of
resident memory within one step on the CPU (high-water mark less what was resident before), each case in its own process: the
loss at {sizes.loss_positions} positions of width {sizes.loss_width}, forward and backward.
"""


def main() -> None:
    """Measure everything and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--no-compile", action="store_true", help="leave the ratios with torch.compile out")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "speed", help="folder of the report")
    options = parser.parse_args()
    sizes = QUICK if options.quick else Sizes()
    where, start = machine(), time.perf_counter()
    command = shlex.join(["python", *sys.argv])
    figures = hidden_stages(sizes)
    figures.append(first_stage_and_one_shot(sizes))
    figures.append(trainer_overhead(sizes))
    if not options.no_compile:
        figures += [*hidden_stages(sizes, compiles=True), trainer_overhead(sizes, compiles=True)]
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
