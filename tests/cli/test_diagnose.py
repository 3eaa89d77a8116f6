"""`tutelage diagnose` from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tutelage.cli import main
from tutelage.reproduction.diagnose_language import LanguageDiagnosis
from tutelage.reproduction.diagnose_parity import ParityDiagnosis

PLANTED = [
    *("--teacher", "planted", "--d", "10", "--k", "3", "--teacher_width", "200", "--student_width", "24"),
    *("--seeds", "0", "--learning_rates", "0.1", "--budget_samples", "32000", "--eval_every", "3200"),
    *("--eval_samples", "512", "--stage_samples", "6400"),
]


def test_fourier_weights_show_why_the_stage_helps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose", "parity-mlp/smoke", *PLANTED, "--output_dir", str(tmp_path)]) == 0
    text = (tmp_path / "fourier.json").read_text()
    found = ParityDiagnosis.from_json(text)
    assert found.to_json() == text.strip()
    assert (found.d, found.k) == (10, 3)
    output, hidden = found.output.support, found.hidden.support
    assert output[3] > 0.95
    assert abs(output[1]) < 0.02
    assert hidden[1] > 0.2
    assert found.student[-1].weights.support[3] > 0.5
    assert found.student[0].weights.support[3] < 0.2
    for name in ("fourier.png", "fourier.md"):
        assert (tmp_path / name).stat().st_size > 100
    assert "fourier.png" in capsys.readouterr().out


def test_ngram_probes_of_a_teachers_layers(tmp_path: Path, causal_teacher: Path, corpus: Path) -> None:
    command = [
        "diagnose",
        "--teacher",
        str(causal_teacher),
        "--dataset",
        str(corpus / "text.txt"),
        "--max_length",
        "16",
    ]
    assert main([*command, "--length", "2", "--output_dir", str(tmp_path)]) == 0
    text = (tmp_path / "ngrams.json").read_text()
    found = LanguageDiagnosis.from_json(text)
    assert found.to_json() == text.strip()
    layers = found.layers
    assert list(layers) == ["0", "1", "2", "3", "4", "final"]
    assert layers["0"][0] > 0.9  # an embedding is a function of its token
    assert all(len(scores) == 2 for scores in layers.values())
    assert (tmp_path / "ngrams.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["parity-transformer/smoke"], "Fourier weights are for parity-mlp, not parity-transformer"),
        (["--teacher", "{classifier}", "--dataset", "{text}"], "n-gram probes are for language models"),
        (["--teacher", "{causal}"], "name a text"),
        (
            ["--teacher", "{causal}", "--dataset", "{text}", "--length", "0"],
            "length must be a number from 1 to 7, got 0",
        ),
        (["--colour=red"], "unknown option '--colour=red'"),
        (["parity-mlp/smoke", "--teacher", "nowhere"], "unknown teacher 'nowhere': use 'trained' or 'planted', or the"),
        (["parity-mlp/smoke", "--length", "2"], "--length is for language models: leave it out, or leave parity-mlp/"),
    ],
)
def test_mistakes(
    flags: list[str],
    message: str,
    tmp_path: Path,
    causal_teacher: Path,
    classifier_teacher: Path,
    corpus: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = {"causal": causal_teacher, "classifier": classifier_teacher, "text": corpus / "text.txt"}
    words = [flag.format(**names) for flag in flags]
    assert main(["diagnose", *words, "--output_dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
