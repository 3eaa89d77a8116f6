"""Extracting a curriculum, and training from it without the teacher."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from tutelage.targets.reading import Reading, StoredRows

from tests.conftest import make_tokenizer, save_llama
from tutelage.cli import main
from tutelage.core.blocks import FINAL
from tutelage.core.curriculum import Curriculum
from tutelage.core.projection import RandomProjection
from tutelage.io.store import Store
from tutelage.runs.distill import distill
from tutelage.runs.extraction.job import ExtractOptions, extract
from tutelage.runs.inputs import RunOptions
from tutelage.targets import manifest as storage
from tutelage.targets.folder import ExtractedCurriculum
from tutelage.tasks.text import read_dataset
from tutelage.training.config import CurriculumConfig
from tutelage.training.records import MetricsFile

STUDENT = "layers=2,hidden_size=16"
TEACHERS = ("causal_lm", "masked_lm", "sequence_classification", "embedding")


@pytest.fixture
def teachers(
    causal_teacher: Path, mlm_teacher: Path, classifier_teacher: Path, embedding_teacher: Path
) -> dict[str, Path]:
    return dict(zip(TEACHERS, (causal_teacher, mlm_teacher, classifier_teacher, embedding_teacher), strict=True))


def settings(folder: Path, teacher: Path | None, **fields: Any) -> CurriculumConfig:
    defaults = {
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "calibration_samples": 8,
        "report_to": "none",
        "disable_tqdm": True,
        "teacher_model_name_or_path": None if teacher is None else str(teacher),
    }
    return CurriculumConfig(output_dir=str(folder), **{**defaults, **fields})


def texts(corpus: Path, **fields: Any) -> RunOptions:
    defaults = {"student": STUDENT, "dataset": str(corpus / "text.jsonl"), "max_length": 16}
    return RunOptions(**{**defaults, **fields})


@pytest.fixture
def extracted(corpus: Path, causal_teacher: Path, tmp_path: Path) -> Callable[..., Path]:
    """The folder of a finished extraction."""

    def make(name: str = "C", teacher: Path = causal_teacher, run: dict[str, Any] | None = None, **fields: Any) -> Path:
        stored = {
            key: fields.pop(key)
            for key in ("projection_dim", "dtype", "shard_tokens", "all_stages", "stages")
            if key in fields
        }
        how = ExtractOptions(**{"dtype": "float32", "shard_tokens": 200, **stored})
        extract(texts(corpus, **(run or {})), settings(tmp_path / name, teacher, **fields), how, log=lambda line: None)
        return tmp_path / name

    return make


def train(folder: Path, curriculum: Path | str | None, run: RunOptions | None = None, **fields: Any) -> dict[str, Any]:
    teacher = fields.pop("teacher", None)
    args = settings(folder, teacher, curriculum_dir=None if curriculum is None else str(curriculum), **fields)
    return distill(run or RunOptions(student=STUDENT), args)


# ---- Stored is live ----


@pytest.mark.parametrize(
    ("task", "fields"),
    [
        ("causal_lm", {}),
        ("causal_lm", {"layer_map": "1:2,2:4", "normalize": "none", "data_seed": 5}),
        ("causal_lm", {"layer_map": "1:1,final:final", "projection": "logits", "gradient_accumulation_steps": 2}),
        ("causal_lm", {"method": "one_shot", "temperature": 2.0, "max_steps": 40}),
        ("masked_lm", {}),
        ("sequence_classification", {}),
        ("sequence_classification", {"layer_map": "final:final"}),
        ("embedding", {}),
        ("embedding", {"layer_map": "1:2,2:4"}),
    ],
)
def test_a_student_from_disk_is_the_student_from_the_teacher(
    teachers: dict[str, Path],
    corpus: Path,
    extracted: Callable[..., Path],
    tmp_path: Path,
    task: str,
    fields: dict[str, Any],
) -> None:
    """Float32 on the CPU, bit for bit, in the order that the trainer's own sampler draws, over several epochs."""
    # several epochs are the same where an epoch ends with a whole batch
    run = {"eval_dataset": str(corpus / "text.txt"), "max_length": 12} if fields.get("max_steps") == 40 else {}
    folder = extracted(teacher=teachers[task], run=run, **fields)
    top_k = {} if task == "embedding" else {"top_k": 64}
    live = train(tmp_path / "live", None, texts(corpus, **run), teacher=teachers[task], **fields, **top_k)
    unset = {"max_steps": -1} if "max_steps" not in fields else {}
    stored = train(tmp_path / "stored", folder, RunOptions(student=STUDENT), **{**fields, **unset})
    one, two = (load_file(next((tmp_path / name).glob("**/model.safetensors"))) for name in ("live", "stored"))
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert torch.equal(value, two[key]), key
    assert stored["budget"]["teacher_flops"] == 0 < live["budget"]["teacher_flops"]
    # an encoder's held-out embeddings were made row by row, not in the batches of the evaluation
    assert stored["student"]["loss"] == pytest.approx(live["student"]["loss"], rel=1e-6 if task == "embedding" else 0)
    logs = [
        [record["loss"] for record in MetricsFile(tmp_path / name / "metrics.jsonl").read() if "loss" in record]
        for name in ("live", "stored")
    ]
    assert logs[0] == logs[1]


