"""What a comparison records."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tests.reproduction.comparing import METHODS, changed, made, names, tiny
from tutelage.core.stages import HiddenStage, OutputStage
from tutelage.reproduction.compare import compare
from tutelage.reproduction.report import write_report
from tutelage.reproduction.results import COMPARISON_FILE, Comparison, Trial, Tuning
from tutelage.reproduction.statistics import Estimate
from tutelage.reproduction.variants import Candidate, parse_variant


def test_comparison_records_everything(tmp_path: Path) -> None:
    result = made(tiny(), tmp_path / "o", command="tutelage compare parity-mlp/smoke")
    assert (result.recipe, result.size, result.budget, result.target) == ("parity-mlp", "smoke", 960, 0.9)
    assert (result.complete, result.command) == (True, "tutelage compare parity-mlp/smoke")
    assert result.seeds == (0, 1) and result.settings["d"] == 8
    (teacher,) = result.teachers
    assert "planted" in teacher.description and teacher.metrics["accuracy"] > 0.99
    assert {"torch", "transformers", "machine"} <= set(result.environment)
    assert names(result) == list(METHODS)
    for entry in result.methods:
        assert entry.tunings == (Tuning(Candidate(0.1)),)  # there was nothing to choose
        assert [run.seed for run in entry.runs] == [0, 1]
        for run in entry.runs:
            for point in run.curve:
                assert set(point.metrics) == {"loss", "accuracy"}
            samples = [point.samples for point in run.curve]
            assert samples == sorted(set(samples)) and samples[0] == 0 and samples[-1] <= 960
            assert samples[:-1] == list(range(0, samples[-1], 80))
            for cost in ("flops", "seconds"):
                costs = [point.cost(cost) for point in run.curve]
                assert costs == sorted(costs) and costs[-1] > 0
            assert run.final == run.curve[-1].metrics
            arrived = [point for point in run.curve if point.metrics["accuracy"] >= 0.9]
            assert run.to_target("samples") == (arrived[0].samples if arrived else None)
            assert run.to_target("flops") == (arrived[0].flops if arrived else None)
    pairs = (("extraction", "one_shot"), ("extraction", "scratch"), ("scratch", "one_shot"))
    expected = [(*pair, cost) for pair in pairs for cost in ("samples", "flops", "seconds")]
    assert sorted((ratio.over, ratio.under, ratio.cost) for ratio in result.ratios) == sorted(expected)
    assert all(ratio.seeds == 2 for ratio in result.ratios)
    assert [(found.over, found.under) for found in result.differences] == [
        (m, "one_shot") for m in ("extraction", "scratch")
    ]
    for found in result.differences:
        ends = [[run.final["accuracy"] for run in result.method(m).runs] for m in (found.over, found.under)]
        apart = [mine - theirs for mine, theirs in zip(*ends, strict=True)]
        assert (found.paired.mean, found.paired.pairs) == (pytest.approx(sum(apart) / 2), 2)
        assert (found.paired.low, found.paired.high) == (min(apart), max(apart))
    assert "NaN" not in (tmp_path / "o" / COMPARISON_FILE).read_text() and result.verdict


def test_a_target_never_reached_is_null_and_beyond_the_budget(tmp_path: Path) -> None:
    result = made(tiny(d=12, k=4, teacher_width=400, target=0.99, seeds=(0, 1, 2)), tmp_path / "o", ["one_shot"])
    entry = result.method("one_shot")
    assert [run.to_target("samples") for run in entry.runs] == [None] * 3
    assert entry.samples_to_target == Estimate(None, None, None)
    assert all(run.curve[-1].samples == 960 for run in entry.runs)  # the whole budget was given


def test_methods_are_named_as_they_were_asked_for(tmp_path: Path) -> None:
    deep = parse_variant("deep:layer_map=2:2,stage_steps=5")
    short = parse_variant("short:method=one_shot,budget=0.5")
    result = made(tiny(target=1.0, k=3), tmp_path / "o", ["extraction", deep, short])
    assert names(result) == ["extraction", "deep", "short"]
    assert result.method("deep").variant == deep and result.method("short").variant == short
    stages = {method.name: method.curriculum.stages for method in result.methods if method.curriculum}
    assert [(type(s), s.steps) for s in stages["extraction"]] == [(HiddenStage, 20), (OutputStage, 40)]
    hidden, output = stages["deep"]
    assert isinstance(hidden, HiddenStage) and (hidden.steps, hidden.student_place) == (5, 2)
    assert isinstance(output, OutputStage) and output.steps == 55
    assert [s.steps for s in stages["short"]] == [30]
    assert result.ratio("deep", "short") is not None and result.ratio("extraction", "deep") is not None


def test_without_a_target_one_shots_median_is_it(tmp_path: Path) -> None:
    recipe = changed(
        dataclasses.replace(tiny(seeds=(0, 1, 2)), target=None), metric="loss", better="lower", stop_at_target=False
    )
    result = made(recipe, tmp_path / "o", ["extraction", "one_shot"])
    finals = [run.final["loss"] for run in result.method("one_shot").runs]
    assert result.target is not None and result.target == sorted(finals)[1]
    for entry in result.methods:
        for run in entry.runs:
            assert run.curve[-1].samples == 960
            arrived = [point.samples for point in run.curve if point.metrics["loss"] <= result.target]
            assert run.to_target("samples") == (arrived[0] if arrived else None)
    without = made(recipe, tmp_path / "o2", ["extraction", "scratch"])
    assert without.target is None and "ended best" in without.verdict


def test_an_easy_target_holds_before_training(tmp_path: Path) -> None:
    result = made(tiny(target=0.1), tmp_path / "o", ["extraction", "one_shot"])
    for entry in result.methods:
        assert entry.samples_to_target.median == 0


def test_a_rate_at_which_training_diverges_is_not_chosen(tmp_path: Path) -> None:
    result = made(tiny(learning_rates=(1e30, 0.1), trials=2), tmp_path / "o", ["one_shot"])
    entry = result.method("one_shot")
    (tuning,) = entry.tunings
    assert tuning.candidate == Candidate(0.1)
    assert tuning.trials[0] == Trial(Candidate(1e30), "samples to target", diverged=True)
    assert all(run.diverged is None for run in entry.runs)


def test_a_method_that_diverges_at_every_rate_is_said_so(tmp_path: Path) -> None:
    """The other methods are still run."""
    lines: list[str] = []
    result = compare(
        tiny(learning_rates=(1e30, 1e31), trials=2), tmp_path / "o", ["one_shot", "scratch"], log=lines.append
    )
    assert any("one_shot diverged at every learning rate that was tried" in line for line in lines)
    entry = result.method("one_shot")
    assert entry.diverged and entry.tunings[0].candidate is None and entry.trials == 2
    assert not entry.edges and not entry.runs
    assert result.method("scratch").diverged
    assert Comparison.from_json(result.to_json()) == result
    write_report(tmp_path / "o")


def test_a_reported_run_that_diverges_is_a_run_that_never_arrived(tmp_path: Path) -> None:
    result = made(tiny(learning_rates=(1e30,)), tmp_path / "o", ["one_shot"])
    for run in result.method("one_shot").runs:
        assert run.diverged is not None and ("not finite" in run.diverged or "loss is" in run.diverged)
        assert run.to_target("samples") is None
