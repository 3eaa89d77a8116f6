"""The comparison engine on a parity so small that a run takes a fraction of a second."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import save_llama
from tutelage.reproduction import runner as runs
from tutelage.reproduction import teachers
from tutelage.reproduction.compare import COMPARISON_FILE, compare
from tutelage.reproduction.recipe import Recipe
from tutelage.reproduction.recipes import resolve
from tutelage.reproduction.recipes.parity import ParityMLPRecipe
from tutelage.reproduction.report import write_report
from tutelage.reproduction.verdict import verdict
from tutelage.tasks.parity import ParityMLP, ParityMLPConfig
from tutelage.training import trainer as trainer_module
from tutelage.training.trainer import CurriculumTrainer

TINY: dict[str, Any] = {
    "d": 8,
    "k": 2,
    "teacher": "planted",
    "teacher_width": 64,
    "student_width": 16,
    "seeds": (0, 1),
    "tuning_seeds": (1000,),
    "learning_rates": (0.1,),
    "batch_size": 16,
    "budget_samples": 960,
    "eval_every": 80,
    "eval_samples": 64,
    "stage_samples": 320,
    "target": 0.9,
}
# a teacher that is trained: on two bits it takes a second
TRAINED = {**TINY, "d": 6, "teacher": "trained", "teacher_max_samples": 32_000, "teacher_checkpoint_every": 320}
METHODS = ("extraction", "one_shot", "scratch")


class WithoutData(ParityMLPRecipe):
    """Its runs fail, wherever they are made."""

    def train_data(self, seeds: Sequence[int], count: int) -> Any:
        raise ValueError("no data here")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUTELAGE_CACHE", str(tmp_path / "cache"))


def tiny(**fields: Any) -> Recipe:
    return resolve("parity-mlp/smoke", {**TINY, **fields})


def made(system: Recipe, folder: Path, methods: Sequence[str] | None = METHODS, **settings: Any) -> dict[str, Any]:
    """A comparison, after checking that what is returned is what is on disk."""
    result = compare(system, folder, methods, log=lambda line: None, **settings)
    assert json.loads((folder / COMPARISON_FILE).read_text(encoding="utf-8")) == json.loads(json.dumps(result))
    return result


def timeless(value: Any) -> Any:
    """Without what a clock says."""
    if isinstance(value, dict):
        return {key: timeless(inner) for key, inner in value.items() if "seconds" not in key}
    return [timeless(inner) for inner in value] if isinstance(value, list) else value


def whole_budgets(monkeypatch: pytest.MonkeyPatch, stages: dict[str, Any]) -> None:
    """Runs go on beyond the target; the hidden stage is changed."""
    monkeypatch.setattr(ParityMLPRecipe, "stop_at_target", False)
    arguments = ParityMLPRecipe.method_arguments

    def changed(self: Any, method: str) -> dict[str, Any]:
        made = arguments(self, method)
        return {**made, **stages} if made else made

    monkeypatch.setattr(ParityMLPRecipe, "method_arguments", changed)


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What every trainer of a run is given."""
    seen: list[dict[str, Any]] = []

    class Spy(CurriculumTrainer):
        def __init__(self, **given: Any):
            seen.append({**given, "start": copy.deepcopy(given["model"].state_dict())})
            super().__init__(**given)

    monkeypatch.setattr(runs, "CurriculumTrainer", Spy)
    return seen


