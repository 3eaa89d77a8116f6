"""What is written as JSON is read back as it was."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from tutelage.core.curriculum import Curriculum, extraction, joint, one_shot, progressive, scratch
from tutelage.core.errors import UserError
from tutelage.core.records import Record
from tutelage.core.stages import HiddenStage, OutputStage
from tutelage.runs.evaluate import EvaluationResult
from tutelage.runs.inputs import RunOptions
from tutelage.runs.plan import Plan, plan
from tutelage.runs.plan_extraction import ExtractionRequest, plan_extraction
from tutelage.runs.results import Budget, ModelMetrics, RunResult
from tutelage.targets.identity import DataIdentity, ExtractionIdentity, HeadSettings, TeacherIdentity
from tutelage.targets.manifest import Manifest, Shard, Split
from tutelage.targets.rows import RowFormat
from tutelage.training.config import CurriculumConfig

CURRICULA = {
    "extraction": extraction(
        2, 4, 30, layer_map=[(1, 2), ("final", "final")], warm_start="head", top_k=3, temperature=2.0
    ),
    "one_shot": one_shot(5, label_weight=0.25),
    "progressive": progressive(8, ["early", "late"]),
    "scratch": scratch(4),
    "joint": joint(2, 4, 9, layer_map=[(1, 2), ("final", "final")], hidden_weight=0.5, label_weight=0.1, top_k=3),
    "own": Curriculum(
        "own",
        (HiddenStage(3, 1, 2, learning_rate=0.5), OutputStage(2, "early", 0.5, 1e-3), OutputStage(1, continues=True)),
        projection="pca",
        projection_seed=7,
        normalize="none",
    ),
}
IDENTITY = ExtractionIdentity(
    task="embedding",
    teacher=TeacherIdentity("bert", "abc", "bfloat16", 4, {"embedding_size": 12, "pooling": "cls"}, 102),
    tokenizer="def",
    data=DataIdentity("text.jsonl", 120, "123", streamed=True),
    evaluation="456",
    curriculum=CURRICULA["extraction"],
    width=16,
    forms={
        "stage_1": RowFormat("int8", 102, "none", True, "states"),
        "stage_2": RowFormat("int8", 102, "none", True, "states"),
        "stage_3": RowFormat("float16", 70_000, "tokens", False, "top_k"),
        "calibration": RowFormat("int8", 102, "none", True, "states"),
    },
    student="layers=2",
    causal=False,
    with_mask=True,
    mlm_probability=0.15,
    longest=16,
    kept=64,
    seed=3,
    sequential=True,
    batch_size=4,
    step_examples=8,
    calibration_samples=32,
    all_stages=True,
    shard_tokens=200,
    centered=True,
    head=HeadSettings(softcap=30.0, scale=0.5, outputs=100),
)
SHARDS = (Shard("stage_1/a.arrow", 3, 40, 512, "aa" * 32), Shard("stage_1/b.arrow", 1, 9, 99, "bb" * 32))
MANIFEST = Manifest(
    IDENTITY,
    (Split("stage_1", SHARDS), *(Split(name, ()) for name in ("stage_2", "stage_3", "calibration", "evaluation"))),
    {"head.safetensors": "cc" * 32},
    environment={"torch": "2.13", "threads": 2},
)
RESULT = RunResult(
    {"teacher": "bert", "student": "layers=2", "dataset": "text.jsonl"},
    "causal_lm",
    "extraction",
    3,
    ModelMetrics(1000, {"loss": 1.5, "kl": 0.25}),
    ModelMetrics(None, {}),
    Budget(8, 32, 512, 1e9, 2e9, 1.5),
    {"torch": "2.13", "threads": 2},
)
RECORDS: dict[str, Record] = {
    **CURRICULA,
    "identity": IDENTITY,
    "identity of a model without a head": dataclasses.replace(
        IDENTITY, head=None, mlm_probability=None, teacher=dataclasses.replace(IDENTITY.teacher, shape=None)
    ),
    "manifest": MANIFEST,
    "result": RESULT,
    "evaluation": EvaluationResult("bert", "text.txt", "gpt", 7, {"loss": 1.5, "accuracy": 0.5}),
    "evaluation without a teacher": EvaluationResult("bert", "text.txt", None, 7, {"loss": 1.5}),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_is_read_back_as_it_was(name: str) -> None:
    record = RECORDS[name]
    again = type(record).from_json(record.to_json())
    assert again == record
    assert type(again) is type(record)
    assert again.to_json() == record.to_json()
    assert type(record).from_dict(json.loads(json.dumps(record.to_dict()))) == record


@pytest.mark.parametrize("request_fields", [None, {}, {"tokens_per_second": 1000.0}])
def test_a_plan_is_read_back_as_it_was(causal_teacher: Path, request_fields: dict[str, Any] | None) -> None:
    args = CurriculumConfig(teacher_model_name_or_path=str(causal_teacher), use_cpu=True, method="extraction")
    planned = plan(RunOptions(student="layers=2,hidden_size=16"), args)
    if request_fields is not None:
        found = plan_extraction(planned, ExtractionRequest(10**6, width=16, top_k=8, **request_fields))
        planned = dataclasses.replace(planned, extraction=found)
    again = Plan.from_json(planned.to_json())
    assert again == planned
    assert isinstance(again.student.blocks, tuple)
    assert isinstance(again.curriculum.stages[0], HiddenStage)
    if planned.extraction is not None:
        assert again.extraction is not None
        assert again.extraction.hours == planned.extraction.hours
        assert again.extraction.bytes == planned.extraction.bytes


def test_nested_values_have_their_own_types() -> None:
    again = Manifest.from_json(MANIFEST.to_json())
    assert isinstance(again.identity.curriculum.stages[-1], OutputStage)
    assert isinstance(again.identity.forms["stage_3"], RowFormat)
    assert isinstance(again.identity.head, HeadSettings)
    assert isinstance(again.splits[0].shards[1], Shard)
    assert (again.splits[0].rows, again.splits[0].tokens, again.splits[0].bytes) == (4, 49, 611)
    result = RunResult.from_json(RESULT.to_json())
    assert isinstance(result.budget, Budget)
    assert result.budget.flops == 3e9


def test_an_unknown_stage_is_refused() -> None:
    fields = CURRICULA["one_shot"].to_dict()
    fields["stages"][0]["kind"] = "layerwise"
    with pytest.raises(UserError, match="unknown kind 'layerwise': expected one of hidden, output, joint"):
        Curriculum.from_dict(fields)


def test_two_extractions_with_different_settings_have_different_digests() -> None:
    renamed = dataclasses.replace(IDENTITY, student="layers=3")
    changed = dataclasses.replace(IDENTITY, width=8)
    assert renamed.unnamed() == IDENTITY.unnamed() != changed.unnamed()
    assert ExtractionIdentity.from_json(IDENTITY.to_json()).digest == IDENTITY.digest != changed.digest
