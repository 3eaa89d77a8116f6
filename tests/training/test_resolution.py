"""From settings as given to one resolved run: budget, defaults, and what an extracted curriculum decides."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import BertForSequenceClassification, Trainer, TrainingArguments

from tests.conftest import bert_config
from tests.training.conftest import llama, token_rows
from tutelage import CurriculumConfig, CurriculumTrainer
from tutelage.core.blocks import FINAL
from tutelage.core.curriculum import HiddenStage
from tutelage.tasks.collators import CausalCollator

Make = Callable[..., CurriculumTrainer]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("accumulation", "epochs"), [(4, 3), (3, 1.5), (1, 2)])
def test_epochs_give_the_steps_that_transformers_gives(
    make_trainer: Make, tmp_path: Path, accumulation: int, epochs: float, drop_last: bool
) -> None:
    budget = {
        "num_train_epochs": epochs,
        "gradient_accumulation_steps": accumulation,
        "per_device_train_batch_size": 5,
        "dataloader_drop_last": drop_last,
        "use_cpu": True,
        "report_to": "none",
    }
    plain = Trainer(
        llama(2, 16, seed=2),
        TrainingArguments(str(tmp_path / "plain"), **budget),
        train_dataset=token_rows(),
        data_collator=CausalCollator(),
    )
    loader = plain.get_train_dataloader()
    expected = plain.set_initial_training_values(plain.args, loader)[-1]
    trainer = make_trainer(method="one_shot", max_steps=-1, **budget)
    assert trainer.curriculum.total_steps == expected


def test_settings_that_a_method_does_not_read_are_named(make_trainer: Make) -> None:
    with pytest.warns(UserWarning, match="method 'one_shot' does not read num_stages, projection"):
        make_trainer(method="one_shot", num_stages=1, projection="pca")


def test_classifiers_get_the_papers_stages_by_default(classifier_teacher: Path, tmp_path: Path) -> None:
    rows = Dataset.from_dict({"input_ids": [[2, 7, 3]] * 8, "labels": [0] * 8})
    args = CurriculumConfig(output_dir=str(tmp_path / "o"), max_steps=8, use_cpu=True)
    student = BertForSequenceClassification(bert_config(num_hidden_layers=2, num_labels=3))
    trainer = CurriculumTrainer(student, str(classifier_teacher), args, rows)
    assert trainer.curriculum.warm_start == "none"
    assert [stage.student_place for stage in trainer.curriculum.stages if isinstance(stage, HiddenStage)] == [1, 2]
    assert FINAL not in [stage.teacher_place for stage in trainer.curriculum.hidden_stages]
