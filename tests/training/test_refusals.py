"""Settings and models that no run can have, refused before any compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import BertForSequenceClassification, BertModel

from tests.conftest import bert_config
from tests.training.conftest import llama, token_rows
from tutelage import CurriculumConfig, CurriculumTrainer, UserError
from tutelage.tasks.embedding import EmbeddingModel

Make = Callable[..., CurriculumTrainer]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"teacher_dtype": "float99"}, "unknown teacher_dtype 'float99'"),
        ({"logits_chunk_size": 0}, "logits_chunk_size must be at least 1"),
        ({"temperature": float("nan")}, "temperature must be positive and finite"),
        ({"learning_rate": -1.0}, "learning_rate must be a number from 0 up"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor has no part"),
    ],
)
def test_settings_that_mean_nothing(make_trainer: Make, setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(**setting)


def test_a_student_that_is_its_own_teacher_is_refused(make_trainer: Make) -> None:
    model = llama(2, 16, seed=1)
    with pytest.raises(UserError, match="the student is the teacher: one model cannot be both"):
        make_trainer(student=model, teacher_model=model)


def test_a_student_that_shares_parameters_with_its_teacher_is_refused(make_trainer: Make) -> None:
    student, teacher = llama(2, 16, seed=1), llama(4, 16, seed=2)
    student.set_input_embeddings(teacher.get_input_embeddings())
    with pytest.raises(
        UserError, match=r"student and teacher share model.embed_tokens.weight .of 1 parameters., so that"
    ):
        make_trainer(student=student, teacher_model=teacher)


@pytest.mark.parametrize("fields", [{"num_labels": 1}, {"num_labels": 3, "problem_type": "multi_label_classification"}])
def test_only_single_choice_classifiers_are_distilled(tmp_path: Path, fields: dict[str, Any]) -> None:
    def model() -> BertForSequenceClassification:
        return BertForSequenceClassification(bert_config(num_hidden_layers=2, **fields))

    rows = Dataset.from_dict({"input_ids": [[2, 7, 3]] * 8, "labels": [0] * 8})
    args = CurriculumConfig(output_dir=str(tmp_path / "o"), max_steps=2, use_cpu=True)
    with pytest.raises(ValueError, match="only classification into one of two or more classes"):
        CurriculumTrainer(model(), model(), args, rows)


def classifier(*names: str) -> BertForSequenceClassification:
    fields = {"id2label": dict(enumerate(names))} if names else {"num_labels": 2}
    return BertForSequenceClassification(bert_config(num_hidden_layers=2, **fields))


@pytest.mark.parametrize(
    ("teacher", "student", "refused"),
    [
        (("bad", "good"), ("good", "bad"), "class 0 is 'good' in the student and 'bad' in the teacher"),
        (("bad", "good"), ("bad", "fine"), "class 1 is 'fine' in the student and 'good' in the teacher"),
        (("bad", "good"), ("Bad", "GOOD"), None),
        (("bad", "good"), (), None),  # no names of their own: LABEL_0, LABEL_1
        ((), ("bad", "good"), None),
    ],
)
def test_classes_that_mean_something_else_are_refused(
    tmp_path: Path, teacher: tuple[str, ...], student: tuple[str, ...], refused: str | None
) -> None:
    rows = Dataset.from_dict({"input_ids": [[2, 7, 3]] * 8, "labels": [0] * 8})
    args = CurriculumConfig(output_dir=str(tmp_path / "o"), max_steps=8, use_cpu=True)
    if refused is None:
        CurriculumTrainer(classifier(*student), classifier(*teacher), args, rows)
        return
    with pytest.raises(ValueError, match=refused):
        CurriculumTrainer(classifier(*student), classifier(*teacher), args, rows)


def test_scratch_is_refused_for_sentence_encoders(tmp_path: Path) -> None:
    args = CurriculumConfig(output_dir=str(tmp_path / "o"), method="scratch", max_steps=2, use_cpu=True)
    with pytest.raises(ValueError, match="no labels to learn from"):
        CurriculumTrainer(EmbeddingModel(BertModel(bert_config())), None, args, token_rows())
