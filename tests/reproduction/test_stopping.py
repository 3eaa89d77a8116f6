"""Where exactly a run reached its target: finer evaluations around the one that found it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.reproduction.comparing import changed, made, timeless, tiny
from tutelage.reproduction.recipe import Recipe
from tutelage.reproduction.results import RunRecord
from tutelage.reproduction.stopping import FINE_FILE, StopAtTarget
from tutelage.tasks.classification import PlainClassification
from tutelage.training import meter
from tutelage.training.trainer import CurriculumTrainer

SEEDS = (0, 1, 3)


def recipe(replicated: bool = True, **fields: Any) -> Recipe:
    """Evaluated every ten steps; seeds reach the target at different steps."""
    usual = {"seeds": SEEDS, "budget_samples": 3_200, "eval_every": 160, "learning_rates": (0.3,), "stage_samples": 64}
    made = tiny(**{**usual, **fields})
    return made if replicated else changed(made, replicated=False)


def runs(recipe: Recipe, folder: Path, method: str = "one_shot") -> tuple[RunRecord, ...]:
    return made(recipe, folder, [method]).method(method).runs


@pytest.mark.parametrize("method", ["one_shot", "extraction"])
@pytest.mark.parametrize("replicated", [True, False])
def test_the_target_is_found_where_evaluations_as_fine_find_it(tmp_path: Path, method: str, replicated: bool) -> None:
    around = runs(recipe(replicated, fine_eval_every=16), tmp_path / "around", method)
    always = runs(recipe(replicated, eval_every=16), tmp_path / "always", method)
    coarse = runs(recipe(replicated), tmp_path / "coarse", method)
    found = [run.at_target for run in always]
    assert all(point is not None and point.samples % 160 for point in found)
    assert len({point.samples for point in found if point is not None}) > 1
    for mine, point in zip(around, found, strict=True):
        assert mine.at_target is not None and point is not None
        assert mine.at_target.samples == point.samples and mine.at_target.flops == pytest.approx(point.flops)
        assert mine.at_target.metrics == pytest.approx(point.metrics, rel=1e-5)
    for mine, run in zip(around, coarse, strict=True):  # they end alike, after the same training
        at = {point.samples: point for point in mine.curve}
        assert [dataclasses.replace(at[point.samples], seconds=point.seconds) for point in run.curve] == list(run.curve)
        assert mine.curve[-1].samples == run.curve[-1].samples
        # between two evaluations up to the first that finds it, and nowhere else
        finer = [samples for samples in at if samples % 160]
        until = max(point.samples for point in found if point is not None) if replicated else mine.to_target("samples")
        assert finer and until is not None and max(finer) <= until


def test_finer_evaluations_do_not_disturb_training(tmp_path: Path, trainers: list[dict[str, Any]]) -> None:
    """The same weights at the end, bit for bit, though one seed arrives before the other."""
    for name, fine in (("with", 32), ("without", None)):
        runs(recipe(fine_eval_every=fine), tmp_path / name, "extraction")
    left, right = (given["model"] for given in trainers)
    assert left.training == right.training
    for name, value in left.state_dict().items():
        assert torch.equal(value, right.state_dict()[name]), name


def test_finer_evaluations_take_no_training_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on by 1 in a training step, and by 1,000 in an evaluation."""
    now, evaluate, step = [0.0], PlainClassification.evaluate, CurriculumTrainer.training_step

    def slow(*args: Any, **kwargs: Any) -> dict[str, float]:
        now[0] += 1_000
        return evaluate(*args, **kwargs)

    def timed(*args: Any, **kwargs: Any) -> Any:
        now[0] += 1
        return step(*args, **kwargs)

    monkeypatch.setattr(meter.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(PlainClassification, "evaluate", slow)
    monkeypatch.setattr(CurriculumTrainer, "training_step", timed)
    for run in runs(recipe(fine_eval_every=16), tmp_path):
        assert any(point.samples % 160 for point in run.curve)
        seconds = [point.seconds * len(SEEDS) for point in run.curve]  # of seven digits
        assert seconds == pytest.approx([point.samples / 16 for point in run.curve], rel=1e-6)


def test_a_run_that_was_killed_finds_the_same_place(tmp_path: Path, kill: Callable[[str, int], None]) -> None:
    """Between the arrivals of two seeds, and after evaluations that no checkpoint knows of."""
    fine = recipe(eval_every=32, fine_eval_every=16, learning_rates=(0.15,), seeds=(0, 1))  # checkpoints each 40 steps
    whole = made(fine, tmp_path / "whole", ["one_shot"])
    steps = sorted(int(run.to_target("samples") or 0) // 16 for run in whole.method("one_shot").runs)
    assert 40 < steps[0] < steps[1] - 2 and (steps[0] % 2 or steps[1] % 2)
    kill("one_shot", steps[1] - 1)
    with pytest.raises(KeyboardInterrupt):
        made(fine, tmp_path / "parts", ["one_shot"])
    (before,) = (tmp_path / "parts").glob(f"runs/*/*/{FINE_FILE}")
    assert len(before.read_text(encoding="utf-8").splitlines()) >= 1
    assert timeless(made(fine, tmp_path / "parts", ["one_shot"])) == timeless(whole)


def test_evaluations_of_a_run_that_is_made_again_are_not_mixed_with_the_first_ones(tmp_path: Path) -> None:
    fine = recipe(fine_eval_every=16)
    whole = made(fine, tmp_path, ["one_shot"])
    (file,) = tmp_path.glob(f"runs/*/*/{FINE_FILE}")
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    wrong = {**lines[0], "samples": 16, "step": 1, **{f"eval_accuracy_{index}": 1.0 for index in range(len(SEEDS))}}
    file.write_text(json.dumps(wrong) + "\n", encoding="utf-8")
    file.with_name("run.json").unlink()
    assert timeless(made(fine, tmp_path, ["one_shot"])) == timeless(whole)


def test_weights_are_kept_only_until_the_next_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And none at all where a run does not end at its target."""
    kept: list[int] = []
    step_end = StopAtTarget.on_step_end

    def counted(self: StopAtTarget, *args: Any, **kwargs: Any) -> None:
        step_end(self, *args, **kwargs)
        kept.append(len(self._kept))

    monkeypatch.setattr(StopAtTarget, "on_step_end", counted)
    runs(recipe(fine_eval_every=32, budget_samples=960), tmp_path / "ends")
    assert max(kept) == 5  # every second of ten steps
    kept.clear()
    whole = changed(recipe(fine_eval_every=32, budget_samples=960), stop_at_target=False)
    assert {run.curve[-1].samples for run in runs(whole, tmp_path / "whole")} == {960}
    assert set(kept) == {0}


@pytest.mark.parametrize("every", [0, -16, 161])
def test_finer_evaluations_are_finer(every: int) -> None:
    with pytest.raises(ValueError, match="fine_eval_every must be"):
        recipe(fine_eval_every=every)
