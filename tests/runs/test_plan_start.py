"""What a plan says about the start of a student from its teacher."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import run
from tests.runs.conftest import STUDENT, settings, texts
from tutelage.core.curriculum import one_shot
from tutelage.core.errors import UserError
from tutelage.runs.distill import distill
from tutelage.runs.inputs import RunOptions, load_inputs
from tutelage.runs.plan import plan
from tutelage.targets.live import LiveTargets


def flags(teacher: Path, corpus: Path) -> list[object]:
    text = ["--dataset", corpus / "text.jsonl", "--max_length", 16, "--calibration_samples", 16, "--use_cpu", "true"]
    return ["plan", "--teacher", teacher, "--student", STUDENT, *text]


def test_blocks_and_kept_variance_are_planned(causal_teacher: Path, corpus: Path, tmp_path: Path) -> None:
    command = flags(causal_teacher, corpus)
    start = json.loads(run(*command, "--json"))["start"]
    assert start["blocks"] == [1, 4]  # a causal language model's ends
    assert 0 < start["variance"] <= 1
    kept = f"its residual basis keeps {start['variance']:.1%} of the mean square of the teacher's states"
    assert f"the student starts from blocks 1, 4 of the teacher; {kept}" in run(*command)
    chosen = json.loads(run(*command, "--layer_map=1:1,2:3", "--json"))["start"]
    assert chosen["blocks"] == [1, 3]
    for choice, blocks in (("uniform", [2, 4]), ("2,3", [2, 3])):
        assert json.loads(run(*command, f"--start_blocks={choice}", "--json"))["start"]["blocks"] == blocks
    # what a run of the same settings starts with
    args = settings(tmp_path, causal_teacher)
    inputs = load_inputs(texts(corpus), args)
    assert isinstance(inputs.source, LiveTargets) and inputs.train_dataset is not None
    inputs.source.attach(one_shot(1, student_init="teacher", start_blocks=(1, 4)), inputs.student)
    rows = [inputs.train_dataset[index] for index in range(16)]
    started = inputs.source.start(inputs.student, lambda: [inputs.collator(rows)])
    assert started is not None and start["variance"] == pytest.approx(started.variance, rel=1e-3)


def test_a_basis_that_keeps_everything_and_no_start_at_all(causal_teacher: Path, corpus: Path) -> None:
    command = flags(causal_teacher, corpus)
    wide = json.loads(run(*command, "--student=layers=2", "--residual_basis=pca", "--json"))["start"]
    assert wide["variance"] == pytest.approx(1.0)
    copied = json.loads(run(*command, "--student=layers=2", "--json"))["start"]
    assert copied == {"blocks": [1, 4], "basis": "identity", "variance": None}
    assert "blocks 1, 4 of the teacher, without a change of coordinates" in run(*command, "--student=layers=2")
    assert "of the teacher, through a random residual basis" in run(*command, "--residual_basis=random")
    assert json.loads(run(*command, "--student_init=random", "--json"))["start"] is None
    assert "starts from" not in run(*command, "--preset=paper")


def test_a_plan_refuses_a_basis_by_a_head_that_does_not_read_the_residual_stream(
    classifier_teacher: Path, tmp_path: Path
) -> None:
    args = settings(tmp_path, classifier_teacher, student_init=None, residual_basis="logits")
    with pytest.raises(UserError, match="no output head that reads the residual stream: use residual_basis='pca'"):
        plan(RunOptions(student=STUDENT), args)


def test_a_plan_is_of_what_distill_does(causal_teacher: Path, corpus: Path, tmp_path: Path) -> None:
    planned = json.loads(run(*flags(causal_teacher, corpus), "--max_steps=8", "--json"))["curriculum"]
    distill(texts(corpus), settings(tmp_path / "run", causal_teacher, student_init=None))
    assert json.loads((tmp_path / "run" / "curriculum.json").read_text()) == planned
