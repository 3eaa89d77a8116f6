"""model2vec's static model of MiniLM, measured as `students.py` measures our students.

    make .venv-lowest/.installed-dev
    .venv-lowest/bin/python -m pip install -c .venv-lowest/constraints.txt 'model2vec[distill]==0.10.0'
    .venv-lowest/bin/python benchmarks/model2vec_static.py --output results/model2vec

(`model2vec[distill]` needs transformers below 5.4: the environment of the oldest versions has 5.3.)

A static model has a vector for each token and averages those of a text: it is made from the vocabulary alone, without texts,
tokens or seeds. Its vectors are rotated (and shortened) by PCA, so a cosine to the teacher's embeddings says nothing. Instead:
the rank correlation of pairwise similarities with the teacher's, and the tests. Each is measured on the first 64 tokens of the
teacher, as for all other students, and on 512, the static model's own limit (the teacher's similarities are those of 64).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread, before tokenizers is imported

import torch
import torch.nn.functional as F
from students import TEACHERS, with_assets
from students_report import COLUMNS as PAGE
from torch import Tensor
from torch.utils.data import DataLoader

from tutelage.core.correlation import spearman
from tutelage.runs.environment import environment
from tutelage.runs.sentences import distinct_texts, encode, read_tests, run_tests, sentence_rows
from tutelage.runs.speed import SPEED_ROWS
from tutelage.tasks.loading import load_tokenizer, stored_bytes
from tutelage.tasks.registry import get_task
from tutelage.tasks.text import read_dataset

WIDTHS = (256, 384)  # their default, and the teacher's
PAIRED = 1000  # held-out texts whose pairwise similarities are compared, as in `tutelage evaluate`
REPEATS = 5
SETTINGS = TEACHERS["minilm"]
COLUMNS = {heading: metric for heading, metric in PAGE["minilm"].items() if metric != "cosine"}


def distilled(teacher: str, width: int, folder: str) -> Any:
    """A static model, as its library makes it, saved in half precision and loaded in single precision: half precision would
    give many documents the same similarity."""
    from model2vec import StaticModel  # of an environment of its own
    from model2vec.distill import distill

    distill(teacher, device="cpu", pca_dims=width).save_pretrained(folder)
    return StaticModel.from_pretrained(folder, quantize_to="float32")


def embed(static: Any, texts: Sequence[str]) -> Tensor:
    """Unit embeddings (N, E) of whole texts."""
    vectors_NE = static.encode(list(texts), max_length=None, use_multiprocessing=False)
    return F.normalize(torch.as_tensor(vectors_NE, dtype=torch.float32), dim=-1)


class Cut:
    """Cuts texts after so many tokens of the teacher."""

    def __init__(self, tokenizer: Any, tokens: int):
        self.tokenizer, self.tokens = tokenizer, tokens

    def __call__(self, texts: Sequence[str]) -> list[str]:
        given = {"truncation": True, "max_length": self.tokens, "return_offsets_mapping": True}
        offsets = self.tokenizer(list(texts), **given)["offset_mapping"]
        return [text[: max(end for _, end in spans)] for text, spans in zip(texts, offsets, strict=True)]


class Teacher:
    """The teacher on the held-out texts: its similarities, and its seconds per text for tokens and for the forward."""

    def __init__(self, folder: str, texts: list[str], length: int):
        task = get_task("embedding")
        model, self.tokenizer = task.load(folder).eval(), load_tokenizer(folder)
        assert self.tokenizer is not None
        collator = task.collator(self.tokenizer)
        rows = sentence_rows(texts[:PAIRED], model, self.tokenizer, task, length)
        self.similarities = similarities(encode(model, rows, task, collator, 64))
        some = rows.select(range(min(SPEED_ROWS, len(rows))))
        batches = list(DataLoader(some, batch_size=16, collate_fn=collator))
        with torch.inference_mode():
            forward = seconds_of(lambda: [task.whole_output(model, batch) for batch in batches])
        self.forward_seconds = forward / len(some)
        given = {"truncation": True, "max_length": length}
        self.token_seconds = seconds_of(lambda: self.tokenizer(texts, **given)) / len(texts)


def similarities(embeddings_NE: Tensor) -> Any:
    """Cosine similarities of all pairs of unit embeddings, N (N - 1) / 2."""
    first, second = torch.triu_indices(len(embeddings_NE), len(embeddings_NE), offset=1)
    return (embeddings_NE @ embeddings_NE.T)[first, second].double().numpy()


def seconds_of(work: Any) -> float:
    """Median CPU seconds of some runs, after one to warm up: on one thread, whatever else the machine does."""
    work()
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return statistics.median(times)


def measure(static: Any, teacher: Teacher, texts: list[str], assets: Path, length: int) -> dict[str, float]:
    """Rank correlation, tests and speed of a static model on the first `length` tokens of each text."""
    cut = Cut(teacher.tokenizer, length)
    shortened = cut(texts)
    theirs = similarities(embed(static, shortened[:PAIRED]))
    metrics = {"similarity_spearman": spearman(theirs, teacher.similarities)}
    for name, given in SETTINGS["evaluations"].items():
        found = with_assets(given, assets)
        tests = read_tests(found.get("pairs"), found.get("retrieval"), get_task("embedding"))
        whole = distinct_texts(tests)
        metrics |= {
            f"{name}: {key}": value for key, value in run_tests(tests, whole, embed(static, cut(whole))).items()
        }
    ids = static.tokenize(shortened)
    averaging = seconds_of(lambda: [static.embedding[row].mean(0) for row in ids]) / len(texts)
    both = seconds_of(lambda: embed(static, shortened)) / len(texts)
    metrics["sentences_per_second"] = 1 / averaging
    metrics["speedup"] = teacher.forward_seconds / averaging
    metrics["sentences_per_second_with_tokenizing"] = 1 / both
    metrics["speedup_with_tokenizing"] = (teacher.forward_seconds + teacher.token_seconds) / both
    return metrics


def run(assets: Path, widths: Sequence[int], lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Each width at each length."""
    texts: Any = read_dataset(str(assets / SETTINGS["held_out"]))["text"]
    texts = list(texts)[: SETTINGS["run"]["max_samples"]]
    folder = str(assets / SETTINGS["teacher"])
    teacher, found = Teacher(folder, texts, SETTINGS["run"]["max_length"]), []
    for width in widths:
        with tempfile.TemporaryDirectory() as made:
            start = time.perf_counter()
            static = distilled(folder, width, made)
            seconds = time.perf_counter() - start
            size = {"megabytes": (stored_bytes(made) or 0) / 1e6, "parameters": static.embedding.size}
        for length in lengths:
            metrics = measure(static, teacher, texts, assets, length)
            found.append({"width": width, "length": length, "seconds": seconds, "metrics": {**metrics, **size}})
            print(json.dumps(found[-1]), flush=True)
    return found


