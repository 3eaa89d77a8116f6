"""Reading, splitting, tokenising, packing and collating text."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from tests.conftest import WORDS, make_tokenizer, sentences
from tutelage.tasks import text as reading
from tutelage.tasks.registry import TASKS
from tutelage.tasks.text import keep_rows, read_dataset, split_dataset, stream_dataset, tokenize

CAUSAL, MASKED, CLASSIFIER, EMBEDDING = (
    TASKS[name] for name in ("causal_lm", "masked_lm", "sequence_classification", "embedding")
)
CLS, SEP, MASK, EOS = 2, 3, 4, 5


@pytest.fixture(scope="module")
def plain() -> PreTrainedTokenizerBase:
    return make_tokenizer()


@pytest.fixture(scope="module")
def encoder() -> PreTrainedTokenizerBase:
    return make_tokenizer(encoder=True)


def flat(rows: Any) -> list[int]:
    return [token for row in rows["input_ids"] for token in row]


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer.convert_tokens_to_ids(text.split())


# ---- Reading ----


@pytest.mark.parametrize("name", ["text.txt", "text.jsonl", "text.parquet", "folder"])
def test_every_format_gives_the_same_texts(corpus: Path, name: str) -> None:
    data = read_dataset(str(corpus / name))
    assert [text.removesuffix("\n") for text in data["text"]] == sentences(120)


def test_splits_of_a_folder(tmp_path: Path, corpus: Path) -> None:
    rows = Dataset.from_dict({"text": sentences(6)})
    DatasetDict({"train": rows.select(range(4)), "validation": rows.select(range(4, 6))}).save_to_disk(tmp_path / "d")
    data = read_dataset(str(tmp_path / "d"))
    train, held_out = split_dataset(data, 0.5)
    assert (list(train["text"]), list(held_out["text"])) == (sentences(6)[:4], sentences(6)[4:])
    assert list(read_dataset(str(tmp_path / "d"), "validation")["text"]) == sentences(6)[4:]
    with pytest.raises(ValueError, match=r"has no split 'test': it has train, validation"):
        read_dataset(str(tmp_path / "d"), "test")
    with pytest.raises(ValueError, match=r"has no split 'test': it has no splits"):
        read_dataset(str(corpus / "text.txt"), "test")


def test_the_end_is_held_out_where_there_is_no_split() -> None:
    rows = Dataset.from_dict({"text": sentences(20)})
    for data in (rows, DatasetDict({"train": rows})):
        train, held_out = split_dataset(data, 0.1)
        assert (list(train["text"]), list(held_out["text"])) == (sentences(20)[:18], sentences(20)[18:])


def test_too_few_rows_to_split() -> None:
    with pytest.raises(ValueError, match=r"has 1 example\(s\), too few to hold 1 out"):
        split_dataset(Dataset.from_dict({"text": ["one"]}), 0.05)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("text.txt", b"", "is empty: it needs at least one example"),
        ("text.csv", b"text\n", r"ends in '.csv': expected .txt, .jsonl or .parquet"),
        ("text.txt", b"na\xefve\n", r"not UTF-8: byte 0xef near offset 2; convert it, e.g. `iconv"),
        ("text.jsonl", b'{"text": "na\xefve"}\n', "not UTF-8"),
        ("text.txt", b"cut \xe2\x82", "not UTF-8"),
        ("text.jsonl", b"not json\n", r"could not read '.*text.jsonl' as .jsonl"),
        ("text.parquet", b"not parquet", r"could not read '.*text.parquet' as .parquet"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_dataset(str(tmp_path / name))


def test_a_byte_that_is_no_utf8_is_found_beyond_the_first_block(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(b"e" * (1 << 20) + b"\xc3\xa9 \xe9\n")
    with pytest.raises(ValueError, match=r"byte 0xe9 near offset 1048579;"):
        read_dataset(str(tmp_path / "text.txt"))


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no dataset file '/nowhere/text.txt'"):
        read_dataset("/nowhere/text.txt")
    with pytest.raises(
        ValueError,
        match="no dataset 'nobody/nothing': there is no local file or folder of that name, and it was not found",
    ):
        read_dataset("nobody/nothing")
    with pytest.raises(ValueError, match="was not written by datasets' save_to_disk"):
        read_dataset(str(tmp_path))
    Dataset.from_dict({"text": []}).save_to_disk(tmp_path / "empty")
    with pytest.raises(ValueError, match="is empty: it needs at least one example"):
        read_dataset(str(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("text.txt", CAUSAL),
        ("text.txt", MASKED),  # it has no labels for a classifier
        *itertools.product(["text.jsonl", "text.parquet", "folder", "*.jsonl"], [CAUSAL, MASKED, CLASSIFIER]),
    ],
)
def test_a_stream_gives_the_rows_of_the_dataset(corpus: Path, name: str, task: Any, encoder: Any) -> None:
    whole = tokenize(read_dataset(str(corpus / name.replace("*", "text"))), encoder, task, 16)
    stream = tokenize(stream_dataset(str(corpus / name)), encoder, task, 16)
    kept = keep_rows(stream, 10**6)
    assert kept.to_list() == whole.to_list() and len(whole) > 20
    assert keep_rows(stream, 5).to_list() == whole.to_list()[:5]


def test_a_stream_is_read_as_far_as_needed(tmp_path: Path, plain: PreTrainedTokenizerBase) -> None:
    seen = []

    def documents() -> Any:
        for text in sentences(200_000):
            seen.append(text)
            yield {"text": text}

    rows = keep_rows(tokenize(IterableDataset.from_generator(documents), plain, CAUSAL, 16), 10)
    assert len(rows) == 10
    assert len(seen) < 100_000


def test_a_stream_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("no json\n")
    with pytest.raises(ValueError, match=r"could not stream dataset '.*\*.jsonl'"):
        stream_dataset(str(tmp_path / "*.jsonl"))
    with pytest.raises(ValueError, match=r"no dataset file '/nowhere/text.txt'"):
        stream_dataset("/nowhere/text.txt")
    with pytest.raises(ValueError, match=r"could not stream dataset 'nobody/nothing'"):
        stream_dataset("nobody/nothing")


# ---- Packing ----


def test_lines_of_a_text_file_are_one_stream(corpus: Path, plain: PreTrainedTokenizerBase) -> None:
    packed = tokenize(read_dataset(str(corpus / "text.txt")), plain, CAUSAL, 16)
    stream = ids_of(plain, " ".join(sentences(120)))
    assert flat(packed) == stream[: len(stream) // 16 * 16]
    assert {len(row) for row in packed["input_ids"]} == {16}
    assert packed.column_names == ["input_ids"]


@pytest.mark.parametrize("name", ["text.jsonl", "text.parquet", "folder"])
def test_documents_end_with_eos(corpus: Path, plain: PreTrainedTokenizerBase, name: str) -> None:
    packed = tokenize(read_dataset(str(corpus / name)), plain, CAUSAL, 16)
    stream = [token for text in sentences(120) for token in (*ids_of(plain, text), EOS)]
    assert flat(packed) == stream[: len(stream) // 16 * 16]


BOS = CLS  # of the tokenizers below


def beginning(template: str) -> PreTrainedTokenizerBase:
    """A causal tokenizer with a template, as Llama's and Gemma's are."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[("[CLS]", BOS), ("<eos>", EOS)]
    )
    return tokenizer


