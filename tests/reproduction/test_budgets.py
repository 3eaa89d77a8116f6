"""Every method has the same data, students and budget."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.reproduction.comparing import METHODS, changed, made, tiny
from tutelage.core.curriculum import Curriculum
from tutelage.reproduction.recipe import Recipe


def test_all_methods_of_a_seed_share_student_and_data(tmp_path: Path, trainers: list[dict[str, Any]]) -> None:
    recipe = changed(tiny(), replicated=False)
    made(recipe, tmp_path / "o")
    by_seed: dict[tuple[int, ...], list[dict[str, Any]]] = {}
    for given in trainers:
        by_seed.setdefault(tuple(given["train_dataset"].seed), []).append(given)
    assert {seeds: len(found) for seeds, found in by_seed.items()} == {(0,): 3, (1,): 3}
    for first, *others in by_seed.values():
        assert {first["curriculum"].method, *(other["curriculum"].method for other in others)} == set(METHODS)
        ids, labels = first["train_dataset"].arrays()
        for other in others:
            for name, value in first["start"].items():
                assert torch.equal(value, other["start"][name])
            assert torch.equal(ids, other["train_dataset"].arrays()[0])
            assert torch.equal(labels, other["train_dataset"].arrays()[1])
            assert torch.equal(first["eval_dataset"].arrays()[0], other["eval_dataset"].arrays()[0])
            assert first["args"].seed == other["args"].seed
            assert len(first["train_dataset"]) == 960 == other["curriculum"].total_steps * 16
    (zero, *_), (one, *_) = by_seed[0,], by_seed[1,]
    assert not torch.equal(zero["start"]["blocks.0.weight"], one["start"]["blocks.0.weight"])
    assert not torch.equal(zero["train_dataset"].arrays()[0], one["train_dataset"].arrays()[0])
    assert not torch.equal(zero["eval_dataset"].arrays()[0], one["eval_dataset"].arrays()[0])
    assert not torch.equal(zero["train_dataset"].arrays()[0][:64], zero["eval_dataset"].arrays()[0])


def test_replicas_say_what_single_runs_say(tmp_path: Path) -> None:
    together = made(tiny(target=0.8), tmp_path / "together")
    apart = made(changed(tiny(target=0.8), replicated=False), tmp_path / "apart")
    for method in METHODS:
        for mine, theirs in zip(together.method(method).runs, apart.method(method).runs, strict=True):
            assert mine.seed == theirs.seed
            assert mine.to_target("samples") == theirs.to_target("samples")
            for left, right in zip(mine.curve, theirs.curve, strict=False):  # they wait for the slowest seed
                assert left.samples == right.samples
                assert left.flops == pytest.approx(right.flops)
                assert left.metrics["accuracy"] == right.metrics["accuracy"]
                assert left.metrics["loss"] == pytest.approx(right.metrics["loss"], rel=1e-4)


def test_budgets_are_equal_in_samples(tmp_path: Path) -> None:
    result = made(changed(tiny(), stop_at_target=False), tmp_path / "o")
    assert {run.curve[-1].samples for entry in result.methods for run in entry.runs} == {960}


def with_stages(recipe: Recipe, stages: dict[str, Any]) -> Recipe:
    """The recipe with other hidden stages, whose runs do not end at the target."""
    own = recipe.method_arguments

    def method_arguments(self: Recipe, method: str) -> dict[str, Any]:
        return own(method) | (stages if method == "extraction" else {})

    return changed(recipe, stop_at_target=False, method_arguments=method_arguments)


@pytest.mark.parametrize(
    ("fields", "stages"),
    [
        ({"budget_samples": 1920, "stage_samples": 640}, {}),
        ({"stage_samples": 160}, {}),
        ({}, {"stage_steps": None, "stage_fraction": 0.4}),
    ],
)
def test_budgets_may_be_equal_in_flops(tmp_path: Path, fields: dict[str, Any], stages: dict[str, Any]) -> None:
    """Hidden stages of so many examples, as the recipe has them (many, few), or of a fraction of the steps."""
    recipe = with_stages(tiny(**fields), stages)
    result = made(recipe, tmp_path / "o", match="flops")
    assert result.match == "flops"
    spent = {method.name: method.runs[0].curve[-1] for method in result.methods}
    budget = recipe.budget_samples
    assert spent["one_shot"].samples == budget
    for name in ("extraction", "scratch"):
        assert spent[name].flops == pytest.approx(spent["one_shot"].flops, rel=0.05), name
    assert spent["scratch"].samples > 1.2 * budget  # it runs no teacher
    assert spent["extraction"].samples < budget  # a step of this hidden stage costs more


def test_a_comparison_at_equal_seconds_resumes_with_its_own_steps(
    tmp_path: Path, kill: Callable[[str, int], None]
) -> None:
    """The clock differs after a restart: a run that had begun keeps the stages it began with."""
    recipe = with_stages(tiny(eval_every=16), {"stage_steps": None, "stage_fraction": 0.4})  # checkpoints each 20 steps
    kill("extraction", 22)
    with pytest.raises(KeyboardInterrupt):
        made(recipe, tmp_path / "o", ["extraction"], match="seconds")
    (folder,) = (tmp_path / "o" / "runs").glob("extraction-*/*")
    begun = json.loads((folder / "curriculum.json").read_text(encoding="utf-8"))
    assert [stage["kind"] for stage in begun["stages"]] == ["hidden", "output"]
    result = made(recipe, tmp_path / "o", ["extraction"], match="seconds")
    assert result.method("extraction").curriculum == Curriculum.from_dict(begun)
    steps = sum(stage["steps"] for stage in begun["stages"])
    assert result.method("extraction").runs[0].curve[-1].samples == steps * 16
