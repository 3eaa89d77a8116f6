"""What an extracted curriculum contains, and in which order a run reads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.runs.conftest import files_of, train
from tutelage.core.projection import RandomProjection
from tutelage.runs.inputs import RunOptions
from tutelage.targets.folder import ExtractedCurriculum
from tutelage.targets.rows import dequantized
from tutelage.targets.source import Reading
from tutelage.targets.stored_rows import StoredRows


def test_the_folder_is_readable_without_tutelage(extracted: Callable[..., Path], causal_teacher: Path) -> None:
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


@pytest.mark.parametrize(
    ("stages", "layer_map"), [(["2", "4"], "1:2,2:4"), (["3", "final"], "1:3,final:final"), (["final"], "final:final")]
)
def test_stages_can_be_extracted_before_a_student_is_chosen(
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
    one, two = (dequantized(batch) for batch in batches)
    largest = one.abs().amax(-1, keepdim=True)
    assert ((one - two).abs() <= error * largest).all()
    assert not torch.equal(one, two)
    assert sum(s.bytes for s in small.manifest.splits) < 0.75 * sum(s.bytes for s in exact.manifest.splits)
    train(tmp_path / "run", tmp_path / "small")


def test_every_row_is_read_once_per_pass_in_an_order_drawn_from_the_seed(extracted: Callable[..., Path]) -> None:
    stored = ExtractedCurriculum(extracted(max_steps=10, stage_steps=[5]))
    curriculum = stored.curriculum
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


def test_a_teacher_may_be_placed_by_transformers(extracted: Callable[..., Path]) -> None:
    assert files_of(extracted("plain")) == files_of(extracted("placed", teacher_device_map="auto"))


def test_quantization_settings_reach_transformers(
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