@pytest.fixture
def kill(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """Interrupt the runs of a method at a step, once."""

    def at(method: str, step: int) -> None:
        original, left = CurriculumTrainer.training_step, [1]

        def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
            running = "/runs/" in self.args.output_dir and self.curriculum.method == method
            if left and running and self.state.global_step == step:
                left.clear()
                raise KeyboardInterrupt
            return original(self, *args, **kwargs)

        monkeypatch.setattr(CurriculumTrainer, "training_step", training_step)

    return at


# ---- What is written ----


def test_comparison_has_the_documented_schema(tmp_path: Path) -> None:
    result = made(tiny(), tmp_path / "o", command="tutelage compare parity-mlp/smoke")
    assert set(result) >= {"recipe", "size", "budget", "target", "environment", "methods", "ratios", "verdict"}
    assert (result["recipe"], result["size"], result["budget"], result["target"]) == ("parity-mlp", "smoke", 960, 0.9)
    assert (result["complete"], result["command"]) == (True, "tutelage compare parity-mlp/smoke")
    assert result["seeds"] == [0, 1] and result["settings"]["d"] == 8
    assert "planted" in result["teacher"]["description"] and result["teacher"]["accuracy"] > 0.99
    assert {"torch", "transformers", "machine"} <= set(result["environment"])
    assert list(result["methods"]) == list(METHODS)
    for entry in result["methods"].values():
        assert set(entry) >= {"learning_rate", "runs", "median_samples_to_target", "ci95", "curriculum"}
        assert entry["learning_rate"] == 0.1
        assert [run["seed"] for run in entry["runs"]] == [0, 1]
        for run in entry["runs"]:
            assert set(run) >= {
                "samples_to_target",
                "flops_to_target",
                "seconds_to_target",
                "seconds",
                "final",
                "curve",
            }
            for point in run["curve"]:
                assert set(point) == {"samples", "flops", "seconds", "loss", "accuracy"}
            samples = [point["samples"] for point in run["curve"]]
            assert samples == sorted(set(samples)) and samples[0] == 0 and samples[-1] <= 960
            assert samples[:-1] == list(range(0, samples[-1], 80))
            for cost in ("flops", "seconds"):
                costs = [point[cost] for point in run["curve"]]
                assert costs == sorted(costs) and costs[-1] > 0
            assert run["final"] == {key: run["curve"][-1][key] for key in ("loss", "accuracy")}
            arrived = [point for point in run["curve"] if point["accuracy"] >= 0.9]
            assert run["samples_to_target"] == (arrived[0]["samples"] if arrived else None)
            assert run["flops_to_target"] == (arrived[0]["flops"] if arrived else None)
    names = {f"extraction/{other}{cost}" for other in ("one_shot", "scratch") for cost in ("", " flops", " seconds")}
    assert set(result["ratios"]) == names
    for ratio in result["ratios"].values():
        assert set(ratio) >= {"median", "ci95"} and len(ratio["ci95"]) == 2
    assert "NaN" not in (tmp_path / "o" / COMPARISON_FILE).read_text() and isinstance(result["verdict"], str)


def test_a_target_never_reached_is_null_and_beyond_the_budget(tmp_path: Path) -> None:
    result = made(tiny(d=12, k=4, teacher_width=400, target=0.99, seeds=(0, 1, 2)), tmp_path / "o", ["one_shot"])
    entry = result["methods"]["one_shot"]
    assert [run["samples_to_target"] for run in entry["runs"]] == [None] * 3
    assert (entry["median_samples_to_target"], entry["ci95"]) == (None, [None, None])
    assert all(run["curve"][-1]["samples"] == 960 for run in entry["runs"])  # the whole budget was given


def test_methods_are_named_as_they_were_asked_for(tmp_path: Path) -> None:
    names = ["extraction", "extraction:layer_map=2:2,stage_steps=5", "one_shot:budget=0.5"]
    result = made(tiny(target=1.0, k=3), tmp_path / "o", names)
    assert list(result["methods"]) == names
    stages = {name: result["methods"][name]["curriculum"]["stages"] for name in names}
    assert [(s["kind"], s["steps"]) for s in stages[names[0]]] == [("hidden", 20), ("output", 40)]
    assert [(s["kind"], s["steps"], s.get("student_place")) for s in stages[names[1]]] == [
        ("hidden", 5, 2),
        ("output", 55, None),
    ]
    assert [s["steps"] for s in stages[names[2]]] == [30]
    assert f"{names[1]}/{names[2]}" in result["ratios"] and f"{names[0]}/{names[1]}" in result["ratios"]


def test_without_a_target_one_shots_median_is_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"metric": "loss", "better": "lower", "stop_at_target": False}.items():
        monkeypatch.setattr(ParityMLPRecipe, name, value)
    system: Any = dataclasses.replace(tiny(seeds=(0, 1, 2)), target=None)  # type: ignore[call-arg]
    result = made(system, tmp_path / "o", ["extraction", "one_shot"])
    finals = [run["final"]["loss"] for run in result["methods"]["one_shot"]["runs"]]
    assert result["target"] == sorted(finals)[1]
    for entry in result["methods"].values():
        for run in entry["runs"]:
            assert run["curve"][-1]["samples"] == 960
            arrived = [point["samples"] for point in run["curve"] if point["loss"] <= result["target"]]
            assert run["samples_to_target"] == (arrived[0] if arrived else None)
    without = made(system, tmp_path / "o2", ["extraction", "scratch"])
    assert without["target"] is None and "ended best" in without["verdict"]


def test_an_easy_target_holds_before_training(tmp_path: Path) -> None:
    result = made(tiny(target=0.1), tmp_path / "o", ["extraction", "one_shot"])
    for entry in result["methods"].values():
        assert entry["median_samples_to_target"] == 0


# ---- Fairness ----


def test_all_methods_of_a_seed_share_student_and_data(
    tmp_path: Path, trainers: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ParityMLPRecipe, "replicated", False)
    made(tiny(), tmp_path / "o")
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


def test_replicas_say_what_single_runs_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = made(tiny(target=0.8), tmp_path / "together")
    monkeypatch.setattr(ParityMLPRecipe, "replicated", False)
    apart = made(tiny(target=0.8), tmp_path / "apart")
    for method in METHODS:
        for mine, theirs in zip(together["methods"][method]["runs"], apart["methods"][method]["runs"], strict=True):
            assert mine["seed"] == theirs["seed"]
            assert mine["samples_to_target"] == theirs["samples_to_target"]
            for left, right in zip(mine["curve"], theirs["curve"], strict=False):  # they wait for the slowest seed
                assert left["samples"] == right["samples"]
                assert left["flops"] == pytest.approx(right["flops"])
                assert left["accuracy"] == right["accuracy"]
                assert left["loss"] == pytest.approx(right["loss"], rel=1e-4)


