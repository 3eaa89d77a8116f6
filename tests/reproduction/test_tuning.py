"""Learning rates and schedules are chosen on seeds of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.reproduction.comparing import made, silent, tiny
from tutelage.reproduction.results import CurvePoint, RunRecord
from tutelage.reproduction.runner import Runner
from tutelage.reproduction.tuning import tune
from tutelage.reproduction.variants import Candidate, plain_variant


def test_rates_are_chosen_on_tuning_seeds_alike_for_all(tmp_path: Path, trainers: list[dict[str, Any]]) -> None:
    grid = (0.001, 0.3)  # with the first nothing moves
    result = made(tiny(learning_rates=grid), tmp_path / "o", ["one_shot", "scratch"])
    for entry in result.methods:
        assert entry.candidate == Candidate(0.3)
        scores = {trial.candidate.label: trial.score for trial in entry.trials}
        assert set(scores) == {"0.001", "0.3"}
        assert scores["0.001"] is None and scores["0.3"] is not None and scores["0.3"] > 0
    tuned = [given for given in trainers if "/tuning/" in given["args"].output_dir]
    reported = [given for given in trainers if "/runs/" in given["args"].output_dir]
    assert {tuple(given["train_dataset"].seed) for given in tuned} == {(1000,)}
    assert {tuple(given["train_dataset"].seed) for given in reported} == {(0, 1)}
    for method in ("one_shot", "scratch"):
        mine = [given["args"].learning_rate for given in tuned if given["curriculum"].method == method]
        assert sorted(mine) == sorted(grid)
        assert [g["args"].learning_rate for g in reported if g["curriculum"].method == method] == [0.3]


def test_tuning_may_take_a_fraction_of_the_budget(tmp_path: Path, trainers: list[dict[str, Any]]) -> None:
    made(tiny(learning_rates=(0.001, 0.002), tuning_share=0.5, target=1.0), tmp_path / "o", ["one_shot"])
    steps = [given["curriculum"].total_steps for given in trainers]
    assert steps == [30, 30, 60]


def run_of(samples: int, arrived: bool) -> RunRecord:
    return RunRecord(1000, (CurvePoint(samples, 0.0, 0.0, {"accuracy": 1.0 if arrived else 0.5}),))


@pytest.mark.parametrize("count", [2, 3])
def test_a_candidate_is_stopped_only_where_it_cannot_win(
    count: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With two seeds the median is their mean, so one slow seed does not lose yet."""
    times = {0.1: [100_000] * count, 0.3: [50_000, 140_000, 60_000][:count]}
    fields = {"learning_rates": (0.1, 0.3), "tuning_seeds": tuple(range(1000, 1000 + count)), "budget_samples": 500_000}
    recipe = tiny(**fields)

    def runs_of(self: Any, variant: Any, candidate: Any, seeds: Any, what: str, limit: float | None) -> Any:
        for samples in times[candidate.learning_rate]:
            arrived = limit is None or samples <= limit
            yield [run_of(samples if arrived or limit is None else int(limit), arrived)]

    monkeypatch.setattr(Runner, "runs", runs_of)
    runner = Runner(recipe, recipe.make_teacher(tmp_path), tmp_path, "samples")
    best, _ = tune(runner, plain_variant("one_shot"), silent)
    assert best is not None and best.learning_rate == 0.3


def test_progressive_tries_every_schedule_at_every_rate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tried: list[tuple[str, float]] = []

    def runs_of(self: Any, variant: Any, candidate: Any, seeds: Any, what: str, limit: float | None) -> Any:
        tried.append((candidate.schedule, candidate.learning_rate))
        good = (candidate.schedule, candidate.learning_rate) == ("pace-4", 0.3)
        yield [run_of(100, good)]

    monkeypatch.setattr(Runner, "runs", runs_of)
    recipe = tiny(learning_rates=(0.1, 0.3))
    runner = Runner(recipe, recipe.make_teacher(tmp_path), tmp_path, "samples")
    best, trials = tune(runner, plain_variant("progressive"), silent)
    assert best is not None and (best.schedule, best.learning_rate) == ("pace-4", 0.3)
    assert len(tried) == len(set(tried)) == len(trials) == 8
