"""Rates and settings are chosen on seeds and held-out data of their own, with as many trials for every method."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.reproduction.comparing import TRAINED, changed, made, silent, tiny
from tutelage.core.curriculum import METHODS
from tutelage.reproduction.recipes import resolve
from tutelage.reproduction.recipes.user_run import user_recipe
from tutelage.reproduction.report import write_report
from tutelage.reproduction.results import CurvePoint, RunRecord, Tuning
from tutelage.reproduction.runner import Runner
from tutelage.reproduction.search import RATE, Axis
from tutelage.reproduction.teachers import Checkpoint, Teacher
from tutelage.reproduction.tuning import axes_of, tune
from tutelage.reproduction.variants import PACES, Candidate, parse_variant, plain_variant

CHECKPOINTS = tuple(Checkpoint(320 * n, f"at-{320 * n}") for n in range(1, 6))


def with_checkpoints(recipe: Any) -> Teacher:
    """A teacher that is said to have five checkpoints, and was not trained."""
    return Teacher(recipe.new_teacher(), "untrained", checkpoints=CHECKPOINTS, transition=3)


def tuned_and_reported(trainers: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What the trainers of tuning runs and of reported ones were given."""
    tuned = [given for given in trainers if "/tuning/" in given["args"].output_dir]
    return tuned, [given for given in trainers if "/runs/" in given["args"].output_dir]


def test_rates_are_chosen_on_tuning_seeds_alike_for_all(tmp_path: Path, trainers: list[dict[str, Any]]) -> None:
    grid = (0.001, 0.3)  # with the first nothing moves
    result = made(tiny(learning_rates=grid, trials=2), tmp_path / "o", ["one_shot", "scratch"])
    for entry in result.methods:
        (tuning,) = entry.tunings
        assert tuning.candidate == Candidate(0.3) and tuning.edges == (RATE,)
        scores = {trial.candidate.label: trial.score for trial in tuning.trials}
        assert set(scores) == {"0.001", "0.3"}
        assert scores["0.001"] is None and scores["0.3"] is not None and scores["0.3"] > 0
    tuned, reported = tuned_and_reported(trainers)
    assert {tuple(given["train_dataset"].seed) for given in tuned} == {(1000,)}
    assert {tuple(given["train_dataset"].seed) for given in reported} == {(0, 1)}
    for method in ("one_shot", "scratch"):
        mine = [given["args"].learning_rate for given in tuned if given["curriculum"].method == method]
        assert sorted(mine) == sorted(grid)
        assert [g["args"].learning_rate for g in reported if g["curriculum"].method == method] == [0.3]


def test_tuning_takes_the_whole_budget(tmp_path: Path, trainers: list[dict[str, Any]]) -> None:
    made(tiny(learning_rates=(0.001, 0.002), trials=2, target=1.0), tmp_path / "o", ["one_shot"])
    assert [given["curriculum"].total_steps for given in trainers] == [60, 60, 60]


# ---- Held-out data ----


def test_tuning_runs_of_a_parity_are_evaluated_on_other_data(tmp_path: Path, trainers: list[dict[str, Any]]) -> None:
    made(tiny(learning_rates=(0.1, 0.3), trials=2), tmp_path / "o", ["one_shot"])
    tuned, reported = tuned_and_reported(trainers)
    held = [given["eval_dataset"].arrays()[0][:, 0] for given in (*tuned, *reported)]
    assert torch.equal(held[0], held[1]) and held[0].shape == held[-1].shape
    assert not torch.equal(held[0], held[-1])


def rows_of(data: Any) -> list[tuple[int, ...]]:
    return [tuple(torch.as_tensor(row["input_ids"]).tolist()) for row in data]


def test_tuning_runs_of_a_grammar_are_evaluated_on_other_data(tmp_path: Path, trainers: list[dict[str, Any]]) -> None:
    fields = {"budget_samples": 32, "eval_every": 32, "eval_samples": 16, "teacher_samples": 32, "teacher_heads": 2}
    fields |= {"student_heads": 1, "levels": 3, "teacher_checkpoints": 1, "tuning_seeds": (1000,), "trials": 2}
    recipe = resolve("pcfg-clm/smoke", {**fields, "learning_rates": (3e-3, 1e-2)})
    made(recipe, tmp_path / "o", ["scratch"])
    tuned, reported = tuned_and_reported(trainers)
    held = [rows_of(given["eval_dataset"]) for given in (*tuned, *reported)]
    assert held[0] == held[1] == rows_of(recipe.eval_data([0], tuning=True))
    assert held[2] == rows_of(recipe.eval_data([0])) != held[0]
    assert len(held[0]) == len(held[2]) == 16


