"""Every recipe: its three sizes, its fields, and a comparison at the smallest."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import save_llama
from tutelage.core.stages import HiddenStage, OutputStage
from tutelage.reproduction import teachers
from tutelage.reproduction.compare import compare
from tutelage.reproduction.recipe import PaperRecipe, Recipe, change_fields
from tutelage.reproduction.recipes import RECIPES, SIZES, resolve
from tutelage.reproduction.recipes.parity import ParityMLPRecipe, ParityTransformerRecipe
from tutelage.reproduction.scaling import SCALING_SIZES
from tutelage.tasks.registry import TASKS

NAMES = ("parity-mlp", "parity-transformer", "pcfg-mlm", "pcfg-clm", "text-mlm", "text-clm")
EVERY = [(name, size) for name in NAMES for size in ("smoke", "laptop", "paper")]
BEST = {"pcfg": "standardized", "text": "final-state"}

# the smoke sizes, smaller still
LANGUAGE: dict[str, Any] = {
    "budget_samples": 96,
    "eval_every": 48,
    "eval_samples": 16,
    "teacher_samples": 128,
    "teacher_heads": 2,
    "student_heads": 1,
}
SMALLER: dict[str, dict[str, Any]] = {
    "parity-mlp": {
        "d": 6,
        "k": 2,
        "teacher_width": 64,
        "student_width": 16,
        "budget_samples": 3_200,
        "eval_every": 320,
        "eval_samples": 128,
        "stage_samples": 640,
        "teacher_max_samples": 32_000,
        "teacher_checkpoint_every": 320,
    },
    "parity-transformer": {
        "d": 4,
        "k": 2,
        "teacher_heads": 2,
        "student_heads": 1,
        "tuning_seeds": (1000,),
        "budget_samples": 3_200,
        "eval_every": 640,
        "eval_samples": 128,
        "stage_samples": 320,
        "teacher_learning_rate": 3e-3,
        "learning_rates": (3e-3,),
        "teacher_max_samples": 32_000,
        "teacher_checkpoint_every": 640,
    },
    "pcfg-mlm": {**LANGUAGE, "levels": 3},
    "pcfg-clm": {**LANGUAGE, "levels": 3},
    "text-mlm": {**LANGUAGE, "max_length": 16},
    "text-clm": {**LANGUAGE, "max_length": 16},
}


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the user's teachers nor texts that were fetched."""
    monkeypatch.setenv("TUTELAGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TUTELAGE_ASSETS", str(tmp_path / "assets"))


def smaller(name: str, **fields: Any) -> Recipe:
    return resolve(f"{name}/smoke", {**SMALLER[name], **fields})


def quiet(line: str) -> None:
    pass


# ---- Sizes and fields ----


def test_all_recipes_are_tested() -> None:
    assert tuple(RECIPES) == NAMES and SIZES == ("smoke", "laptop", "paper")


@pytest.mark.parametrize(("name", "size"), EVERY)
def test_every_size_has_the_same_fields_and_consistent_numbers(name: str, size: str) -> None:
    sizes = RECIPES[name]
    fields: Any = sizes[size]
    assert tuple(sizes) == SIZES and fields.about and fields.size == size
    assert isinstance(fields, PaperRecipe) and type(fields) is type(sizes["laptop"])
    assert fields.seeds and fields.learning_rates and not set(fields.seeds) & set(fields.tuning_seeds)
    for key in ("budget_samples", "eval_every"):  # no example is left over
        assert getattr(fields, key) % fields.batch_size == 0, key
    if isinstance(fields, ParityMLPRecipe | ParityTransformerRecipe):
        stages = fields.layers if isinstance(fields, ParityTransformerRecipe) else 1
        assert stages * fields.stage_samples < fields.budget_samples
        assert fields.stage_samples % fields.batch_size == 0
        assert fields.teacher_factor > 1  # trained past convergence
        if isinstance(fields, ParityMLPRecipe):
            assert fields.student_width < fields.teacher_width
    if hasattr(fields, "student_heads"):
        assert fields.student_heads < fields.teacher_heads