def test_rates_are_chosen_on_tuning_seeds_alike_for_all(tmp_path: Path, trainers: list[dict[str, Any]]) -> None:
    grid = (0.001, 0.3)  # with the first nothing moves
    result = made(tiny(learning_rates=grid), tmp_path / "o", ["one_shot", "scratch"])
    for entry in result["methods"].values():
        assert entry["learning_rate"] == 0.3
        assert set(entry["grid"]) == {"0.001", "0.3"}
        assert entry["grid"]["0.001"]["score"] is None and entry["grid"]["0.3"]["score"] > 0
    tuned = [given for given in trainers if "/tuning/" in given["args"].output_dir]
    reported = [given for given in trainers if "/runs/" in given["args"].output_dir]
    assert {tuple(given["train_dataset"].seed) for given in tuned} == {(1000,)}
    assert {tuple(given["train_dataset"].seed) for given in reported} == {(0, 1)}
    for method in ("one_shot", "scratch"):
        mine = [given["args"].learning_rate for given in tuned if given["curriculum"].method == method]
        assert sorted(mine) == sorted(grid)
        assert [g["args"].learning_rate for g in reported if g["curriculum"].method == method] == [0.3]


def test_tuning_may_take_a_share_of_the_budget(tmp_path: Path, trainers: list[dict[str, Any]]) -> None:
    made(tiny(learning_rates=(0.001, 0.002), tuning_share=0.5, target=1.0), tmp_path / "o", ["one_shot"])
    steps = [given["curriculum"].total_steps for given in trainers]
    assert steps == [30, 30, 60]


def test_budgets_are_equal_in_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ParityMLPRecipe, "stop_at_target", False)
    result = made(tiny(), tmp_path / "o")
    assert {run["curve"][-1]["samples"] for entry in result["methods"].values() for run in entry["runs"]} == {960}