def test_it_goes_on_in_the_middle_of_a_stage(extracted: Callable[..., Path], tmp_path: Path) -> None:
    folder = extracted()
    train(tmp_path / "whole", folder)
    train(tmp_path / "cut", folder, save_strategy="steps", save_steps=3)
    for checkpoint in (tmp_path / "cut").glob("checkpoint-*"):
        if checkpoint.name != "checkpoint-6":
            shutil.rmtree(checkpoint)
    train(tmp_path / "cut", folder, save_strategy="steps", save_steps=3, resume_from_checkpoint="true")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(value, two[key]) for key, value in one.items())


# ---- What is on disk ----


def test_anybody_can_read_it(extracted: Callable[..., Path], causal_teacher: Path) -> None:
    folder = extracted(layer_map="1:2,final:final", normalize="none", warm_start="none", projection_dim=24)
    data = datasets.load_from_disk(folder)
    assert set(data) == {"stage_1", "stage_2", "stage_3", "evaluation"}
    streamed = datasets.load_dataset(
        "arrow", data_files=str(folder / "stage_1" / "*.arrow"), split="train", streaming=True
    )
    assert next(iter(streamed))["example_id"] == data["stage_1"][0]["example_id"]
    teacher = AutoModelForCausalLM.from_pretrained(causal_teacher)
    row = data["stage_1"][3]
    with torch.no_grad():
        output = teacher(input_ids=torch.tensor([row["input_ids"]]), output_hidden_states=True)
    expected = output.hidden_states[2][0] @ RandomProjection(32, 24, (0, 2)).matrix()
    found = torch.tensor(row["teacher_states"]).reshape(-1, 24)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    output_row = data["stage_3"][0]
    with torch.no_grad():
        log_p = teacher(input_ids=torch.tensor([output_row["input_ids"]])).logits[0, :-1].log_softmax(-1)
    kept = torch.tensor(output_row["teacher_log_probs"]).reshape(len(log_p), -1)
    torch.testing.assert_close(kept, log_p.topk(kept.shape[1]).values, rtol=1e-4, atol=1e-5)


def test_the_data_is_divided_among_the_stages(extracted: Callable[..., Path]) -> None:
    folder = extracted(max_steps=10, stage_steps=[2], layer_map="1:1,2:4")
    data = datasets.load_from_disk(folder)
    assert [len(data[name]) for name in ("stage_1", "stage_2", "stage_3")] == [8, 8, 24]
    ids = [row for name in ("stage_1", "stage_2", "stage_3") for row in data[name]["example_id"]]
    assert len(set(ids)) == 40  # no example twice within an epoch
    every = extracted("all", max_steps=10, stage_steps=[2], layer_map="1:1,2:4", all_stages=True)
    rows = {len(part) for name, part in datasets.load_from_disk(every).items() if name.startswith("stage")}
    assert len(rows) == 1 and rows.pop() > 40