def test_published_settings_are_the_papers() -> None:
    mlp, transformer = RECIPES["parity-mlp"]["paper"], RECIPES["parity-transformer"]["paper"]
    assert (mlp.d, mlp.k, mlp.teacher_width, mlp.student_width) == (100, 6, 50_000, 1000)  # type: ignore[attr-defined]
    assert (transformer.d, transformer.k, transformer.teacher_heads, transformer.student_heads) == (100, 6, 32, 4)  # type: ignore[attr-defined]
    for name in ("pcfg-mlm", "text-mlm"):
        fields: Any = RECIPES[name]["paper"]
        assert (fields.teacher_heads, fields.student_heads, fields.head_width, fields.batch_size) == (32, 8, 8, 512)
        assert fields.mlm_probability == 0.3


@pytest.mark.parametrize(("name", "size"), [(name, size) for name, size in EVERY if not name.startswith("text")])
def test_every_size_is_a_system(name: str, size: str) -> None:
    system = resolve(f"{name}/{size}")
    assert (system.name, system.size) == (name, size)
    assert system.task in TASKS and system.better in ("higher", "lower")
    assert system.method_arguments("extraction") and not system.method_arguments("one_shot")
    assert {"extraction", "one_shot", "progressive", "scratch"} <= {part.name for part in system.default_methods}
    if size == "smoke":
        seed = system.seeds[0]
        student = system.make_student([seed])
        assert all(
            torch.equal(a, b)
            for a, b in zip(student.parameters(), system.make_student([seed]).parameters(), strict=True)
        )
        other = system.make_student([seed + 1])
        assert not all(torch.equal(a, b) for a, b in zip(student.parameters(), other.parameters(), strict=True))


def test_the_size_is_laptop_unless_given() -> None:
    assert resolve("parity-mlp").size == "laptop"
    fields: Any = resolve("parity-mlp")
    assert (fields.d, fields.k, fields.teacher_width, fields.student_width) == (64, 5, 5000, 100)
    assert len(fields.seeds) == 5


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("parity", {}, "unknown recipe 'parity': there are parity-mlp, parity-transformer, pcfg-mlm, .*--list"),
        ("parity-mlp/huge", {}, "unknown size 'huge' of parity-mlp: there are smoke, laptop, paper"),
        ("parity-mlp/smoke", {"heads": 3}, "parity-mlp has no field 'heads': it has seeds, tuning_seeds"),
        ("parity-mlp/smoke", {"d": "many"}, "cannot read d='many': it must be a whole number"),
        ("parity-mlp/smoke", {"d": "8.5"}, "cannot read d='8.5': it must be a whole number"),
        ("parity-mlp/smoke", {"d": "inf"}, "cannot read d='inf': it must be a whole number"),
        ("parity-mlp/smoke", {"d": "nan"}, "cannot read d='nan': it must be a whole number"),
        ("parity-mlp/smoke", {"d": ["8", "9"]}, r"cannot read d=\['8', '9'\]: it must be a whole number"),
        ("parity-mlp/smoke", {"seeds": "0 x"}, "cannot read seeds='0 x'"),
        ("parity-mlp/smoke", {"k": "17"}, "a parity needs k from 1 to d=16 support coordinates, got k=17"),
        ("parity-mlp/smoke", {"k": "0"}, "got k=0"),
        ("parity-mlp/smoke", {"support": "0 1 16"}, "out of range: coordinates are 0 to 15"),
        ("parity-transformer/smoke", {"support": "1 1"}, "is not k=2 different coordinates"),
        (
            "parity-mlp/smoke",
            {"teacher": "wise"},
            "unknown teacher 'wise': use 'trained' or 'planted', or the folder of",
        ),
        ("parity-mlp/smoke", {"match_activation": "both"}, "unknown match_activation 'both'"),
        ("parity-mlp/smoke", {"batch_size": "0"}, "batch_size"),
        ("parity-mlp/smoke", {"budget_samples": "-64"}, "budget_samples"),
        ("parity-mlp/smoke", {"eval_samples": "0"}, "eval_samples"),
        ("pcfg-mlm/smoke", {"teacher_checkpoints": "0"}, "teacher_checkpoints"),
    ],
)
def test_bad_fields_are_refused(name: str, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(name, overrides)


def test_fields_are_read_from_text() -> None:
    read = change_fields(
        ParityMLPRecipe(),
        {
            "budget_samples": "2e6",
            "d": "1_000",
            "k": 7,
            "target": "0.95",
            "seeds": ["3", "4"],
            "tuning_seeds": "9",
            "learning_rates": "0.1,1e-2 3",
            "support": "0 1 2 3 4 5 6",
            "teacher": "planted",
        },
        "parity-mlp",
    )
    assert (read.budget_samples, read.d, read.k, read.target) == (2_000_000, 1000, 7, 0.95)
    assert (read.seeds, read.tuning_seeds, read.learning_rates) == ((3, 4), (9,), (0.1, 0.01, 3.0))
    assert (read.support, read.teacher) == ((0, 1, 2, 3, 4, 5, 6), "planted")
    assert all(type(value) is int for value in (read.budget_samples, read.d, *read.seeds, *read.support))
    assert read.student_width == ParityMLPRecipe().student_width


def test_an_unset_field_is_read_from_text() -> None:
    assert change_fields(ParityMLPRecipe(k=2, support=(1, 2)), {"support": "none"}, "r").support is None
    changed = change_fields(ParityMLPRecipe(support=(1, 2, 3, 4, 5)), {"seeds": (1, 2), "support": None}, "r")
    assert changed.support is None and changed.seeds == (1, 2)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [("parity-mlp", "teacher_path", "teacher"), ("text-mlm", "mask_probability", "mlm_probability")],
)
def test_an_old_spelling_names_the_new_one(name: str, old: str, new: str) -> None:
    with pytest.raises(ValueError, match=f"{name} has no field '{old}': it is now called '{new}'"):
        change_fields(RECIPES[name]["laptop"], {old: "0.5"}, name)