@pytest.mark.parametrize(
    ("fields", "stages"),
    [
        ({"budget_samples": 1920, "stage_samples": 640}, {}),
        ({"stage_samples": 160}, {}),
        ({}, {"stage_steps": None, "stage_fraction": 0.4}),
    ],
)
def test_budgets_may_be_equal_in_flops(
    tmp_path: Path, fields: dict[str, Any], stages: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden stages of so many examples, as the recipe has them (many, few), or of a share of the steps."""
    system = tiny(**fields)
    whole_budgets(monkeypatch, stages)
    result = made(system, tmp_path / "o", match="flops")
    assert result["match"] == "flops"
    spent = {name: entry["runs"][0]["curve"][-1] for name, entry in result["methods"].items()}
    budget = system.budget_samples
    assert spent["one_shot"]["samples"] == budget
    for name in ("extraction", "scratch"):
        assert spent[name]["flops"] == pytest.approx(spent["one_shot"]["flops"], rel=0.05), name
    assert spent["scratch"]["samples"] > 1.2 * budget  # it runs no teacher
    assert spent["extraction"]["samples"] < budget  # a step of this hidden stage costs more


def test_a_comparison_at_equal_seconds_goes_on_with_its_own_steps(
    tmp_path: Path, kill: Callable[[str, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock says something else after a restart: a run that had begun keeps the stages it began with."""
    system = tiny(eval_every=16)  # a checkpoint each 20 steps
    whole_budgets(monkeypatch, {"stage_steps": None, "stage_fraction": 0.4})
    kill("extraction", 22)
    with pytest.raises(KeyboardInterrupt):
        made(system, tmp_path / "o", ["extraction"], match="seconds")
    (folder,) = (tmp_path / "o" / "runs").glob("extraction-*/*")
    begun = json.loads((folder / "curriculum.json").read_text(encoding="utf-8"))
    assert [stage["kind"] for stage in begun["stages"]] == ["hidden", "output"]
    result = made(system, tmp_path / "o", ["extraction"], match="seconds")
    assert result["methods"]["extraction"]["curriculum"] == begun
    steps = sum(stage["steps"] for stage in begun["stages"])
    assert result["methods"]["extraction"]["runs"][0]["curve"][-1]["samples"] == steps * 16


# ---- Stopped and started again ----


def test_a_finished_comparison_is_read_back(tmp_path: Path, trainers: list[dict[str, Any]]) -> None:
    first = made(tiny(learning_rates=(0.1, 0.3)), tmp_path / "o")
    trainers.clear()
    assert made(tiny(learning_rates=(0.1, 0.3)), tmp_path / "o") == first
    assert not trainers
    more = made(tiny(learning_rates=(0.1, 0.3)), tmp_path / "o", [*METHODS, "extraction:layer_map=2:2"])
    assert {name: more["methods"][name] for name in METHODS} == first["methods"]
    assert {given["curriculum"].method for given in trainers} == {"extraction"}


def test_a_method_more_keeps_those_that_were_there(tmp_path: Path, trainers: list[dict[str, Any]]) -> None:
    first = made(tiny(), tmp_path / "o", ["one_shot", "scratch"])
    trainers.clear()
    more = made(tiny(), tmp_path / "o", ["extraction"])
    assert {given["curriculum"].method for given in trainers} == {"extraction"}
    assert list(more["methods"]) == ["one_shot", "scratch", "extraction"]
    assert {name: more["methods"][name] for name in first["methods"]} == first["methods"]
    assert "extraction/one_shot" in more["ratios"]


def test_only_a_missing_run_is_made_again(
    tmp_path: Path, trainers: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ParityMLPRecipe, "replicated", False)
    system = tiny()
    folder = tmp_path / "o"
    first = made(system, folder)
    (lost,) = folder.glob("runs/one_shot-*/*seed-1/run.json")
    lost.unlink()
    (folder / COMPARISON_FILE).unlink()
    trainers.clear()
    again = made(system, folder)
    assert [given["args"].output_dir for given in trainers] == [str(lost.parent)]
    assert timeless(again) == timeless(first)
    for method in ("extraction", "scratch"):
        assert again["methods"][method] == first["methods"][method]


@pytest.mark.parametrize(("method", "step"), [("one_shot", 30), ("extraction", 25), ("extraction", 10)])
def test_a_run_killed_in_its_middle_ends_as_if_it_had_not_been(
    tmp_path: Path, kill: Callable[[str, int], None], method: str, step: int
) -> None:
    system, methods = (
        tiny(eval_every=16, target=1.0, k=3, d=10),
        ("extraction", "one_shot"),
    )  # checkpoints each 20 steps
    whole = made(system, tmp_path / "whole", methods)
    kill(method, step)
    with pytest.raises(KeyboardInterrupt):
        made(system, tmp_path / "parts", methods)
    state = tmp_path / "parts" / COMPARISON_FILE
    if method == "one_shot":  # what is finished can be reported already
        known = json.loads(state.read_text(encoding="utf-8"))
        assert known["complete"] is False
        assert [name for name, entry in known["methods"].items() if entry["runs"]] == ["extraction"]
    else:
        assert not state.exists()
    assert timeless(made(system, tmp_path / "parts", methods)) == timeless(whole)


def test_a_seed_that_arrived_before_the_kill_has_arrived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill: Callable[[str, int], None]
) -> None:
    """Seed 0 is at the target for a while early on, seed 1 at step 40: there the run ends, killed in between or not."""
    now = [0]
    evaluate = CurriculumTrainer.evaluate

    def remember(self: Any, *args: Any, **kwargs: Any) -> Any:
        now[0] = self.state.global_step
        return evaluate(self, *args, **kwargs)

    def scripted(*args: Any, **kwargs: Any) -> dict[str, float]:
        values = {"accuracy_0": float(5 <= now[0] <= 10), "accuracy_1": float(now[0] >= 40)}
        return {"accuracy": 0.5, "loss": 1.0, "loss_0": 1.0, "loss_1": 1.0, **values}

    monkeypatch.setattr(CurriculumTrainer, "evaluate", remember)
    monkeypatch.setattr(trainer_module, "evaluate_batches", scripted)
    system = tiny(eval_every=16)
    whole = made(system, tmp_path / "whole", ["one_shot"])
    assert [run["curve"][-1]["samples"] for run in whole["methods"]["one_shot"]["runs"]] == [640, 640]
    kill("one_shot", 30)
    with pytest.raises(KeyboardInterrupt):
        made(system, tmp_path / "parts", ["one_shot"])
    assert timeless(made(system, tmp_path / "parts", ["one_shot"])) == timeless(whole)


def test_a_folder_of_another_comparison_is_refused(tmp_path: Path) -> None:
    made(tiny(), tmp_path / "o", ["scratch"])
    before = (tmp_path / "o" / COMPARISON_FILE).read_bytes()
    with pytest.raises(ValueError, match=r"holds another comparison \(another d\): choose another --output_dir"):
        compare(tiny(d=9), tmp_path / "o", ["scratch"], log=lambda line: None)
    with pytest.raises(ValueError, match=r"holds another comparison \(another match\)"):
        compare(tiny(), tmp_path / "o", ["scratch"], match="flops", log=lambda line: None)
    assert (tmp_path / "o" / COMPARISON_FILE).read_bytes() == before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no comparison"):
        compare(tiny(), tmp_path / "notes", ["scratch"], log=lambda line: None)
    assert [file.name for file in (tmp_path / "notes").iterdir()] == ["mine.txt"]


# ---- Teachers ----