def apart(recipe: Any, most: int) -> None:
    """Both held-out sets have at most so many examples, and none in common."""
    held = [rows_of(recipe.eval_data([0], tuning=tuning)) for tuning in (False, True)]
    assert 1 < len(held[0]) <= most and 0 <= len(held[0]) - len(held[1]) <= 1
    assert not set(held[0]) & set(held[1])


def test_held_out_text_is_divided_between_tuning_and_report(corpus: Path, tmp_path: Path) -> None:
    text = {"dataset": str(corpus / "text.txt"), "eval_samples": 5, "max_length": 16}
    apart(resolve("text-clm/smoke", text), 5)
    apart(resolve("text-clm/smoke", {**text, "eval_samples": 10**6}), 10**6)
    own = {"student": "layers=1,hidden_size=32", "dataset": str(corpus / "text.txt"), "max_samples": 9}
    apart(user_recipe(None, {**own, "max_length": 16, "use_cpu": True}), 5)


def test_a_single_held_out_example_does_not_suffice_for_tuning_and_report(corpus: Path) -> None:
    own = {"student": "layers=1,hidden_size=32", "dataset": str(corpus / "text.txt"), "max_samples": 1}
    recipe = user_recipe(None, {**own, "max_length": 16, "use_cpu": True})
    assert len(recipe.eval_data([0])) == 1
    with pytest.raises(
        ValueError, match="one held-out example, but tuning and report need one each: give more held-out"
    ):
        recipe.eval_data([0], tuning=True)


# ---- What is searched ----


def searched(text: str, trials: int | None = 12) -> dict[str, Axis]:
    """The axes of a variant on a parity with five checkpoints."""
    recipe = resolve("parity-mlp/smoke", {**TRAINED, "learning_rates": (0.1, 0.3), "trials": trials})
    variant = parse_variant(text) if ":" in text else plain_variant(text)
    return axes_of(recipe, variant, with_checkpoints(recipe))


def test_every_method_has_the_same_rates_and_settings_of_its_own() -> None:
    rates = {RATE: Axis((0.1, 0.3), grows=True)}
    for method in ("one_shot", "scratch"):
        assert searched(method) == rates
    extraction = searched("extraction")
    assert extraction == {
        **rates,
        "stage_steps": Axis((10, 20, 40), start=20, grows=True),
        "stage_learning_rate": Axis((1.0, 3.0, 9.0), start=3.0, grows=True),
    }
    assert searched("mine:method=extraction,normalize=none") == extraction
    assert searched("joint") == {**rates, "hidden_weight": Axis((0.3, 1.0, 3.0), start=1.0, grows=True)}
    progressive = searched("progressive")
    assert list(progressive) == [RATE, "phase_samples", "checkpoint", "schedule"]
    # half of the budget at most, so that the search begins with what can be run
    assert progressive["phase_samples"] == Axis((240, 480, 960), start=480, grows=True)


def test_transformers_begin_progressive_with_half_of_the_teachers_own_transition() -> None:
    recipe = resolve("parity-transformer")
    axes = axes_of(recipe, plain_variant("progressive"), with_checkpoints(recipe))
    assert axes["phase_samples"] == Axis((6_400, 12_800, 25_600), start=12_800, grows=True)
    assert axes_of(recipe, plain_variant("extraction"), with_checkpoints(recipe))["stage_learning_rate"].values == (
        0.001,
        0.003,
        0.009,
    )


def test_a_length_that_a_variant_gives_is_the_only_one() -> None:
    """A number of steps takes the place of a fraction of them, which the language recipes search."""
    recipe = resolve("pcfg-clm")
    for length in ("stage_steps=100", "stage_fraction=0.3"):
        found = axes_of(recipe, parse_variant(f"mine:method=extraction,{length}"), with_checkpoints(recipe))
        assert found.keys() == {RATE, "num_stages"}


def test_language_searches_the_places_of_joint_as_those_of_extraction() -> None:
    recipe = resolve("pcfg-clm")
    found = {name: axes_of(recipe, plain_variant(name), with_checkpoints(recipe)) for name in METHODS}
    assert found["joint"]["num_stages"] == found["extraction"]["num_stages"] == Axis((1, 2, 4), start=1)
    assert found["extraction"]["stage_fraction"] == Axis((0.125, 0.25, 0.5), start=0.25, grows=True)
    # the teacher sees many times as many samples, so no student can follow its pace
    assert found["progressive"]["schedule"] == Axis(("two", "even", "half"), ordered=False)
    assert list(found["progressive"]) == [RATE, "schedule", "phase_samples", "checkpoint"]
    assert found["one_shot"].keys() == {RATE}


