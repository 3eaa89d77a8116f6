"""Peak memory of a calibration, and the seconds of its linear algebra.

    python benchmarks/calibration.py --output results/calibration

- *memory*: how far a calibration (statistics, second moment, projection `logits`) raises the resident memory of a process of
  its own, on 64 and on 640 examples of 128 tokens: in a stream, and with all states gathered first, as it was.
- *seconds*: of the projection `logits` and of the decoder of a head transplant, before and now, one after the other in the same
  run; matrices of width D, projected to D/2.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from shrinkage import decoder_before, directions_before
from transformers import LlamaConfig, LlamaForCausalLM

from tutelage.core.blocks import FINAL
from tutelage.core.curriculum import Curriculum
from tutelage.core.heads import OutputHead
from tutelage.core.projection import RandomProjection, spectral_projection
from tutelage.core.stages import HiddenStage, OutputStage
from tutelage.core.standardize import Standardizer
from tutelage.runs.environment import environment
from tutelage.targets.live import LiveTargets
from tutelage.targets.maps import Calibration, calibrate
from tutelage.training.feed import CollatedBatches

WIDTH, LENGTH, BATCH, VOCABULARY = 256, 128, 16, 1000
SAMPLES = (64, 640)
ROUNDS = {512: 3, 1024: 3, 2048: 1}  # by width


# ---- Memory ----


def resident() -> int:
    """Bytes of memory resident now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def high_water() -> int:
    """Most bytes that were ever resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def collate(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=generator)}


def streamed(teacher: LiveTargets, batches: CollatedBatches) -> None:
    curriculum = Curriculum("extraction", (HiddenStage(1, FINAL, FINAL), OutputStage(1)), "logits")
    calibration = Calibration(WIDTH // 2, keep_moment=True, head=OutputHead.of(teacher.model))
    calibrate(teacher.stage_states, curriculum, batches, 2, calibration)


def gathered(teacher: LiveTargets, batches: CollatedBatches) -> None:
    """As it was: all states in float32, then in float64."""
    held = list(batches)
    states = torch.cat([teacher.states(FINAL, batch).flatten(0, 1) for batch in held])
    doubles = states.double()
    norms = doubles.norm(dim=-1)
    kept = doubles[norms <= 4 * norms.median()]
    mean = kept.mean(0)
    standardizer = Standardizer(mean.float(), (kept - mean).square().mean(0).sqrt().float(), float(4 * norms.median()))
    standard = standardizer(states[standardizer.keep(states)]).double()
    weight = teacher.model.lm_head.weight.double()  # type: ignore[union-attr, operator]
    directions_before(standard.T @ standard / len(standard), WIDTH // 2, weight.T @ weight)


def worker(how: str, samples: int) -> int:
    """Bytes by which a calibration raises resident memory."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    teacher, run = LiveTargets(LlamaForCausalLM(config)), {"streamed": streamed, "gathered": gathered}[how]
    run(teacher, CollatedBatches([0], collate))
    gc.collect()
    # memory that the set-up had and gave back would hide the growth: take it, so that the high-water mark is now
    ballast = torch.ones(max(0, high_water() - resident()) + 2**20, dtype=torch.uint8)
    before = resident()
    run(teacher, CollatedBatches(list(range(samples // BATCH)), collate))
    grown = high_water() - before
    del ballast
    return grown


def memory() -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    environ = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    for how in ("streamed", "gathered"):
        found[how] = {}
        for samples in SAMPLES:
            command = [sys.executable, __file__, "--worker", how, "--samples", str(samples)]
            done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=True)
            found[how][str(samples)] = int(done.stdout.split()[-1])
        found[how]["ratio"] = found[how][str(SAMPLES[1])] / found[how][str(SAMPLES[0])]
    return found


# ---- Seconds ----


def seconds_of(rounds: int, *functions: Callable[[], Any]) -> list[float]:
    """Median seconds of each, in turn."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for function, mine in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            mine.append(time.perf_counter() - start)
    return [statistics.median(mine) for mine in times]


def seconds(width: int) -> dict[str, dict[str, float]]:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(4 * width, width, generator=generator).double() @ torch.randn(width, width).double()
    scale = states.square().mean(0).sqrt()
    moment = (states / scale).T @ (states / scale) / len(states)
    weight = torch.randn(4 * width, width, generator=generator).double()
    gram, projection = weight.T @ weight, RandomProjection(width, width // 2, 0)
    found = {}
    for name, before, now in (
        (
            "projection logits",
            lambda: directions_before(moment, width // 2, gram),
            lambda: spectral_projection(moment, width // 2, gram),
        ),
        ("decoder", lambda: decoder_before(projection, moment), lambda: projection.decoder(moment)),
    ):
        one, two = seconds_of(ROUNDS[width], before, now)
        found[name] = {"before": one, "now": two, "ratio": two / one}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--worker", help="print the bytes of one case: streamed or gathered")
    parser.add_argument("--samples", type=int, default=SAMPLES[0])
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.worker is not None:
        print(worker(options.worker, options.samples))
        return
    command, made = f"python benchmarks/calibration.py --output {options.output}", environment()
    used, timed = memory(), {str(width): seconds(width) for width in ROUNDS}
    result = {"command": command, "environment": made, "bytes": used, "seconds": timed}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "results.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    low, high = map(str, SAMPLES)
    lines = [
        "# Calibration",
        "",
        f"By `{command}`; {made['machine']}, {made['threads']} thread(s), torch {made['torch']}, transformers "
        f"{made['transformers']}.",
        "",
        f"Growth of resident memory in a calibration; teacher of width {WIDTH} with 2 blocks, examples of {LENGTH} tokens, "
        f"batches of {BATCH}.",
        "",
        f"| how | {low} examples, MiB | {high} examples, MiB | ratio |",
        "|---|---|---|---|",
        *(f"| {how} | {v[low] / 2**20:.1f} | {v[high] / 2**20:.1f} | {v['ratio']:.2f} |" for how, v in used.items()),
        "",
        "Seconds of the linear algebra at a change of stages, from width D to D/2, median of 3 (at 2,048 of 1).",
        "",
        "| D | what | before | now | ratio |",
        "|---|---|---|---|---|",
        *(
            f"| {width} | {name} | {v['before']:.2f} | {v['now']:.2f} | {v['ratio']:.2f} |"
            for width, each in timed.items()
            for name, v in each.items()
        ),
        "",
    ]
    (options.output / "README.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
