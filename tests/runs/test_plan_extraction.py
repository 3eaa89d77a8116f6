"""The plan of an extraction against the files that one writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tutelage.cli import main
from tutelage.core.topk import top_k
from tutelage.io.store import Store
from tutelage.runs.plan_extraction import ExtractionPlan, bytes_per_token, describe_extraction_plan, read_count
from tutelage.targets import rows
from tutelage.targets.manifest import ShardWriter
from tutelage.targets.rows import RowFormat


@pytest.mark.parametrize(
    ("text", "count"), [("1T", 10**12), ("250M", 250_000_000), ("2e9", 2 * 10**9), ("1_000", 1000), ("1.5k", 1500)]
)
def test_counts(text: str, count: int) -> None:
    assert read_count(text) == count


@pytest.mark.parametrize("text", ["", "T", "many", "-1", "0", "infT", "nan"])
def test_text_that_is_not_a_count_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="count"):
        read_count(text)


@pytest.mark.parametrize("dtype", rows.DTYPES)
@pytest.mark.parametrize("vocabulary", [300, 70_000])
@pytest.mark.parametrize(("kind", "pairs"), [("states", 1), ("top_k", 0), ("top_k", 2)])
def test_a_token_takes_what_the_plan_says(tmp_path: Path, dtype: str, vocabulary: int, kind: str, pairs: int) -> None:
    beside = ("states",) * pairs if kind == "top_k" else ()
    form = RowFormat(dtype, vocabulary, "none", False, kind, beside)
    batch = {"input_ids": torch.randint(300, (8, 256))}
    columns = rows.encode_inputs(batch, range(8), form)
    for number in range(pairs):
        states = torch.randn(8, 256, 48)
        columns |= rows.encode_states(states, torch.ones(8, 256, dtype=torch.bool), [256] * 8, form, number)
    if kind == "top_k":
        columns |= rows.encode_outputs(top_k(torch.randn(8 * 256, 300), 16), [256] * 8, form)
    shard = ShardWriter(Store(tmp_path), "stage_1", 1, form.features).write(0, [columns])
    planned = bytes_per_token(dtype, vocabulary, [48] * pairs, 16 if kind == "top_k" else None)
    assert shard.tokens == 8 * 256
    assert shard.bytes / shard.tokens == pytest.approx(planned, rel=0.03)


def test_a_token_takes_at_most_the_intended_bytes() -> None:
    """At r = 192 in int8 a hidden-stage token takes at most 256 bytes, an output-stage token with 64 outputs at most 320."""
    assert bytes_per_token("int8", 49_152, [192], None) <= 256
    assert bytes_per_token("int8", 49_152, [], 64) <= 320


def test_plan_with_tokens_on_the_command_line(causal_teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--teacher", str(causal_teacher), "--student", "layers=2,hidden_size=16", "--use_cpu", "true"]
    command += ["--method", "extraction"]
    assert main([*command, "--tokens", "1B"]) == 0
    assert "live teacher in 3 runs" in capsys.readouterr().out
    assert main([*command, "--tokens", "1B", "--tokens_per_second", "1000", "--runs", "5", "--json"]) == 0
    found = ExtractionPlan.from_dict(json.loads(capsys.readouterr().out)["extraction"])
    assert sum(stage.tokens for stage in found.stages) == pytest.approx(1e9)
    assert found.runs == 5
    whole = 1e9 / 1000 / 3600  # if every token went through the whole teacher
    assert found.hours is not None and 0.5 * whole < found.hours < whole
    printed = describe_extraction_plan(found)
    assert f"live teacher in 5 runs: {5 * found.teacher_flops:.3g} teacher FLOPs" in printed
    assert f", {5 * found.hours:,.1f} accelerator-hours" in printed
    assert main([*command, "--tokens", "lots"]) == 2
    assert "cannot read 'lots' as a count" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens_per_second", "0"], "tokens_per_second must be positive and finite, got 0.0"),
        (["--tokens_per_second", "nan"], "tokens_per_second must be positive and finite"),
        (["--runs", "0"], "runs must be at least 1, got 0"),
        (["--projection_dim", "-4"], "projection_dim must be a number from 1 to 131072, got -4"),
    ],
)
def test_numbers_that_make_no_sense(
    causal_teacher: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    command = ["plan", "--teacher", str(causal_teacher), "--student", "layers=2,hidden_size=16", "--use_cpu", "true"]
    assert main([*command, "--tokens", "1B", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_classifier_has_one_output_per_row(classifier_teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--teacher", str(classifier_teacher), "--student", "layers=2,hidden_size=16", "--json"]
    command += ["--method", "extraction"]
    assert main([*command, "--tokens", "1B", "--max_length", "16", "--use_cpu", "true"]) == 0
    found = json.loads(capsys.readouterr().out)["extraction"]
    assert found["top_k"] == 3
    assert found["stages"][-1]["bytes_per_token"]["int8"] < 4
