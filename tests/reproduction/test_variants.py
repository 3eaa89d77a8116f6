"""Methods by name, what is tuned, and the curricula of progressive distillation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tutelage.core.curriculum import HiddenStage, OutputStage
from tutelage.reproduction.teachers import Checkpoint, Teacher
from tutelage.reproduction.variants import SCHEDULES, Candidate, build_curriculum, candidates, parse_variant
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


@pytest.mark.parametrize("method", ["extraction", "one_shot", "progressive", "scratch"])
def test_a_bare_method_changes_nothing(method: str) -> None:
    variant = parse_variant(method)
    assert (variant.name, variant.method, variant.overrides, variant.budget_share) == (method, method, {}, 1.0)


def test_overrides_are_typed_and_the_name_is_kept() -> None:
    text = "extraction:projection=logits,warm_start=head,num_stages=2,stage_fraction=0.3,stage_steps=5,eval_with_teacher=true"
    variant = parse_variant(text)
    assert (variant.name, variant.method, variant.budget_share) == (text, "extraction", 1.0)
    assert variant.overrides == {
        "projection": "logits",
        "warm_start": "head",
        "num_stages": 2,
        "stage_fraction": 0.3,
        "stage_steps": [5],
        "eval_with_teacher": True,
    }


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        ("extraction:layer_map=1:1,2:2", {"layer_map": "1:1,2:2"}),
        (
            "extraction:layer_map=1:1,2:4,final:final,warm_start=head",
            {"layer_map": "1:1,2:4,final:final", "warm_start": "head"},
        ),
        ("extraction:normalize=none,layer_map=1:2,2:4", {"normalize": "none", "layer_map": "1:2,2:4"}),
        ("extraction:layer_map=1:1,2:2,stage_steps=10,20,30", {"layer_map": "1:1,2:2", "stage_steps": [10, 20, 30]}),
        ("extraction:stage_learning_rate=1e-3", {"stage_learning_rate": 1e-3}),
        ("one_shot:label_weight=0.5,temperature=2", {"label_weight": 0.5, "temperature": 2.0}),
    ],
)
def test_a_value_may_hold_commas_and_colons(text: str, overrides: dict[str, Any]) -> None:
    assert parse_variant(text).overrides == overrides


def test_budget_is_a_share_and_no_field() -> None:
    variant = parse_variant("extraction:budget=0.6,normalize=none")
    assert (variant.budget_share, variant.overrides) == (0.6, {"normalize": "none"})
    assert parse_variant("one_shot:budget=1").budget_share == 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extract", "unknown method 'extract' in 'extract': use one of extraction, one_shot, progressive, scratch"),
        ("", "unknown method ''"),
        (":normalize=none", "unknown method ''"),
        ("extraction:colour=red", "unknown field 'colour' in 'extraction:colour=red'"),
        ("extraction:head", "unknown field 'head' in 'extraction:head'"),
        ("extraction:budget=0", "budget in 'extraction:budget=0' is a share from 0 to 1, got 0"),
        ("extraction:budget=1.5", "is a share from 0 to 1, got 1.5"),
        ("extraction:budget=nan", "is a share from 0 to 1, got nan"),
        ("extraction:budget=half", "budget"),
        ("extraction:num_stages=two", "num_stages"),
        ("extraction:stage_fraction=much", "stage_fraction"),
        ("extraction:stage_steps=1,x", "stage_steps"),
        (
            "progressive:schedule=pace-3",
            "schedule in .* belongs to progressive and is one of two, pace-4, pace-2, pace-1",
        ),
        ("extraction:schedule=two", "schedule in 'extraction:schedule=two' belongs to progressive"),
    ],
)
def test_what_is_no_method_is_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_variant(text)


@pytest.mark.parametrize("method", ["extraction", "one_shot", "scratch", "extraction:projection=logits"])
def test_all_methods_get_the_same_rates(method: str) -> None:
    assert candidates(parse_variant(method), RATES) == [Candidate(0.1), Candidate(0.3)]


def test_progressive_gets_every_schedule_as_well() -> None:
    tried = candidates(parse_variant("progressive"), RATES)
    assert tried == [Candidate(rate, schedule) for schedule in SCHEDULES for rate in RATES]
    assert candidates(parse_variant("progressive:schedule=two"), RATES) == [
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
    curriculum = built("pace-2", 150, temperature=2.0, label_weight=0.25, normalize="none")
    assert curriculum.temperature == 2.0
    assert {stage.label_weight for stage in curriculum.stages} == {0.25}


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
    "field", ["method=scratch", "learning_rate=5", "gradient_accumulation_steps=2", "seed=3", "output_dir=x"]
)
def test_what_the_comparison_sets_no_method_changes(field: str) -> None:
    with pytest.raises(ValueError, match="is set by the comparison itself, the same for every method"):
        parse_variant(f"extraction:{field}")


def test_a_shortened_budget_shortens_the_schedule_alike() -> None:
    """What tuning sees is the curriculum that is reported, in small."""
    model = torch.nn.Linear(1, 1)
    teacher = Teacher(
        model,
        "trained",
        checkpoints=tuple(Checkpoint(8_000 * n, f"at-{8_000 * n}") for n in range(1, 9)),
        transition=1,
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
