"""A student that starts from its teacher, which is not there: its first weights are in the extracted curriculum."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.runs.conftest import STUDENT, files_of, settings, texts, train
from tutelage import CurriculumTrainer
from tutelage.core.curriculum import Curriculum, one_shot
from tutelage.core.errors import UserError
from tutelage.runs.evaluate import EvaluateOptions, evaluate
from tutelage.runs.extraction import job
from tutelage.runs.extraction.job import describe_extraction, extract
from tutelage.runs.extraction.options import ExtractOptions
from tutelage.runs.inputs import RunOptions
from tutelage.runs.model_card import _hidden_row
from tutelage.targets.folder import ExtractedCurriculum
from tutelage.targets.manifest import ShardWriter

Extracted = Callable[..., Path]
STARTS = {"student_init": "teacher"}
ONE_SHOT, JOINT = ({"method": method, **STARTS} for method in ("one_shot", "joint"))  # joint: with residual targets


def first_weights(folder: Path, curriculum: Path, student: str | None, **fields: Any) -> dict[str, torch.Tensor]:
    """The weights of a student that learns nothing."""
    train(folder, curriculum, RunOptions(student=student), learning_rate=0.0, max_steps=1, **fields)
    return load_file(folder / "model.safetensors")


def equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, two[name]) for name, value in one.items())


def curriculum_of(folder: Path) -> Curriculum:
    return Curriculum.from_json((folder / "curriculum.json").read_text())


@pytest.mark.parametrize("student", [None, STUDENT])
def test_a_preset_of_the_same_shape_takes_the_stored_weights(
    extracted: Extracted, tmp_path: Path, student: str | None
) -> None:
    folder = extracted(**ONE_SHOT)
    stored = load_file(folder / "student" / "model.safetensors")
    assert equal(stored, first_weights(tmp_path / "run", folder, student, student_init=None))
    assert curriculum_of(tmp_path / "run").student_init == "teacher"
    card = (tmp_path / "run" / "README.md").read_text()
    assert "its teacher's weights (student_init=teacher) |" in card
    assert "Hidden stages" not in card and card.endswith("(loss.png)\n")


def test_random_weights_may_be_asked_for_where_no_target_needs_the_others(extracted: Extracted, tmp_path: Path) -> None:
    folder = extracted(**ONE_SHOT)
    stored = load_file(folder / "student" / "model.safetensors")
    found = [
        first_weights(tmp_path / "asked", folder, STUDENT, student_init="random"),
        first_weights(tmp_path / "paper", folder, STUDENT, student_init=None, preset="paper"),
    ]
    assert equal(*found) and not equal(stored, found[0])
    assert curriculum_of(tmp_path / "asked").student_init == curriculum_of(tmp_path / "paper").student_init == "random"
    assert "random weights (student_init=random)" in (tmp_path / "asked" / "README.md").read_text()


@pytest.mark.parametrize("student", [None, STUDENT])
def test_random_weights_are_refused_where_the_targets_are_residual(
    extracted: Extracted, tmp_path: Path, student: str | None
) -> None:
    folder = extracted(**JOINT)
    with pytest.raises(UserError, match="was made with student_init=teacher, but student_init=random was given"):
        first_weights(tmp_path / "run", folder, student, student_init="random")


def test_a_method_without_hidden_targets_serves_any_student(extracted: Extracted, tmp_path: Path) -> None:
    folder = extracted(**JOINT)
    one_shot = {"method": "one_shot", "layer_map": None}
    first_weights(tmp_path / "other", folder, "layers=1,hidden_size=16", student_init=None, **one_shot)
    first_weights(tmp_path / "random", folder, STUDENT, student_init="random", **one_shot)
    assert curriculum_of(tmp_path / "other").student_init == curriculum_of(tmp_path / "random").student_init == "random"
    first_weights(tmp_path / "stored", folder, None, student_init=None, **one_shot)
    assert curriculum_of(tmp_path / "stored").student_init == "teacher"


def test_a_student_of_another_shape_has_no_stored_weights(extracted: Extracted, tmp_path: Path) -> None:
    folder, other = extracted(**ONE_SHOT), "layers=1,hidden_size=16"
    message = (
        "has no weights from the teacher for this student: extract with --student_init teacher and this student, or"
    )
    with pytest.raises(UserError, match=message):
        first_weights(tmp_path / "run", folder, other, student_init="teacher")
    first_weights(tmp_path / "random", folder, other, student_init=None)
    assert curriculum_of(tmp_path / "random").student_init == "random"


@pytest.mark.parametrize("init", [None, "teacher"])
def test_residual_targets_are_for_the_student_that_they_were_extracted_for(
    extracted: Extracted, tmp_path: Path, init: str | None
) -> None:
    """Also where the width fits: random weights would be reported as the teacher's."""
    folder = extracted(**JOINT)
    message = "has no weights from the teacher for this student: leave the student out, or extract again for this one"
    with pytest.raises(UserError, match=message):
        first_weights(tmp_path / "run", folder, "layers=1,hidden_size=16", student_init=init)


