"""Extraction and training where text and curriculum lie in object storage, on a local S3 server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from tests.runs.conftest import no_space_left, settings, texts, train
from tutelage.cli import main
from tutelage.runs.extraction.job import extract
from tutelage.runs.extraction.options import ExtractOptions
from tutelage.targets import manifest as storage

moto_server = pytest.importorskip("moto.server", reason="needs moto[server] and s3fs")
pytest.importorskip("s3fs", reason="needs moto[server] and s3fs")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    running = moto_server.ThreadedMotoServer(port=0, verbose=False)
    running.start()
    yield "http://{}:{}".format(*running.get_host_and_port())
    running.stop()


@pytest.fixture
def s3(server: str, monkeypatch: pytest.MonkeyPatch, corpus: Path) -> Any:
    """File system of the server, with the text in a bucket; URLs reach it through the variables that AWS tools read."""
    values = {
        "ENDPOINT_URL": server,
        "ACCESS_KEY_ID": "user",
        "SECRET_ACCESS_KEY": "secret",
        "DEFAULT_REGION": "us-east-1",
    }
    for name, value in values.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    found = fsspec.filesystem("s3", skip_instance_cache=True)
    if not found.exists("bucket"):
        found.mkdir("bucket")
        found.put_file(str(corpus / "text.jsonl"), "bucket/text/part-0.jsonl")
        found.put(str(corpus / "folder"), "bucket/text/folder", recursive=True)
    return found


def test_loader_processes_fetch_their_own(s3: Any, corpus: Path, causal_teacher: Path, tmp_path: Path) -> None:
    args = settings(Path("unused"), causal_teacher, max_steps=16)
    args.output_dir = "s3://bucket/workers"
    extract(texts(corpus), args, ExtractOptions(shard_tokens=200), log=print)
    train(tmp_path / "one", args.output_dir)
    train(tmp_path / "two", args.output_dir, dataloader_num_workers=2)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_a_far_shard_is_compared_when_it_is_fetched(
    s3: Any, corpus: Path, causal_teacher: Path, tmp_path: Path
) -> None:
    args = settings(Path("unused"), causal_teacher, max_steps=16)
    args.output_dir = "s3://bucket/damaged"
    extract(texts(corpus), args, ExtractOptions(shard_tokens=200), log=print)
    for name in s3.find("bucket/damaged/stage_2"):
        if name.endswith(".arrow"):
            content = bytearray(s3.cat(name))
            content[-100] ^= 1
            s3.pipe(name, bytes(content))
    with pytest.raises(ValueError, match=r"stage_2/.* is damaged \(its checksum is not the manifest's\)"):
        train(tmp_path / "student", args.output_dir)
    assert (tmp_path / "student" / "curriculum.json").exists()  # it had begun: what is not needed yet is not read


@pytest.mark.parametrize("name", ["part-*.jsonl", "part-0.jsonl", "folder"])
def test_text_and_curriculum_in_a_bucket(
    s3: Any, corpus: Path, causal_teacher: Path, tmp_path: Path, name: str
) -> None:
    how = ExtractOptions(shard_tokens=200)
    near = extract(
        texts(corpus, streaming=True), settings(tmp_path / "near", causal_teacher, max_steps=16), how, log=print
    )
    args = settings(Path("unused"), causal_teacher, max_steps=16)
    args.output_dir = f"s3://bucket/{name.strip('*')}"
    made = extract(texts(corpus, dataset=f"s3://bucket/text/{name}", streaming=True), args, how, log=print)
    assert made.splits == near.splits  # to the checksum
    train(tmp_path / "far", args.output_dir)
    train(tmp_path / "student", str(tmp_path / "near"))
    assert (tmp_path / "far/model.safetensors").read_bytes() == (tmp_path / "student/model.safetensors").read_bytes()


def test_the_command_line(
    s3: Any, causal_teacher: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = "s3://bucket/cli"
    command = [
        *("extract", f"--teacher={causal_teacher}", "--dataset=s3://bucket/text/part-*.jsonl", "--streaming=true"),
        *("--student=layers=2,hidden_size=16", "--max_length=16", "--max_steps=16", "--per_device_train_batch_size=4"),
        *(f"--output_dir={folder}", "--shard_tokens=200", "--use_cpu=true", "--student_init=random"),
    ]
    with monkeypatch.context() as killed:
        write, written = storage.ShardWriter.write, []

        def write_two(writer: storage.ShardWriter, number: int, parts: Any) -> Any:
            if len(written) == 2:
                parts = no_space_left()
            written.append(number)
            return write(writer, number, parts)

        killed.setattr(storage.ShardWriter, "write", write_two)
        assert main(command) == 2
    assert "could not write 's3://bucket/cli/" in capsys.readouterr().err
    assert main(["inspect", folder]) == 2
    assert "is unfinished: run the same" in capsys.readouterr().err
    before = {name: s3.modified(name) for name in s3.find("bucket/cli") if name.endswith(".arrow")}
    assert len(before) == 2
    assert main(command) == 0
    assert {name: s3.modified(name) for name in before} == before
    capsys.readouterr()
    assert main(["inspect", folder]) == 0
    assert "checksums: all as in the manifest" in capsys.readouterr().out
    run = ["distill", f"--curriculum_dir={folder}", "--student=layers=2,hidden_size=8", "--use_cpu=true"]
    assert main([*run, f"--output_dir={tmp_path / 'S'}", "--save_strategy=no", "--disable_tqdm=true"]) == 0
    assert (tmp_path / "S" / "model.safetensors").is_file()


def test_a_bucket_that_cannot_be_reached(s3: Any, causal_teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for dataset in ("s3://bucket/none.jsonl", "s3://bucket/text/none-*.jsonl", "s3://bucket/text"):
        with pytest.raises(
            ValueError, match=r"could not stream dataset 's3://bucket/|'s3://bucket/text' was not written by"
        ):
            extract(
                texts(Path(), dataset=dataset, streaming=True),
                settings(Path("unused"), causal_teacher),
                ExtractOptions(),
            )
    assert main(["inspect", "s3://bucket/none"]) == 2
    assert "s3://bucket/none" in capsys.readouterr().err