def test_with_one_trial_nothing_is_searched() -> None:
    for method in ("extraction", "joint", "progressive"):
        assert searched(method, trials=1).keys() == {RATE}
        assert searched(method, trials=None) == searched(method)  # without a number they are searched, in their grid


def test_a_setting_that_a_variant_fixes_is_not_searched() -> None:
    assert searched("mine:method=extraction,stage_steps=5").keys() == {RATE, "stage_learning_rate"}
    assert searched("mine:method=joint,hidden_weight=2,learning_rate=0.5") == {RATE: Axis((0.5,))}
    assert searched("mine:method=scratch,learning_rate=0.5")[RATE] == Axis((0.5,))
    assert searched("mine:method=progressive,schedule=two").keys() == {RATE, "phase_samples", "checkpoint"}
    # which checkpoint and for how long says nothing at a pace
    assert searched("mine:method=progressive,schedule=pace-2").keys() == {RATE}


def test_values_that_a_variant_gives_are_searched() -> None:
    found = searched("mine:method=joint,hidden_weight=0.3|1|3,normalize=none|standardize,eval_with_teacher=true|false")
    assert found["hidden_weight"] == Axis((0.3, 1.0, 3.0), start=1.0)  # from the middle, as what recipes search
    assert found["normalize"] == Axis(("none", "standardize"), start="none", ordered=False)
    assert not found["eval_with_teacher"].ordered
    # they come before what the recipe searches by itself, so that trials are left for them
    asked = searched("mine:method=extraction,normalize=none|standardize")
    assert list(asked) == [RATE, "normalize", "stage_steps", "stage_learning_rate"]
    assert searched("mine:method=scratch,learning_rate=0.5|1")[RATE].values == (0.5, 1.0)
    paces = searched("mine:method=progressive,schedule=pace-2|two")
    assert paces["schedule"] == Axis(("pace-2", "two"), start="pace-2", ordered=False)
    assert {"phase_samples", "checkpoint"} <= paces.keys()  # of the second one


# ---- Runs of the search ----


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[Candidate, tuple[int, ...], float | None]]]:
    """Let the metric of a run be a function of candidate and seed; the runs that were asked for, and their limits.

    The value is the number of samples after which the target is reached, or the final metric where there is none."""

    def script(value: Callable[[Candidate, int], float]) -> list[tuple[Candidate, tuple[int, ...], float | None]]:
        asked: list[tuple[Candidate, tuple[int, ...], float | None]] = []

        def runs_of(
            self: Runner, _: Any, candidate: Candidate, seeds: Sequence[int], what: str = "", limit: float | None = None
        ) -> Any:
            if what == "tuning":
                asked.append((candidate, tuple(seeds), limit))
            for seed in seeds:
                found = value(candidate, seed)
                if not self.recipe.stop_at_target:
                    metrics = {"loss": found} if math.isfinite(found) else {}
                    yield [RunRecord(seed, (CurvePoint(960, 0.0, 0.0, metrics),), None if metrics else "loss is nan")]
                    continue
                arrived = found <= min(self.recipe.budget_samples, math.inf if limit is None else limit)
                ended = int(found if arrived else min(limit or math.inf, self.recipe.budget_samples))
                yield [RunRecord(seed, (CurvePoint(ended, 0.0, 0.0, {"accuracy": 1.0 if arrived else 0.5}),))]

        monkeypatch.setattr(Runner, "runs", runs_of)
        return asked

    return script


def tuned(recipe: Any, method: str, folder: Path, teacher: Teacher | None = None) -> Tuning:
    variant = parse_variant(method) if ":" in method else plain_variant(method)
    return tune(Runner(recipe, teacher or recipe.make_teacher(folder), folder, "samples"), variant, silent)


@pytest.mark.parametrize("count", [2, 3])
def test_a_candidate_is_stopped_only_where_it_cannot_win(count: int, tmp_path: Path, scripted: Any) -> None:
    """With two seeds the median is their mean, so one slow seed does not lose yet."""
    times = {0.1: [100_000] * count, 0.3: [50_000, 140_000, 60_000][:count]}
    asked = scripted(lambda candidate, seed: times[candidate.learning_rate][seed - 1000])
    fields = {"learning_rates": (0.1, 0.3), "tuning_seeds": tuple(range(1000, 1000 + count)), "budget_samples": 500_000}
    found = tuned(tiny(**fields, trials=2), "one_shot", tmp_path)
    assert found.candidate == Candidate(0.3)
    assert [limit for _, _, limit in asked] == [None, 100_000 * (1 if count % 2 else 2)]
    assert [trial.seeds for trial in found.trials] == [count, count]  # all seeds of a replicated recipe are one run


