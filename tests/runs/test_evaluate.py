"""`evaluate`: rated pairs and retrieval of sentence encoders, size and speed of every model."""

from __future__ import annotations

import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import AutoTokenizer, BertModel

from tests.cli.conftest import run
from tests.conftest import WORDS, bert_config, make_tokenizer, sentences
from tutelage import EvaluateOptions, evaluate
from tutelage.core.errors import UserError
from tutelage.runs import speed
from tutelage.runs.sentences import Retrieval
from tutelage.tasks.embedding import EmbeddingModel, SentenceEmbedding, load_embedding_model
from tutelage.tasks.loading import load_model, stored_bytes

SCORES = [3.5, 1.0, 1.0, 5.0, 2.25, 4.0, 1.0, 3.5, 2.0, 4.75, 0.5, 3.0]  # with ties


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence encoder with a Dense module, and its tokenizer."""
    folder = tmp_path_factory.mktemp("students") / "narrow"
    torch.manual_seed(1)
    config = bert_config(num_hidden_layers=1, hidden_size=16, num_attention_heads=2, intermediate_size=32)
    EmbeddingModel(BertModel(config), 32).save_pretrained(folder)
    make_tokenizer(encoder=True).save_pretrained(folder)
    return folder


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    rows = {"sentence1": sentences(12, seed=1), "sentence2": sentences(12, seed=2), "score": SCORES}
    return write_rows(tmp_path / "pairs.jsonl", rows)


@pytest.fixture
def retrieval(tmp_path: Path) -> Path:
    """30 documents, two of them equal; 12 queries, and rows with an empty or no query."""
    documents = sentences(29, seed=3)
    queries = [*sentences(12, words=5, seed=4), *[""] * 5, *[None] * 13]
    return write_rows(tmp_path / "retrieval.jsonl", {"query": queries, "document": [*documents, documents[3]]})


def write_rows(path: Path, columns: dict[str, list[Any]]) -> Path:
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@torch.no_grad()
def embed(folder: Path, text: str, length: int = 64) -> torch.Tensor:
    """The unit embedding of one text, without padding."""
    ids = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    ids = ids if len(ids) <= length else [*ids[: length - 1], ids[-1]]  # [SEP] stays
    return F.normalize(load_embedding_model(str(folder)).eval()(torch.tensor([ids]))[0], dim=0)


def mean_ranks(values: list[float]) -> torch.Tensor:
    return torch.tensor([sum(v < u for v in values) + (sum(v == u for v in values) + 1) / 2 for u in values])


def spearman_of(folder: Path, pairs: Path, length: int = 64) -> float:
    rows = read_rows(pairs)
    cosines = [float(embed(folder, row["sentence1"], length) @ embed(folder, row["sentence2"], length)) for row in rows]
    ranks = torch.stack([mean_ranks(cosines), mean_ranks([row["score"] for row in rows])])
    return float(torch.corrcoef(ranks)[0, 1])


def test_pairs_give_the_rank_correlation_with_human_ratings(
    student: Path, pairs: Path, embedding_teacher: Path
) -> None:
    found = evaluate(EvaluateOptions(str(student), teacher=str(embedding_teacher), pairs=str(pairs), batch_size=5))
    mine, theirs = spearman_of(student, pairs), spearman_of(embedding_teacher, pairs)
    assert found.metrics["pairs_spearman"] == pytest.approx(mine, abs=1e-6)
    assert found.metrics["teacher_pairs_spearman"] == pytest.approx(theirs, abs=1e-6)
    assert ("pairs_spearman_kept" in found.metrics) == (theirs > 0)
    assert (found.dataset, found.pairs, found.sequences) == (None, str(pairs), 0)
    back = evaluate(EvaluateOptions(str(embedding_teacher), teacher=str(embedding_teacher), pairs=str(pairs)))
    assert back.metrics.get("pairs_spearman_kept", 1.0) == pytest.approx(1)


def test_long_texts_are_truncated_as_in_training(student: Path, tmp_path: Path) -> None:
    rows = {"sentence1": sentences(12, 30, seed=5), "sentence2": sentences(12, 30, seed=2), "score": SCORES}
    pairs = write_rows(tmp_path / "long.jsonl", rows)
    found = evaluate(EvaluateOptions(str(student), pairs=str(pairs), max_length=8)).metrics["pairs_spearman"]
    assert found == pytest.approx(spearman_of(student, pairs, 8), abs=1e-6)
    assert abs(found - spearman_of(student, pairs)) > 1e-3


def test_retrieval_ranks_each_document_among_all(student: Path, retrieval: Path, embedding_teacher: Path) -> None:
    found = evaluate(EvaluateOptions(str(student), teacher=str(embedding_teacher), retrieval=str(retrieval))).metrics
    rows = read_rows(retrieval)
    for prefix, folder in (("", student), ("teacher_", embedding_teacher)):
        documents = {row["document"]: embed(folder, row["document"]) for row in rows}
        ranks = []
        for row in rows:
            if row["query"]:
                query = embed(folder, row["query"])
                order = sorted(documents, key=lambda text: -float(documents[text] @ query))
                ranks.append(order.index(row["document"]) + 1)
        assert len(ranks) == 12
        for count in (1, 10):
            assert found[f"{prefix}recall_at_{count}"] == pytest.approx(sum(rank <= count for rank in ranks) / 12)
        assert found[f"{prefix}mrr"] == pytest.approx(sum(1 / rank for rank in ranks) / 12)
    assert found["mrr_kept"] == pytest.approx(found["mrr"] / found["teacher_mrr"])


def test_embeddings_that_are_not_numbers_are_refused(student: Path, retrieval: Path, tmp_path: Path) -> None:
    """No similarity is above NaN, so that every answer would rank first."""
    model = load_embedding_model(str(student))
    model.encoder.get_input_embeddings().weight.data.fill_(float("nan"))
    model.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(student).save_pretrained(tmp_path / "broken")
    with pytest.raises(UserError, match="the model gives embeddings that are not finite"):
        evaluate(EvaluateOptions(model=str(tmp_path / "broken"), retrieval=str(retrieval)))


def test_retrieval_by_hand(tmp_path: Path) -> None:
    """Unit vectors at angles; the answer of q1 is the nearest, that of q2 the second, that of q3 ties with two others."""
    degrees = {"q1": 0, "q2": 50, "q3": 180, "a": 1, "b": 40, "c": 55, "d": 179, "e": 181}
    columns = {"query": ["q1", "q2", "q3", None, "", "q1"], "document": ["a", "b", "d", "c", "e", "a"]}
    test = Retrieval.read(str(write_rows(tmp_path / "r.jsonl", columns)))
    assert test.documents == ["a", "b", "d", "c", "e"]  # equal texts are one document

    def unit(texts: Any) -> torch.Tensor:
        angle = torch.tensor([float(degrees[text]) for text in texts]) * torch.pi / 180
        return torch.stack([angle.cos(), angle.sin()], dim=1).mul(1e4).round().div(1e4)  # so that d and e are as near

    expected = {"recall_at_1": 2 / 4, "recall_at_10": 1.0, "mrr": (1 + 1 / 2 + 1 / 2 + 1) / 4}
    assert test.measure(unit) == pytest.approx(expected)


def test_each_distinct_text_is_encoded_once_in_order_of_length(
    student: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[torch.Size] = []
    whole = SentenceEmbedding.whole_output

    def record(self: Any, model: Any, batch: Any) -> Any:
        shapes.append(batch["input_ids"].shape)
        return whole(self, model, batch)

    monkeypatch.setattr(SentenceEmbedding, "whole_output", record)
    rows = read_rows(pairs)
    texts = [row["sentence1"] for row in rows]
    retrieval = write_rows(tmp_path / "r.jsonl", {"query": texts, "document": [row["sentence2"] for row in rows]})
    evaluate(EvaluateOptions(str(student), pairs=str(pairs), retrieval=str(retrieval), batch_size=4))
    distinct = {text for row in rows for text in (row["sentence1"], row["sentence2"])}
    assert sum(shape[0] for shape in shapes) == len(distinct)
    lengths = sorted((len(text.split()) + 2 for text in distinct), reverse=True)
    assert [shape[1] for shape in shapes] == lengths[::4]


def test_a_teacher_may_have_its_own_tokenizer_where_only_sentences_are_compared(
    student: Path, pairs: Path, embedding_teacher: Path, tmp_path: Path
) -> None:
    load_embedding_model(str(embedding_teacher)).save_pretrained(tmp_path / "other")
    make_tokenizer(encoder=True, words=WORDS[::-1]).save_pretrained(tmp_path / "other")
    found = evaluate(EvaluateOptions(str(student), teacher=str(tmp_path / "other"), pairs=str(pairs))).metrics
    assert found["teacher_pairs_spearman"] == pytest.approx(spearman_of(tmp_path / "other", pairs), abs=1e-6)


def test_dataset_and_sentences_together(student: Path, pairs: Path, embedding_teacher: Path, corpus: Path) -> None:
    flags = ("--model", student, "--teacher", embedding_teacher, "--dataset", corpus / "text.jsonl", "--max_samples", 8)
    both = json.loads(run("evaluate", *flags, "--pairs", pairs, "--json"))
    alone = json.loads(run("evaluate", *flags, "--json"))
    assert both["sequences"] == alone["sequences"] == 8
    assert {name: both["metrics"][name] for name in alone["metrics"]} == alone["metrics"]
    assert "pairs_spearman" in both["metrics"] and "cosine" in both["metrics"]
    table = dict(line.split(maxsplit=1) for line in run("evaluate", *flags, "--pairs", pairs).splitlines())
    assert table["pairs"] == str(pairs)
    assert table["teacher_pairs_spearman"] == f"{both['metrics']['teacher_pairs_spearman']:.4f}"
    assert table["parameters"] == f"{both['metrics']['parameters']:,}"


def text_rows(**columns: list[Any]) -> dict[str, list[Any]]:
    return {"sentence1": list(WORDS[:3]), "sentence2": list(WORDS[3:6]), "score": [1, 2, 3], **columns}


@pytest.mark.parametrize(
    ("kind", "columns", "message"),
    [
        ("pairs", {"sentence1": ["ba"], "sentence2": ["da"]}, "has no column 'score' (it has sentence1, sentence2)"),
        ("pairs", {name: values[:2] for name, values in text_rows().items()}, "has 2 row(s): a rank correlation needs"),
        ("pairs", text_rows(score=[2, 2, 2]), "has the same score 2 in all rows"),
        ("pairs", text_rows(score=["a", "b", "c"]), "has 'a' in column 'score' of row 1: expected a finite number"),
        ("pairs", text_rows(sentence2=["ba", None, "da"]), "has 'None' in column 'sentence2' of row 2: expected text"),
        ("pairs", text_rows(sentence1=["ba", "da", " "]), "has ' ' in column 'sentence1' of row 3: expected text"),
        ("retrieval", {"query": ["ba"], "text": ["da"]}, "has no column 'document' (it has query, text)"),
        ("retrieval", {"query": ["", None], "document": ["ba", "da"]}, "has no query: fill the column 'query'"),
        ("retrieval", {"query": [1, 2], "document": ["ba", "da"]}, "column 'query' of row 1: expected text or nothing"),
        (
            "retrieval",
            {"query": ["ba", ""], "document": ["da", ""]},
            "has '' in column 'document' of row 2: expected text",
        ),
    ],
)
def test_unusable_files_are_refused_before_a_model_is_loaded(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, columns: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(SentenceEmbedding, "load", lambda *_args, **_kwargs: pytest.fail("a model was loaded"))
    path = write_rows(tmp_path / "rows.jsonl", columns)
    with pytest.raises(UserError) as refused:
        evaluate(EvaluateOptions(str(student), **{kind: str(path)}))
    assert f"{kind} {str(path)!r}" in str(refused.value)
    assert message in str(refused.value)


def test_other_models_have_no_sentence_metrics(mlm_teacher: Path, pairs: Path, corpus: Path) -> None:
    data = str(corpus / "text.txt")
    for kind in ("pairs", "retrieval"):
        with pytest.raises(
            UserError, match=f"--{kind} is for sentence encoders, but this model has the task masked_lm"
        ):
            evaluate(EvaluateOptions(str(mlm_teacher), data, **{kind: str(pairs)}))


def test_sizes_are_those_of_the_stored_weights(student: Path, pairs: Path, embedding_teacher: Path) -> None:
    (student / "target_stats.safetensors").write_bytes(bytes(5000))  # of a run, no weights
    found = evaluate(EvaluateOptions(str(student), teacher=str(embedding_teacher), pairs=str(pairs))).metrics
    files = (student / "model.safetensors", student / "2_Dense" / "model.safetensors")
    assert found["megabytes"] == sum(file.stat().st_size for file in files) / 1e6
    assert found["teacher_megabytes"] == (embedding_teacher / "model.safetensors").stat().st_size / 1e6
    model = load_embedding_model(str(student))
    assert found["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    halves = speed.model_size(model.bfloat16(), "a-name/on-the-hub")  # no folder: as it is in memory
    assert halves["megabytes"] == pytest.approx(2 * found["parameters"] / 1e6)


def test_shards_add_up(causal_teacher: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    load_model(str(causal_teacher), AutoModelForCausalLM).save_pretrained(tmp_path, max_shard_size="50KB")
    shards = list(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert stored_bytes(str(tmp_path)) == sum(file.stat().st_size for file in shards)
    assert stored_bytes(str(tmp_path / "none")) is None


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[float]], None]:
    """Make the passes that are timed take these seconds."""

    def tick(seconds: list[float]) -> None:
        readings = iter([reading for duration in seconds for reading in (0.0, duration)])
        monkeypatch.setattr(speed, "time", types.SimpleNamespace(perf_counter=lambda: next(readings)))

    return tick


def test_speed_is_the_median_pass_on_one_thread(
    ticking: Callable[[list[float]], None],
    student: Path,
    embedding_teacher: Path,
    corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads, calls = torch.get_num_threads(), []
    whole = SentenceEmbedding.whole_output

    def record(self: Any, model: Any, batch: Any) -> Any:
        calls.append(torch.get_num_threads())
        return whole(self, model, batch)

    monkeypatch.setattr(SentenceEmbedding, "whole_output", record)
    ticking([2.0, 10.0, 1.0, 9.0, 99.0, 8.0, 1.0, 8.0, 2.0, 8.0])  # model and teacher in turns
    names = (str(student), str(corpus / "text.jsonl"), str(embedding_teacher))
    options = EvaluateOptions(*names, max_samples=32, measure_speed=True)
    torch.set_num_threads(2)
    try:
        found = evaluate(options).metrics
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    timed = 5 * 2 * 2 + 2  # passes, models and batches, and one batch each to warm up
    assert calls[-timed:] == [1] * timed
    assert 1 not in calls[:-timed]
    assert found["sentences_per_second"] == 32 / 2
    assert found["teacher_sentences_per_second"] == 32 / 8
    assert found["speedup"] == 4
    assert "tokens_per_second" not in found


def test_speed_of_a_language_model_counts_tokens(
    ticking: Callable[[list[float]], None], causal_teacher: Path, corpus: Path
) -> None:
    ticking([0.5] * 5)
    flags = ("--model", causal_teacher, "--dataset", corpus / "text.txt", "--max_length", 16, "--max_samples", 6)
    found = json.loads(run("evaluate", *flags, "--measure_speed", "true", "--json"))["metrics"]
    assert (found["sequences_per_second"], found["tokens_per_second"]) == (12, 12 * 16)
    assert "speedup" not in found


def test_speed_without_a_dataset_is_measured_on_the_sentences(
    ticking: Callable[[list[float]], None], student: Path, tmp_path: Path
) -> None:
    ticking([1.0] * 5)
    rows = Dataset.from_dict({"query": ["ba"] * 300, "document": sentences(300)})
    rows.to_parquet(tmp_path / "rows.parquet")
    options = EvaluateOptions(str(student), retrieval=str(tmp_path / "rows.parquet"), measure_speed=True)
    assert evaluate(options).metrics["sentences_per_second"] == 256
