"""Curricula as data: the four builders, layer maps, the step a stage begins at, and JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tutelage.core.blocks import HEAD
from tutelage.core.curriculum import (
    METHODS,
    WARM_STARTS,
    Curriculum,
    Stage,
    extraction,
    one_shot,
    parse_layer_map,
    progressive,
    scratch,
    uniform_layer_map,
)

SETTINGS: dict[str, Any] = {
    "projection": "orthogonal",
    "projection_seed": 3,
    "normalize": "none",
    "warm_start": "head+embedding",
    "temperature": 2.0,
}


def test_names() -> None:
    assert METHODS == ("extraction", "one_shot", "progressive", "scratch")
    assert WARM_STARTS == ("none", "head", "embedding", "head+embedding")


def test_defaults_are_the_papers_projection() -> None:
    curriculum = one_shot(10)
    assert curriculum == Curriculum("one_shot", (Stage("output", 10),), "gaussian", 0, "standardize", "none", 1.0)


def test_extraction_by_default() -> None:
    assert extraction(2, 4, 100) == Curriculum(
        "extraction", (Stage("hidden", 25, 1, 2), Stage("hidden", 25, 2, 4), Stage("output", 50))
    )


def test_extraction_with_everything_given() -> None:
    curriculum = extraction(
        2,
        4,
        100,
        layer_map=[(1, 1), (HEAD, HEAD)],
        stage_steps=[10, 20],
        stage_learning_rate=0.1,
        label_weight=0.3,
        **SETTINGS,
    )
    assert curriculum == Curriculum(
        "extraction",
        (
            Stage("hidden", 10, 1, 1, learning_rate=0.1),
            Stage("hidden", 20, HEAD, HEAD, learning_rate=0.1),
            Stage("output", 70, label_weight=0.3),
        ),
        **SETTINGS,
    )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [16, 16, 18, 50]),  # what does not divide goes to the last hidden stage
        ({"stage_fraction": 0.3}, [10, 10, 10, 70]),
        ({"stage_fraction": 0.999}, [33, 33, 34, 0]),
        ({"num_stages": 1}, [50, 50]),
        ({"stage_steps": 5}, [5, 5, 5, 85]),
        ({"stage_steps": (1, 2, 3)}, [1, 2, 3, 94]),
        ({"stage_steps": 5, "stage_fraction": 0.9}, [5, 5, 5, 85]),
    ],
)
def test_extraction_shares_out_the_budget(settings: dict[str, Any], expected: list[int]) -> None:
    if expected[-1] == 0:
        with pytest.raises(ValueError, match=r"stage 4 \(output\) would get 0 steps"):
            extraction(3, 6, 100, **settings)
        return
    curriculum = extraction(3, 6, 100, **settings)
    assert [stage.steps for stage in curriculum.stages] == expected
    assert curriculum.total_steps == 100


def test_extraction_takes_a_layer_map_for_a_deeper_student() -> None:
    stages = extraction(6, 3, 100, layer_map=[(2, 1), (6, 3)]).stages
    assert [(stage.student_place, stage.teacher_place) for stage in stages] == [(2, 1), (6, 3), (None, None)]


def test_one_shot() -> None:
    assert one_shot(10, label_weight=0.5, **SETTINGS) == Curriculum(
        "one_shot", (Stage("output", 10, label_weight=0.5),), **SETTINGS
    )


def test_progressive() -> None:
    assert progressive(100, ["early", "late"], label_weight=0.5, **SETTINGS) == Curriculum(
        "progressive",
        (
            Stage("output", 33, teacher_checkpoint="early", label_weight=0.5),
            Stage("output", 33, teacher_checkpoint="late", label_weight=0.5),
            Stage("output", 34, label_weight=0.5),
        ),
        **SETTINGS,
    )


def test_scratch() -> None:
    curriculum = scratch(10, **SETTINGS)
    assert curriculum == Curriculum("scratch", (Stage("output", 10, label_weight=1.0),), **SETTINGS)
    assert not curriculum.stages[0].needs_teacher


@pytest.mark.parametrize(
    ("stage", "name", "needs_teacher"),
    [
        (Stage("hidden", 1, 2, 4), "hidden 2:4", True),
        (Stage("hidden", 1, HEAD, HEAD, label_weight=1.0), "hidden head:head", True),
        (Stage("output", 1), "output", True),
        (Stage("output", 1, label_weight=0.9), "output", True),
        (Stage("output", 1, teacher_checkpoint="early"), "output early", True),
        (Stage("output", 1, label_weight=1.0), "labels", False),
    ],
)
def test_stage_name_and_teacher(stage: Stage, name: str, needs_teacher: bool) -> None:
    assert (stage.name, stage.needs_teacher) == (name, needs_teacher)


@pytest.mark.parametrize(
    ("student", "teacher", "stages", "expected"),
    [
        (1, 1, None, [(1, 1)]),
        (1, 12, None, [(1, 12)]),
        (3, 6, None, [(1, 2), (2, 4), (3, 6)]),
        (2, 3, None, [(1, 2), (2, 3)]),
        (4, 6, None, [(1, 2), (2, 3), (3, 4), (4, 6)]),
        (4, 4, None, [(1, 1), (2, 2), (3, 3), (4, 4)]),
        (5, 12, None, [(1, 2), (2, 5), (3, 7), (4, 10), (5, 12)]),
        (4, 12, 2, [(2, 6), (4, 12)]),
        (4, 12, 1, [(4, 12)]),
        (6, 12, 4, [(2, 4), (3, 6), (4, 8), (6, 12)]),
        (6, 12, 6, [(1, 2), (2, 4), (3, 6), (4, 8), (5, 10), (6, 12)]),
        (12, 28, 3, [(4, 9), (8, 19), (12, 28)]),
    ],
)
def test_uniform_layer_map(student: int, teacher: int, stages: int | None, expected: list[tuple[int, int]]) -> None:
    assert uniform_layer_map(student, teacher, stages) == expected


@pytest.mark.parametrize("student", range(1, 13))
def test_uniform_layer_map_is_always_a_valid_one(student: int) -> None:
    for teacher in range(student, 25):
        for stages in range(1, student + 1):
            built = extraction(student, teacher, 1000, num_stages=stages).stages
            assert len(built) == stages + 1
            assert (built[-2].student_place, built[-2].teacher_place) == (student, teacher)


def test_uniform_layer_map_errors() -> None:
    with pytest.raises(
        ValueError, match=r"the student has 7 blocks, the teacher 6: .*give a layer_map such as '1:1,head"
    ):
        uniform_layer_map(7, 6)
    for stages in (0, 4, -1):
        with pytest.raises(ValueError, match=rf"num_stages must be from 1 to the student's 3 blocks, got {stages}"):
            uniform_layer_map(3, 6, stages)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1:2", [(1, 2)]),
        ("1:2,2:4,head:head", [(1, 2), (2, 4), (HEAD, HEAD)]),
        (" 1 : 2 , 3:head ", [(1, 2), (3, HEAD)]),
        ("10:12", [(10, 12)]),
    ],
)
def test_parse_layer_map(text: str, expected: list[tuple[Any, Any]]) -> None:
    assert parse_layer_map(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"layer_map '': '' is not a student:teacher pair such as 1:2"),
        ("1:2,3", r"layer_map '1:2,3': '3' is not a student:teacher pair such as 1:2"),
        ("1:two", r"layer_map '1:two': 'two' is neither a block number nor 'head'"),
        ("-1:2", r"layer_map '-1:2': '-1' is neither a block number nor 'head'"),
        ("1:", r"layer_map '1:': '' is neither a block number nor 'head'"),
        ("1:2:3", r"layer_map '1:2:3': '2:3' is neither a block number nor 'head'"),
    ],
)
def test_parse_layer_map_errors(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_layer_map(text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer_map": [(1, 1)], "num_stages": 1}, r"give layer_map or num_stages, not both"),
        ({"layer_map": []}, r"layer_map is empty: give pairs such as '1:2,head:head', or None for the uniform map"),
        ({"layer_map": [(0, 1)]}, r"layer_map: the student has blocks 1 to 3 and 'head', not 0"),
        ({"layer_map": [(4, 1)]}, r"layer_map: the student has blocks 1 to 3 and 'head', not 4"),
        ({"layer_map": [(1, 7)]}, r"layer_map: the teacher has blocks 1 to 6 and 'head', not 7"),
        ({"layer_map": [(1, "logits")]}, r"layer_map: the teacher has blocks 1 to 6 and 'head', not 'logits'"),
        ({"layer_map": [(1, 2), (1, 3)]}, r"layer_map 1:2,1:3 is not strictly increasing in both student and teacher"),
        ({"layer_map": [(1, 2), (2, 2)]}, r"layer_map 1:2,2:2 is not strictly increasing"),
        ({"layer_map": [(HEAD, HEAD), (3, 6)]}, r"layer_map head:head,3:6 is not strictly increasing"),
        ({"stage_fraction": 0}, r"stage_fraction is a share between 0 and 1, got 0"),
        ({"stage_fraction": 1.0}, r"stage_fraction is a share between 0 and 1, got 1\.0"),
        ({"stage_steps": [10, 10]}, r"stage_steps has 2 entries for 3 hidden stages"),
        (
            {"stage_steps": 0},
            r"budget too small for the stages: stage 1 \(hidden 1:2\) would get 0 steps; raise max_steps",
        ),
        (
            {"stage_steps": 40},
            r"stage 4 \(output\) would get -20 steps; .*lower stage_fraction, stage_steps or num_stages",
        ),
        ({"label_weight": 1.5}, r"label_weight is a share from 0 to 1, got 1\.5"),
        ({"label_weight": -0.1}, r"label_weight is a share from 0 to 1, got -0\.1"),
        ({"projection": "dct"}, r"unknown projection 'dct': use one of gaussian, orthogonal, rademacher, pca, head"),
        ({"normalize": "l2"}, r"unknown normalize 'l2': use one of standardize, none"),
        ({"warm_start": "all"}, r"unknown warm_start 'all': use one of none, head, embedding, head\+embedding"),
        ({"temperature": 0}, r"temperature must be positive, got 0"),
    ],
)
def test_extraction_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        extraction(3, 6, 100, **settings)


def test_extraction_with_too_few_steps_for_its_stages() -> None:
    with pytest.raises(ValueError, match=r"stage 1 \(hidden 1:2\) would get 0 steps"):
        extraction(3, 6, 4)


def test_progressive_errors() -> None:
    with pytest.raises(ValueError, match=r"needs the teacher's intermediate checkpoints: pass teacher_checkpoints"):
        progressive(100, [])
    with pytest.raises(ValueError, match=r"stage 1 \(output early\) would get 0 steps"):
        progressive(1, ["early"])


def test_curriculum_errors() -> None:
    with pytest.raises(ValueError, match=r"a curriculum needs at least one stage \(method 'mine' has none\)"):
        Curriculum("mine", ())
    with pytest.raises(ValueError, match=r"stage 2 is of unknown kind 'logits': use 'hidden' or 'output'"):
        Curriculum("mine", (Stage("output", 1), Stage("logits", 1)))
    for places in ((None, 1), (1, None)):
        with pytest.raises(ValueError, match=r"hidden stage 1 needs both student_place and teacher_place"):
            Curriculum("mine", (Stage("hidden", 1, *places),))
    with pytest.raises(ValueError, match=r"stage 1 \(labels\) would get 0 steps"):
        scratch(0)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, (0, 0)),
        (9, (0, 9)),
        (10, (1, 0)),
        (29, (1, 19)),
        (30, (2, 0)),
        (99, (2, 69)),
        (100, (2, 70)),
        (105, (2, 75)),
    ],
)
def test_stage_at(step: int, expected: tuple[int, int]) -> None:
    assert extraction(2, 4, 100, stage_steps=[10, 20]).stage_at(step) == expected


@pytest.mark.parametrize(
    "curriculum",
    [
        extraction(
            3, 6, 100, layer_map=[(1, 2), (HEAD, HEAD)], stage_learning_rate=1e-3, label_weight=0.25, **SETTINGS
        ),
        one_shot(10),
        progressive(10, ["early"], temperature=3.0),
        scratch(10),
    ],
    ids=lambda curriculum: curriculum.method,
)
def test_json_round_trip(curriculum: Curriculum) -> None:
    text = curriculum.to_json()
    again = Curriculum.from_json(text)
    assert again == curriculum and isinstance(again.stages, tuple)
    assert again.to_json() == text


def test_json_is_checked_when_read() -> None:
    fields = json.loads(one_shot(10).to_json())
    fields["temperature"] = -1.0
    with pytest.raises(ValueError, match=r"temperature must be positive, got -1\.0"):
        Curriculum.from_json(json.dumps(fields))
