"""Rows that no model can train on are refused before a run, in one line that says what they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import budget
from tests.conftest import VOCAB
from tutelage.cli import main

GOOD = list(range(6, 16))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [7, VOCAB]}, f"has the token id {VOCAB}, but ids are from 0 to {VOCAB - 1}"),
        ({"input_ids": [7, 2**63 - 1]}, "has the token id 9223372036854775807, but ids are from 0"),
        ({"input_ids": [7, 2**70]}, "each row needs a list of whole numbers"),
        ({"input_ids": [7, -1]}, "has the token id -1, but ids are from 0"),
        ({"input_ids": [7, 1.5]}, "each row needs a list of whole numbers"),
        ({"input_ids": [7, None]}, "has input_ids without a value: drop these rows"),
        ({"input_ids": None}, "has input_ids without a value: drop these rows"),
        ({"input_ids": [[7, 8]]}, "each row needs a list of whole numbers"),
        ({"input_ids": []}, "has a row without tokens: drop it"),
        ({"input_ids": "ba"}, "each row needs a list of whole numbers"),
        ({"input_ids": 7}, "each row needs a list of whole numbers"),
        ({"labels": [*GOOD[1:], VOCAB]}, f"has the label {VOCAB}, but the model has the classes 0 to {VOCAB - 1}"),
        ({"labels": [*GOOD[1:], -1]}, "has the label -1, but the model has the classes 0"),
        ({"labels": [0.5] * 10}, "has labels of the type list<item: double>: expected a list of whole numbers per row"),
        ({"labels": [*GOOD[1:], None]}, "has labels without a value: give -100 for none"),
        ({"labels": None}, "rows with more or fewer labels than tokens: give one label per token"),
        ({"labels": [7]}, "rows with more or fewer labels than tokens: give one label per token"),
        ({"labels": ["a"] * 10}, "expected a list of whole numbers per row, one per token"),
        ({"labels": 7}, "expected a list of whole numbers per row, one per token"),
        ({"attention_mask": [1]}, "has attention masks without one number per token"),
        ({"attention_mask": None}, "has attention masks without one number per token"),
        ({"attention_mask": [2] * 10}, "has attention masks with other values than 0 and 1"),
        ({"attention_mask": [0.5] * 10}, "has attention masks with other values than 0 and 1"),
    ],
    ids=str,
)
@pytest.mark.parametrize("others", [20, 0])
def test_a_row_that_cannot_be_used(
    row: dict[str, Any],
    message: str,
    others: int,
    causal_teacher: Path,
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One bad row among good ones, and rows that are all bad."""
    (name,) = row
    good = {"input_ids": GOOD, **({} if name == "input_ids" else {name: [1] * 10})}
    rows = [good] * others + [{**good, **row}] * (1 if others else 20)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    flags = [f"--teacher={causal_teacher}", "--student=layers=2,hidden_size=16", f"--dataset={tmp_path / 'rows.jsonl'}"]
    data = [f"--eval_dataset={corpus / 'text.txt'}", f"--output_dir={tmp_path / 'out'}"]
    assert main(["distill", *flags, *data, *budget()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line or (not others and ("whole numbers" in line or "without" in line))


@pytest.mark.parametrize(
    ("name", "count", "flags", "message"),
    [
        (
            "few.txt",
            19,
            [],
            "the held-out part of the dataset (1 of its rows; name an eval_dataset to use another): the text",
        ),
        (
            "short.txt",
            3,
            ["--eval_dataset={file}", "--dataset={corpus}"],
            "eval_dataset '{file}': the text is too short",
        ),
        ("short.txt", 3, ["--dataset={file}"], "distill: the text is too short for one block of 16 tokens"),
    ],
)
def test_a_text_that_is_too_short_says_which_side_it_is(
    name: str,
    count: int,
    flags: list[str],
    message: str,
    causal_teacher: Path,
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / name
    file.write_text("ba den ba\n" * count)
    known = [f"--teacher={causal_teacher}", "--student=layers=2,hidden_size=16", f"--dataset={file}"]
    given = [flag.format(file=file, corpus=corpus / "text.txt") for flag in flags]
    assert main(["distill", *known, *given, f"--output_dir={tmp_path / 'out'}", *budget()]) == 2
    assert message.format(file=file) in capsys.readouterr().err