def test_a_narrower_student_reads_the_first_columns(extracted: Callable[..., Path], tmp_path: Path) -> None:
    wide, narrow = extracted("wide", projection_dim=24), extracted("narrow")
    one, two = (datasets.load_from_disk(folder)["stage_1"].with_format("numpy") for folder in (wide, narrow))
    assert one["example_id"][:].tolist() == two["example_id"][:].tolist()
    for a, b in zip(one["teacher_states"], two["teacher_states"], strict=True):
        np.testing.assert_allclose(a.reshape(-1, 24)[:, :16], b.reshape(-1, 16), rtol=1e-5, atol=1e-6)
    train(tmp_path / "from-wide", wide)
    train(tmp_path / "from-narrow", narrow)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("from-wide", "from-narrow"))
    for key, value in one.items():
        torch.testing.assert_close(value, two[key], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("projection", ["pca", "logits"])
def test_a_narrower_student_reads_the_first_columns_of_data_aware_projections(
    extracted: Callable[..., Path], tmp_path: Path, projection: str
) -> None:
    folder = extracted(projection=projection, projection_dim=24)
    stored = ExtractedCurriculum(folder)
    wide, narrow = (stored.target_maps(stored.curriculum, width)[0] for width in (24, 16))
    assert wide is not None and narrow is not None
    state = torch.randn(3, 5, 24 if projection == "none" else wide.standardizer.mean.numel())
    assert torch.equal(narrow(state), wide(state)[..., :16])
    train(tmp_path / "student", folder)  # with its head transplanted
    assert (tmp_path / "student" / "model.safetensors").is_file()


def test_labels_of_the_data_are_kept(extracted: Callable[..., Path], causal_teacher: Path, tmp_path: Path) -> None:
    """Prompts that are not learnt from, in rows of different lengths."""
    generator = np.random.default_rng(0)
    ids = [generator.integers(6, 20, size=length).tolist() for length in (16, 12, 9, 16) * 8]
    labels = [[-100] * (len(row) // 2) + row[len(row) // 2 :] for row in ids]
    datasets.Dataset.from_dict({"input_ids": ids, "labels": labels}).save_to_disk(tmp_path / "data")
    run = {"dataset": str(tmp_path / "data"), "eval_dataset": str(tmp_path / "data"), "max_samples": 8}
    folder = extracted(run=run)
    live = train(tmp_path / "live", None, RunOptions(student=STUDENT, **run), teacher=causal_teacher, top_k=64)
    stored = train(tmp_path / "stored", folder)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("live", "stored"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert stored["student"]["loss"] == live["student"]["loss"]


def test_lost_shards_are_made_again(extracted: Callable[..., Path]) -> None:
    folder = extracted()
    before = files_of(folder)
    shards = sorted(folder.glob("stage_*/*.arrow"))
    manifest = (folder / "manifest.json").read_text()
    shards[0].unlink()
    shards[2].write_bytes(shards[2].read_bytes()[:-1])
    extracted()
    assert files_of(folder) == before
    assert json.loads((folder / "manifest.json").read_text())["splits"] == json.loads(manifest)["splits"]
    assert not list(folder.rglob("*.receipt.json"))


def test_statistics_are_made_once(extracted: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from tutelage.training import calibration

    folder = extracted()
    next(folder.glob("stage_2/*.arrow")).unlink()

    def again(*_: Any, **__: Any) -> Any:
        raise AssertionError("shards of one curriculum have one set of statistics")

    monkeypatch.setattr(calibration, "calibrate", again)
    extracted()


@pytest.mark.parametrize("changed", [{"mlm_probability": 0.05}, {"max_samples": 2}])
def test_what_decides_the_rows_is_another_extraction(
    extracted: Callable[..., Path], teachers: dict[str, Path], changed: dict[str, Any]
) -> None:
    teacher = teachers["masked_lm"]
    extracted(teacher=teacher, run={"mlm_probability": 0.6})
    with pytest.raises(ValueError, match="holds the curriculum of another extraction"):
        extracted(teacher=teacher, run={"mlm_probability": 0.6, **changed})


def test_names_of_files_do_not_matter(
    extracted: Callable[..., Path], corpus: Path, tmp_path: Path, causal_teacher: Path
) -> None:
    folder = extracted()
    shutil.copy(corpus / "text.jsonl", tmp_path / "renamed.jsonl")
    shutil.copytree(causal_teacher, tmp_path / "moved")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    extracted(teacher=tmp_path / "moved", run={"dataset": str(tmp_path / "renamed.jsonl")})
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_the_batch_of_the_extraction_is_taken(extracted: Callable[..., Path], tmp_path: Path) -> None:
    args = settings(tmp_path / "S", None, curriculum_dir=str(extracted()), max_steps=-1)
    args.per_device_train_batch_size = CurriculumConfig(output_dir="").per_device_train_batch_size
    result = distill(RunOptions(student=STUDENT), args)
    assert args.per_device_train_batch_size == 4
    assert result["budget"]["samples"] == 8 * 4


def test_another_student_takes_what_it_needs(extracted: Callable[..., Path], tmp_path: Path) -> None:
    folder = extracted(layer_map="1:1,2:2,final:final", warm_start="none", projection_dim=32)
    deep = train(tmp_path / "deep", folder, RunOptions(student="layers=4,hidden_size=32"), layer_map="2:1,final:final")
    curriculum = Curriculum.from_json((tmp_path / "deep" / "curriculum.json").read_text())
    assert [(s.student_place, s.teacher_place) for s in curriculum.stages[:-1]] == [(2, 1), (FINAL, FINAL)]
    assert deep["budget"]["steps"] == 8
    shallow = train(tmp_path / "shallow", folder, RunOptions(student="layers=1,hidden_size=16"), layer_map="1:2")
    assert shallow["budget"]["teacher_flops"] == 0
    output = train(tmp_path / "output", folder, method="one_shot", max_steps=3)
    assert output["method"] == "one_shot"


@pytest.mark.parametrize(
    ("stages", "layer_map"), [(["2", "4"], "1:2,2:4"), (["3", "final"], "1:3,final:final"), (["final"], "final:final")]
)
def test_stages_that_no_student_asked_for(
    extracted: Callable[..., Path], tmp_path: Path, stages: list[str], layer_map: str
) -> None:
    folder = extracted(run={"student": None}, stages=stages, projection_dim=16)
    same = extracted("named", run={"student": "layers=2,hidden_size=16"}, layer_map=layer_map)
    assert {k: v for k, v in files_of(folder).items() if "stage" in k} == {
        k: v for k, v in files_of(same).items() if "stage" in k
    }
    for layers in (1, 2, 4):  # fewer blocks than stages read the deepest that each stands for
        train(tmp_path / f"S{layers}", folder, RunOptions(student=f"layers={layers},hidden_size=8"))


@pytest.mark.parametrize(("dtype", "error"), [("int8", 1 / 127), ("float16", 1e-3)])
def test_smaller_dtypes_are_close(extracted: Callable[..., Path], tmp_path: Path, dtype: str, error: float) -> None:
    exact, small = ExtractedCurriculum(extracted("exact")), ExtractedCurriculum(extracted("small", dtype=dtype))
    batches = [
        StoredRows(s, s.curriculum, 16, Reading(4, 4, seed=42)).__getitems__([0, 1, 2, 3]).tensors(0)
        for s in (exact, small)
    ]
    from tutelage.targets.rows import dequantized

    one, two = (dequantized(batch) for batch in batches)
    largest = one.abs().amax(-1, keepdim=True)
    assert ((one - two).abs() <= error * largest).all()
    assert not torch.equal(one, two)
    assert sum(s.bytes for s in small.manifest.splits) < 0.75 * sum(s.bytes for s in exact.manifest.splits)
    train(tmp_path / "run", tmp_path / "small")


# ---- Order ----


def test_every_row_comes_once_a_pass_in_an_order_of_the_seed(extracted: Callable[..., Path]) -> None:
    stored = ExtractedCurriculum(extracted(max_steps=10, stage_steps=[5]))
    curriculum = Curriculum.from_json(stored.identity["curriculum"])
    orders = {}
    for seed in (42, 7, 8):
        rows = StoredRows(stored, curriculum, 16, Reading(8, 8, seed=seed))  # twice the examples of a step: two passes
        places = [rows.place(position) for position in range(len(rows))]
        assert [stage for stage, _ in places] == [0] * 40 + [1] * 40
        first, second = [row for _, row in places[:20]], [row for _, row in places[20:40]]
        assert sorted(first) == sorted(second) == list(range(20))
        assert first != second
        orders[seed] = first
    assert orders[42] != orders[7] != orders[8] != orders[42]


# ---- Interruptions ----


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.arrow"))}


def test_an_extraction_goes_on_where_it_was(
    extracted: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = extracted("whole")
    written: list[int] = []
    original = storage.ShardWriter.write

    def full(self: Any, number: int, batches: Any) -> Any:
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(number)
        return original(self, number, batches)

    monkeypatch.setattr(storage.ShardWriter, "write", full)
    with pytest.raises(OSError, match="No space left"):
        extracted("cut")
    with pytest.raises(ValueError, match="is unfinished: run the same `tutelage extract` again"):
        train(tmp_path / "student", tmp_path / "cut")
    monkeypatch.setattr(storage.ShardWriter, "write", lambda *a: written.append(a[1]) or original(*a))
    before = len(written)
    extracted("cut")
    assert len(written) - before == len(files_of(whole)) - 2  # only the missing ones
    assert files_of(tmp_path / "cut") == files_of(whole)
    assert not list((tmp_path / "cut").rglob("*.receipt.json")) and not list((tmp_path / "cut").rglob("*.tmp"))
    before = len(written)
    extracted("cut")  # a finished one is left alone
    assert len(written) == before


def test_another_extraction_is_not_mixed_in(extracted: Callable[..., Path], tmp_path: Path) -> None:
    extracted()
    with pytest.raises(ValueError, match="holds the curriculum of another extraction"):
        extracted(projection_seed=3)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no curriculum"):
        extracted("notes")


# ---- Refusals ----


def spoil(folder: Path, what: str) -> None:
    shard = next(iter(sorted((folder / "stage_1").glob("*.arrow"))))
    content = bytearray(shard.read_bytes())
    if what == "damaged":
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    elif what == "cut":
        shard.write_bytes(content[:-8])
    elif what == "missing":
        shard.unlink()
    elif what == "newer":
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    elif what == "no manifest":
        (folder / "manifest.json").unlink()
    elif what == "not JSON":
        (folder / "manifest.json").write_text("{")
    elif what == "maps":
        (folder / "target_stats.safetensors").write_bytes(b"nothing")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("damaged", r"stage_1/data-00000.*is damaged \(its checksum"),
        ("cut", r"stage_1/data-00000.*is damaged"),
        ("missing", r"stage_1/data-00000.*is missing: copy it there"),
        ("newer", "has format 99, this version reads up to 1: upgrade"),
        ("no manifest", "holds no curriculum .no manifest.json.: make one with `tutelage extract`"),
        ("not JSON", "is not a curriculum's manifest"),
        ("maps", "target_stats.safetensors.*is damaged"),
    ],
)
def test_a_spoilt_curriculum_is_refused(
    extracted: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str, message: str
) -> None:
    folder = extracted()
    spoil(folder, what)
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "student", folder)
    assert not (tmp_path / "student").exists()
    assert main(["inspect", str(folder)]) == 2
    assert "tutelage inspect:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "student", "message"),
    [
        ({}, "layers=2,hidden_size=24", "holds projections to width 16, the student is 24 wide"),
        (
            {"layer_map": "1:3,final:final"},
            STUDENT,
            "does not hold the stage 'hidden 1:3': it has teacher places final, output",
        ),
        ({"projection_seed": 4}, STUDENT, "was extracted with projection_seed=0, not 4"),
        ({"top_k": 5}, STUDENT, "was extracted with top_k=64, not 5"),
        ({"temperature": 2.0}, STUDENT, "was extracted with temperature=1.0, not 2.0"),
        ({"method": "progressive"}, STUDENT, "method 'progressive' does not train from a curriculum on disk"),
        ({"method": "scratch"}, STUDENT, "method 'scratch' does not train from a curriculum on disk"),
        ({"warm_start": "head+embedding"}, STUDENT, "needs the teacher's embedding"),
        ({"task": "masked_lm"}, STUDENT, "is for task causal_lm, not masked_lm"),
    ],
)
def test_what_the_curriculum_cannot_serve_is_refused(
    extracted: Callable[..., Path], tmp_path: Path, fields: dict[str, Any], student: str, message: str
) -> None:
    folder = extracted()
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "student", folder, RunOptions(student=student), **fields)


def test_a_curriculum_without_a_head_transplants_none(extracted: Callable[..., Path], tmp_path: Path) -> None:
    folder = extracted(layer_map="final:final", warm_start="none")
    with pytest.raises(ValueError, match="holds no output head to start from"):
        train(tmp_path / "student", folder, warm_start="head")
    train(tmp_path / "student", folder)


def test_what_is_given_must_be_what_it_was_made_from(
    extracted: Callable[..., Path], corpus: Path, causal_teacher: Path, tmp_path: Path
) -> None:
    folder = extracted()
    train(tmp_path / "same", folder, texts(corpus), teacher=causal_teacher)
    other = save_llama(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="was extracted from another teacher"):
        train(tmp_path / "a", folder, teacher=other)
    with pytest.raises(ValueError, match="was extracted from other data"):
        train(tmp_path / "b", folder, texts(corpus, max_length=12))
    from tests.conftest import WORDS

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
        ({"label_weight": 0.5}, "label_weight is chosen when a student is trained"),
        ({"layer_map": "1:9"}, "the teacher has blocks 1 to 4"),
        ({"stages": ["1", "9"]}, "the teacher has blocks 1 to 4"),
        ({"stages": ["final", "2"]}, r"each deeper than the one before, final at most as the last.*got final 2"),
        ({"stages": ["2", "2"]}, r"stages must be teacher blocks.*got 2 2"),
        ({"stages": ["0"]}, r"stages must be teacher blocks from 1"),
        ({"projection_dim": 0}, "projection_dim must be at least 1, got 0"),
        ({"projection": "orthogonal", "projection_dim": 1000}, "orthogonal"),
        ({"curriculum_dir": "elsewhere"}, "an extraction runs the teacher: leave curriculum_dir out"),
        ({"stages": ["two"]}, r"stages must be teacher blocks"),
        ({"stages": ["2"], "projection_dim": None}, "add --projection_dim"),
        ({"stages": ["2"], "run": {}}, "stages and student both say"),
        ({"stages": ["2"], "layer_map": "1:2"}, "stages and layer_map both say"),
        ({"stages": ["2"], "method": "one_shot"}, "method 'one_shot' has no hidden stages"),
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


# ---- Command line ----


def test_the_command_line(
    corpus: Path, causal_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, data = str(tmp_path / "C"), str(corpus / "text.jsonl")
    small = ["--max_length", "16", "--max_steps", "4", "--per_device_train_batch_size", "4", "--use_cpu", "true"]
    teacher = ["--teacher", str(causal_teacher), "--dataset", data, "--student", STUDENT]
    assert main(["extract", *teacher, "--output_dir", folder, *small]) == 0
    assert "stage_2       output" in capsys.readouterr().out
    assert main(["inspect", folder]) == 0
    assert "checksums: all as in the manifest" in capsys.readouterr().out
    assert main(["inspect", folder, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["identity"]["width"] == 16
    student = ["--curriculum_dir", folder, "--student", "layers=1,hidden_size=8", "--use_cpu", "true"]
    assert main(["distill", *student, "--output_dir", str(tmp_path / "S"), "--per_device_train_batch_size", "4"]) == 0
    assert (tmp_path / "S" / "model.safetensors").is_file() and (tmp_path / "S" / "tokenizer.json").is_file()
    assert main(["distill", "--curriculum_dir", folder, "--output_dir", str(tmp_path / "T")]) == 2
    assert "name a student" in capsys.readouterr().err


# ---- Large teachers ----


def test_a_teacher_may_be_placed_by_transformers(extracted: Callable[..., Path]) -> None:
    assert files_of(extracted("plain")) == files_of(extracted("placed", teacher_device_map="auto"))


def test_quantisation_is_transformers_own(
    extracted: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, causal_teacher: Path
) -> None:
    seen: dict[str, Any] = {}
    original = AutoModelForCausalLM.from_pretrained

    def spy(path: str, **kwargs: Any) -> Any:
        seen.update(kwargs)
        kwargs.pop("quantization_config", None)
        return original(path, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", spy)
    extracted(teacher_quantization='{"quant_method": "bitsandbytes", "load_in_8bit": true}', teacher_dtype="float32")
    assert seen["quantization_config"].load_in_8bit and seen["dtype"] == "float32"
    with pytest.raises(ValueError, match=r"teacher_quantization .* cannot be used"):
        extracted("other", teacher_quantization="{")


# ---- Several processes ----


def test_any_number_of_processes_make_the_same_curriculum(corpus: Path, causal_teacher: Path, tmp_path: Path) -> None:
    found = []
    for processes in (1, 3):
        folder = tmp_path / f"by-{processes}"
        options = ["--teacher", str(causal_teacher), "--dataset", str(corpus / "text.jsonl"), "--student", STUDENT]
        options += ["--max_length", "16", "--num_train_epochs", "1", "--per_device_train_batch_size", "4"]
        options += ["--use_cpu", "true", "--dtype", "float32", "--shard_tokens", "200", "--output_dir", str(folder)]
        command = [sys.executable, "-m", "tutelage", "extract", *options]
        if processes > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
            command = [sys.executable, *launcher, *command[1:]]
        done = subprocess.run(
            command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(files_of(folder))
        assert len([name for name in found[-1] if name.startswith("stage_2")]) > 2
        assert storage.read_manifest(Store(folder)).identity["seed"] == 42
    assert found[0] == found[1]


def test_two_processes_train_one_student_from_disk(extracted: Callable[..., Path], tmp_path: Path) -> None:
    folder = extracted(max_steps=12, per_device_train_batch_size=8)
    students = []
    for processes in (1, 2):
        output = tmp_path / f"student-{processes}"
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [sys.executable, *(launcher if processes > 1 else []), "-m", "tutelage", "distill"]
        command += [f"--curriculum_dir={folder}", f"--student={STUDENT}", f"--output_dir={output}", "--optim=sgd"]
        command += [f"--per_device_train_batch_size={8 // processes}", "--use_cpu=true", "--save_strategy=no"]
        done = subprocess.run(
            command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr[-3000:]
        students.append(load_file(output / "model.safetensors"))
    one, two = students
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-6)


# ---- Elsewhere than on this machine ----


@pytest.fixture
def bucket() -> Any:
    """An object store in memory."""
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.store.clear()
    yield memory
    memory.store.clear()


def test_a_curriculum_may_lie_behind_a_url(
    extracted: Callable[..., Path], corpus: Path, causal_teacher: Path, tmp_path: Path, bucket: Any
) -> None:
    folder = extracted(max_steps=24)
    args = settings(Path("unused"), causal_teacher, max_steps=24)
    args.output_dir = "memory://curricula/C"
    how = ExtractOptions(dtype="float32", shard_tokens=200)
    manifest = extract(texts(corpus), args, how, log=lambda line: None)
    assert manifest.splits == storage.read_manifest(Store(folder)).splits  # the same files, to the checksum
    far = {name.removeprefix("/curricula/C/"): bucket.cat(name) for name in bucket.find("/curricula/C")}
    assert far.keys() == {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    train(tmp_path / "student", "memory://curricula/C")
    assert (tmp_path / "student" / "model.safetensors").is_file()
    bucket.rm("/curricula/C/stage_2/data-00000-of-00004.arrow")
    with pytest.raises(ValueError, match=r"stage_2/data-00000-of-00004.arrow of the curriculum .* is missing"):
        train(tmp_path / "other", "memory://curricula/C")


def test_far_shards_are_dealt_to_the_devices(extracted: Callable[..., Path], bucket: Any) -> None:
    folder = extracted(max_steps=24)
    for file in folder.rglob("*"):
        if file.is_file():
            bucket.pipe(f"/far/{file.relative_to(folder).as_posix()}", file.read_bytes())
    stored = ExtractedCurriculum("memory://far")
    rows = StoredRows(stored, stored.curriculum, 16, Reading(step_examples=4, batch_size=2, devices=2, seed=3))
    assert not rows.planned
    shards = stored.manifest.split("stage_1").shards
    ends = np.cumsum([shard.rows for shard in shards])
    places = [rows.place(position)[1] for position in range(int(ends[-1]))]
    assert sorted(places) == list(range(int(ends[-1])))  # every row once a pass
    used = [
        {
            int(np.searchsorted(ends, row, side="right"))
            for batch in range(device, 8, 2)
            for row in places[2 * batch : 2 * batch + 2]
        }
        for device in (0, 1)
    ]
    assert not used[0] & used[1]  # while there are whole shards left
    batch = rows.__getitems__([0, 1])
    near = StoredRows(ExtractedCurriculum(folder), stored.curriculum, 16, Reading(4, 2, 2, seed=3))
    expected = near.tables[0].take(places[:2])
    assert batch.table.equals(expected)
    fetched = rows.tables[0].store.fetch(shards[0].file).parent
    for position in range(len(places)):
        rows.__getitems__([position])
    assert len(list(fetched.glob("*.arrow"))) <= stored.store.kept


def test_data_may_lie_behind_a_url(corpus: Path, bucket: Any) -> None:
    bucket.pipe("/data/text.jsonl", (corpus / "text.jsonl").read_bytes())
    for file in (corpus / "folder").iterdir():
        bucket.pipe(f"/data/folder/{file.name}", file.read_bytes())
    near = read_dataset(str(corpus / "text.jsonl"))
    assert read_dataset("memory://data/text.jsonl")["text"][:] == near["text"][:]
    assert read_dataset("memory://data/folder")["text"][:] == near["text"][:]
    with pytest.raises(ValueError, match=r"could not read dataset 'memory://data/none.jsonl'"):
        read_dataset("memory://data/none.jsonl")


def test_a_streamed_run_reads_the_first_rows(corpus: Path, causal_teacher: Path, tmp_path: Path) -> None:
    held_out = {"eval_dataset": str(corpus / "text.jsonl")}
    how: dict[str, Any] = {"max_steps": 5, "train_sampling_strategy": "sequential"}
    for name, streaming in (("whole", False), ("streamed", True)):
        run = texts(corpus, streaming=streaming, **held_out)
        distill(run, settings(tmp_path / name, causal_teacher, **how))
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "streamed"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("run", "fields", "message"),
    [
        ({}, {"max_steps": -1}, "a stream has no length to count epochs in: set --max_steps"),
        ({"max_samples": 1000}, {}, r"the stream has \d+ row\(s\), too few to hold 1000 out"),
    ],
)
def test_a_stream_that_does_not_serve_is_refused(
    corpus: Path, causal_teacher: Path, tmp_path: Path, run: dict[str, Any], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        distill(texts(corpus, streaming=True, **run), settings(tmp_path / "S", causal_teacher, **fields))


def test_a_curriculum_on_disk_takes_no_stream(extracted: Callable[..., Path], tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(ValueError, match="a curriculum is always read as needed"):
        train(tmp_path / "S", extracted(), texts(corpus, streaming=True))
