"""Settings that an extraction, or a run from an extracted curriculum, cannot have."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import WORDS, make_tokenizer, save_llama
from tests.runs.conftest import STUDENT, texts, train
from tutelage.core.curriculum import Curriculum
from tutelage.runs.inputs import RunOptions
from tutelage.targets.folder import ExtractedCurriculum


@pytest.mark.parametrize(
    ("fields", "student", "message"),
    [
        ({}, "layers=2,hidden_size=24", "has projections of width 16, but the student has width 24"),
        (
            {"layer_map": "1:3,final:final"},
            STUDENT,
            "does not hold the stage 'hidden 1:3': it has teacher places final, output",
        ),
        (
            {"projection_seed": 4},
            STUDENT,
            "was made with projection_seed=0, but projection_seed=4 was given: leave projection_seed out",
        ),
        ({"top_k": 5}, STUDENT, "was made with top_k=64, but top_k=5 was given"),
        ({"temperature": 2.0}, STUDENT, "was made with temperature=1.0, but temperature=2.0 was given"),
        ({"method": "progressive"}, STUDENT, "method 'progressive' does not train from an extracted curriculum"),
        ({"method": "scratch"}, STUDENT, "method 'scratch' does not train from an extracted curriculum"),
        ({"warm_start": "head+embedding"}, STUDENT, "needs the teacher's embedding"),
        ({"method": "one_shot", "warm_start": "head"}, STUDENT, "'head' without a hidden stage needs the teacher"),
        ({"task": "masked_lm"}, STUDENT, "is for task causal_lm, not masked_lm"),
        ({"projection": "learned"}, STUDENT, "'learned' needs the teacher's own states, .* or leave projection out"),
        ({"output_positions": "all"}, STUDENT, "'all' needs the teacher's outputs at positions without a label"),
        ({"output_loss": "mse"}, STUDENT, "'mse' needs all logits of the teacher, .* or leave output_loss out"),
    ],
)
def test_settings_that_the_curriculum_does_not_contain_are_refused(
    extracted: Callable[..., Path], tmp_path: Path, fields: dict[str, Any], student: str, message: str
) -> None:
    folder = extracted()
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "student", folder, RunOptions(student=student), **fields)


@pytest.mark.parametrize(
    ("made", "given"),
    [
        ({"temperature": 2.0}, {"temperature": 1.0}),
        ({"normalize": "none"}, {"normalize": "standardize"}),
        ({"projection": "rademacher"}, {"projection": "gaussian"}),
        ({"projection_seed": 3}, {"projection_seed": 0}),
        ({}, {"calibration_samples": 64}),
    ],
)
def test_an_explicit_default_that_contradicts_the_curriculum_is_refused(
    extracted: Callable[..., Path], tmp_path: Path, made: dict[str, Any], given: dict[str, Any]
) -> None:
    """None means not given; a default that is given is a setting like any other."""
    ((name, value),) = given.items()
    folder = extracted(warm_start="none", **made)
    with pytest.raises(ValueError, match=f"was made with {name}=.*, but {name}={value} was given: leave {name} out"):
        train(tmp_path / "student", folder, **given)
    train(tmp_path / "student", folder, **{"calibration_samples": None, name: made.get(name)})
    curriculum = Curriculum.from_json((tmp_path / "student" / "curriculum.json").read_text())
    assert {name: getattr(curriculum, name) for name in made} == made


def test_a_budget_in_epochs_is_not_overridden_by_the_curriculum(extracted: Callable[..., Path], tmp_path: Path) -> None:
    folder = extracted()
    assert train(tmp_path / "as-extracted", folder, max_steps=-1).budget.steps == 8
    rows = ExtractedCurriculum(folder).identity.data.rows
    found = train(tmp_path / "epochs", folder, max_steps=-1, num_train_epochs=0.5)
    assert found.budget.steps == math.ceil(0.5 * math.ceil(rows / 4)) != 8


def test_a_transplant_needs_a_stored_output_head(extracted: Callable[..., Path], tmp_path: Path) -> None:
    folder = extracted(layer_map="final:final", warm_start="none")
    with pytest.raises(ValueError, match="contains no output head to start from"):
        train(tmp_path / "student", folder, warm_start="head")
    train(tmp_path / "student", folder)


def test_a_different_teacher_dataset_or_tokenizer_is_refused(
    extracted: Callable[..., Path], corpus: Path, causal_teacher: Path, tmp_path: Path
) -> None:
    folder = extracted()
    train(tmp_path / "same", folder, texts(corpus), teacher=causal_teacher)
    other = save_llama(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="was made from a different teacher"):
        train(tmp_path / "a", folder, teacher=other)
    with pytest.raises(ValueError, match="was made from different data"):
        train(tmp_path / "b", folder, texts(corpus, dataset=str(corpus / "text.txt")))
    with pytest.raises(ValueError, match="was made with max_length=16, but max_length=12 was given"):
        train(tmp_path / "b", folder, texts(corpus, max_length=12))
    student = save_llama(tmp_path / "student", hidden_size=16)
    make_tokenizer(words=tuple(reversed(WORDS))).save_pretrained(student)
    with pytest.raises(ValueError, match="different tokenizers"):
        train(tmp_path / "c", folder, RunOptions(student=str(student)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dtype": "int4"}, "unknown dtype 'int4': use one of int8, float16, float32"),
        ({"shard_tokens": 0}, "shard_tokens must be at least 1"),
        ({"method": "scratch"}, "method 'scratch' reads no finished teacher's states"),
        ({"resume_from_checkpoint": "true"}, "an extraction always continues what is in output_dir"),
        ({"overwrite_output_dir": True}, "an extraction overwrites nothing"),
        ({"label_weight": 0.5}, "label_weight is chosen when a student is trained"),
        ({"hidden_weight": 0.5, "method": "joint"}, "hidden_weight is chosen when a student is trained"),
        ({"layer_map": "1:9"}, "the teacher has blocks 1 to 4"),
        ({"stages": ["1", "9"]}, "the teacher has blocks 1 to 4"),
        ({"stages": ["final", "2"]}, r"each deeper than the one before, final at most as the last.*got final 2"),
        ({"stages": ["2", "2"]}, r"stages must be teacher blocks.*got 2 2"),
        ({"stages": ["0"]}, r"stages must be teacher blocks from 1"),
        ({"projection_dim": 0}, "projection_dim must be a number from 1 to 131072, got 0"),
        ({"projection": "orthogonal", "projection_dim": 1000}, "orthogonal"),
        ({"curriculum_dir": "elsewhere"}, "an extraction runs the teacher: leave curriculum_dir out"),
        ({"stages": ["two"]}, r"stages must be teacher blocks"),
        (
            {"stages": ["2"], "projection_dim": None},
            "`--stages` needs `--projection_dim`: the hidden size of the widest student that you plan to train",
        ),
        ({"stages": ["2"], "run": {}}, "stages and student both say"),
        ({"stages": ["2"], "layer_map": "1:2"}, "stages and layer_map both say"),
        ({"stages": ["2"], "method": "one_shot"}, "method 'one_shot' has no hidden stages"),
        (
            {"method": "joint", "warm_start": "head"},
            "'head' is stored for hidden stages, which method 'joint' does not have",
        ),
        ({"projection": "learned"}, "'learned' needs the teacher's own states, which an extracted curriculum does not"),
        ({"output_positions": "all"}, "'all' needs the teacher's outputs at positions without a label"),
        ({"output_loss": "mse"}, "'mse' needs all logits of the teacher, which an extracted curriculum does not"),
    ],
)
def test_an_extraction_that_cannot_work_is_refused(
    extracted: Callable[..., Path], tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    if "stages" in fields:
        fields = {"run": {"student": None}, "projection_dim": 8, **fields}
    with pytest.raises(ValueError, match=message):
        extracted(**fields)
    assert not (tmp_path / "C").exists()
