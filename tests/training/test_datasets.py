"""Every kind of dataset that `transformers.Trainer` documents, and what is read of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, List, Value
from safetensors.torch import load_file
from torch import nn
from torch.utils import data as torch_data
from transformers import BertForSequenceClassification, BertModel, TrainingArguments

from tests.conftest import CLASSES, bert_config, make_tokenizer
from tests.launch import launch
from tests.training.conftest import LENGTH, VOCAB, llama, token_rows
from tutelage import CurriculumConfig, CurriculumTrainer
from tutelage.core.errors import UserError
from tutelage.targets.identity import data_fingerprint
from tutelage.tasks.embedding import EmbeddingModel
from tutelage.tasks.language import CausalCollator
from tutelage.training.checks import check_recomputing
from tutelage.training.records import MetricsFile


def make(output: Path, train: Any, evaluation: Any = None, **settings: Any) -> CurriculumTrainer:
    """A 2-block student under a 4-block teacher; rows are read in their order."""
    names = ("compute_metrics", "preprocess_logits_for_metrics", "model", "teacher_model", "processing_class")
    given = {name: settings.pop(name) for name in names if name in settings}
    defaults = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "calibration_samples": 8,
        "layer_map": "1:2",
        "stage_steps": [3],
        "train_sampling_strategy": "sequential",
        "report_to": "none",
    }
    args = CurriculumConfig(output_dir=str(output), **{**defaults, **settings})
    given = {"model": llama(2, 16, seed=2), "teacher_model": llama(4, 24, seed=1), **given}
    collator = None if "processing_class" in given else CausalCollator()
    return CurriculumTrainer(args=args, train_dataset=train, eval_dataset=evaluation, data_collator=collator, **given)


class Listed(torch_data.Dataset[Any]):
    """A dataset of one's own, which counts how often a row is read."""

    def __init__(self, rows: list[dict[str, Any]]):
        self.rows, self.reads = rows, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.reads += 1
        return self.rows[index]


class Stream(torch_data.IterableDataset[Any]):
    """Rows that can only be iterated."""

    def __init__(self, rows: Any):
        self.rows, self.reads = rows, 0

    def __iter__(self) -> Iterator[Any]:
        for row in self.rows:
            self.reads += 1
            yield row


# ---- What is read ----


def test_few_rows_of_a_custom_dataset_are_read_before_and_during_two_steps(tmp_path: Path) -> None:
    train, evaluation = (Listed([{"input_ids": list(range(1, 9))} for _ in range(5000)]) for _ in range(2))
    trainer = make(tmp_path / "run", train, evaluation, max_steps=2, stage_steps=[1])
    assert train.reads < 80 and evaluation.reads < 80
    trainer.train()
    assert train.reads < 80 + 8 + 2 * 4 + 20  # the calibration, two batches, an example of each stage and the identity


def test_the_first_rows_of_a_stream_are_read_once_for_all_that_looks_at_them(tmp_path: Path) -> None:
    train = Stream(token_rows(100))
    trainer = make(tmp_path / "run", train, max_steps=2, stage_steps=[1])
    assert train.reads == 1
    trainer.train()
    assert train.reads == 1 + 8 + 3 * 4  # the loader reads one batch ahead


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [1, VOCAB]}, f"has the token id {VOCAB}, but ids are from 0 to {VOCAB - 1}: tokenise"),
        ({"input_ids": [1, -1]}, "has the token id -1, but ids are from 0"),
        ({"input_ids": [1] * 33}, "has a sequence of 33 tokens, the model has 32 positions: lower max_length"),
        ({"input_ids": [1, 2], "labels": [1, VOCAB]}, f"has the label {VOCAB}, but the model has the classes 0 to 60"),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_rows_that_do_not_fit_are_named_when_they_are_used(
    tmp_path: Path, row: dict[str, Any], message: str, streamed: bool
) -> None:
    rows = [{"input_ids": [1, 2], **({"labels": [1, 2]} if "labels" in row else {})} for _ in range(200)]
    rows[1] = row
    trainer = make(tmp_path / "run", Stream(rows) if streamed else Listed(rows))
    with pytest.raises(UserError, match=f"a batch of the data {message}"):
        next(iter(trainer.get_train_dataloader()))


def test_a_class_that_the_model_lacks_is_named_when_it_is_used(tmp_path: Path) -> None:
    rows = [{"input_ids": [2, 7, 3], "labels": 0} for _ in range(200)]
    rows[1] = {**rows[1], "labels": CLASSES}
    models = [BertForSequenceClassification(bert_config(num_labels=CLASSES)) for _ in range(2)]
    given = {"model": models[0], "teacher_model": models[1], "processing_class": make_tokenizer(encoder=True)}
    trainer = make(tmp_path / "run", Listed(rows), **given)
    with pytest.raises(UserError, match="a batch of the data has the label 3, but the model has the classes 0 to 2"):
        next(iter(trainer.get_train_dataloader()))