def test_a_trained_teacher_is_trained_past_convergence_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = made(resolve("parity-mlp/smoke", TRAINED), tmp_path / "o", ["progressive", "one_shot"])
    figures = first["teacher"]
    assert figures["samples"] >= 2.5 * figures["converged_at"]
    times = figures["samples"] / figures["converged_at"]
    assert f"{times:.3g} times" in figures["description"] and figures["accuracy"] >= 0.999
    entry = first["methods"]["progressive"]
    assert entry["schedule"] in ("pace-1", "pace-2", "pace-4", "two")
    assert set(entry["grid"]) == {f"0.1 {name}" for name in ("pace-1", "pace-2", "pace-4", "two")}
    *before, last = entry["curriculum"]["stages"]
    assert before and last["teacher_checkpoint"] is None
    assert all(stage["teacher_checkpoint"].startswith("at-") for stage in before)  # by name, not by place

    def no_training(*args: Any) -> None:
        raise AssertionError("the teacher was trained again")

    monkeypatch.setattr(teachers, "_train", no_training)
    again = made(resolve("parity-mlp/smoke", {**TRAINED, "eval_every": 160}), tmp_path / "o2", ["one_shot"])
    assert again["teacher"] == figures
    with pytest.raises(AssertionError, match="trained again"):
        made(resolve("parity-mlp/smoke", {**TRAINED, "teacher_width": 65}), tmp_path / "o3", ["one_shot"])


def test_progressive_leaves_the_teacher_as_it_was(tmp_path: Path) -> None:
    """One-shot after progressive is one-shot."""
    system = resolve("parity-mlp/smoke", TRAINED)
    after = made(system, tmp_path / "a", ["progressive:schedule=two", "one_shot"])
    alone = made(system, tmp_path / "b", ["one_shot"])
    assert timeless(after["methods"]["one_shot"]["runs"]) == timeless(alone["methods"]["one_shot"]["runs"])


def test_a_teacher_that_does_not_converge_is_said_so(tmp_path: Path) -> None:
    system = resolve("parity-mlp/smoke", {**TRAINED, "teacher_learning_rate": 1e-6, "teacher_max_samples": 640})
    for _ in range(2):  # an unfinished teacher is not taken for a finished one
        with pytest.raises(ValueError, match=r"did not reach accuracy 0.999 within 640 samples \(it is at 0\.\d+\)"):
            compare(system, tmp_path / "o", log=lambda line: None)


@pytest.fixture
def given_teacher(tmp_path: Path) -> str:
    """A finished teacher of the tiny parity, without checkpoints."""
    tiny().make_teacher(tmp_path).model.save_pretrained(tmp_path / "given")
    return str(tmp_path / "given")


def test_a_teacher_may_be_given(tmp_path: Path, given_teacher: str) -> None:
    planted = made(tiny(), tmp_path / "planted")
    given = made(tiny(teacher=given_teacher), tmp_path / "o", METHODS)
    assert given["teacher"]["description"] == "given: given"
    assert given["teacher"]["accuracy"] == planted["teacher"]["accuracy"]
    for method in METHODS:
        assert timeless(given["methods"][method]["runs"]) == timeless(planted["methods"][method]["runs"])


