"""Where the linear algebra of a stage switch is computed, and how exactly."""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


def fastest(function: Callable[..., torch.Tensor], *matrices: torch.Tensor, others_wait: bool = True) -> torch.Tensor:
    """`function(*matrices)` for float64 matrices on the CPU, where its result is too.

    It runs on the GPU where this process uses one, or else, also where the GPU cannot, on the CPU. If the other processes of
    this machine wait meanwhile, it takes their threads: launchers give each process one."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        try:
            return function(*(matrix.cuda() for matrix in matrices)).cpu()
        except (
            RuntimeError
        ):  # too little memory, or the library failed; the CPU raises an error that the matrices cause
            pass
    threads = torch.get_num_threads()
    torch.set_num_threads(threads * int(os.environ.get("LOCAL_WORLD_SIZE", "1") if others_wait else 1))
    try:
        return function(*matrices)
    finally:
        torch.set_num_threads(threads)


@contextmanager
def whole_float32(device: torch.device) -> Iterator[None]:
    """Products of float32 on `device` in whole float32, whatever the user has set: no autocast, and no TF32, which keeps 10
    bits of it."""
    choose: Callable[[str], None] = torch.set_float32_matmul_precision
    exact = "highest"
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # set the newer way (torch 2.9), which must not be mixed with this one
        choose = functools.partial(setattr, torch.backends.cuda.matmul, "fp32_precision")
        before, exact = torch.backends.cuda.matmul.fp32_precision, "ieee"
    choose(exact)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        choose(before)