@pytest.mark.parametrize("kind", ["uint8", "uint16", "uint32", "int64"])
def test_labels_of_every_kind_of_number_are_checked(tmp_path: Path, kind: str) -> None:
    features = Features({"input_ids": List(Value("int32")), "labels": Value(kind)})
    rows = Dataset.from_dict({"input_ids": [[2, 7, 3]] * 8, "labels": [0, 1, 2, 3, None, 0, 0, 0]}, features)
    models = [BertForSequenceClassification(bert_config(num_labels=CLASSES)) for _ in range(2)]
    with pytest.raises(UserError, match="the training dataset has the label 3, but the model has the classes 0 to 2"):
        make(tmp_path / "run", rows, model=models[0], teacher_model=models[1])


def test_rows_of_several_sequences_may_be_longer_than_a_sequence(tmp_path: Path) -> None:
    collator = make(tmp_path / "run", token_rows()).data_collator
    for inner, message in (({"position_ids": torch.arange(40)[None] % 20}, None), ({}, "a sequence of 40 tokens")):
        checked = dataclasses.replace(
            collator, collator=lambda _, inner=inner: {"input_ids": torch.ones(1, 40, dtype=torch.long), **inner}
        )
        if message is None:
            checked([])
        else:
            with pytest.raises(UserError, match=message):
                checked([])


def test_rows_that_are_tokenised_as_they_are_read(tmp_path: Path) -> None:
    texts = Dataset.from_dict({"text": ["abc", "defg"] * 8})
    rows = texts.with_transform(lambda batch: {"input_ids": [[ord(c) - 96 for c in t] for t in batch["text"]]})
    trainer = make(tmp_path / "run", rows, remove_unused_columns=False)
    trainer.train()
    wrong = texts.with_transform(lambda batch: {"input_ids": [[ord(c) for c in t] for t in batch["text"]]})
    with pytest.raises(UserError, match="the training dataset has the token id 103"):
        make(tmp_path / "other", wrong, remove_unused_columns=False)


def test_only_datasets_that_can_be_read_whole_are_compared_with_an_extracted_curriculum() -> None:
    rows = Listed([{"input_ids": [1]}])
    with pytest.raises(UserError, match="the data is a Listed, which cannot be compared with that of an extracted"):
        data_fingerprint(rows)
    assert rows.reads == 0


# ---- Streams ----


def stream_of(kind: str, rows: Dataset) -> Any:
    return rows.to_iterable_dataset() if kind == "datasets" else Stream(rows)


def weights(trainer: CurriculumTrainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


@pytest.mark.parametrize("kind", ["datasets", "torch"])
def test_a_stream_trains_and_evaluates_as_the_same_rows_in_memory(tmp_path: Path, kind: str) -> None:
    rows, held_out = token_rows(40, ragged=True), token_rows(7, seed=9)
    settings = {"eval_strategy": "steps", "eval_steps": 3, "eval_with_teacher": True}
    settings |= {"gradient_accumulation_steps": 2, "per_device_eval_batch_size": 3}
    one = make(tmp_path / "one", rows, held_out, **settings)
    two = make(tmp_path / "two", stream_of(kind, rows), stream_of(kind, held_out), **settings)
    one.train()
    two.train()
    assert all(torch.equal(value, weights(one)[name]) for name, value in weights(two).items())
    ignored = {"seconds", "epoch", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
    left, right = (
        [{name: value for name, value in record.items() if name not in ignored} for record in t.metrics_file.read()]
        for t in (one, two)
    )
    assert left[:-1] == right[:-1]  # the last one says how fast it was
    metrics = two.evaluate()
    assert metrics["eval_samples_per_second"] * metrics["eval_runtime"] == pytest.approx(7, rel=0.2)


@pytest.mark.parametrize("kind", ["datasets", "torch"])
def test_a_streamed_run_is_resumed(tmp_path: Path, kind: str) -> None:
    settings = {"save_strategy": "steps", "save_steps": 4}
    rows = token_rows(40)
    whole = make(tmp_path / "run", stream_of(kind, rows), **settings)
    whole.train()
    again = make(tmp_path / "run", stream_of(kind, rows), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(again).items())
    with pytest.raises(UserError, match="was created with a different data"):
        make(tmp_path / "run", rows, **settings).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))


def streamed_in_processes(output: Path) -> None:
    for dispatch in (True, False):
        settings = {"accelerator_config": {"dispatch_batches": dispatch}, "optim": "sgd", "eval_with_teacher": True}
        streams = Stream(token_rows(40, ragged=not dispatch)), Stream(token_rows(8, seed=9))
        trainer = make(output / str(dispatch), *streams, **settings)
        trainer.train()
        trainer.evaluate()
        trainer.save_model()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_share_a_stream(tmp_path: Path) -> None:
    """The first one reads all of it, as by default, or each reads its part, which rows of different lengths need."""
    launch(2, streamed_in_processes, tmp_path / "two")
    settings = {"optim": "sgd", "per_device_train_batch_size": 8, "eval_with_teacher": True}
    for dispatch in (True, False):
        one = make(tmp_path / str(dispatch), token_rows(40, ragged=not dispatch), token_rows(8, seed=9), **settings)
        one.train()
        expected = one.evaluate()
        found = load_file(tmp_path / "two" / str(dispatch) / "model.safetensors")
        for name, value in found.items():
            torch.testing.assert_close(value, weights(one)[name], rtol=1e-5, atol=1e-6)
        last = MetricsFile(tmp_path / "two" / str(dispatch) / "metrics.jsonl").read()[-1]
        for name in ("eval_loss", "eval_kl"):
            assert last[name] == pytest.approx(expected[name], rel=1e-4)


