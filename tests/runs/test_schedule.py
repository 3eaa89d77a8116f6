"""Which rows an extraction stores, and how they are divided into shards."""

from __future__ import annotations

from tutelage.core.curriculum import Curriculum
from tutelage.core.stages import HiddenStage, OutputStage
from tutelage.runs.extraction.schedule import Schedule, plan_shards
from tutelage.targets.source import Reading, epoch_order

TWO_STAGES = Curriculum("extraction", (HiddenStage(3, 1, 1), OutputStage(5)))


def test_the_rows_of_a_stage_are_those_that_its_steps_read() -> None:
    schedule = Schedule(TWO_STAGES, 100, Reading(step_examples=4, batch_size=2, seed=7))
    order = epoch_order(100, 7, 0).tolist()
    assert schedule.examples(0) == order[:12]
    assert schedule.examples(1) == order[12:32]


def test_a_stage_of_several_epochs_lists_each_row_once() -> None:
    schedule = Schedule(TWO_STAGES, 10, Reading(step_examples=4, batch_size=4, seed=7))
    first, second = (epoch_order(10, 7, epoch).tolist() for epoch in (0, 1))
    assert schedule.examples(0) == [*first, *(row for row in second[:2] if row not in first)]
    rows = schedule.examples(1)  # the rest of the second epoch, the third, and two rows of the fourth
    assert rows[:8] == second[2:]
    assert sorted(rows) == list(range(10))


def test_a_sequential_schedule_reads_the_rows_as_they_are() -> None:
    schedule = Schedule(TWO_STAGES, 100, Reading(4, 4, seed=7), sequential=True)
    assert schedule.examples(0) == list(range(12))
    assert schedule.order(3) == list(range(100))


def test_all_stages_gives_every_row_to_every_stage() -> None:
    schedule = Schedule(TWO_STAGES, 20, Reading(4, 4, seed=7), all_stages=True)
    for stage in (0, 1):
        assert schedule.examples(stage) == epoch_order(20, 7, 0).tolist()


def test_shards_hold_whole_batches_up_to_their_tokens() -> None:
    examples, lengths = [5, 3, 8, 1, 9, 2, 7], [10, 10, 10, 10, 30, 10, 10]
    shards = plan_shards(examples, lengths, batch_size=2, shard_tokens=45)
    assert shards == [[[5, 3], [8, 1]], [[9, 2]], [[7]]]
    assert [example for shard in shards for batch in shard for example in batch] == examples


def test_a_batch_that_is_larger_than_a_shard_has_a_shard_to_itself() -> None:
    assert plan_shards([0, 1, 2], [100, 1, 1], batch_size=1, shard_tokens=10) == [[[0]], [[1], [2]]]
    assert plan_shards([], [], batch_size=4, shard_tokens=10) == [[]]
