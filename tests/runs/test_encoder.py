"""The encoder alone: from a teacher and rows to the columns of a shard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from tests.conftest import VOCAB, llama_config, make_tokenizer
from tutelage.core.curriculum import extraction, one_shot
from tutelage.core.projection import RandomProjection
from tutelage.core.stages import HiddenStage
from tutelage.runs.extraction.encoder import Encoder
from tutelage.targets.live import LiveTargets
from tutelage.targets.source import StatisticsFile
from tutelage.tasks.registry import get_task

WIDTH, LENGTH, KEPT = 16, 12, 5


def encoder_of(curriculum: Any, folder: Path, dtype: str = "float32", chunk_size: int | None = None) -> Encoder:
    task = get_task("causal_lm")
    torch.manual_seed(0)
    source = LiveTargets(task.build(llama_config()), task)
    student = task.build(llama_config(num_hidden_layers=2, hidden_size=WIDTH, num_attention_heads=2))
    source.attach(curriculum, student)
    rows = Dataset.from_dict({"input_ids": torch.randint(6, VOCAB, (8, LENGTH)).tolist()})
    encoder = Encoder(
        source, rows, rows.select([0, 1]), task.collator(make_tokenizer()), VOCAB, dtype, "cpu", chunk_size
    )
    file = StatisticsFile(folder / "statistics.safetensors", read=False, write=False)
    source.prepare(file, lambda: [encoder.batch([0, 1, 2, 3])], "cpu")
    return encoder


def test_hidden_columns_are_projected_states_of_the_teacher(tmp_path: Path) -> None:
    curriculum = extraction(2, 4, 8, normalize="none", projection_seed=3)
    encoder = encoder_of(curriculum, tmp_path)
    form = encoder.form(curriculum.stages[0], encoder.batch([0]))
    assert (form.content, form.label, form.dtype) == ("states", "none", "float32")
    (columns,) = encoder.stage_columns(0, form, [[6, 2]])
    assert columns["example_id"].to_pylist() == [6, 2]
    assert columns["input_ids"].to_pylist() == [encoder.data[row]["input_ids"] for row in (6, 2)]
    stage = curriculum.stages[0]
    assert isinstance(stage, HiddenStage)
    with torch.no_grad():
        output = encoder.source.model(input_ids=encoder.batch([6, 2])["input_ids"], output_hidden_states=True)
    expected = (
        output.hidden_states[stage.teacher_place] @ RandomProjection(32, WIDTH, (3, stage.teacher_place)).matrix()
    )
    found = torch.tensor(columns["teacher_states"].to_pylist()).reshape(2, LENGTH, WIDTH)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_output_columns_are_the_largest_log_probabilities(tmp_path: Path, chunk_size: int | None) -> None:
    curriculum = one_shot(4, top_k=KEPT, temperature=2.0)
    encoder = encoder_of(curriculum, tmp_path, chunk_size=chunk_size)
    form = encoder.form(curriculum.stages[0], encoder.batch([0]))
    assert form.content == "top_k"
    batches = list(encoder.stage_columns(0, form, [[0, 1], [2]]))
    assert [columns["example_id"].to_pylist() for columns in batches] == [[0, 1], [2]]
    with torch.no_grad():
        logits = encoder.source.model(input_ids=encoder.batch([0, 1])["input_ids"]).logits[:, :-1]
    expected = (logits / 2.0).log_softmax(-1).topk(KEPT).values
    found = torch.tensor(batches[0]["teacher_log_probs"].to_pylist()).reshape(2, LENGTH - 1, KEPT)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_evaluation_columns_hold_the_rows_alone(tmp_path: Path) -> None:
    curriculum = one_shot(4, top_k=KEPT)
    encoder = encoder_of(curriculum, tmp_path, dtype="int8")
    form = encoder.evaluation_form(encoder.form(curriculum.stages[0], encoder.batch([0])))
    assert form.content == "inputs"
    found = list(encoder.evaluation_columns(form, [[0, 1]]))
    assert [columns["input_ids"].to_pylist() for columns in found] == [[row["input_ids"]] for row in encoder.evaluation]
    assert not any(name.startswith("teacher") for columns in found for name in columns)
