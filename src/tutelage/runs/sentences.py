"""Sentence encoders on tests that people rate them by: pairs with human ratings, and queries with their documents.

Shapes: N texts, E embedding width, P pairs, Q queries, M documents."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from tutelage.core.correlation import spearman
from tutelage.core.errors import UserError
from tutelage.runs.environment import quiet_unless_terminal
from tutelage.runs.inputs import sequence_length
from tutelage.tasks.base import Task
from tutelage.tasks.text import read_dataset, tokenize
from tutelage.training.checks import check_dataset

_LEAST_PAIRS = 3
_QUERIES_TOGETHER = 1024  # whose similarities to all documents are held at a time

Embed = Callable[[Sequence[str]], Tensor]
"""Unit embeddings of texts, (N, E)."""


@dataclass(frozen=True)
class Pairs:
    """Pairs of sentences with a human rating of their similarity."""

    first: list[str]
    second: list[str]
    scores: list[float]

    @classmethod
    def read(cls, path: str) -> "Pairs":
        """From a dataset with the columns sentence1, sentence2 and score; UserError if it has too few or unusable rows."""
        data, what = _read(path, "pairs", ("sentence1", "sentence2", "score")), f"pairs {path!r}"
        if len(data) < _LEAST_PAIRS:
            raise UserError(f"{what} has {len(data)} row(s): a rank correlation needs at least {_LEAST_PAIRS} pairs")
        first, second = (_texts(data, column, what) for column in ("sentence1", "sentence2"))
        scores = _values(data, "score", what, lambda value: isinstance(value, int | float) and math.isfinite(value))
        if len(set(scores)) == 1:
            raise UserError(
                f"{what} has the same score {scores[0]} in all rows: a rank correlation needs different ones"
            )
        return cls(first, second, scores)

    @property
    def texts(self) -> list[str]:
        return self.first + self.second

    def measure(self, embed: Embed) -> dict[str, float]:
        """`pairs_spearman`, the rank correlation of cosine similarities and ratings."""
        cosine_P = (embed(self.first) * embed(self.second)).sum(1)
        return {"pairs_spearman": spearman(cosine_P.cpu().double().numpy(), np.array(self.scores, dtype=float))}


@dataclass(frozen=True)
class Retrieval:
    """Queries, the document that answers each, and all documents, each text once."""

    queries: list[str]
    answers: list[int]  # index of the right document of each query
    documents: list[str]

    @classmethod
    def read(cls, path: str) -> "Retrieval":
        """From a dataset with the columns query and document: the document of a row answers its query, and rows without a
        query are only candidates. UserError if no row has a query, or one has no document."""
        data, what = _read(path, "retrieval", ("query", "document")), f"retrieval {path!r}"
        documents = _texts(data, "document", what)
        queries = _values(data, "query", what, lambda value: value is None or isinstance(value, str), "text or nothing")
        places = {text: place for place, text in enumerate(dict.fromkeys(documents))}
        asked = [
            (query, places[text]) for query, text in zip(queries, documents, strict=True) if query and query.strip()
        ]
        if not asked:
            raise UserError(f"{what} has no query: fill the column 'query' in at least one row")
        return cls([query for query, _ in asked], [place for _, place in asked], list(places))

    @property
    def texts(self) -> list[str]:
        return self.queries + self.documents

    def measure(self, embed: Embed) -> dict[str, float]:
        """`recall_at_1`, `recall_at_10` and `mrr` (mean reciprocal rank) among all documents, by cosine similarity; of
        documents with the same similarity the right one counts as the last."""
        queries_QE, documents_ME = embed(self.queries), embed(self.documents)
        answers_Q, parts = torch.tensor(self.answers), []
        for start in range(0, len(answers_Q), _QUERIES_TOGETHER):
            some = slice(start, start + _QUERIES_TOGETHER)
            similarity_QM = queries_QE[some] @ documents_ME.T
            parts.append((similarity_QM >= similarity_QM.gather(1, answers_Q[some, None])).sum(1))
        rank_Q = torch.cat(parts).cpu().double()
        recalls = {f"recall_at_{count}": (rank_Q <= count).cpu().double().mean().item() for count in (1, 10)}
        return {**recalls, "mrr": rank_Q.reciprocal().mean().item()}


def read_tests(pairs: str | None, retrieval: str | None, task: Task) -> list[Pairs | Retrieval]:
    """The tests whose files are given; UserError for models without sentence embeddings."""
    if (pairs or retrieval) and not task.embeds:
        given = "--pairs" if pairs else "--retrieval"
        raise UserError(f"{given} is for sentence encoders, but this model has the task {task.name}: leave {given} out")
    tests: list[Pairs | Retrieval] = [] if pairs is None else [Pairs.read(pairs)]
    return tests if retrieval is None else [*tests, Retrieval.read(retrieval)]


def distinct_texts(tests: Sequence[Pairs | Retrieval]) -> list[str]:
    """Every text of the tests, once."""
    return list(dict.fromkeys(text for test in tests for text in test.texts))


def run_tests(tests: Sequence[Pairs | Retrieval], texts: Sequence[str], embeddings_NE: Tensor) -> dict[str, float]:
    """Metrics of all tests, from the unit embeddings of their distinct texts."""
    places = {text: place for place, text in enumerate(texts)}

    def embed(some: Sequence[str]) -> Tensor:
        return embeddings_NE[[places[text] for text in some]]

    return {name: value for test in tests for name, value in test.measure(embed).items()}


def compared(model: dict[str, float], teacher: dict[str, float] | None = None) -> dict[str, float]:
    """The metrics of a model, with the teacher's (`teacher_*`) and the fraction of them that the model keeps (`*_kept`),
    which is left out where the teacher's is not positive."""
    theirs = teacher or {}
    kept = {f"{name}_kept": model[name] / value for name, value in theirs.items() if value > 0}
    return {**model, **{f"teacher_{name}": value for name, value in theirs.items()}, **kept}


