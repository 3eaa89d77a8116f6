"""The whole way on real teachers and text: `make assets` first, then `pytest -m assets`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from tutelage import Standardizer, find_blocks, forward_to
from tutelage.cli import main

pytestmark = pytest.mark.assets


@pytest.fixture(scope="module")
def assets() -> Path:
    folder = Path(os.environ.get("TUTELAGE_ASSETS", ".assets"))
    assert (folder / "smollm2").is_dir(), f"no assets in {folder}: run `make assets`"
    return folder


def texts(assets: Path, count: int) -> list[str]:
    lines = (assets / "wikipedia" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    return [json.loads(line)["text"] for line in lines]


def short_text(assets: Path, folder: Path) -> str:
    """A small JSONL file of real summaries."""
    file = folder / "summaries.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(assets, 60)), encoding="utf-8")
    return str(file)


@pytest.mark.parametrize("method", ["extraction", "one_shot"])
def test_distil_smollm2(assets: Path, tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]) -> None:
    teacher, output = str(assets / "smollm2"), str(tmp_path / "student")
    arguments = {
        "teacher_model_name_or_path": teacher,
        "student": "layers=4,hidden_size=192,tie_word_embeddings=false",
        "student_init": "random",
        "dataset": short_text(assets, tmp_path),
        "method": method,
        "max_length": "64",
        "max_steps": "4",
        "per_device_train_batch_size": "2",
        "calibration_samples": "16",
        "max_samples": "2",
        "save_strategy": "no",
        "output_dir": output,
    }
    if method == "extraction":
        arguments["num_stages"] = "2"
    assert main(["distill", *(part for key, value in arguments.items() for part in (f"--{key}", value))]) == 0
    student = AutoModelForCausalLM.from_pretrained(output)
    assert student.config.hidden_size == 192
    assert len(find_blocks(student)) == 4
    assert (
        AutoTokenizer.from_pretrained(output)("a b")["input_ids"]
        == AutoTokenizer.from_pretrained(teacher)("a b")["input_ids"]
    )
    result = json.loads((tmp_path / "student/result.json").read_text())
    assert result["teacher"]["metrics"]["loss"] < 5 < result["student"]["metrics"]["loss"] < 12
    capsys.readouterr()


def test_smollm2_states_and_sinks(assets: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(assets / "smollm2").eval()
    tokenizer = AutoTokenizer.from_pretrained(assets / "smollm2")
    ids = tokenizer("\n".join(texts(assets, 20)), return_tensors="pt")["input_ids"][:, :128]
    with torch.no_grad():
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
        for block in (0, 1, 15, 29):
            torch.testing.assert_close(forward_to(model, block, input_ids=ids), states[block], rtol=0, atol=0)
    standardizer = Standardizer.fit(states[20][0])
    sinks = ~standardizer.keep(states[20])[0]
    assert sinks[0]  # the first token
    assert sinks.sum() <= 4
    assert standardizer(states[20][0])[~sinks].abs().max() < 30  # where raw states reach thousands


def test_distil_minilm_into_sentence_transformers_format(assets: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    from tutelage.tasks.embedding import load_embedding_model

    output = str(tmp_path / "student")
    arguments = {
        "teacher_model_name_or_path": str(assets / "minilm"),
        "student": "layers=3,hidden_size=96",
        "dataset": short_text(assets, tmp_path),
        "layer_map": "final:final",
        "warm_start": "head",
        "max_length": "32",
        "max_steps": "6",
        "per_device_train_batch_size": "4",
        "calibration_samples": "50",
        "save_strategy": "no",
        "output_dir": output,
    }
    assert main(["distill", *(part for key, value in arguments.items() for part in (f"--{key}", value))]) == 0
    sentences = texts(assets, 3)
    encoder = SentenceTransformer(output, device="cpu")
    theirs = torch.as_tensor(encoder.encode(sentences))
    assert theirs.shape == (3, 384)
    batch = AutoTokenizer.from_pretrained(output)(sentences, padding=True, truncation=True, return_tensors="pt")
    model = load_embedding_model(output).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**batch), theirs, rtol=1e-4, atol=1e-5)
    assert AutoModel.from_pretrained(output).config.hidden_size == 96
    result = json.loads((tmp_path / "student/result.json").read_text())
    assert -1 <= result["student"]["metrics"]["cosine"] <= 1
    assert {"similarity_pearson", "similarity_spearman"} <= result["student"]["metrics"].keys()


def test_evaluate_smollm2_against_itself(assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher, data = str(assets / "smollm2"), short_text(assets, tmp_path)
    arguments = [
        "--model",
        teacher,
        "--dataset",
        data,
        "--teacher",
        teacher,
        "--max_length",
        "64",
        "--max_samples",
        "4",
    ]
    assert main(["evaluate", *arguments, "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    assert metrics["kl"] == pytest.approx(0, abs=1e-5)
    assert metrics["agreement"] == 1
    assert 2 < metrics["loss"] < 4.5


@pytest.mark.parametrize(
    ("file", "count", "columns"),
    [
        ("lee/pairs.jsonl", 1225, {"sentence1", "sentence2", "score"}),
        ("wikipedia/retrieval-title.jsonl", 10_033, {"query", "document"}),
        ("wikipedia/retrieval-sentence.jsonl", 10_033, {"query", "document"}),
        ("articles/train.jsonl", 3279, {"title", "text"}),
        ("reviews/train.jsonl", 11_478, {"text", "label"}),
        ("reviews/heldout.jsonl", 1274, {"text", "label"}),
        ("brown/heldout.jsonl", 8905, {"text", "source"}),
    ],
)
def test_texts_have_all_their_rows(assets: Path, file: str, count: int, columns: set[str]) -> None:
    if not (assets / file).is_file() and file.startswith("brown"):
        pytest.skip("the Brown corpus needs npm")
    rows = [json.loads(line) for line in (assets / file).read_text(encoding="utf-8").splitlines()]
    assert len(rows) == count
    assert all(row.keys() == columns for row in rows)


def test_real_queries_and_documents(assets: Path) -> None:
    def read(file: str) -> list[dict[str, str]]:
        return [json.loads(line) for line in (assets / file).read_text(encoding="utf-8").splitlines()]

    pairs = read("lee/pairs.jsonl")
    assert len({pair[side] for pair in pairs for side in ("sentence1", "sentence2")}) == 50
    titles, sentences = read("wikipedia/retrieval-title.jsonl"), read("wikipedia/retrieval-sentence.jsonl")
    heldout = read("wikipedia/heldout.jsonl")
    assert [row["query"] for row in titles if row["query"]] == [row["title"] for row in heldout]
    assert [i for i, row in enumerate(titles) if row["query"]] == list(range(9, 10_033, 10))
    assert sum(bool(row["query"]) for row in sentences) == 925
    assert len({row["document"] for row in sentences}) == 10_033
