"""Every method has the same data, students and budget."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.reproduction.comparing import METHODS, changed, made, tiny
from tutelage.core.curriculum import Curriculum
from tutelage.reproduction import runner
from tutelage.reproduction.recipe import Recipe
from tutelage.reproduction.recipes import resolve
from tutelage.reproduction.report import write_report
from tutelage.reproduction.results import Tuning
from tutelage.reproduction.variants import Candidate, parse_variant, plain_variant
from tutelage.training.trainer import CurriculumTrainer


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


@pytest.mark.parametrize("name", ["pcfg-mlm/smoke", "text-mlm/smoke"])
def test_masks_of_a_seed_do_not_depend_on_the_stages(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Students of all methods see the same tokens masked."""
    seen: dict[str, list[torch.Tensor]] = {}
    training_step = CurriculumTrainer.training_step

    def spied(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if "/runs/" in self.args.output_dir:
            seen.setdefault(Path(self.args.output_dir).parent.name[:-7], []).append(inputs["input_ids"].clone())
        return training_step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(CurriculumTrainer, "training_step", spied)
    recipe = resolve(name, {"learning_rates": (1e-3,), "trials": 1, "seeds": (0,)})
    methods = ["scratch", "one_shot", "joint", *(parse_variant(f"s{n}:num_stages={n}") for n in (1, 2))]
    made(recipe, tmp_path, methods)
    assert seen.keys() == {"scratch", "one_shot", "joint", "s1", "s2"}
    for batches in seen.values():
        assert len(batches) == len(seen["scratch"]) > 1
        assert all(map(torch.equal, batches, seen["scratch"]))


def test_every_seed_has_random_matrices_of_its_own(tmp_path: Path, trainers: list[dict[str, Any]]) -> None:
    recipe = resolve("pcfg-clm/smoke", {"learning_rates": (1e-3,), "trials": 1, "seeds": (3, 4)})
    fixed = parse_variant("fixed:method=extraction,projection_seed=7")
    made(recipe, tmp_path, ["extraction", "joint", "one_shot", fixed])
    seeds: dict[str, list[int]] = {}
    for given in trainers:
        name = Path(given["args"].output_dir).parent.name[:-7]
        seeds.setdefault(name, []).append(given["curriculum"].projection_seed)
    assert seeds == {"extraction": [3, 4], "joint": [3, 4], "one_shot": [0, 0], "fixed": [7, 7]}


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


# ---- Variants with a budget of their own ----


def lengths(trainers: list[dict[str, Any]]) -> dict[str, int]:
    """Steps of the reported runs, by the method's or variant's name."""
    runs = [given for given in trainers if "/runs/" in given["args"].output_dir]
    return {Path(given["args"].output_dir).parent.name[:-7]: given["curriculum"].total_steps for given in runs}


def test_twice_the_budget_is_twice_the_steps(tmp_path: Path, trainers: list[dict[str, Any]]) -> None:
    variants = [parse_variant("double:method=one_shot,budget=2"), parse_variant("long:method=extraction,budget=4")]
    result = made(with_stages(tiny(), {}), tmp_path / "o", ["one_shot", "extraction", *variants])
    assert lengths(trainers) == {"one_shot": 60, "extraction": 60, "double": 120, "long": 240}
    assert {run.curve[-1].samples for run in result.method("double").runs} == {1_920}
    assert all(len(given["train_dataset"]) == 16 * given["curriculum"].total_steps for given in trainers)
    hidden, output = (stage.steps for stage in result.method("long").curriculum.stages)  # type: ignore[union-attr]
    assert (hidden, output) == (20, 220)  # the stage is as long as it was, the output stage has the rest
    first = [[point.metrics for point in result.method(name).runs[0].curve[:13]] for name in ("one_shot", "double")]
    assert first[0] == first[1]  # the longer run begins with the same data


def test_labels_alone_get_as_many_flops_as_one_shot(tmp_path: Path) -> None:
    """In a comparison at equal samples, where the others keep theirs; to within a step."""
    labels = [
        parse_variant("labels:method=scratch,match=flops"),
        parse_variant("more:method=scratch,match=flops,budget=2"),
    ]
    result = made(with_stages(tiny(), {}), tmp_path / "o", ["one_shot", "scratch", *labels])
    spent = {method.name: method.runs[0].curve[-1] for method in result.methods}
    step = spent["scratch"].flops / 60
    assert spent["one_shot"].samples == spent["scratch"].samples == 960
    assert spent["labels"].samples > 1.2 * 960
    assert abs(spent["labels"].flops - spent["one_shot"].flops) <= step
    assert abs(spent["more"].flops - 2 * spent["one_shot"].flops) <= step
    write_report(tmp_path / "o")
    text = (tmp_path / "o" / "report.md").read_text(encoding="utf-8")
    assert "Budget of every method: 960 samples, unless its settings give a budget or match a cost." in text
    assert "| labels | scratch | match=flops |" in text


def test_searched_settings_do_not_keep_costs_from_being_equal(tmp_path: Path) -> None:
    """Stages of other lengths, other numbers of stages, and a stage longer than the comparison's own budget."""
    fixed = "stage_steps=5,stage_learning_rate=3,learning_rate=0.1"
    numbers = parse_variant(f"numbers:method=extraction,{fixed},layer_map=1:2|1:1,2:2")
    long = parse_variant("long:method=extraction,budget=2,match=flops,stage_steps=62")
    recipe = with_stages(tiny(trials=2), {})
    result = made(recipe, tmp_path / "o", ["one_shot", "extraction", numbers, long], match="flops")
    assert [method.trials for method in result.methods] == [2, 2, 2, 2]
    assert {len(trial.candidate.settings) for trial in result.method("extraction").tunings[0].trials} == {2}
    maps = {trial.candidate.settings["layer_map"] for trial in result.method("numbers").tunings[0].trials}
    assert maps == {"1:2", "1:1,2:2"}
    spent = {method.name: method.runs[0].curve[-1].flops for method in result.methods}
    for name, times in (("extraction", 1), ("numbers", 1), ("long", 2)):
        assert spent[name] == pytest.approx(times * spent["one_shot"], rel=0.05), name


def test_other_numbers_of_stages_have_costs_of_their_own(tmp_path: Path) -> None:
    """The language recipes search them."""
    fields = {"budget_samples": 320, "learning_rates": (1e-3,), "trials": 5, "seeds": (0,), "tuning_seeds": (1000,)}
    recipe = resolve("pcfg-clm/smoke", {**fields, "num_stages": 1})
    staged = parse_variant("staged:method=extraction,learning_rate=1e-3,stage_fraction=0.5")
    result = made(recipe, tmp_path / "o", ["one_shot", staged], match="flops")
    (tuning,) = result.method("staged").tunings
    assert {trial.candidate.settings["num_stages"] for trial in tuning.trials} == {1, 2}
    assert len(list((tmp_path / "o" / "pilot").glob("staged-*.json"))) == 2
    spent = {method.name: method.runs[0].curve[-1].flops for method in result.methods}
    assert spent["staged"] == pytest.approx(spent["one_shot"], rel=0.05)


def test_two_costs_are_each_measured(tmp_path: Path) -> None:
    """FLOPs are not taken for seconds."""
    recipe = tiny(budget_samples=320, stage_samples=160)
    builds = runner.Runner(recipe, recipe.make_teacher(tmp_path), tmp_path, "samples")
    for cost in ("flops", "seconds"):
        made = builds.curriculum(parse_variant(f"labels:method=scratch,match={cost}"), Candidate(0.1))
        assert 10 <= made.total_steps <= 400  # a step of one-shot costs a few times one of labels alone
    files = {file.name.rsplit("-", 1)[-1] for file in tmp_path.glob("pilot/one_shot-*.json")}
    assert files == {"flops.json", "seconds.json"}


def test_equal_seconds_of_a_variant_need_one_job(tmp_path: Path) -> None:
    variant = parse_variant("labels:method=scratch,match=seconds")
    with pytest.raises(ValueError, match=r"match=seconds and --match seconds need --jobs 1"):
        made(tiny(), tmp_path / "o", ["one_shot", variant], jobs=2)
    assert not (tmp_path / "o").exists()


def test_costs_are_measured_by_one_thread_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods that run side by side need the same cost of one-shot, which one of them measures."""
    measure, inside, most = runner._step_costs, [0], [0]

    def watched(*args: Any) -> dict[str, float]:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.05)
        try:
            return measure(*args)
        finally:
            inside[0] -= 1

    monkeypatch.setattr(runner, "_step_costs", watched)
    recipe = tiny(budget_samples=320, stage_samples=160)
    builds = runner.Runner(recipe, recipe.make_teacher(tmp_path), tmp_path, "flops")
    with ThreadPoolExecutor(2) as threads:
        made = [threads.submit(builds.curriculum, plain_variant(m), Candidate(0.1)) for m in ("extraction", "scratch")]
    assert all(one.result().total_steps for one in made)
    assert most == [1]


def test_a_rate_of_a_variant_is_not_tuned(tmp_path: Path, trainers: list[dict[str, Any]]) -> None:
    fixed = parse_variant("fixed:method=scratch,learning_rate=0.05")
    result = made(tiny(learning_rates=(0.1, 0.3), trials=2), tmp_path / "o", [fixed])
    entry = result.method("fixed")
    assert entry.tunings == (Tuning(Candidate(0.05)),) and entry.trials == 0
    assert [given["args"].learning_rate for given in trainers] == [0.05]


def test_values_that_a_variant_gives_are_searched_in_runs(tmp_path: Path, trainers: list[dict[str, Any]]) -> None:
    weights = parse_variant("weights:method=joint,hidden_weight=0.3|1|3,learning_rate=0.1")
    (tuning,) = made(tiny(trials=3), tmp_path / "o", [weights]).method("weights").tunings
    tried = [
        given["curriculum"].stages[0].hidden_weight for given in trainers if "/tuning/" in given["args"].output_dir
    ]
    assert tuning.candidate is not None
    chosen = tuning.candidate.settings["hidden_weight"]
    assert set(tried) == {trial.candidate.settings["hidden_weight"] for trial in tuning.trials} <= {0.3, 1.0, 3.0}
    assert {0.3, 1.0} <= set(tried)
    (reported,) = [given for given in trainers if "/runs/" in given["args"].output_dir]
    assert reported["curriculum"].stages[0].hidden_weight == chosen
    assert trainers[0]["args"].learning_rate == 0.1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mine:method=joint,hidden_weight=1|-3", "hidden_weight must be"),
        ("mine:method=extraction,stage_steps=5|60", "budget too small for the stages"),
        ("mine:method=extraction,layer_map=1:2|9:9", "the student has blocks 1 to 2"),
        ("mine:method=scratch,learning_rate=-1", "learning_rate must be positive and finite, got -1"),
        ("mine:method=scratch,learning_rate=0.1|0", "learning_rate must be positive and finite, got 0"),
    ],
)
def test_a_value_that_cannot_be_run_is_refused_before_any_run(
    tmp_path: Path, trainers: list[dict[str, Any]], text: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        made(tiny(trials=4), tmp_path / "o", ["one_shot", parse_variant(text)])
    assert not trainers