def test_a_candidate_whose_first_seed_does_not_arrive_is_not_run_on_the_others(tmp_path: Path, scripted: Any) -> None:
    """Where a run has one seed, and ends at the target."""
    times = {0.1: 400, 0.3: 10**6, 0.9: 300}
    asked = scripted(lambda candidate, seed: times[candidate.learning_rate])
    fields = {"learning_rates": (0.1, 0.3, 0.9), "tuning_seeds": (1000, 1001, 1002), "trials": 3}
    found = tuned(changed(tiny(**fields), replicated=False), "one_shot", tmp_path)
    runs = {
        rate: [s for candidate, seeds, _ in asked if candidate.learning_rate == rate for s in seeds] for rate in times
    }
    assert runs == {0.1: [1000, 1001, 1002], 0.3: [1000], 0.9: [1000, 1001, 1002]}
    assert found.candidate == Candidate(0.9)
    assert [(trial.score, trial.seeds, trial.stopped_after) for trial in found.trials] == [
        (400, 3, None),
        (None, 1, 400),
        (300, 3, None),
    ]


def test_where_the_median_does_not_arrive_a_seed_that_does_counts(tmp_path: Path, scripted: Any) -> None:
    times = {0.1: [10**6] * 3, 0.3: [10**6, 400, 10**6], 0.9: [10**6] * 3}
    scripted(lambda candidate, seed: times[candidate.learning_rate][seed - 1000])
    fields = {"learning_rates": tuple(times), "tuning_seeds": (1000, 1001, 1002), "trials": 3}
    assert tuned(tiny(**fields), "one_shot", tmp_path).candidate == Candidate(0.3)


def by_loss(**fields: Any) -> Any:
    """A recipe whose runs take the whole budget, as those of languages do; the final loss is compared."""
    recipe = dataclasses.replace(tiny(**fields), target=None)  # type: ignore[call-arg]
    return changed(recipe, replicated=False, metric="loss", better="lower", stop_at_target=False)


def test_a_candidate_that_is_clearly_worse_on_the_first_seed_is_not_run_on_the_second(
    tmp_path: Path, scripted: Any
) -> None:
    """More than a hundredth worse than the best first seed, where final values are compared."""
    losses = {0.1: (2.0, 2.5), 0.2: (2.03, 1.0), 0.3: (2.01, 2.0), 0.4: (1.9, 2.4)}
    asked = scripted(lambda candidate, seed: losses[candidate.learning_rate][seed - 1000])
    recipe = by_loss(learning_rates=tuple(losses), tuning_seeds=(1000, 1001), trials=4)
    found = tuned(recipe, "one_shot", tmp_path)
    assert [(candidate.learning_rate, seeds) for candidate, seeds, _ in asked] == [
        (0.1, (1000,)),
        (0.1, (1001,)),
        (0.2, (1000,)),  # 1.5% worse: its good second seed is never seen
        (0.3, (1000,)),
        (0.3, (1001,)),
        (0.4, (1000,)),
        (0.4, (1001,)),
    ]
    assert [trial.seeds for trial in found.trials] == [2, 1, 2, 2]
    assert found.candidate == Candidate(0.3)  # by the mean of both seeds
    assert [trial.score for trial in found.trials] == pytest.approx([2.25, 2.03, 2.005, 2.15])


def test_one_that_was_dropped_is_not_chosen_for_its_good_first_seed(tmp_path: Path, scripted: Any) -> None:
    losses = {0.1: (1.0, 9.0), 0.2: (1.2, 1.2)}
    scripted(lambda candidate, seed: losses[candidate.learning_rate][seed - 1000])
    found = tuned(by_loss(learning_rates=tuple(losses), tuning_seeds=(1000, 1001), trials=2), "one_shot", tmp_path)
    assert found.candidate == Candidate(0.1) and [trial.seeds for trial in found.trials] == [2, 1]


