"""A comparison on several teachers: settings chosen with the first, runs on each, and results over all pairs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from tests.reproduction.comparing import METHODS, TRAINED, made, names, silent, timeless, timeless_runs, tiny
from tutelage.core.errors import UserError
from tutelage.reproduction.compare import compare
from tutelage.reproduction.recipes import resolve
from tutelage.reproduction.recipes.parity import ParityMLPRecipe
from tutelage.reproduction.report import write_report
from tutelage.reproduction.results import COMPARISON_FILE, Comparison
from tutelage.reproduction.runner import PlannedRun, Runner
from tutelage.reproduction.search import RATE
from tutelage.reproduction.summary import ratio_of
from tutelage.reproduction.teachers import Teacher
from tutelage.reproduction.variants import SCHEDULES, parse_variant

TUNED = {"teacher_seeds": (0, 1, 2), "support": None, "learning_rates": (0.1, 0.3), "trials": 3, "eval_every": 160}


def test_each_teacher_has_a_folder_and_a_support_of_its_own(tmp_path: Path, trainers: list[dict[str, Any]]) -> None:
    """What was chosen with the first teacher is used with the others without a search."""
    result = made(tiny(**TUNED), tmp_path / "o", ["extraction", "one_shot"], command="tutelage compare parity-mlp")
    assert sorted(path.name for path in (tmp_path / "o").iterdir() if path.is_dir()) == [
        "teacher-0",
        "teacher-1",
        "teacher-2",
    ]
    parts = [Comparison.read(tmp_path / "o" / f"teacher-{seed}") for seed in (0, 1, 2)]
    assert [part.settings["teacher_seeds"] for part in parts] == [[0], [1], [2]]
    assert len({tuple(part.settings["support"]) for part in parts}) == 3
    assert (result.complete, result.command, result.pairs) == (True, "tutelage compare parity-mlp", 6)
    assert result.settings["teacher_seeds"] == [0, 1, 2]
    assert result.teachers == tuple(teacher for part in parts for teacher in part.teachers)
    for name in names(result):
        first, *others = (part.method(name) for part in parts)
        assert first.trials == 3 and result.method(name).tunings == first.tunings
        chosen = first.tunings[0].candidate
        assert chosen is not None
        for other in others:
            assert other.trials == 0 and other.tunings[0].candidate == dataclasses.replace(chosen, settings={})
            assert other.variant.overrides == {RATE: chosen.learning_rate, **chosen.settings}
            assert other.curriculum == first.curriculum
    places = [Path(given["args"].output_dir).relative_to(tmp_path / "o").parts[:2] for given in trainers]
    assert {place for place in places if "tuning" in place} == {("teacher-0", "tuning")}
    assert {place for place in places if "runs" in place} == {(f"teacher-{seed}", "runs") for seed in (0, 1, 2)}


@pytest.fixture(scope="module")
def pooled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a comparison on two teachers."""
    folder = tmp_path_factory.mktemp("pooled")
    made(tiny(teacher_seeds=(3, 5), support=None, target=0.8), folder)
    return folder


def test_results_are_over_all_pairs_of_teacher_and_seed(pooled: Path) -> None:
    result, *parts = (Comparison.read(pooled / part) for part in ("", "teacher-3", "teacher-5"))
    for name in METHODS:
        pairs = [run.pair for run in result.method(name).runs]
        assert pairs == [(0, 0), (0, 1), (1, 0), (1, 1)]
        for index, part in enumerate(parts):
            mine = [dataclasses.replace(run, teacher=0) for run in result.method(name).runs if run.teacher == index]
            assert mine == list(part.method(name).runs)
    found = result.ratio("extraction", "one_shot")
    assert found is not None and found.seeds == 4
    assert found == ratio_of(result.method("extraction"), result.method("one_shot"), "samples")
    both = [ratio for part in parts if (ratio := part.ratio("extraction", "one_shot")) is not None]
    assert found.paired.pairs == sum(ratio.paired.pairs for ratio in both)
    lows = [ratio.paired.estimate.low for ratio in both if ratio.paired.estimate.low is not None]
    assert found.paired.estimate.low == min(lows)
    difference = result.difference("extraction", "one_shot")
    assert difference is not None and difference.paired.pairs == 2  # the mean of each teacher's runs
    text = write_report(pooled).with_suffix(".md").read_text(encoding="utf-8")
    assert "Medians over seeds 0, 1, each with 2 teachers." in text
    assert "<summary>Teacher 1</summary>" in text and "<summary>Teacher 2</summary>" in text
    assert "over 4 pairs of runs" in result.verdict or "of 4 runs" in result.verdict


def test_a_part_is_the_comparison_on_its_teacher_alone(pooled: Path, tmp_path: Path) -> None:
    part = Comparison.read(pooled / "teacher-5")
    alone = made(tiny(teacher_seeds=(5,), support=None, target=0.8), tmp_path / "alone")
    for name in METHODS:
        assert timeless_runs(part.method(name)) == timeless_runs(alone.method(name))


