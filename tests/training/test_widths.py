"""Models whose state before the output head has a width of its own: ELECTRA, RemBERT, ALBERT, OPT with a projection."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    ElectraConfig,
    ElectraForMaskedLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    RemBertConfig,
    RemBertForMaskedLM,
)

from tests.conftest import POSITIONS, VOCAB, make_tokenizer
from tests.training.conftest import token_rows
from tutelage import CurriculumConfig, CurriculumTrainer, ExtractOptions, RunOptions, distill, extract
from tutelage.core.blocks import FINAL
from tutelage.targets.live import LiveTargets
from tutelage.tasks.registry import detect_task


def electra(layers: int, width: int, final: int, **fields: Any) -> PreTrainedModel:
    return ElectraForMaskedLM(ElectraConfig(embedding_size=final, **sizes(layers, width), **fields))


def rembert(layers: int, width: int, final: int) -> PreTrainedModel:
    own = {"input_embedding_size": 12, "output_embedding_size": final}
    return RemBertForMaskedLM(RemBertConfig(**own, **sizes(layers, width)))


def albert(layers: int, width: int, final: int) -> PreTrainedModel:
    return AlbertForMaskedLM(
        AlbertConfig(embedding_size=final, inner_group_num=1, num_hidden_groups=1, **sizes(1, width))
    )


def opt(layers: int, width: int, final: int) -> PreTrainedModel:
    fields = {**sizes(layers, width), "ffn_dim": 2 * width, "word_embed_proj_dim": final, "do_layer_norm_before": False}
    return OPTForCausalLM(OPTConfig(**fields))


def sizes(layers: int, width: int) -> dict[str, Any]:
    torch.manual_seed(layers)
    fields = {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": 2,
        "intermediate_size": 2 * width,
    }
    return {
        "vocab_size": VOCAB,
        "max_position_embeddings": POSITIONS,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        **fields,
    }


MODELS: dict[str, Callable[..., PreTrainedModel]] = {
    "electra": electra,
    "rembert": rembert,
    "albert": albert,
    "opt": opt,
}


@pytest.mark.parametrize("name", MODELS)
def test_a_stage_at_final_is_projected_between_the_widths_there(tmp_path: Path, name: str) -> None:
    teacher, student = MODELS[name](3, 32, 16), MODELS[name](2, 24, 8)
    args = CurriculumConfig(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=4, calibration_samples=8, use_cpu=True,
        layer_map="1:1,final:final", warm_start="head", report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    task = detect_task(teacher)
    rows = token_rows()
    trainer = CurriculumTrainer(student, teacher, args, rows, None, make_tokenizer(), task.collator(make_tokenizer()))
    trainer.train()
    maps = trainer.source.maps
    shapes = [tuple(found.projection.matrix().shape) for found in maps if found is not None]
    assert shapes == [(32, 24), (16, 8)]
    assert task.width(student, FINAL) == 8
    assert isinstance(trainer.source, LiveTargets)


def test_a_student_from_disk_equals_the_student_from_the_teacher(tmp_path: Path, corpus: Path) -> None:
    electra(3, 32, 16).save_pretrained(tmp_path / "teacher")
    make_tokenizer(encoder=True).save_pretrained(tmp_path / "teacher")
    run = RunOptions(
        student="layers=2,hidden_size=8,heads=2,embedding_size=12", dataset=str(corpus / "text.jsonl"), max_length=16
    )

    def settings(folder: str, **fields: Any) -> CurriculumConfig:
        defaults = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "max_steps": 6}
        shape = {"per_device_train_batch_size": 4, "calibration_samples": 8, "layer_map": "1:1,final:final"}
        return CurriculumConfig(str(tmp_path / folder), **{**defaults, **shape, "warm_start": "head", **fields})

    teacher = {"teacher_model_name_or_path": str(tmp_path / "teacher")}
    extract(run, settings("C", **teacher), ExtractOptions(dtype="float32"), log=lambda line: None)
    distill(run, settings("live", **teacher, top_k=64))
    distill(RunOptions(student=run.student), settings("stored", curriculum_dir=str(tmp_path / "C")))
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("live", "stored"))
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert torch.equal(value, two[key]), key