def sentence_rows(
    texts: Sequence[str], model: nn.Module, tokenizer: PreTrainedTokenizerBase, task: Task, max_length: int | None
) -> Dataset:
    """Texts as the inputs of a model, truncated to `max_length` tokens (None: the model's limit, capped at 256)."""
    data = Dataset.from_dict({"text": list(texts)})
    config: Any = task.backbone(model).config
    length = sequence_length(max_length, [config], tokenizer, data)
    rows = tokenize(data, tokenizer, task, length)
    check_dataset(rows, [model], task, "sentence")
    return rows


@torch.inference_mode()
def encode(model: nn.Module, rows: Dataset, task: Task, collator: Any, batch_size: int) -> Tensor:
    """Unit embeddings of the rows, (N, E) in float32 on the CPU, from batches of rows with similar lengths; UserError where one
    is not finite."""
    lengths = [len(ids) for ids in rows["input_ids"]]
    order = sorted(range(len(rows)), key=lengths.__getitem__, reverse=True)  # too little memory shows at once
    loader = DataLoader(rows.select(order), batch_size=batch_size, collate_fn=collator)
    device, parts = next(model.parameters()).device, []
    model.eval()
    for batch in tqdm(loader, desc="Encoding", unit="batch", disable=quiet_unless_terminal()):
        output_BE = task.whole_output(model, {key: value.to(device) for key, value in batch.items()})
        parts.append(F.normalize(output_BE.float(), dim=-1).cpu())
        if not parts[-1].isfinite().all():  # no number is above NaN: it would count as the best of all
            raise UserError("the model gives embeddings that are not finite: train it again at a lower learning_rate")
    return torch.cat(parts)[torch.tensor(order).argsort()]


def held_out_part(data: Any) -> Dataset:
    """The part of a dataset that is meant for evaluation, where it has several."""
    if not isinstance(data, dict):
        return data
    held_out = [data[name] for name in ("test", "validation", "eval") if name in data]
    return (held_out or list(data.values()))[0]


def _read(path: str, kind: str, columns: Sequence[str]) -> Dataset:
    data = held_out_part(read_dataset(path))
    if missing := [column for column in columns if column not in data.column_names]:
        found = f"{kind} {path!r} has no column {missing[0]!r} (it has {', '.join(data.column_names)})"
        raise UserError(f"{found}: it needs the columns {', '.join(columns)}")
    return data


def _texts(data: Dataset, column: str, what: str) -> list[str]:
    return _values(data, column, what, lambda value: isinstance(value, str) and bool(value.strip()), "text")


def _values(
    data: Dataset, column: str, what: str, usable: Callable[[Any], bool], expected: str = "a finite number"
) -> list[Any]:
    """The values of a column; UserError for the first that cannot be used."""
    values = list(data[column])
    for row, value in enumerate(values):
        if not usable(value):
            found = f"{what} has {str(value)[:40]!r} in column {column!r} of row {row + 1}"
            raise UserError(f"{found}: expected {expected}; correct or drop the row")
    return values
