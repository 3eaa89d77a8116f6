"""Curricula and text behind a URL, and text that is streamed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.runs.conftest import settings, texts, train
from tutelage.io.store import Store
from tutelage.runs.distill import distill
from tutelage.runs.extraction.job import extract
from tutelage.runs.extraction.options import ExtractOptions
from tutelage.targets import manifest as storage
from tutelage.targets.folder import ExtractedCurriculum
from tutelage.targets.source import Reading
from tutelage.targets.stored_rows import StoredRows
from tutelage.tasks.text import read_dataset


def test_a_curriculum_is_written_to_and_read_from_a_url(
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
    with pytest.raises(
        ValueError, match=r"stage_2/data-00000-of-00004.arrow of the extracted curriculum .* is missing"
    ):
        train(tmp_path / "other", "memory://curricula/C")


def test_remote_shards_are_divided_among_the_devices(extracted: Callable[..., Path], bucket: Any) -> None:
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


def test_data_is_read_from_a_url(corpus: Path, bucket: Any) -> None:
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
def test_a_stream_without_a_budget_or_too_short_is_refused(
    corpus: Path, causal_teacher: Path, tmp_path: Path, run: dict[str, Any], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        distill(texts(corpus, streaming=True, **run), settings(tmp_path / "S", causal_teacher, **fields))


def test_streaming_is_refused_with_an_extracted_curriculum(
    extracted: Callable[..., Path], tmp_path: Path, corpus: Path
) -> None:
    with pytest.raises(ValueError, match="an extracted curriculum is always read as needed"):
        train(tmp_path / "S", extracted(), texts(corpus, streaming=True))
