"""Methods by name, what is tuned, and the curricula of progressive distillation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tutelage.core.stages import HiddenStage, OutputStage
from tutelage.reproduction.teachers import Checkpoint, Teacher
from tutelage.reproduction.variants import (
    SCHEDULES,
    Candidate,
    Variant,
    build_curriculum,
    candidates,
    parse_variant,
    plain_variant,
    read_methods,
)
from tutelage.training.config import CurriculumConfig

RATES = (0.1, 0.3)
# kept after 640, 1,280, 2,560 and 6,400 examples; at a batch of 64: 10, 10, 20 and 60 steps apart
CHECKPOINTS = (Checkpoint(640, "a"), Checkpoint(1_280, "b"), Checkpoint(2_560, "c"), Checkpoint(6_400, "d"))
TEACHER = Teacher(nn.Identity(), "trained", checkpoints=CHECKPOINTS, transition=2)


def built(schedule: str, steps: int, teacher: Teacher = TEACHER, batch_size: int = 64, **settings: Any) -> Any:
    args = CurriculumConfig(output_dir=None, method="progressive", use_cpu=True, **settings)
    return build_curriculum(args, Candidate(0.1, schedule), (2, 2), teacher, steps, batch_size)


def shape(curriculum: Any) -> list[tuple[int, str | None]]:
    return [(stage.steps, stage.teacher_checkpoint) for stage in curriculum.stages]


def test_progressive_starts_from_the_teacher_by_the_settings_of_every_method() -> None:
    settings = {"student_init": "teacher", "residual_basis": "random", "projection_seed": 7, "start_blocks": "1,2"}
    curriculum = built("two", 10, **settings)
    assert [getattr(curriculum, name) for name in settings] == ["teacher", "random", 7, (1, 2)]


@pytest.mark.parametrize("method", ["extraction", "one_shot", "progressive", "scratch"])
def test_a_bare_method_changes_nothing(method: str) -> None:
    variant = plain_variant(method)
    assert (variant.name, variant.method, variant.overrides, variant.budget_fraction) == (method, method, {}, 1.0)
    assert variant.settings == ""


def test_overrides_are_typed_and_the_name_is_kept() -> None:
    text = "mine:projection=logits,warm_start=head,num_stages=2,stage_fraction=0.3,stage_steps=5,eval_with_teacher=true"
    variant = parse_variant(text)
    assert (variant.name, variant.method, variant.budget_fraction) == ("mine", "extraction", 1.0)
    assert variant.overrides == {
        "projection": "logits",
        "warm_start": "head",
        "num_stages": 2,
        "stage_fraction": 0.3,
        "stage_steps": [5],
        "eval_with_teacher": True,
    }
    assert variant.settings == text.removeprefix("mine:").replace(",", ", ")


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        ("mine:layer_map=1:1,2:2", {"layer_map": "1:1,2:2"}),
        (
            "mine:layer_map=1:1,2:4,final:final,warm_start=head",
            {"layer_map": "1:1,2:4,final:final", "warm_start": "head"},
        ),
        ("mine:normalize=none,layer_map=1:2,2:4", {"normalize": "none", "layer_map": "1:2,2:4"}),
        ("mine:layer_map=1:1,2:2,stage_steps=10,20,30", {"layer_map": "1:1,2:2", "stage_steps": [10, 20, 30]}),
        ("mine:stage_learning_rate=1e-3", {"stage_learning_rate": 1e-3}),
        ("soft:method=one_shot,label_weight=0.5,temperature=2", {"label_weight": 0.5, "temperature": 2.0}),
        ("one_shot:temperature=2", {"temperature": 2.0}),
    ],
)
def test_a_value_may_hold_commas_and_colons(text: str, overrides: dict[str, Any]) -> None:
    assert parse_variant(text).overrides == overrides


def test_a_name_that_is_a_method_needs_no_method() -> None:
    assert parse_variant("one_shot:temperature=2").method == "one_shot"
    assert parse_variant("soft:method=one_shot,temperature=2").method == "one_shot"
    with pytest.raises(ValueError, match="one_shot is a method: choose a different name"):
        parse_variant("one_shot:method=scratch")


def test_budget_is_a_fraction_and_no_field() -> None:
    variant = parse_variant("short:budget=0.6,normalize=none")
    assert (variant.budget_fraction, variant.overrides) == (0.6, {"normalize": "none"})
    assert variant.settings == "normalize=none, budget=0.6"
    assert parse_variant("all:method=one_shot,budget=1").budget_fraction == 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mine", "the variant 'mine' has no settings: write NAME:key=value"),
        ("", "the variant '' has no settings"),
        (":normalize=none", "'' cannot name a variant: use letters"),
        ("a/b:normalize=none", "'a/b' cannot name a variant"),
        (
            "mine:method=extract",
            "variant 'mine' has the unknown method 'extract': use one of extraction, joint, one_shot",
        ),
        ("mine:colour=red", "variant 'mine' has the unknown field 'colour'"),
        ("mine:head", "cannot read 'head' in the variant 'mine:head': write NAME:key=value"),
        ("mine:budget=0", "variant 'mine': budget is a fraction, above 0 and at most 1, got 0"),
        ("mine:budget=1.5", "at most 1, got 1.5"),
        ("mine:budget=nan", "at most 1, got nan"),
        ("mine:budget=half", "cannot read budget='half'"),
        ("mine:num_stages=two", "cannot read num_stages='two'"),
        ("mine:stage_fraction=much", "stage_fraction"),
        ("mine:stage_steps=1,x", "stage_steps"),
        (
            "mine:method=progressive,schedule=pace-3",
            "schedule=pace-3 is for progressive, one of two, pace-4, pace-2, pace-1",
        ),
        ("mine:schedule=two", "schedule=two is for progressive, one of"),
    ],
)
def test_what_is_no_variant_is_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_variant(text)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("extract", "unknown method 'extract': use one of extraction, joint, one_shot, progressive, scratch"),
        ("", "unknown method ''"),
        (
            "extraction:projection=logits",
            "not the name of a method.*--variant NAME:method=extraction,projection=logits, or in a comparison file",
        ),
    ],
)
def test_what_is_no_method_is_refused_by_name(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plain_variant(name)


def test_methods_of_a_file_are_a_mapping_or_a_list() -> None:
    given = {"one_shot": {}, "extraction": None, "final-state": {"layer_map": "final:final", "stage_steps": ["5", "6"]}}
    one_shot, plain, named = read_methods(given)
    assert (one_shot, plain) == (Variant("one_shot", "one_shot"), Variant("extraction", "extraction"))
    assert named == Variant("final-state", "extraction", {"layer_map": "final:final", "stage_steps": [5, 6]})
    assert read_methods(["extraction", "one_shot"]) == (plain, one_shot)
    assert read_methods("extraction one_shot") == (plain, one_shot)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "methods must be a mapping of names to settings"),
        (5, "methods must be a mapping of names to settings"),
        ({"mine": {}}, "unknown method 'mine'.* with --variant"),
        ({"mine": "head"}, "variant 'mine' needs a mapping"),
        ({"mine": {"colour": "red"}}, "unknown field 'colour'"),
        (["mine"], "unknown method 'mine'"),
    ],
)
def test_methods_of_a_file_that_cannot_be_read(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_methods(value)


@pytest.mark.parametrize("method", ["extraction", "one_shot", "scratch", "mine"])
def test_all_methods_get_the_same_rates(method: str) -> None:
    assert candidates(Variant(method, "extraction" if method == "mine" else method), RATES) == [
        Candidate(0.1),
        Candidate(0.3),
    ]


def test_progressive_gets_every_schedule_as_well() -> None:
    tried = candidates(plain_variant("progressive"), RATES)
    assert tried == [Candidate(rate, schedule) for schedule in SCHEDULES for rate in RATES]
    assert candidates(parse_variant("paced:method=progressive,schedule=two"), RATES) == [
        Candidate(0.1, "two"),
        Candidate(0.3, "two"),
    ]
    assert len({candidate.label for candidate in tried}) == len(tried)  # each has its own folder
    assert Candidate(3e-4).label == "0.0003" and Candidate(0.1, "two").label == "0.1 two"


@pytest.mark.parametrize(
    ("schedule", "steps", "expected"),
    [
        ("pace-1", 150, [(10, "a"), (10, "b"), (20, "c"), (60, "d"), (50, None)]),
        ("pace-2", 150, [(5, "a"), (5, "b"), (10, "c"), (30, "d"), (100, None)]),
        ("pace-4", 150, [(2, "a"), (2, "b"), (5, "c"), (15, "d"), (126, None)]),
        ("two", 150, [(20, "c"), (130, None)]),  # the transition's checkpoint for half the teacher's time to it
        # a budget that ends before the checkpoints do: the finished teacher still comes last
        ("pace-1", 100, [(10, "a"), (10, "b"), (20, "c"), (59, "d"), (1, None)]),
        ("pace-1", 25, [(10, "a"), (10, "b"), (4, "c"), (1, None)]),
        ("pace-1", 21, [(10, "a"), (10, "b"), (1, None)]),
        ("two", 6, [(5, "c"), (1, None)]),
        ("two", 1, [(1, None)]),
        ("pace-4", 2, [(1, "a"), (1, None)]),
    ],
)
def test_progressive_curricula(schedule: str, steps: int, expected: list[tuple[int, str | None]]) -> None:
    curriculum = built(schedule, steps)
    assert shape(curriculum) == expected
    assert curriculum.total_steps == steps
    assert curriculum.method == "progressive"
    # one optimiser and one schedule over all of them
    assert [stage.continues for stage in curriculum.stages] == [False] + [True] * (len(expected) - 1)
    assert curriculum.schedule_steps(0) == steps


def test_checkpoints_closer_than_a_step_get_one_each() -> None:
    assert shape(built("pace-4", 10, batch_size=640)) == [(1, "a"), (1, "b"), (1, "c"), (1, "d"), (6, None)]


def test_the_middle_checkpoint_stands_in_for_an_unknown_transition() -> None:
    assert shape(built("two", 50, Teacher(nn.Identity(), "trained", checkpoints=CHECKPOINTS)))[0] == (20, "c")
    assert shape(built("two", 50, Teacher(nn.Identity(), "trained", checkpoints=CHECKPOINTS, transition=0)))[0] == (
        5,
        "a",
    )


def test_progressive_keeps_the_settings_of_the_output_loss() -> None:
    curriculum = built("pace-2", 150, temperature=2.0, label_weight=0.25)
    assert curriculum.temperature == 2.0
    assert {stage.label_weight for stage in curriculum.stages} == {0.25}


def test_progressive_reads_a_warm_start_and_refuses_what_it_does_not_read() -> None:
    curriculum = built("pace-2", 150, warm_start="head", projection="pca", normalize="none")
    assert (curriculum.warm_start, curriculum.projection, curriculum.normalize) == ("head", "pca", "none")
    with pytest.raises(ValueError, match="method 'progressive' does not read projection: leave it out, or use method"):
        built("pace-2", 150, projection="pca")


def test_progressive_without_checkpoints_is_refused() -> None:
    with pytest.raises(ValueError, match=r"this teacher has none \(given: x\): leave progressive out of --methods"):
        built("two", 50, Teacher(nn.Identity(), "given: x"))


def test_other_methods_are_built_by_their_settings() -> None:
    args = CurriculumConfig(output_dir=None, method="extraction", num_stages=2, stage_fraction=0.4, use_cpu=True)
    curriculum = build_curriculum(args, Candidate(0.1), (2, 4), TEACHER, 50, 64)
    assert curriculum.stages == (HiddenStage(10, 1, 2), HiddenStage(10, 2, 4), OutputStage(30))
    args = CurriculumConfig(output_dir=None, method="scratch", use_cpu=True)
    (stage,) = build_curriculum(args, Candidate(0.1), (2, 4), TEACHER, 50, 64).stages
    assert (stage.steps, stage.label_weight, stage.needs_teacher) == (50, 1.0, False)


@pytest.mark.parametrize(
    "field", ["task=causal_lm", "learning_rate=5", "gradient_accumulation_steps=2", "seed=3", "output_dir=x"]
)
def test_no_variant_changes_what_the_comparison_sets(field: str) -> None:
    with pytest.raises(ValueError, match="the comparison sets it, the same for every method"):
        parse_variant(f"mine:{field}")


def test_a_shortened_budget_shortens_the_schedule_alike() -> None:
    """What tuning sees is the curriculum that is reported, in small."""
    model = torch.nn.Linear(1, 1)
    teacher = Teacher(
        model, "trained", checkpoints=tuple(Checkpoint(8_000 * n, f"at-{8_000 * n}") for n in range(1, 9)), transition=1
    )
    for schedule in SCHEDULES:
        made = [
            build_curriculum(
                CurriculumConfig(output_dir="o", method="progressive"),
                Candidate(0.1, schedule),
                (2, 2),
                teacher,
                steps,
                32,
                share,
            )
            for steps, share in ((1000, 1.0), (340, 0.34))
        ]
        whole, part = ([stage.steps for stage in curriculum.stages] for curriculum in made)
        assert len(whole) == len(part)
        for a, b in zip(whole, part, strict=True):
            assert abs(a * 0.34 - b) <= len(whole), (
                schedule,
                whole,
                part,
            )  # each is rounded down, the last gets the rest