def test_a_comparison_on_several_teachers_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainers: list[dict[str, Any]]
) -> None:
    recipe, methods = tiny(**{**TUNED, "teacher_seeds": (0, 1)}), ("extraction", "one_shot")
    whole = made(recipe, tmp_path / "whole", methods)
    make = Runner.make

    def killed(self: Runner, planned: PlannedRun) -> Any:
        if "teacher-1" in str(planned.folder) and planned.variant.method == "one_shot":
            raise KeyboardInterrupt
        return make(self, planned)

    monkeypatch.setattr(Runner, "make", killed)
    with pytest.raises(KeyboardInterrupt):
        made(recipe, tmp_path / "parts", methods)
    monkeypatch.setattr(Runner, "make", make)
    trainers.clear()
    known = Comparison.read(tmp_path / "parts")
    assert not known.complete and len(known.teachers) == 1 and [len(method.runs) for method in known.methods] == [2, 2]
    write_report(tmp_path / "parts")
    assert "still running: 4 of 8 runs" in (tmp_path / "parts" / "report.md").read_text(encoding="utf-8")
    assert timeless(made(recipe, tmp_path / "parts", methods)) == timeless(whole)
    assert ["teacher-1/runs/one_shot" in given["args"].output_dir for given in trainers] == [True]
    trainers.clear()
    assert timeless(made(recipe, tmp_path / "parts", methods)) == timeless(whole)
    assert not trainers
    more = made(recipe, tmp_path / "parts", ["scratch"])
    assert names(more) == [*methods, "scratch"] and len(more.method("scratch").runs) == 4
    assert tuple(map(timeless_runs, more.methods[:2])) == tuple(map(timeless_runs, whole.methods))


def test_a_schedule_that_was_chosen_is_not_searched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it makes other settings void, which the first teacher was tuned for."""
    fields = {**TRAINED, "teacher_seeds": (0, 1), "teacher_checkpoint_every": 80, "trials": 4, "seeds": (0,)}
    paced = parse_variant("paced:method=progressive,learning_rate=0.3,schedule=pace-4|pace-1")
    result = made(resolve("parity-mlp/smoke", fields), tmp_path, [paced])
    (tuning,) = result.method("paced").tunings
    assert tuning.candidate is not None and tuning.candidate.settings["schedule"] in SCHEDULES[1:]
    assert len(tuning.trials) == 2  # a pace has neither phase nor checkpoint
    second = Comparison.read(tmp_path / "teacher-1").method("paced")
    assert second.trials == 0 and second.variant.overrides["schedule"] == tuning.candidate.settings["schedule"]
    assert [run.pair for run in result.method("paced").runs] == [(0, 0), (1, 0)]


def test_a_checkpoint_that_a_second_teacher_does_not_have_does_not_end_the_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_teacher = ParityMLPRecipe.make_teacher

    def shortened(self: ParityMLPRecipe, folder: Path) -> Teacher:
        """Teachers with three checkpoints and with one."""
        teacher = make_teacher(self, folder)
        kept = teacher.checkpoints[: 1 if self.teacher_seed else 3]
        assert len(kept) == (1 if self.teacher_seed else 3)
        return dataclasses.replace(teacher, checkpoints=kept, transition=0)

    monkeypatch.setattr(ParityMLPRecipe, "make_teacher", shortened)
    fields = {**TRAINED, "teacher_seeds": (0, 1), "teacher_checkpoint_every": 80, "seeds": (0,)}
    late = parse_variant("late:method=progressive,schedule=two,checkpoint=2,phase_samples=160")
    result = made(resolve("parity-mlp/smoke", fields), tmp_path, [late])
    assert [run.pair for run in result.method("late").runs] == [(0, 0), (1, 0)]
    second = Comparison.read(tmp_path / "teacher-1").method("late")
    assert second.variant.overrides["checkpoint"] == 0


def test_a_folder_of_other_teachers_is_refused(tmp_path: Path) -> None:
    made(tiny(teacher_seeds=(0, 1)), tmp_path / "o", ["scratch"])
    before = (tmp_path / "o" / COMPARISON_FILE).read_bytes()
    with pytest.raises(UserError, match=r"contains a comparison with a different teacher_seeds: give the original"):
        compare(tiny(teacher_seeds=(0, 2)), tmp_path / "o", ["scratch"], log=silent)
    assert (tmp_path / "o" / COMPARISON_FILE).read_bytes() == before


def test_a_method_that_diverges_with_the_first_teacher_is_not_run_with_the_others(tmp_path: Path) -> None:
    wild = parse_variant("wild:method=one_shot,learning_rate=1e30|1e31")
    recipe = tiny(teacher_seeds=(0, 1), trials=2)
    result = made(recipe, tmp_path / "o", [wild, "scratch"])
    assert result.complete and result.method("wild").diverged and not result.method("wild").runs
    assert [run.pair for run in result.method("scratch").runs] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert names(Comparison.read(tmp_path / "o" / "teacher-1")) == ["scratch"]
    with pytest.raises(UserError, match="every method diverged with the first teacher: add smaller learning_rates"):
        compare(recipe, tmp_path / "o2", [wild], log=silent)
    assert Comparison.read(tmp_path / "o2").method("wild").diverged


@pytest.mark.parametrize(
    ("seeds", "message"),
    [
        ((), r"teacher_seeds must be different numbers, at least one, got \[\]"),
        ((1, 1), r"teacher_seeds must be different numbers, at least one, got \[1, 1\]"),
        ((-1,), "each of the teacher_seeds must be a number from 0 up, got -1"),
    ],
)
def test_teacher_seeds_that_cannot_work_are_refused(seeds: tuple[int, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny(teacher_seeds=seeds)


def test_a_finished_teacher_is_one_teacher(given_teacher: str) -> None:
    with pytest.raises(UserError, match="is one finished teacher: leave teacher_seeds out"):
        tiny(teacher=given_teacher, teacher_seeds=(0, 1))


def test_what_cannot_work_is_refused_before_the_first_teacher(tmp_path: Path, trainers: list[dict[str, Any]]) -> None:
    with pytest.raises(UserError, match="layer_map: the student has blocks 1 to 2"):
        compare(tiny(teacher_seeds=(0, 1)), tmp_path / "o", [parse_variant("deep:layer_map=9:9")], log=silent)
    assert not trainers
