"""Where the linear algebra of a stage switch runs."""

from __future__ import annotations

import pytest
import torch

from tutelage.core.linalg import fastest


def test_it_takes_the_threads_of_all_processes_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    before, seen = torch.get_num_threads(), []

    def double(matrix: torch.Tensor) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        return 2 * matrix

    assert torch.equal(fastest(double, torch.ones(2)), torch.full((2,), 2.0))
    fastest(double, torch.ones(2), others_wait=False)
    assert seen == [2 * before, before]
    assert torch.get_num_threads() == before


def test_a_gpu_that_fails_leaves_it_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def refuse(matrix: torch.Tensor) -> torch.Tensor:
        tried.append(matrix)
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.Tensor, "cuda", refuse)
    matrix = torch.eye(3).double()
    assert torch.equal(fastest(torch.linalg.eigvalsh, matrix), torch.ones(3).double())
    assert tried == [matrix]
