"""The curricula of progressive distillation: its schedules, and what is searched for them."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from tutelage.core.stages import HiddenStage, OutputStage
from tutelage.reproduction.schedules import axes, build_curriculum, within
from tutelage.reproduction.search import Axis
from tutelage.reproduction.teachers import Checkpoint, Teacher
from tutelage.reproduction.variants import PACES, SHARES
from tutelage.training.config import CurriculumConfig

# kept after 640, 1,280, 2,560 and 6,400 examples; at a batch of 64: 10, 10, 20 and 60 steps apart
CHECKPOINTS = (Checkpoint(640, "a"), Checkpoint(1_280, "b"), Checkpoint(2_560, "c"), Checkpoint(6_400, "d"))
TEACHER = Teacher(nn.Identity(), "trained", checkpoints=CHECKPOINTS, transition=2)


def built(
    chosen: str | dict[str, Any], steps: int, teacher: Teacher = TEACHER, batch_size: int = 64, **settings: Any
) -> Any:
    """The curriculum of a schedule by its name, or of settings that tuning chose."""
    args = CurriculumConfig(output_dir=None, method="progressive", use_cpu=True, **settings)
    chosen = {"schedule": chosen} if isinstance(chosen, str) else chosen
    return build_curriculum(args, chosen, (2, 2), teacher, steps, batch_size)


def shape(curriculum: Any) -> list[tuple[int, str | None]]:
    return [(stage.steps, stage.teacher_checkpoint) for stage in curriculum.stages]


def test_progressive_starts_from_the_teacher_by_the_settings_of_every_method() -> None:
    settings = {"student_init": "teacher", "residual_basis": "random", "projection_seed": 7, "start_blocks": "1,2"}
    curriculum = built("two", 10, **settings)
    assert [getattr(curriculum, name) for name in settings] == ["teacher", "random", 7, (1, 2)]


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
    curriculum = build_curriculum(args, {}, (2, 4), TEACHER, 50, 64)
    assert curriculum.stages == (HiddenStage(10, 1, 2), HiddenStage(10, 2, 4), OutputStage(30))
    args = CurriculumConfig(output_dir=None, method="scratch", use_cpu=True)
    (stage,) = build_curriculum(args, {}, (2, 4), TEACHER, 50, 64).stages
    assert (stage.steps, stage.label_weight, stage.needs_teacher) == (50, 1.0, False)


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({}, (20, "c")),
        ({"phase_samples": 640}, (10, "c")),
        ({"phase_samples": 6_400}, (100, "c")),
        ({"phase_samples": 63}, (1, "c")),  # less than a step is a step
        ({"phase_samples": 9_599}, (149, "c")),
        # by default half of the samples that the teacher had seen at its checkpoint
        ({"checkpoint": -2}, (5, "a")),
        ({"checkpoint": -1}, (10, "b")),
        ({"checkpoint": 1}, (50, "d")),
        ({"checkpoint": 1, "phase_samples": 640, "schedule": "two"}, (10, "d")),
    ],
)
def test_the_first_phase_and_its_checkpoint_can_be_chosen(
    chosen: dict[str, Any], expected: tuple[int, str | None]
) -> None:
    assert shape(built(chosen, 150)) == [expected, (150 - expected[0], None)]


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"checkpoint": 2}, r"checkpoint=2 is not one of the teacher's 4: the one .* is number 3"),
        ({"checkpoint": -3}, r"checkpoint=-3 is not one of the teacher's 4: the one .* is number 3"),
        ({"phase_samples": 9_600}, "phase_samples=9600 takes all of the 9600 samples of the run: give fewer"),
        ({"phase_samples": 0}, "phase_samples must be at least 1, got 0"),
        ({"phase_samples": -64}, "phase_samples must be at least 1, got -64"),
    ],
)
def test_a_phase_or_checkpoint_out_of_range_is_refused(chosen: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        built(chosen, 150)


def test_a_pace_uses_neither_a_phase_nor_one_checkpoint() -> None:
    void = {"schedule": "pace-1", "phase_samples": 10**9, "checkpoint": 99}
    assert built(void, 150) == built("pace-1", 150)


def test_checkpoints_may_share_the_run_or_its_first_half() -> None:
    assert shape(built("even", 50)) == [(10, "a"), (10, "b"), (10, "c"), (10, "d"), (10, None)]
    assert shape(built("half", 50)) == [(6, "a"), (6, "b"), (6, "c"), (6, "d"), (26, None)]
    assert shape(built("even", 3)) == [(1, "a"), (1, "b"), (1, None)]  # the finished teacher always comes last
    assert built({"schedule": "half", "phase_samples": 10**9, "checkpoint": 99}, 50) == built("half", 50)


def test_phase_checkpoint_and_schedule_are_searched() -> None:
    found = axes(TEACHER, 640, PACES)
    assert found == {
        "phase_samples": Axis((320, 640, 1280), start=640, grows=True),
        "checkpoint": Axis((-2, -1, 0, 1), start=0),
        "schedule": Axis(("two", "pace-4", "pace-2", "pace-1"), ordered=False),
    }
    for offset in found["checkpoint"].values:  # each of them can be run, and they are all that there are
        assert shape(built({"checkpoint": offset}, 150))[0][1] == "abcd"[2 + offset]
    assert axes(TEACHER, 640, SHARES)["schedule"] == Axis(("two", "even", "half"), ordered=False)
    assert axes(Teacher(nn.Identity(), "given: x"), 640, PACES) == {}
    middle = axes(Teacher(nn.Identity(), "trained", checkpoints=CHECKPOINTS[:3]), 640, PACES)
    assert middle["checkpoint"] == Axis((-1, 0, 1), start=0)  # of an unknown transition


def test_a_checkpoint_that_another_teacher_does_not_have_becomes_the_nearest_one() -> None:
    """What was chosen with one teacher is used with others, whose training took another number of checkpoints."""
    fewer = Teacher(nn.Identity(), "trained", checkpoints=CHECKPOINTS[:3], transition=1)
    for offset, expected in ((-3, -1), (-1, -1), (0, 0), (1, 1), (2, 1)):
        chosen = within({"checkpoint": offset, "phase_samples": 640}, fewer)
        assert chosen == {"checkpoint": expected, "phase_samples": 640}
        built(chosen, 150, fewer)
    assert within({"schedule": "pace-2"}, fewer) == {"schedule": "pace-2"}
    without = Teacher(nn.Identity(), "given: x")  # refused later, by name
    assert within({"checkpoint": 2}, without) == {"checkpoint": 2}