@pytest.mark.parametrize("template", ["[CLS] $A", "[CLS] $A <eos>", "$A <eos>"])
@pytest.mark.parametrize("streamed", [False, True])
def test_documents_begin_as_the_tokenizer_begins_them(template: str, streamed: bool) -> None:
    tokenizer, data = beginning(template), Dataset.from_dict({"text": sentences(20)})
    rows = tokenize(data.to_iterable_dataset() if streamed else data, tokenizer, CAUSAL, 16)
    stream = [token for text in sentences(20) for token in tokenizer(text)["input_ids"]]
    if "eos" not in template:
        stream = [token for text in sentences(20) for token in (*tokenizer(text)["input_ids"], EOS)]
    found = [token for row in rows for token in row["input_ids"]]
    assert found == stream[: len(stream) // 16 * 16] and found.count(BOS) == (20 if "CLS" in template else 0)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_text_file_begins_once(
    corpus: Path, plain: PreTrainedTokenizerBase, streamed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lines are one document, also where they are packed in several groups."""
    monkeypatch.setattr(reading, "_PACKED_TOGETHER", 50)
    read = stream_dataset if streamed else read_dataset
    rows = tokenize(read(str(corpus / "text.txt")), beginning("[CLS] $A <eos>"), CAUSAL, 16)
    found = [token for row in rows for token in row["input_ids"]]
    assert found[0] == BOS and found.count(BOS) == 1 and EOS not in found
    groups = [ids_of(plain, " ".join(sentences(120)[start : start + 50])) for start in (0, 50, 100)]
    groups[0] = [BOS, *groups[0]]
    assert found == [token for group in groups for token in group[: len(group) // 16 * 16]]


def test_documents_that_end_in_a_line_break_are_still_documents(plain: PreTrainedTokenizerBase) -> None:
    data = Dataset.from_dict({"text": [text + "\n" for text in sentences(8)]})
    assert flat(tokenize(data, plain, CAUSAL, 8)).count(EOS) in (7, 8)


def test_masked_blocks_have_the_special_tokens(corpus: Path, encoder: PreTrainedTokenizerBase) -> None:
    packed = tokenize(read_dataset(str(corpus / "text.jsonl")), encoder, MASKED, 16)
    rows = packed["input_ids"]
    assert {(len(row), row[0], row[-1]) for row in rows} == {(16, CLS, SEP)}
    stream = ids_of(encoder, " ".join(sentences(120)))
    assert [token for row in rows for token in row[1:-1]] == stream[: len(stream) // 14 * 14]


def test_sentences_are_truncated_one_a_row(corpus: Path, encoder: PreTrainedTokenizerBase) -> None:
    data = read_dataset(str(corpus / "text.jsonl"))
    rows = tokenize(data, encoder, CLASSIFIER, 8)
    assert next(iter(rows["input_ids"])) == [CLS, *ids_of(encoder, sentences(120)[0])[:6], SEP]
    assert list(rows["labels"]) == list(data["label"])
    assert not {"label", "labels"} & set(tokenize(data, encoder, EMBEDDING, 8).column_names)


def test_tokenised_data_pass_through(plain: PreTrainedTokenizerBase) -> None:
    data = Dataset.from_dict({"input_ids": [[7, 8, 9], [7] * 12]})
    assert tokenize(data, plain, CAUSAL, 12) is data
    with pytest.raises(ValueError, match="a sequence of 12 tokens, the model takes 11: truncate it"):
        tokenize(data, plain, CAUSAL, 11)


@pytest.mark.parametrize(
    ("columns", "task", "length", "message"),
    [
        ({"body": ["a"]}, CAUSAL, 8, r"no column 'text' \(it has body\); .* needs text: rename the column or set"),
        ({"text": ["a"]}, CLASSIFIER, 8, r"no column 'label' \(it has text\); .* needs text and label"),
        ({"text": [1]}, CAUSAL, 8, "column 'text' of the dataset has the type int64: expected text"),
        ({"text": [["a"]]}, CAUSAL, 8, "column 'text' of the dataset has the type List.*: expected text"),
        ({"text": ["a", None]}, CAUSAL, 8, "column 'text' of the dataset has rows without a value"),
        (
            {"text": ["a"], "label": ["good"]},
            CLASSIFIER,
            8,
            "'label' of the dataset has the type string: expected class numbers",
        ),
        ({"text": ["ba den"]}, CAUSAL, 8, "too short for one block of 8 tokens: lower --max_length"),
        ({"text": ["ba den"]}, CAUSAL, 1, "max_length 1 is too short: task causal_lm needs at least 2 tokens"),
        ({"text": ["ba den"]}, MASKED, 2, "max_length 2 is too short: task masked_lm needs at least 3 tokens"),
    ],
)
def test_data_that_do_not_fit_the_task(
    columns: dict[str, Any], task: Any, length: int, message: str, encoder: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(ValueError, match=message):
        tokenize(Dataset.from_dict(columns), encoder, task, length)


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_a_folder_of_formatted_rows_is_read_as_lists(tmp_path: Path, plain: PreTrainedTokenizerBase, kind: str) -> None:
    data = Dataset.from_dict({"input_ids": [[7, 8, 9], [7] * 12], "labels": [[7, 8, 9], [7] * 12]})
    data.with_format(kind).save_to_disk(tmp_path / "rows")
    for read in (read_dataset, stream_dataset):
        rows = tokenize(read(str(tmp_path / "rows")), plain, CAUSAL, 12)
        assert list(rows) == data.to_list()
    assert list(tokenize(data.with_format(kind), plain, CAUSAL, 12)[0]["input_ids"]) == [7, 8, 9]


def test_another_text_column(plain: PreTrainedTokenizerBase) -> None:
    packed = tokenize(Dataset.from_dict({"body": sentences(4)}), plain, CAUSAL, 8, text_column="body")
    assert flat(packed)[:3] == ids_of(plain, sentences(4)[0])[:3]


# ---- Collating ----


def test_causal_collator_pads_ragged_rows(plain: PreTrainedTokenizerBase) -> None:
    collate = CAUSAL.collator(plain)
    batch = collate([{"input_ids": [7, 8, 9]}, {"input_ids": [7]}])
    assert batch["input_ids"].tolist() == [[7, 8, 9], [7, 0, 0]]
    assert batch["labels"].tolist() == [[7, 8, 9], [7, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert collate([{"input_ids": [7, 8], "labels": [-100, 8]}])["labels"].tolist() == [[-100, 8]]


def test_masks_depend_on_the_batch_alone(encoder: PreTrainedTokenizerBase) -> None:
    rows = [{"input_ids": [CLS, *range(6, 6 + 40), SEP]}, {"input_ids": [CLS, *range(20, 20 + 40), SEP]}]
    torch.manual_seed(1)
    first = MASKED.collator(encoder)(rows)
    torch.manual_seed(2)
    collate = MASKED.collator(encoder)
    collate(rows[:1])
    state = torch.get_rng_state()
    second = collate(rows)
    assert torch.equal(torch.get_rng_state(), state)
    for name in ("input_ids", "labels"):
        assert torch.equal(first[name], second[name])
    swapped = collate(rows[::-1])
    assert not torch.equal(swapped["labels"].flip(0) != -100, first["labels"] != -100)


@pytest.mark.parametrize("kind", ["torch", "numpy"])
@pytest.mark.parametrize("task", [CAUSAL, MASKED, CLASSIFIER, EMBEDDING], ids=lambda task: task.name)
@pytest.mark.parametrize("lengths", [(42, 42), (42, 17)])
def test_batches_do_not_depend_on_the_format_of_the_rows(
    encoder: PreTrainedTokenizerBase, task: Any, kind: str, lengths: tuple[int, int]
) -> None:
    ids = [[CLS, *range(start, start + length - 2), SEP] for start, length in zip((6, 20), lengths, strict=True)]
    rows = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * length for length in lengths]})
    if task is CLASSIFIER:
        rows = rows.add_column("labels", [0, 2])
    plain, formatted = (task.collator(encoder)([data[0], data[1]]) for data in (rows, rows.with_format(kind)))
    assert {*plain} == {*formatted}
    for name in plain:
        assert torch.equal(plain[name], formatted[name]), name


def test_masking_follows_the_probability_and_spares_special_tokens(encoder: PreTrainedTokenizerBase) -> None:
    words = [6 + index % len(WORDS) for index in range(2000)]
    rows = [{"input_ids": [CLS, *words, SEP]} for _ in range(4)]
    batch = MASKED.collator(encoder, mlm_probability=0.25)(rows)
    ids, chosen = torch.tensor([row["input_ids"] for row in rows]), batch["labels"] != -100
    assert torch.equal(batch["labels"][chosen], ids[chosen])
    assert torch.equal(batch["input_ids"][~chosen], ids[~chosen])
    assert not chosen[:, [0, -1]].any()
    # 5 standard deviations: 0.0048 of 8,000 positions, 0.0089 of the 2,000 chosen ones
    assert chosen.float().mean().item() == pytest.approx(0.25, abs=0.025)
    assert (batch["input_ids"][chosen] == MASK).float().mean().item() == pytest.approx(0.8, abs=0.045)


def test_a_tokenizer_without_a_mask_token(plain: PreTrainedTokenizerBase) -> None:
    bare = make_tokenizer()
    bare.mask_token = None
    with pytest.raises(ValueError, match="does not have a mask token"):
        MASKED.collator(bare)


def test_sentences_are_padded(encoder: PreTrainedTokenizerBase) -> None:
    rows = [
        {"input_ids": [CLS, 7, SEP], "attention_mask": [1, 1, 1]},
        {"input_ids": [CLS, 3], "attention_mask": [1, 1]},
    ]
    batch = EMBEDDING.collator(encoder)(rows)
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
