"""A comparison that was stopped resumes where it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.reproduction.comparing import METHODS, changed, made, names, timeless, tiny
from tutelage.reproduction.results import COMPARISON_FILE, Comparison
from tutelage.reproduction.variants import parse_variant
from tutelage.tasks.classification import PlainClassification
from tutelage.training.trainer import CurriculumTrainer


def test_a_finished_comparison_is_read_back(tmp_path: Path, trainers: list[dict[str, Any]]) -> None:
    first = made(tiny(learning_rates=(0.1, 0.3), trials=2), tmp_path / "o")
    trainers.clear()
    assert made(tiny(learning_rates=(0.1, 0.3), trials=2), tmp_path / "o") == first
    assert not trainers
    more = made(
        tiny(learning_rates=(0.1, 0.3), trials=2), tmp_path / "o", [*METHODS, parse_variant("deep:layer_map=2:2")]
    )
    assert tuple(more.method(name) for name in METHODS) == first.methods
    assert {given["curriculum"].method for given in trainers} == {"extraction"}


def test_a_method_more_keeps_those_that_were_there(tmp_path: Path, trainers: list[dict[str, Any]]) -> None:
    first = made(tiny(), tmp_path / "o", ["one_shot", "scratch"])
    trainers.clear()
    more = made(tiny(), tmp_path / "o", ["extraction"])
    assert {given["curriculum"].method for given in trainers} == {"extraction"}
    assert names(more) == ["one_shot", "scratch", "extraction"]
    assert tuple(more.method(name) for name in names(first)) == first.methods
    assert more.ratio("extraction", "one_shot") is not None


def test_a_variant_of_the_same_name_with_other_settings_is_run_anew(
    tmp_path: Path, trainers: list[dict[str, Any]]
) -> None:
    made(tiny(), tmp_path / "o", [parse_variant("mine:layer_map=2:2")])
    trainers.clear()
    again = made(tiny(), tmp_path / "o", [parse_variant("mine:layer_map=1:2")])
    assert [given["curriculum"].stages[0].student_place for given in trainers] == [1]
    assert again.method("mine").variant.overrides == {"layer_map": "1:2"}


def test_only_a_missing_run_is_made_again(tmp_path: Path, trainers: list[dict[str, Any]]) -> None:
    recipe = changed(tiny(), replicated=False)
    folder = tmp_path / "o"
    first = made(recipe, folder)
    (lost,) = folder.glob("runs/one_shot-*/*seed-1/run.json")
    lost.unlink()
    (folder / COMPARISON_FILE).unlink()
    trainers.clear()
    again = made(recipe, folder)
    assert [given["args"].output_dir for given in trainers] == [str(lost.parent)]
    assert timeless(again) == timeless(first)
    for method in ("extraction", "scratch"):
        assert again.method(method) == first.method(method)


@pytest.mark.parametrize(("method", "step"), [("one_shot", 30), ("extraction", 25), ("extraction", 10)])
def test_a_run_killed_in_its_middle_ends_as_if_it_had_not_been(
    tmp_path: Path, kill: Callable[[str, int], None], method: str, step: int
) -> None:
    recipe = tiny(eval_every=16, target=1.0, k=3, d=10)  # checkpoints each 20 steps
    methods = ("extraction", "one_shot")
    whole = made(recipe, tmp_path / "whole", methods)
    kill(method, step)
    with pytest.raises(KeyboardInterrupt):
        made(recipe, tmp_path / "parts", methods)
    state = tmp_path / "parts" / COMPARISON_FILE
    if method == "one_shot":  # what is finished can be reported already
        known = Comparison.read(state.parent)
        assert known.complete is False
        assert [method.name for method in known.methods if method.runs] == ["extraction"]
    else:
        assert not state.exists()
    assert timeless(made(recipe, tmp_path / "parts", methods)) == timeless(whole)


def test_a_seed_that_arrived_before_the_kill_has_arrived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill: Callable[[str, int], None]
) -> None:
    """Seed 0 is at the target for a while early on, seed 1 at step 40: there the run ends, killed in between or not."""
    now: list[int | None] = [None]  # the step of the evaluation in progress; None where a teacher is measured
    evaluate, measure = CurriculumTrainer.evaluate, PlainClassification.evaluate

    def remember(self: Any, *args: Any, **kwargs: Any) -> Any:
        now[0] = self.state.global_step
        try:
            return evaluate(self, *args, **kwargs)
        finally:
            now[0] = None

    def scripted(*args: Any, **kwargs: Any) -> dict[str, float]:
        if now[0] is None:
            return measure(*args, **kwargs)
        values = {"accuracy_0": float(5 <= now[0] <= 10), "accuracy_1": float(now[0] >= 40)}
        return {"accuracy": 0.5, "loss": 1.0, "loss_0": 1.0, "loss_1": 1.0, **values}

    monkeypatch.setattr(CurriculumTrainer, "evaluate", remember)
    monkeypatch.setattr(PlainClassification, "evaluate", scripted)
    recipe = tiny(eval_every=16)
    whole = made(recipe, tmp_path / "whole", ["one_shot"])
    assert [run.curve[-1].samples for run in whole.method("one_shot").runs] == [640, 640]
    kill("one_shot", 30)
    with pytest.raises(KeyboardInterrupt):
        made(recipe, tmp_path / "parts", ["one_shot"])
    assert timeless(made(recipe, tmp_path / "parts", ["one_shot"])) == timeless(whole)