def test_residual_targets_are_refused_for_a_model_with_other_weights(extracted: Extracted, tmp_path: Path) -> None:
    folder = extracted(**JOINT)
    args = settings(tmp_path / "run", None, curriculum_dir=str(folder), student_init=None, learning_rate=0.0)
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder / "student"))
    with pytest.raises(UserError, match=r"this model has others: give the folder '.*student' as the student"):
        CurriculumTrainer(model, args=args)
    trainer = CurriculumTrainer(str(folder / "student"), args=args)
    trainer.train()
    assert equal(load_file(folder / "student" / "model.safetensors"), trainer.model.state_dict())


def test_a_student_with_weights_of_its_own_keeps_them(extracted: Extracted, tmp_path: Path) -> None:
    folder = extracted(**JOINT)
    train(tmp_path / "first", folder, RunOptions(), student_init=None)
    own = load_file(tmp_path / "first" / "model.safetensors")
    with pytest.warns(UserWarning, match="learn from these targets only if they come from the start that is stored in"):
        kept = first_weights(tmp_path / "second", folder, str(tmp_path / "first"), student_init=None)
    assert equal(own, kept)
    assert "| Student starts from | its own weights" in (tmp_path / "second" / "README.md").read_text()


def test_inspect_and_the_card_say_how_the_student_starts(extracted: Extracted, tmp_path: Path) -> None:
    folder = extracted(**JOINT)
    described = describe_extraction("C", ExtractedCurriculum(folder).manifest)
    train(tmp_path / "run", folder, RunOptions(), student_init=None)
    card = (tmp_path / "run" / "README.md").read_text()
    assert "its teacher's weights (student_init=teacher), residual basis pca |" in card
    assert "| Hidden stages | projection residual, warm start none, hidden weight 3 |" in card
    assert f"method:               joint\nfor:                  {STUDENT}, from its teacher's weights\n" in described


def test_the_students_files_have_checksums(extracted: Extracted) -> None:
    folder = extracted(**JOINT)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert {"student/config.json", "student/model.safetensors"} <= files.keys()
    weights = folder / "student" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"student/model\.safetensors of .* is damaged"):
        ExtractedCurriculum(folder)


@pytest.mark.parametrize(
    ("place", "name"), [(job.ExtractionJob, "_prepare_maps"), (ShardWriter, "write"), (job.ExtractionJob, "finish")]
)
def test_an_extraction_that_is_interrupted_after_the_student_was_written_resumes(
    extracted: Extracted,
    corpus: Path,
    causal_teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: Any,
    name: str,
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    def run() -> None:
        how = ExtractOptions(dtype="float32", shard_tokens=200)
        extract(texts(corpus), settings(tmp_path / "cut", causal_teacher, **JOINT), how, log=lambda line: None)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            run()
    assert (tmp_path / "cut" / "student" / "model.safetensors").is_file()
    run()
    whole = extracted("whole", **JOINT)
    assert files_of(tmp_path / "cut") == files_of(whole)
    student = "student/model.safetensors"
    assert (tmp_path / "cut" / student).read_bytes() == (whole / student).read_bytes()


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"projection_dim": 24}, "but projection_dim=24 is for students of other widths than its 16: leave one"),
        (
            {"projection_dim": 16, "stages": ["2", "4"], "run": {"student": None}},
            "but stages are for students of several shapes: leave one of them out",
        ),
    ],
)
def test_an_extraction_for_students_that_are_not_known_starts_none_from_the_teacher(
    extracted: Extracted, tmp_path: Path, caplog: pytest.LogCaptureFixture, stored: dict[str, Any], message: str
) -> None:
    folder = extracted(student_init=None, **stored)
    assert "The extraction is for students that start from random weights: " in caplog.text
    described = describe_extraction("C", ExtractedCurriculum(folder).manifest)
    assert f"for:                  students up to width {stored['projection_dim']}, from random weights" in described
    assert ExtractedCurriculum(folder).curriculum.student_init == "random"
    train(tmp_path / "run", folder, RunOptions(student="layers=2,hidden_size=8"), student_init=None)
    with pytest.raises(UserError, match=f"student_init='teacher' stores the first weights of one student, {message}"):
        extracted("refused", student_init="teacher", **stored)


def test_a_started_student_is_evaluated_as_any_other(
    extracted: Extracted, corpus: Path, causal_teacher: Path, tmp_path: Path
) -> None:
    folder = extracted(**JOINT)
    result = train(tmp_path / "run", folder, RunOptions(), student_init=None)
    text = {"dataset": str(corpus / "text.txt"), "teacher": str(causal_teacher), "max_length": 16, "max_samples": 4}
    measured = evaluate(EvaluateOptions(model=str(tmp_path / "run"), **text))
    assert measured.metrics.keys() >= {"loss", "kl", "agreement"}
    assert measured.metrics["parameters"] == result.student.parameters


def test_a_card_says_what_a_student_without_hidden_stages_began_with() -> None:
    rows = [
        _hidden_row(one_shot(1, warm_start=start, projection="pca"))
        for start in ("none", "embedding", "head+embedding")
    ]
    found = "| Warm start | projection pca, normalize standardize, warm start head+embedding |\n"
    assert rows == ["", "| Warm start | embedding |\n", found]
