"""What a user of `transformers.Trainer` takes for granted, and mistakes that would otherwise pass in silence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import BertForSequenceClassification, BertModel, Trainer, TrainerCallback, TrainingArguments

from tests.conftest import bert_config, save_llama, sentences
from tests.training.conftest import VOCAB, llama, token_rows
from tutelage import CurriculumConfig, CurriculumTrainer
from tutelage.core.blocks import FINAL
from tutelage.core.curriculum import HiddenStage
from tutelage.tasks.embedding import EmbeddingModel
from tutelage.tasks.loading import load_tokenizer
from tutelage.tasks.collators import CausalCollator
from tutelage.training.records import last_complete_checkpoint
from tutelage.training.trainer import TrainingDiverged

Make = Callable[..., CurriculumTrainer]


def weights(trainer: CurriculumTrainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


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


def test_resuming_a_finished_run_trains_nothing(make_trainer: Make) -> None:
    settings = {"save_strategy": "steps", "save_steps": 4, "lr_scheduler_type": "constant"}
    first = make_trainer(**settings)
    first.train()
    again = make_trainer(**settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 8
    for name, value in weights(again).items():
        assert torch.equal(value, weights(first)[name]), name
    again.evaluate()


def test_weights_that_break_in_the_last_step_stop_the_run(make_trainer: Make) -> None:
    class Poison(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 7:
                kwargs["model"].lm_head.weight.grad.fill_(float("nan"))

    trainer = make_trainer(method="one_shot", max_grad_norm=0.0, callbacks=[Poison()])
    with pytest.raises(TrainingDiverged, match="a weight is not finite"):
        trainer.train()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"learning_rate": 2e-2}, "learning rate"),
        ({"per_device_train_batch_size": 2}, "batch size"),
        ({"teacher_model": llama(4, 24, seed=5)}, "teacher"),
        ({"train_dataset": token_rows(seed=4)}, "data"),
        ({"seed": 7}, "seed"),
    ],
)
def test_resuming_as_another_run_is_refused(make_trainer: Make, change: dict[str, Any], what: str) -> None:
    settings = {"save_strategy": "steps", "save_steps": 4}
    make_trainer(**settings).train()
    with pytest.raises(ValueError, match=f"of a run with another {what}: resume with what it began with"):
        make_trainer(**settings, **change).train(resume_from_checkpoint=True)


def test_resuming_from_the_checkpoint_of_another_curriculum_is_refused(make_trainer: Make, tmp_path: Path) -> None:
    make_trainer("one", save_strategy="steps", save_steps=4).train()
    other = make_trainer("two", layer_map="1:2", max_steps=12)
    with pytest.raises(ValueError, match="another curriculum"):
        other.train(resume_from_checkpoint=str(last_complete_checkpoint(tmp_path / "one")))


def test_a_finished_teacher_measures_progressive(make_trainer: Make, tmp_path: Path) -> None:
    """Metrics against the teacher are against the finished one, whichever checkpoint a stage learns from."""
    checkpoint = tmp_path / "early"
    llama(4, 24, seed=8).save_pretrained(checkpoint)
    trainer = make_trainer(
        method="progressive",
        teacher_checkpoints=[str(checkpoint)],
        eval_strategy="steps",
        eval_steps=2,
        eval_with_teacher=True,
    )
    trainer.train()
    losses = {record["eval_teacher_loss"] for record in trainer.metrics_file.read() if "eval_teacher_loss" in record}
    assert len(losses) == 1


def test_a_collator_is_found_from_the_task(causal_teacher: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(causal_teacher))
    rows = Dataset.from_dict({"input_ids": tokenizer(sentences(12))["input_ids"]})  # type: ignore[index]
    trainer = CurriculumTrainer(
        model=str(causal_teacher),
        teacher_model=str(causal_teacher),
        args=CurriculumConfig(output_dir=str(tmp_path / "o"), max_steps=2, use_cpu=True, save_strategy="no"),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
    )
    assert trainer.evaluate()["eval_loss"] > 0


def test_rows_padded_before_keep_their_mask() -> None:
    rows = [
        {"input_ids": [5, 6, 0, 0], "attention_mask": [1, 1, 0, 0]},
        {"input_ids": [7, 8, 9, 0], "attention_mask": [1, 1, 1, 0]},
    ]
    batch = CausalCollator(0)(rows)
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 0]]
    assert batch["labels"].tolist() == [[5, 6, -100, -100], [7, 8, 9, -100]]


def test_the_best_encoder_is_loaded_at_the_end(embedding_teacher: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    student = EmbeddingModel(BertModel(bert_config(num_hidden_layers=1)), embedding_size=32)
    ids = Dataset.from_dict({"input_ids": [[2, 7 + i % 9, 9, 3] for i in range(16)], "attention_mask": [[1] * 4] * 16})
    args = CurriculumConfig(
        output_dir=str(tmp_path / "o"),
        method="one_shot",
        max_steps=4,
        learning_rate=1.0,  # the first checkpoint is the best
        per_device_train_batch_size=4,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="cosine",
        greater_is_better=True,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
    )
    trainer = CurriculumTrainer(student, str(embedding_teacher), args, ids, ids, load_tokenizer(str(embedding_teacher)))
    trainer.train()
    best = max(record["eval_cosine"] for record in trainer.metrics_file.read() if "eval_cosine" in record)
    assert trainer.evaluate()["eval_cosine"] == pytest.approx(best, abs=1e-6)


def test_settings_that_a_method_does_not_read_are_named(make_trainer: Make) -> None:
    with pytest.warns(UserWarning, match="method 'one_shot' does not read num_stages, projection"):
        make_trainer(method="one_shot", num_stages=1, projection="pca")


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


@pytest.mark.parametrize("fields", [{"num_labels": 1}, {"num_labels": 3, "problem_type": "multi_label_classification"}])
def test_only_single_choice_classifiers_are_distilled(tmp_path: Path, fields: dict[str, Any]) -> None:
    def model() -> BertForSequenceClassification:
        return BertForSequenceClassification(bert_config(num_hidden_layers=2, **fields))

    rows = Dataset.from_dict({"input_ids": [[2, 7, 3]] * 8, "labels": [0] * 8})
    args = CurriculumConfig(output_dir=str(tmp_path / "o"), max_steps=2, use_cpu=True)
    with pytest.raises(ValueError, match="only classification into one of two or more classes"):
        CurriculumTrainer(model(), model(), args, rows)


def test_classifiers_get_the_papers_stages_by_default(classifier_teacher: Path, tmp_path: Path) -> None:
    rows = Dataset.from_dict({"input_ids": [[2, 7, 3]] * 8, "labels": [0] * 8})
    args = CurriculumConfig(output_dir=str(tmp_path / "o"), max_steps=8, use_cpu=True)
    student = BertForSequenceClassification(bert_config(num_hidden_layers=2, num_labels=3))
    trainer = CurriculumTrainer(student, str(classifier_teacher), args, rows)
    assert trainer.curriculum.warm_start == "none"
    assert [stage.student_place for stage in trainer.curriculum.stages if isinstance(stage, HiddenStage)] == [1, 2]
    assert FINAL not in [stage.teacher_place for stage in trainer.curriculum.hidden_stages]


def test_labels_alone_teach_no_encoder(tmp_path: Path) -> None:
    args = CurriculumConfig(output_dir=str(tmp_path / "o"), method="scratch", max_steps=2, use_cpu=True)
    with pytest.raises(ValueError, match="no labels to learn from"):
        CurriculumTrainer(EmbeddingModel(BertModel(bert_config())), None, args, token_rows())


def test_two_folders_with_different_tokenizers_are_refused(causal_teacher: Path, tmp_path: Path) -> None:
    from tests.conftest import WORDS, make_tokenizer

    other = save_llama(tmp_path / "other")
    make_tokenizer(words=tuple(reversed(WORDS))).save_pretrained(other)
    args = CurriculumConfig(output_dir=str(tmp_path / "o"), max_steps=2, use_cpu=True)
    with pytest.raises(ValueError, match="different tokenizers"):
        CurriculumTrainer(str(other), str(causal_teacher), args, token_rows())


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # peft's own
def test_an_adapter_student_trains(make_trainer: Make) -> None:
    peft = pytest.importorskip("peft")
    base = llama(2, 16, seed=2)
    student = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    trainer = make_trainer(student=student)
    before = weights(trainer)
    trainer.train()
    changed = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)


def test_a_collator_that_draws_draws_the_same_at_every_evaluation(make_trainer: Make) -> None:
    def dropping(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = CausalCollator()(rows)
        batch["labels"][torch.rand(batch["labels"].shape) < 0.5] = -100
        return batch

    trainer = make_trainer()
    trainer.data_collator = dropping
    before = torch.get_rng_state()
    first = trainer.evaluate()["eval_loss"]
    assert torch.equal(torch.get_rng_state(), before)  # training's own draws go on as if nothing had been evaluated
    torch.rand(3)
    assert trainer.evaluate()["eval_loss"] == first


def test_top_k_is_the_output_loss_of_a_run(make_trainer: Make) -> None:
    losses = {}
    for top_k in (None, 3, VOCAB):
        trainer = make_trainer(f"k{top_k}", method="one_shot", max_steps=1, top_k=top_k)
        trainer.train()
        losses[top_k] = trainer.metrics_file.read()[0]["loss"]
    assert losses[3] < losses[None]
    assert losses[VOCAB] == pytest.approx(losses[None], rel=1e-5)
    with pytest.raises(ValueError, match="top_k must be at least 1"):
        make_trainer("k0", method="one_shot", top_k=0)
