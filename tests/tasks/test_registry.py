"""Finding the task of a model, and building models for a task."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MPNetConfig,
    PreTrainedConfig,
    RobertaConfig,
    T5Config,
)

from tests.conftest import CLASSES, bert_config, llama_config
from tutelage.core.inputs import usable_positions
from tutelage.tasks.embedding import EmbeddingModel
from tutelage.tasks.registry import TASKS, detect_task, get_task

TINY_GPT2 = GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=1)


def test_task_of_a_model() -> None:
    assert detect_task(LlamaForCausalLM(llama_config())).name == "causal_lm"
    assert detect_task(GPT2LMHeadModel(TINY_GPT2)).name == "causal_lm"
    assert detect_task(BertForMaskedLM(bert_config())).name == "masked_lm"
    assert detect_task(BertForSequenceClassification(bert_config())).name == "sequence_classification"
    assert detect_task(EmbeddingModel(BertModel(bert_config()))).name == "embedding"


def test_task_of_a_subclass() -> None:
    class Mine(LlamaForCausalLM):
        pass

    assert detect_task(Mine(llama_config())).name == "causal_lm"


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("LlamaForCausalLM", "causal_lm"),
        ("GPT2LMHeadModel", "causal_lm"),
        ("BertForMaskedLM", "masked_lm"),
        ("BertForSequenceClassification", "sequence_classification"),
        ("BertModel", "embedding"),
    ],
)
def test_task_of_a_config(architecture: str, task: str) -> None:
    assert detect_task(PreTrainedConfig(architectures=[architecture])).name == task


def test_task_of_a_folder(
    causal_teacher: Path, mlm_teacher: Path, classifier_teacher: Path, embedding_teacher: Path
) -> None:
    folders = (causal_teacher, mlm_teacher, classifier_teacher, embedding_teacher)
    assert [detect_task(str(folder)).name for folder in folders] == [name for name in TASKS if name != "classification"]


def test_sentence_transformers_files_decide(tmp_path: Path, mlm_teacher: Path) -> None:
    (tmp_path / "config.json").write_text((mlm_teacher / "config.json").read_text())
    assert detect_task(str(tmp_path)).name == "masked_lm"
    (tmp_path / "modules.json").write_text("[]")
    assert detect_task(str(tmp_path)).name == "embedding"


def test_no_known_head() -> None:
    for unknown in (BertForTokenClassification(bert_config()), BertModel(bert_config())):
        with pytest.raises(ValueError, match=f"cannot tell the task of {type(unknown).__name__}: set task to one of"):
            detect_task(unknown)
    with pytest.raises(ValueError, match="cannot tell the task of this model: set task to one of causal_lm"):
        detect_task(llama_config())
    with pytest.raises(ValueError, match="unknown task 'translation': use one of causal_lm, masked_lm"):
        get_task("translation")


@pytest.mark.parametrize("name", [name for name in TASKS if name != "classification"])
def test_a_loaded_model_is_of_its_task(name: str, request: pytest.FixtureRequest) -> None:
    fixture = {"masked_lm": "mlm", "causal_lm": "causal", "sequence_classification": "classifier"}.get(name, name)
    model = TASKS[name].load(str(request.getfixturevalue(f"{fixture}_teacher")))
    assert detect_task(model) is TASKS[name]


def test_a_classifier_has_the_configs_classes() -> None:
    model = TASKS["sequence_classification"].build(bert_config(num_labels=CLASSES))
    assert model.classifier.out_features == CLASSES


def test_an_encoder_takes_pooling_and_width_from_the_teacher() -> None:
    encoder = AutoModel.from_config(bert_config())
    teacher = EmbeddingModel(encoder, embedding_size=24, pooling="cls", normalize=False)
    task = TASKS["embedding"]
    student = task.build(bert_config(hidden_size=16), task.teacher_shape(teacher))
    assert isinstance(student, EmbeddingModel)
    assert (student.pooling, student.normalize, student.embedding_size) == ("cls", False, 24)
    headless = task.build(bert_config(hidden_size=16))
    assert headless.head is None
    assert task.backbone(student) is student.encoder


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        (bert_config(), 64),
        (TINY_GPT2, 1024),
        (RobertaConfig(max_position_embeddings=34, pad_token_id=1), 32),
        (MPNetConfig(max_position_embeddings=34, pad_token_id=1), 32),
        (T5Config(), None),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_longest_sequence(config: PreTrainedConfig, positions: int | None) -> None:
    assert usable_positions(config) == positions
    if config.model_type in ("roberta", "mpnet"):
        small = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        config.update({**small, "intermediate_size": 8})
        model = AutoModel.from_config(config).eval()
        model(input_ids=torch.full((1, 32), 5))
        with pytest.raises((IndexError, RuntimeError), match="out of"):
            model(input_ids=torch.full((1, 33), 5))
