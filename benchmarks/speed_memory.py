"""Growth of resident memory in one training step, each case in a process of its own.

python benchmarks/speed_memory.py 0            # a stage's index, `chunked` or `plain`; prints bytes
python benchmarks/speed_memory.py 0 --quick    # tiny sizes
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from speed_models import QUICK, Sizes, enter, make_objective, optimizer_of, step_of, token_batch
from torch import nn

from tutelage.core.heads import OutputHead
from tutelage.core.losses import output_loss


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
    objective, transition = make_objective(sizes)
    enter(objective, transition, index, row)
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
    command = [sys.executable, __file__, case, *(["--quick"] if quick else [])]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.split()[-1])


def main() -> None:
    """Measure one case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", help="a stage's index, chunked or plain")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    options = parser.parse_args()
    print(memory_worker(options.case, QUICK if options.quick else Sizes()))


if __name__ == "__main__":
    main()