def test_a_stream_without_a_budget_or_without_rows(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the budget is unknown: set max_steps"):
        make(tmp_path / "run", Stream(token_rows()), max_steps=-1)
    with pytest.raises(UserError, match="the training dataset is empty"):
        make(tmp_path / "run", Stream([]))


# ---- Evaluation ----


def test_several_evaluation_datasets_have_their_own_metrics(tmp_path: Path) -> None:
    parts = {"near": token_rows(8, seed=9), "far": Stream(token_rows(6, seed=10))}
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "far_accuracy", "greater_is_better": True}
    trainer = make(tmp_path / "run", token_rows(), parts, **settings)
    trainer.train()
    metrics = trainer.evaluate()
    for name, part in parts.items():
        assert trainer.evaluate(part, metric_key_prefix="x")["x_loss"] == metrics[f"eval_{name}_loss"]
    logged = [record["eval_far_accuracy"] for record in trainer.metrics_file.read() if "eval_far_accuracy" in record]
    assert len(logged) == 4 and metrics["eval_far_accuracy"] == trainer.state.best_metric == max(logged)


@pytest.mark.parametrize(
    ("train", "evaluation", "message"),
    [
        (
            [{"input_ids": [1]}],
            {"a": Dataset.from_dict({"input_ids": [[99]]})},
            r"the evaluation \(a\) dataset has the",
        ),
        (
            [{"input_ids": [1]}],
            {"a": Dataset.from_dict({"x": [1]})},
            r"evaluation \(a\) dataset has no column 'input_id",
        ),
        ([{"input_ids": [1]}], {}, "the evaluation dataset is empty"),
        ({"a": [{"input_ids": [1]}]}, None, r"the training dataset is a dictionary of several \(a\): pass one of them"),
    ],
)
def test_dictionaries_of_datasets_are_checked(tmp_path: Path, train: Any, evaluation: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(tmp_path / "run", train, evaluation)


def test_logits_are_reduced_before_metrics(tmp_path: Path) -> None:
    seen = []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction.predictions.shape)
        right = prediction.predictions[:, :-1] == prediction.label_ids[:, 1:]
        return {"mine": float(right.mean())}

    def choose(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return logits.argmax(-1)

    trainer = make(
        tmp_path / "run",
        token_rows(),
        token_rows(8, seed=9),
        compute_metrics=metrics,
        preprocess_logits_for_metrics=choose,
    )
    found = trainer.evaluate()
    assert seen == [(8, LENGTH)] and found["eval_mine"] == pytest.approx(found["eval_accuracy"])


# ---- Gradient checkpointing ----

FIELDS = {field.name for field in dataclasses.fields(TrainingArguments)}
# named anew in the course of transformers 5
RECOMPUTING = "activation_checkpointing" if "activation_checkpointing" in FIELDS else "gradient_checkpointing"


def test_sentence_encoders_train_with_gradient_checkpointing(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"input_ids": [[2, 7 + i % 9, 9, 3] for i in range(24)], "attention_mask": [[1] * 4] * 24})
    trained, runs = [], []
    for recomputing in (False, True):
        torch.manual_seed(0)
        plain = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        teacher = EmbeddingModel(BertModel(bert_config()))
        student = EmbeddingModel(BertModel(bert_config(num_hidden_layers=2, **plain)))
        counted = runs.append
        student.encoder.encoder.layer[0].attention.register_forward_hook(lambda *_, count=counted: count(0))
        given = {"model": student, "teacher_model": teacher, "processing_class": make_tokenizer(encoder=True)}
        trainer = make(tmp_path / str(recomputing), rows, **given, **{RECOMPUTING: recomputing})
        trainer.train()
        trained.append(weights(trainer))
        runs.append(1)
    for name, value in trained[0].items():
        torch.testing.assert_close(trained[1][name], value, rtol=0, atol=0)
    once = runs.index(1)
    assert len(runs) - once - 2 >= once + 6  # a second forward in every step


def test_gradient_checkpointing_is_refused_where_the_student_has_none(tmp_path: Path) -> None:
    class Plain(nn.Module):
        pass

    check_recomputing(Plain(), False)
    with pytest.raises(UserError, match="gradient_checkpointing cannot work: Plain has no gradient_checkpointing_ena"):
        check_recomputing(Plain(), True)
