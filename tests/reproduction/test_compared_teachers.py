"""Teachers of a comparison: trained, planted or given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import save_llama
from tests.reproduction.comparing import METHODS, TRAINED, made, names, silent, timeless_runs, tiny
from tutelage.reproduction import teachers
from tutelage.reproduction.compare import compare
from tutelage.reproduction.recipes import resolve
from tutelage.reproduction.variants import PACES, parse_variant
from tutelage.tasks.parity import ParityMLP, ParityMLPConfig


def test_a_trained_teacher_is_trained_past_convergence_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {**TRAINED, "teacher_checkpoint_every": 80, "learning_rates": (0.8, 1.6), "trials": 12}
    first = made(resolve("parity-mlp/smoke", fields), tmp_path / "o", ["progressive"])
    (teacher,) = first.teachers
    assert teacher.samples is not None and teacher.converged_at is not None
    times = teacher.samples / teacher.converged_at
    assert times >= 2.5
    assert f"{times:.3g} times" in teacher.description and teacher.metrics["accuracy"] >= 0.999
    entry = first.method("progressive")
    (tuning,) = entry.tunings
    assert tuning.candidate is not None and tuning.candidate.settings["schedule"] in PACES
    tried = {name: [t.candidate for t in tuning.trials if t.candidate.settings["schedule"] == name] for name in PACES}
    assert all(tried.values()) and len(tuning.trials) == entry.trials == 12
    assert len({candidate.settings["phase_samples"] for candidate in tried["two"]}) > 1
    assert len({candidate.settings["checkpoint"] for candidate in tried["two"]}) > 1
    assert entry.curriculum is not None
    *before, last = (getattr(stage, "teacher_checkpoint", "") for stage in entry.curriculum.stages)
    assert before and last is None
    assert all(name.startswith("at-") for name in before)  # by name, without its folder

    def no_training(*args: Any) -> None:
        raise AssertionError("the teacher was trained again")

    monkeypatch.setattr(teachers, "_train", no_training)
    again = made(resolve("parity-mlp/smoke", {**fields, "eval_every": 160, "trials": 1}), tmp_path / "o2", ["one_shot"])
    assert again.teachers == (teacher,)
    with pytest.raises(AssertionError, match="trained again"):
        made(resolve("parity-mlp/smoke", {**fields, "teacher_width": 65}), tmp_path / "o3", ["one_shot"])


def test_progressive_leaves_the_teacher_as_it_was(tmp_path: Path) -> None:
    """One-shot after progressive is one-shot."""
    recipe = resolve("parity-mlp/smoke", TRAINED)
    after = made(recipe, tmp_path / "a", [parse_variant("progressive:schedule=two"), "one_shot"])
    alone = made(recipe, tmp_path / "b", ["one_shot"])
    assert timeless_runs(after.method("one_shot")) == timeless_runs(alone.method("one_shot"))


def test_a_teacher_that_does_not_converge_is_said_so(tmp_path: Path) -> None:
    recipe = resolve("parity-mlp/smoke", {**TRAINED, "teacher_learning_rate": 1e-6, "teacher_max_samples": 640})
    for _ in range(2):  # an unfinished teacher is not taken for a finished one
        with pytest.raises(ValueError, match=r"did not reach accuracy 0.999 within 640 samples \(it is at 0\.\d+\)"):
            compare(recipe, tmp_path / "o", log=silent)


def test_a_teacher_may_be_given(tmp_path: Path, given_teacher: str) -> None:
    planted = made(tiny(), tmp_path / "planted")
    given = made(tiny(teacher=given_teacher), tmp_path / "o", METHODS)
    assert given.teachers[0].description == "given: given"
    assert given.teachers[0].metrics["accuracy"] == planted.teachers[0].metrics["accuracy"]
    for method in METHODS:
        assert timeless_runs(given.method(method)) == timeless_runs(planted.method(method))


def test_a_given_teacher_has_no_checkpoints_so_progressive_is_no_default(tmp_path: Path, given_teacher: str) -> None:
    recipe = tiny(teacher=given_teacher)
    result = made(recipe, tmp_path / "o", None)
    assert names(result) == ["extraction", "joint", "one_shot", "scratch"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d": 9}, "the teacher takes 8 bits, the recipe has d=9: change one of the two"),
        ({"support": (4, 5)}, r"accuracy on this parity \(d=8, k=2, support \[4, 5\]\) is 0\.\d+, which is chance"),
        ({"k": 3}, "which is chance: it was made for a different"),
    ],
)
def test_a_teacher_that_disagrees_with_the_recipe_is_refused(
    tmp_path: Path, given_teacher: str, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        compare(tiny(teacher=given_teacher, eval_samples=1024, **fields), tmp_path / "o", log=silent)


def test_a_folder_without_such_a_teacher_is_refused(tmp_path: Path) -> None:
    def refused(folder: str, message: str) -> None:
        recipe = tiny(teacher=str(tmp_path / folder))
        with pytest.raises((ValueError, OSError), match=message):
            compare(recipe, tmp_path / f"o-{folder}", METHODS, log=silent)

    (tmp_path / "empty").mkdir()
    refused("empty", "empty")
    save_llama(tmp_path / "llama")
    refused("llama", "llama")
    ParityMLP(ParityMLPConfig(8, 16, replica_seeds=[0, 1])).save_pretrained(tmp_path / "replicas")
    refused("replicas", "replica")


def test_a_target_above_the_teacher_is_refused(tmp_path: Path, trainers: list[dict[str, Any]]) -> None:
    narrow: dict[str, Any] = {"k": 3, "teacher_width": 4, "eval_samples": 1024}  # too narrow to be right everywhere
    reaches = tiny(**narrow).make_teacher(tmp_path).metrics["accuracy"]
    assert 0.8 < reaches < 0.9
    message = f"the target accuracy 0.9 is beyond the teacher, which reaches {reaches:.4f}: lower the target"
    with pytest.raises(ValueError, match=message):
        compare(tiny(**narrow), tmp_path / "o", METHODS, log=silent)
    with pytest.raises(ValueError, match=r"the target accuracy 1\.01 is beyond the teacher, which reaches 1\.0000"):
        compare(tiny(target=1.01), tmp_path / "o2", METHODS, log=silent)
    assert not trainers
    made(tiny(**{**narrow, "target": 0.6}), tmp_path / "o3", ["one_shot"])