def report(result: dict[str, Any]) -> str:
    """README.md."""
    where = result["environment"]
    versions = ", ".join(f"{name} {where[name]}" for name in ("model2vec", "torch", "transformers"))
    lines = [
        "# model2vec's static model of all-MiniLM-L6-v2",
        "",
        f"By `{result['command']}`; {where['machine']}, one thread, {versions}.",
        "",
        "Made from the teacher's vocabulary alone with the defaults of the library. It uses no seed and no text, so there is",
        "one run of each; nothing was tuned. *Width*: `pca_dims` (default: 256). *Spearman*: rank correlation of the pairwise",
        "similarities of 1,000 held-out texts with the teacher's; a cosine to the teacher's embeddings would say nothing,",
        "since the vectors are in other coordinates. *MB*: weights on disk, in half precision as the library stores them.",
        "*Times as fast* as the teacher, in CPU seconds of one thread: averaging the vectors alone (tokens are given, as for",
        "our students), and with tokenizing. Tests and texts: as for [students of MiniLM](../students/minilm/README.md).",
        "",
        f"| width | tokens | {' | '.join(COLUMNS)} | MB | times as fast | with tokenizing |",
        "|---" * (len(COLUMNS) + 5) + "|",
    ]
    for found in result["runs"]:
        metrics = found["metrics"]
        cells = [f"{metrics[name]:.3f}" for name in COLUMNS.values()]
        cells += [f"{metrics['megabytes']:.1f}"]
        cells += [f"{metrics[name]:,.0f}" for name in ("speedup", "speedup_with_tokenizing")]
        lines.append(f"| {found['width']} | {found['length']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write results.json and README.md."""
    parser = argparse.ArgumentParser(description="model2vec's static model of MiniLM.")
    parser.add_argument("--assets", type=Path, default=Path(".assets"))
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    command = f".venv-lowest/bin/python benchmarks/model2vec_static.py --output {options.output}"
    runs = run(options.assets, WIDTHS, (SETTINGS["run"]["max_length"], 512))
    result = {"command": command, "environment": {**environment(), "model2vec": version("model2vec")}, "runs": runs}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "results.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (options.output / "README.md").write_text(report(result), encoding="utf-8")


if __name__ == "__main__":
    main()
