"""Records of trained teachers."""

from __future__ import annotations

import dataclasses

from torch import nn

from tutelage.reproduction.teachers import Checkpoint, TeacherJob, TeacherRule, TrainedTeacher


def test_a_record_is_read_back_as_it_was_written() -> None:
    record = TrainedTeacher(
        description="trained from labels for 640 examples",
        samples=640,
        converged_at=None,
        transition=1,
        metrics={"loss": 0.5},
        curve=((0, 0.7), (640, 0.5)),
        checkpoints=(Checkpoint(320, "at-320"), Checkpoint(640, "at-640")),
        settings={"d": 8, "rule": {"metric": "loss"}},
    )
    assert TrainedTeacher.from_json(record.to_json()) == record


def test_a_teachers_folder_is_named_after_all_that_it_depends_on() -> None:
    job = TeacherJob(
        name="parity-mlp",
        identity={"d": 8},
        rule=TeacherRule("accuracy", 0.999, 2.5, 640, 64),
        arguments={"learning_rate": 0.1},
        build=nn.Identity,
        load=lambda folder: nn.Identity(),
        data=lambda count: ([], []),
        collator=None,
    )
    others = (
        dataclasses.replace(job, identity={"d": 9}),
        dataclasses.replace(job, rule=dataclasses.replace(job.rule, factor=3.0)),
        dataclasses.replace(job, arguments={"learning_rate": 0.2}),
    )
    assert len({job.folder_name, *(other.folder_name for other in others)}) == 4
    assert dataclasses.replace(job, collator=print).folder_name == job.folder_name