@pytest.mark.parametrize(("name", "size"), EVERY)
def test_a_recipe_reaches_a_worker_process_as_it_is(name: str, size: str) -> None:
    """Without what it has computed."""
    recipe = RECIPES[name][size]
    if name.startswith("pcfg"):
        assert recipe.collator is recipe.collator
    sent = pickle.loads(pickle.dumps(recipe))
    assert sent == recipe and type(sent) is type(recipe)
    assert set(vars(sent)) == {field.name for field in dataclasses.fields(recipe)}


def test_every_field_of_every_recipe_is_read_back_from_its_own_text() -> None:
    count = 0
    for fields in (*(sizes["smoke"] for sizes in RECIPES.values()), SCALING_SIZES["smoke"]):
        for field in dataclasses.fields(fields):  # type: ignore[arg-type]
            if field.name == "size":
                continue
            value = getattr(fields, field.name)
            text = (
                [str(part) for part in value] if isinstance(value, tuple) else "none" if value is None else str(value)
            )
            read = change_fields(fields, {field.name: text}, "recipe")
            assert read == fields and type(getattr(read, field.name)) is type(value), field.name
            count += 1
    assert count > 140


# ---- The smoke sizes ----


@pytest.mark.parametrize("name", NAMES)
def test_smoke_size_runs(name: str, tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All default methods, with a trained teacher and its checkpoints; and once more without training any."""
    text = {"dataset": str(corpus / "text.txt")} if name.startswith("text") else {}
    result = compare(smaller(name, **text), tmp_path / "o", log=quiet)
    assert result.complete is True
    parity = name.startswith("parity")
    best = () if parity else (f"extraction-{BEST[name[:4]]}", f"joint-{BEST[name[:4]]}")
    assert [method.name for method in result.methods] == [
        "extraction",
        *best,
        *("joint", "one_shot", "progressive", "scratch"),
        *(() if parity else ("extraction-teacher", "joint-teacher", "one_shot-teacher", "progressive-teacher")),
    ]
    assert (result.metric, result.better) == (("accuracy", "higher") if parity else ("loss", "lower"))
    (teacher,) = result.teachers
    assert math.isfinite(teacher.metrics[result.metric])
    assert "trained from labels for" in teacher.description
    curricula = {}
    for method in result.methods:
        assert tuple(run.seed for run in method.runs) == result.seeds
        for run in method.runs:
            assert all(math.isfinite(value) for point in run.curve for value in point.metrics.values())
            assert run.curve[-1].flops > 0 and math.isfinite(run.seconds)
            if not parity:
                assert [point.samples for point in run.curve] == [0, 48, 96]
                assert {"loss", "accuracy", "perplexity"} <= set(run.final)
        assert method.curriculum is not None
        curricula[method.name] = method.curriculum
        assert bool(method.curriculum.hidden_stages) == method.name.startswith(("extraction", "joint"))
    checkpoints = [getattr(stage, "teacher_checkpoint", "") for stage in curricula["progressive"].stages]
    assert checkpoints[-1] is None and all(name.startswith("at-") for name in checkpoints[:-1])
    if not parity:
        paper, mine = (curricula[method] for method in ("extraction", best[0]))
        assert (paper.projection, paper.normalize, paper.warm_start) == ("gaussian", "none", "none")
        assert len(paper.stages) == 3
        assert mine.normalize == "standardize"
        if name.startswith("text"):
            hidden, output = mine.stages
            assert isinstance(hidden, HiddenStage) and isinstance(output, OutputStage)
            assert (hidden.student_place, hidden.teacher_place) == ("final", "final")
            assert (mine.projection, mine.warm_start) == ("logits", "head")
        finals = [run.final["loss"] for run in result.method("one_shot").runs]
        assert result.target == sorted(finals)[len(finals) // 2]

    def no_training(*args: Any) -> None:
        raise AssertionError("the teacher was trained again")

    monkeypatch.setattr(teachers, "_train", no_training)
    assert compare(smaller(name, **text), tmp_path / "o", log=quiet) == result  # also from a system made anew


@pytest.mark.parametrize("name", ["pcfg-clm", "text-mlm"])
def test_language_data_is_paired_by_seed(name: str) -> None:
    system = smaller(name)
    first, again, other = (system.train_data([seed], 96) for seed in (0, 0, 1))
    rows = [[data[index]["input_ids"] for index in range(20)] for data in (first, again, other)]
    rows = [[torch.as_tensor(row).tolist() for row in part] for part in rows]
    assert rows[0] == rows[1] != rows[2]
    held = {tuple(torch.as_tensor(row["input_ids"]).tolist()) for row in system.eval_data([0])}
    again = {tuple(torch.as_tensor(row["input_ids"]).tolist()) for row in system.eval_data([1])}
    assert held == again
    if name.startswith("text"):  # short strings of a grammar may well repeat
        assert not held & {tuple(row) for row in rows[0]}


def test_text_of_ones_own(tmp_path: Path, corpus: Path) -> None:
    assert len(smaller("text-clm").train_data([0], 1)) > 10_000  # the embedded text
    system = smaller("text-clm", dataset=str(corpus / "text.txt"))
    assert len(system.train_data([0], 1)) + len(system.eval_data([0])) < 500
    with pytest.raises(ValueError, match="nowhere"):
        smaller("text-clm", dataset=str(tmp_path / "nowhere.txt"))


def test_texts_that_were_fetched_are_used(tmp_path: Path) -> None:
    alone = len(smaller("text-clm").train_data([0], 1))
    (tmp_path / "assets" / "wikipedia").mkdir(parents=True)
    for name, count in (("train", 40), ("heldout", 4)):
        lines = [json.dumps({"text": f"Number {index} is a number of {name}. " * 10}) for index in range(count)]
        (tmp_path / "assets" / "wikipedia" / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert len(smaller("text-clm", texts="austen+wikipedia").train_data([0], 1)) > alone


@pytest.mark.parametrize(("name", "task"), [("pcfg-clm", "llama"), ("parity-transformer", "llama")])
def test_a_teacher_that_disagrees_is_refused(name: str, task: str, tmp_path: Path) -> None:
    """A Llama of another vocabulary is a teacher of neither."""
    folder = save_llama(tmp_path / "llama")
    with pytest.raises(ValueError, match=r"vocabulary entries|bits|could not load|no weights"):
        compare(smaller(name, teacher=str(folder)), tmp_path / "o", ["one_shot"], log=quiet)


def test_a_language_teacher_may_be_given(tmp_path: Path) -> None:
    first = compare(smaller("pcfg-clm"), tmp_path / "o", ["one_shot"], log=quiet)
    (trained,) = (tmp_path / "cache" / "teachers").glob("pcfg-clm-*/final")
    given = compare(smaller("pcfg-clm", teacher=str(trained)), tmp_path / "o2", ["one_shot"], log=quiet)
    assert given.method("one_shot").runs[0].final["loss"] == first.target
    assert "given" in given.teachers[0].description