def test_a_first_candidate_that_diverges_does_not_end_the_race(tmp_path: Path, scripted: Any) -> None:
    losses = {0.1: math.inf, 0.2: 2.0, 0.3: math.inf}
    asked = scripted(lambda candidate, seed: losses[candidate.learning_rate])
    found = tuned(by_loss(learning_rates=tuple(losses), tuning_seeds=(1000, 1001), trials=3), "one_shot", tmp_path)
    assert found.candidate == Candidate(0.2)
    assert [trial.diverged for trial in found.trials] == [True, False, True]
    assert sum(candidate == Candidate(0.3) for candidate, _, _ in asked) == 1  # its second seed was not needed


def test_a_metric_that_is_better_higher_races_the_other_way(tmp_path: Path, scripted: Any) -> None:
    values = {0.1: 0.80, 0.2: 0.79, 0.3: 0.795, 0.4: 0.9}
    asked = scripted(lambda candidate, seed: values[candidate.learning_rate])
    recipe = changed(by_loss(learning_rates=tuple(values), tuning_seeds=(1000, 1001), trials=4), better="higher")
    assert tuned(recipe, "one_shot", tmp_path).candidate == Candidate(0.4)
    second = [candidate.learning_rate for candidate, seeds, _ in asked if 1001 in seeds]
    assert second == [0.1, 0.3, 0.4]


def test_progressive_searches_its_phase_checkpoint_and_schedule(tmp_path: Path, scripted: Any) -> None:
    def samples(candidate: Candidate, seed: int) -> float:
        if candidate.settings["schedule"] != "two":
            return 700.0
        apart = abs(math.log2(candidate.settings["phase_samples"] / 240)) + abs(candidate.settings["checkpoint"] + 1)
        return 300 + 50 * apart + 100 * abs(math.log(candidate.learning_rate / 0.3))

    asked = scripted(samples)
    recipe = resolve("parity-mlp/smoke", {**TRAINED, "learning_rates": (0.1, 0.3), "trials": 12})
    found = tuned(recipe, "progressive", tmp_path, with_checkpoints(recipe))
    best = Candidate(0.3, {"phase_samples": 240, "checkpoint": -1, "schedule": "two"})
    assert found.candidate == best and found.edges == ()
    assert len(asked) == len({candidate.label for candidate, _, _ in asked}) == len(found.trials) == 12
    assert {candidate.settings["schedule"] for candidate, _, _ in asked} == set(PACES)


def test_a_phase_beyond_the_budget_is_no_trial(tmp_path: Path, scripted: Any) -> None:
    asked = scripted(lambda candidate, seed: 900 - candidate.settings.get("phase_samples", 0) / 2)
    recipe = resolve("parity-mlp/smoke", {**TRAINED, "learning_rates": (0.1,), "trials": 8})
    found = tuned(recipe, "progressive", tmp_path, with_checkpoints(recipe))
    phases = {candidate.settings.get("phase_samples") for candidate, _, _ in asked}
    assert len(found.trials) == 8 and max(filter(None, phases)) == 480  # 960 would be the whole budget


# ---- A comparison ----


def test_every_method_of_a_comparison_gets_the_same_number_of_trials(tmp_path: Path, scripted: Any) -> None:
    scripted(lambda candidate, seed: 800 - 90 * candidate.learning_rate)
    methods = ("extraction", "joint", "one_shot", "progressive", "scratch")
    fields = {"learning_rates": (0.1, 0.3), "trials": 5, "teacher_checkpoint_every": 80}
    result = made(resolve("parity-mlp/smoke", {**TRAINED, **fields}), tmp_path / "o", methods)
    assert {entry.name: entry.trials for entry in result.methods} == dict.fromkeys(methods, 5)
    for entry in result.methods:
        (tuning,) = entry.tunings
        assert len({trial.candidate.label for trial in tuning.trials}) == 5
        assert {0.1, 0.3} <= {trial.candidate.learning_rate for trial in tuning.trials}
        assert tuning.candidate in [trial.candidate for trial in tuning.trials]
    write_report(tmp_path / "o")
    text = (tmp_path / "o" / "report.md").read_text(encoding="utf-8")
    (results,) = [part for part in text.split("\n\n") if part.startswith("| method | samples to accuracy")]
    rows = [row.split("|")[-2].strip() for row in results.splitlines()[2:]]
    assert [row.split(" ")[0] for row in rows] == ["5"] * 5
    shown = [f"5 (at an edge: {', '.join(entry.edges)})" if entry.edges else "5" for entry in result.methods]
    assert [row.replace("\\", "") for row in rows] == shown
    assert any(entry.edges for entry in result.methods)
    assert ", one teacher." in text