def test_a_given_teacher_has_no_checkpoints_so_progressive_is_no_default(tmp_path: Path, given_teacher: str) -> None:
    system = tiny(teacher=given_teacher)
    result = made(system, tmp_path / "o", None)
    assert list(result["methods"]) == list(METHODS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d": 9}, "the teacher takes 8 bits, the recipe has d=9: give the one or change the other"),
        ({"support": (4, 5)}, r"accuracy on this parity \(d=8, k=2, support \[4, 5\]\) is 0\.\d+, which is chance"),
        ({"k": 3}, "which is chance: it was made for a different parity"),
    ],
)
def test_a_teacher_that_disagrees_with_the_recipe_is_refused(
    tmp_path: Path, given_teacher: str, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        compare(tiny(teacher=given_teacher, eval_samples=1024, **fields), tmp_path / "o", log=lambda line: None)


def test_a_folder_without_such_a_teacher_is_refused(tmp_path: Path) -> None:
    def refused(folder: str, message: str) -> None:
        system = tiny(teacher=str(tmp_path / folder))
        with pytest.raises((ValueError, OSError), match=message):
            compare(system, tmp_path / f"o-{folder}", METHODS, log=lambda line: None)

    (tmp_path / "empty").mkdir()
    refused("empty", "empty")
    save_llama(tmp_path / "llama")
    refused("llama", "llama")
    ParityMLP(ParityMLPConfig(8, 16, replica_seeds=[0, 1])).save_pretrained(tmp_path / "replicas")
    refused("replicas", "replica")


def test_a_target_above_the_teacher_is_refused(tmp_path: Path, trainers: list[dict[str, Any]]) -> None:
    narrow = {"k": 3, "teacher_width": 4, "eval_samples": 1024}  # too narrow to be right everywhere
    reaches = tiny(**narrow).make_teacher(tmp_path).metrics["accuracy"]
    assert 0.8 < reaches < 0.9
    message = f"the target accuracy 0.9 is beyond the teacher, which reaches {reaches:.4f}: lower the target"
    with pytest.raises(ValueError, match=message):
        compare(tiny(**narrow), tmp_path / "o", METHODS, log=lambda line: None)
    with pytest.raises(ValueError, match=r"the target accuracy 1\.01 is beyond the teacher, which reaches 1\.0000"):
        compare(tiny(target=1.01), tmp_path / "o2", METHODS, log=lambda line: None)
    assert not trainers
    made(tiny(**{**narrow, "target": 0.6}), tmp_path / "o3", ["one_shot"])


# ---- Refusals, before anything is run ----


@pytest.mark.parametrize(
    ("fields", "methods", "message"),
    [
        ({"seeds": (0, 1, 0)}, METHODS, "seeds are repeated: 0, 1, 0"),
        ({"seeds": ()}, METHODS, "seeds are empty"),
        ({"seeds": (0, 1000)}, METHODS, r"seeds \[1000\] are tuning seeds too"),
        ({"tuning_seeds": (), "learning_rates": (0.1, 0.3)}, METHODS, "tuning_seeds are empty"),
        ({"learning_rates": ()}, METHODS, "learning_rates are empty"),
        ({}, ("scratch", "one_shot", "scratch"), "methods are repeated: scratch, one_shot, scratch"),
        ({}, ("distil",), "unknown method 'distil'"),
        (
            {},
            ("extraction", "progressive"),
            "planted: computes the parity by construction, not trained.*: leave progressive",
        ),
        ({}, ("one_shot", "extraction:stage_steps=60"), "budget too small for the stages"),
        ({}, ("one_shot", "extraction:layer_map=3:2"), "the student has blocks 1 to 2"),
        (
            {},
            ("one_shot", "extraction:layer_map=final:final,warm_start=head"),
            "cannot be made for replicated students",
        ),
        ({"stage_samples": 960}, METHODS, "budget too small for the stages"),
    ],
)
def test_what_cannot_work_is_refused_before_any_run(
    tmp_path: Path,
    trainers: list[dict[str, Any]],
    fields: dict[str, Any],
    methods: Sequence[str],
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        compare(tiny(**fields), tmp_path / "o", methods, log=lambda line: None)
    assert not trainers


def test_an_unknown_match_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown match 'steps': use one of samples, flops, seconds"):
        compare(tiny(), tmp_path / "o", match="steps", log=lambda line: None)
    assert not (tmp_path / "o").exists()


# ---- The verdict ----


def run_of(seed: int, reached: int | None, final: float) -> dict[str, Any]:
    return {"seed": seed, "samples_to_target": reached, "final": {"accuracy": final}, "curve": [{"samples": 1000}]}


def compared(mine: list[int | None], theirs: list[int | None], ratio: dict[str, Any] | None) -> dict[str, Any]:
    def entry(reached: list[int | None], median: int | None) -> dict[str, Any]:
        found = [run_of(seed, value, 0.5 if value is None else 0.99) for seed, value in enumerate(reached)]
        return {"runs": found, "median_samples_to_target": median}

    middle = [sorted(values, key=lambda value: value or 10**9)[len(values) // 2] for values in (mine, theirs)]
    return {
        "metric": "accuracy",
        "better": "higher",
        "target": 0.9,
        "methods": {"extraction": entry(mine, middle[0]), "one_shot": entry(theirs, middle[1])},
        "ratios": {} if ratio is None else {"extraction/one_shot": ratio},
    }


def test_verdict_leaves_out_what_has_not_run(tmp_path: Path) -> None:
    result = made(tiny(), tmp_path / "o", ("extraction", "one_shot"))
    result["methods"]["one_shot"]["runs"] = []
    assert "one_shot" not in verdict(result)
    assert "extraction reached" in verdict(result)


def test_verdict_before_any_run() -> None:
    result = compared([None] * 3, [None] * 3, None)
    assert verdict({**result, "methods": {}}) == "No run has finished yet."
    assert verdict({**result, "methods": {"extraction": {"runs": []}}}) == "No run has finished yet."


def test_verdict_where_both_arrive() -> None:
    ratio = {"median": 0.25, "ci95": [0.2, 0.3], "pairs": 3}
    words = verdict(compared([100, 100, 200], [400, 400, 800], ratio))
    assert "extraction reached accuracy 0.9 on 3 of 3 seeds, after 100 samples (median)." in words
    assert "one_shot reached accuracy 0.9 on 3 of 3 seeds, after 400 samples (median)." in words
    assert (
        "extraction needed 0.25 times the samples of one_shot (range of 3 seed(s) [0.2, 0.3]): extraction is better here."
        in words
    )


def test_verdict_says_the_flops_too() -> None:
    ratio = {"median": 0.25, "ci95": [0.2, 0.3], "pairs": 3}
    result = compared([100, 100, 200], [400, 400, 800], ratio)
    result["ratios"]["extraction/one_shot flops"] = {"median": 0.5, "ci95": [0.4, 0.6], "pairs": 3}
    assert "[0.2, 0.3]) and 0.5 times its FLOPs: extraction is better here." in verdict(result)
    result["ratios"]["extraction/one_shot flops"]["note"] = "at most: in 3 of 3 pairs ..."
    assert "and at most 0.5 times its FLOPs" in verdict(result)


def test_verdict_where_the_interval_crosses_one() -> None:
    ratio = {"median": 0.9, "ci95": [0.5, 1.5], "pairs": 3}
    assert verdict(compared([100] * 3, [110] * 3, ratio)).endswith("these runs do not tell the two apart.")


def test_verdict_where_extraction_is_worse() -> None:
    ratio = {"median": 2.0, "ci95": [1.5, 2.5], "pairs": 3}
    assert verdict(compared([200] * 3, [100] * 3, ratio)).endswith("one_shot is better here.")


def test_verdict_where_the_other_never_arrives() -> None:
    ratio = {"median": 0.1, "ci95": [0.1, 0.2], "pairs": 3, "note": "at most: in 3 of 3 pairs ..."}
    words = verdict(compared([100] * 3, [None] * 3, ratio))
    assert re.search(
        r"one_shot did not reach .*\(median beyond 1,000 samples; 0 of 3 seeds did; it ended at 0\.5\)", words
    )
    assert "extraction needed at most 0.1 times the samples of one_shot" in words
    assert words.endswith("extraction is better here.")


def test_verdict_where_only_the_other_arrives() -> None:
    ratio = {"median": None, "ci95": [None, None], "pairs": 3}
    words = verdict(compared([None] * 3, [100] * 3, ratio))
    assert re.search(r"extraction did not reach .*\(median beyond 1,000 samples; 0 of 3 seeds did", words)
    assert words.endswith("where one_shot did: one_shot is better here.")


def test_verdict_does_not_speak_for_seeds_that_did_not_arrive() -> None:
    ratio = {"median": 0.5, "ci95": [0.5, 0.5], "pairs": 1, "seeds": 3}
    words = verdict(compared([100, None, None], [200, None, None], ratio))
    assert words.endswith("on 1 of 3 seeds; on the others neither arrived.")
    few = {"median": 0.5, "ci95": [0.5, 0.6], "pairs": 2, "seeds": 2}
    assert verdict(compared([100] * 2, [200] * 2, few)).endswith("too few seeds to tell.")
    many = {"median": 0.5, "ci95": [0.5, 0.6], "pairs": 5, "seeds": 5}
    assert "(95% interval [0.5, 0.6]): extraction is better" in verdict(compared([100] * 5, [200] * 5, many))
    none = {"median": None, "ci95": [None, None], "pairs": 0, "seeds": 0}
    assert "Neither" not in verdict(compared([100], [200], none))


def test_verdict_where_neither_arrives() -> None:
    words = verdict(compared([None] * 3, [None] * 3, {"median": None, "ci95": [None, None], "pairs": 0}))
    assert words.endswith("Neither extraction nor one_shot reached the target.")


def test_verdict_names_the_target_even_where_the_first_method_misses_it() -> None:
    words = verdict(compared([None] * 3, [100] * 3, {"median": None, "ci95": [None, None], "pairs": 3}))
    assert "accuracy 0.9" in words[: words.index("one_shot")]  # "did not reach it" alone says nothing


def test_verdict_is_that_of_the_runs(tmp_path: Path) -> None:
    result = made(tiny(budget_samples=6400, eval_every=160, stage_samples=1280, target=0.95), tmp_path / "o")
    for name, entry in result["methods"].items():
        reached = sum(run["samples_to_target"] is not None for run in entry["runs"])
        assert f"{reached} of 2 seeds" in result["verdict"]
        assert f"{name} reached" in result["verdict"] or f"{name} did not reach" in result["verdict"]
    assert "times the samples of one_shot" in result["verdict"]


# ---- Side by side, and what goes wrong ----


def test_runs_side_by_side_say_what_runs_one_by_one_say(tmp_path: Path) -> None:
    fields = {**TRAINED, "learning_rates": (0.1, 0.3)}
    system, methods = resolve("parity-mlp/smoke", fields), ("extraction", "one_shot", "progressive")
    alone = made(system, tmp_path / "alone", methods)
    together = made(system, tmp_path / "together", methods, jobs=2)
    assert together["environment"].pop("jobs") == 2
    together["environment"], alone["environment"] = {}, {}
    assert timeless(together) == timeless(alone)
    assert list(together["methods"]) == list(methods)


def test_side_by_side_an_error_of_a_run_ends_the_comparison(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no data here"):
        compare(
            WithoutData(**tiny(support=(0, 1)).settings()),
            tmp_path / "o",
            METHODS,
            jobs=2,
            log=lambda line: None,
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"jobs": 0}, "jobs must be at least 1"), ({"jobs": 2, "match": "seconds"}, "--match seconds needs --jobs 1")],
)
def test_jobs_that_cannot_work_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare(tiny(), tmp_path / "o", METHODS, log=lambda line: None, **settings)
    assert not (tmp_path / "o").exists()


def test_a_rate_at_which_training_diverges_is_not_chosen(tmp_path: Path) -> None:
    result = made(tiny(learning_rates=(1e30, 0.1)), tmp_path / "o", ["one_shot"])
    entry = result["methods"]["one_shot"]
    assert entry["learning_rate"] == 0.1
    assert entry["grid"]["1e+30"] == {"score": None, "unit": "samples to target", "diverged": True}
    assert all("diverged" not in run for run in entry["runs"])


def test_a_method_that_diverges_at_every_rate_is_said_so(tmp_path: Path) -> None:
    """And the other methods go on."""
    lines: list[str] = []
    result = compare(tiny(learning_rates=(1e30, 1e31)), tmp_path / "o", ["one_shot", "scratch"], log=lines.append)
    assert any("one_shot diverged at every learning rate tried" in line for line in lines)
    entry = result["methods"]["one_shot"]
    assert entry["diverged"] and entry["learning_rate"] is None and not entry["runs"]
    assert result["methods"]["scratch"]["diverged"]
    json.dumps(result, allow_nan=False)
    write_report(tmp_path / "o")


def test_a_refused_comparison_leaves_its_folder_free(tmp_path: Path, given_teacher: str) -> None:
    fields = {"teacher": given_teacher, "eval_samples": 1024}
    with pytest.raises(ValueError, match="is beyond the teacher"):
        compare(tiny(target=1.01, **fields), tmp_path / "o", ["scratch"], log=lambda line: None)
    made(tiny(target=0.6, **fields), tmp_path / "o", ["scratch"])


@pytest.mark.parametrize("count", [2, 3])
def test_a_candidate_is_stopped_only_where_it_cannot_win(
    count: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With two seeds the median is their mean, so one slow seed does not lose yet."""
    times = {0.1: [100_000] * count, 0.3: [50_000, 140_000, 60_000][:count]}
    fields = {"learning_rates": (0.1, 0.3), "tuning_seeds": tuple(range(1000, 1000 + count)), "budget_samples": 500_000}
    system = tiny(**fields)

    def runs_of(self: Any, variant: Any, candidate: Any, seeds: Any, what: str, limit: float | None) -> Any:
        for samples in times[candidate.learning_rate]:
            arrived = limit is None or samples <= limit
            curve = [{"samples": samples if arrived else limit, "accuracy": 1.0 if arrived else 0.5}]
            yield [{"curve": curve, "final": curve[-1]}]

    monkeypatch.setattr(runs.Runner, "runs", runs_of)
    runner = runs.Runner(system, system.make_teacher(tmp_path), tmp_path, "samples")
    best, _ = runner.tune(runs.parse_variant("one_shot"), lambda line: None)
    assert best is not None and best.learning_rate == 0.3


def test_progressive_tries_every_schedule_at_every_rate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tried: list[tuple[str, float]] = []

    def runs_of(self: Any, variant: Any, candidate: Any, seeds: Any, what: str, limit: float | None) -> Any:
        tried.append((candidate.schedule, candidate.learning_rate))
        good = (candidate.schedule, candidate.learning_rate) == ("pace-4", 0.3)
        curve = [{"samples": 100, "accuracy": 1.0 if good else 0.5}]
        yield [{"curve": curve, "final": curve[-1]}]

    monkeypatch.setattr(runs.Runner, "runs", runs_of)
    system = tiny(learning_rates=(0.1, 0.3))
    runner = runs.Runner(system, system.make_teacher(tmp_path), tmp_path, "samples")
    best, grid = runner.tune(runs.parse_variant("progressive"), lambda line: None)
    assert best is not None and (best.schedule, best.learning_rate) == ("pace-4", 0.3)
    assert len(tried) == len(set(tried)) == len(grid) == 8


def test_a_reported_run_that_diverges_is_a_run_that_never_arrived(tmp_path: Path) -> None:
    result = made(tiny(learning_rates=(1e30,)), tmp_path / "o", ["one_shot"])
    for run in result["methods"]["one_shot"]["runs"]:
        assert "not finite" in run["diverged"] or "loss is" in run["diverged"]
        assert run["samples_to_target"] is None


def test_a_method_that_cannot_work_is_refused_before_the_teacher_is_trained(
    tmp_path: Path, trainers: list[dict[str, Any]]
) -> None:
    system = resolve("parity-mlp/smoke", TRAINED)
    with pytest.raises(ValueError, match="layer_map: the student has blocks 1 to 2"):
        compare(system, tmp_path / "o", ["extraction:layer_map=9:9"], log=lambda line: None)
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "o").exists()
