"""Calibration in a stream: one batch at a time, shared by processes."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.conftest import VOCAB
from tests.launch import launch
from tutelage.core.blocks import FINAL
from tutelage.core.curriculum import Curriculum, extraction
from tutelage.core.heads import OutputHead
from tutelage.core.processes import Group
from tutelage.targets.live import LiveTargets
from tutelage.targets.maps import Calibration, calibrate, save_target_maps
from tutelage.training.feed import CollatedBatches


def collate(seed: int) -> dict[str, Any]:
    """Eight random sequences; row i is padded from position 12 - i."""
    ids = torch.randint(6, VOCAB, (8, 12), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(12) < 12 - torch.arange(8).unsqueeze(1)).long()
    return {"input_ids": torch.where(mask.bool(), ids, 0), "attention_mask": mask}


def curriculum_of(projection: str = "gaussian", normalize: str = "standardize") -> Curriculum:
    return extraction(2, 4, 30, layer_map=[(1, 2), (FINAL, FINAL)], projection=projection, normalize=normalize)


class Watched(Sequence[Any]):
    """Batches that are collated when they are asked for; looks at what is in memory when the last one is."""

    def __init__(self, count: int):
        self.count, self.passes, self.numbers = count, 0, 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Any) -> Any:
        if index == self.count - 1:
            self.passes += 1
            gc.collect()
            alive = sum(each.numel() for each in gc.get_objects() if type(each) is torch.Tensor)
            self.numbers = max(self.numbers, alive)
        return collate(index)


def maps_of(teacher: LiveTargets, batches: Sequence[Any], curriculum: Curriculum, group: Group = Group()) -> Any:  # noqa: B008
    calibration = Calibration(16, keep_moment=True, head=OutputHead.of(teacher.model))
    return calibrate(teacher.stage_states, curriculum, batches, 4, calibration, group)


@pytest.fixture
def teacher(causal_teacher: Path) -> LiveTargets:
    return LiveTargets(AutoModelForCausalLM.from_pretrained(causal_teacher))


@pytest.mark.parametrize("projection", ["gaussian", "logits"])
def test_memory_does_not_grow_with_the_number_of_batches(teacher: LiveTargets, projection: str) -> None:
    few, many = Watched(3), Watched(12)
    for batches in (few, many):
        maps_of(teacher, batches, curriculum_of(projection))
    assert few.passes == many.passes == 4  # two stages, twice each
    states = 68 * 32  # of a batch; of the other batches the norms are kept
    assert many.numbers - few.numbers < 0.5 * states


def test_batches_are_collated_when_asked_for_and_the_same_in_each_pass() -> None:
    collated = []

    def mask(rows: list[int]) -> dict[str, torch.Tensor]:
        collated.append(rows)
        return {"input_ids": torch.tensor(rows) * (torch.rand(len(rows)) < 0.5)}

    rows = [list(range(start, start + 50)) for start in (0, 50, 100)]
    batches, state = CollatedBatches(rows, mask), torch.get_rng_state()
    assert collated == [] and len(batches) == 3
    first, second = list(batches), list(batches)
    assert len(collated) == 6
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one["input_ids"], two["input_ids"])
    assert torch.equal(torch.get_rng_state(), state)


def test_few_positions_per_dimension_are_warned_of(teacher: LiveTargets) -> None:
    curriculum = extraction(2, 4, 30, layer_map=[(1, 2)], projection="pca")
    found = (
        r"32-dimensional states for stage hidden 1:2 comes from 68 positions, but needs 128 \(4 per dimension\): raise"
    )
    with pytest.warns(UserWarning, match=found):
        maps_of(teacher, [collate(0)], curriculum)
    maps_of(teacher, [collate(0)], extraction(2, 4, 30, layer_map=[(1, 2)]))  # mean and scale need fewer


@pytest.mark.parametrize("normalize", ["standardize", "none"])
def test_states_that_are_not_finite_are_refused(teacher: LiveTargets, normalize: str) -> None:
    teacher.model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="hidden states are not finite on the calibration text: check its dtype"):
        maps_of(teacher, [collate(seed) for seed in range(3)], curriculum_of("pca", normalize))


def calibrate_here(folder: Path, teacher_folder: Path) -> None:
    """Calibrate on five batches, with all processes; write the maps, and how many forwards this process made."""
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
    group, forwards = Group.of_all("cpu"), []
    teacher = LiveTargets(AutoModelForCausalLM.from_pretrained(teacher_folder))
    states = teacher.stage_states
    teacher.stage_states = lambda *args: (forwards.append(1), states(*args))[1]  # type: ignore[method-assign]
    maps = maps_of(teacher, [collate(seed) for seed in range(5)], curriculum_of("logits"), group)
    save_target_maps(maps, folder / f"{group.rank}.safetensors")
    (folder / f"{group.rank}.txt").write_text(str(len(forwards)))
    if group.size > 1:
        torch.distributed.destroy_process_group()


def test_two_processes_share_a_calibration(causal_teacher: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    calibrate_here(one, causal_teacher)
    launch(2, calibrate_here, two, causal_teacher)
    alone, first, second = (load_file(path / f"{rank}.safetensors") for path, rank in ((one, 0), (two, 0), (two, 1)))
    assert alone.keys() == first.keys() == second.keys()
    assert {"0.projection", "1.projection", "1.moment"} < alone.keys()
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]), name
        if name.endswith("projection"):  # whose columns have a sign by chance
            torch.testing.assert_close(first[name].abs(), value.abs(), rtol=1e-3, atol=1e-4)
        else:
            torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert (one / "0.txt").read_text() == "20"  # five batches, two stages, twice each
    assert [(two / f"{rank}.txt").read_text() for rank in (0, 1)] == ["12", "8"]
