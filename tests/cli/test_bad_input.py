"""Every mistake of a user: exit code 2, one clear line on stderr, no traceback, and nothing computed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaForCausalLM,
    Trainer,
)

from tests.cli.conftest import budget, run
from tests.conftest import POSITIONS, VOCAB, WORDS, llama_config, make_tokenizer, save_llama
from tutelage.cli import main
from tutelage.targets import live
from tutelage.training.objective import StageObjective
from tutelage.training.trainer import CurriculumTrainer

STUDENT = "layers=2,hidden_size=16"
Refused = Callable[..., str]


@pytest.fixture
def error_of(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The line on stderr of a command that fails as a user's mistake should."""

    def error(*arguments: Any) -> str:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert code == 2, captured.err
        assert captured.out == ""
        (line,) = captured.err.splitlines()
        assert line.startswith(f"tutelage {arguments[0]}: ")
        assert "Traceback" not in line
        return line

    return error


@pytest.fixture
def refused(
    error_of: Callable[..., str], monkeypatch: pytest.MonkeyPatch, causal_teacher: Path, corpus: Path, tmp_path: Path
) -> Refused:
    """The error of a `distill` that is sound but for the given flags (None leaves one out); it must compute nothing."""

    def forbidden(*_: Any, **__: Any) -> None:
        pytest.fail("something was computed before the mistake was found")

    monkeypatch.setattr(CurriculumTrainer, "training_step", forbidden)
    monkeypatch.setattr(live, "calibrate", forbidden)
    monkeypatch.setattr(StageObjective, "forward", forbidden)

    def error(**flags: Any) -> str:
        sound = {
            "teacher_model_name_or_path": causal_teacher,
            "student": STUDENT,
            "dataset": corpus / "text.txt",
            "output_dir": tmp_path / "out",
        }
        given = {name: value for name, value in {**sound, **flags}.items() if name not in budget_names}
        changes = {name: value for name, value in flags.items() if name in budget_names}
        line = error_of(
            "distill", *(f"--{name}={value}" for name, value in given.items() if value is not None), *budget(**changes)
        )
        assert not list((tmp_path / "out").glob("*")), "a refused run must not claim its folder"
        return line

    budget_names = {flag.split("=")[0].removeprefix("--") for flag in budget()}
    return error


def test_the_sound_run_trains(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, causal_teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    """The fixture notices computing: without a mistake it is what stops the run."""
    with pytest.raises(pytest.fail.Exception, match="something was computed"):
        refused()


# ---- Blocks, methods, stages, budget ----


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"method": "osmosis"},
            "unknown method 'osmosis': use one of extraction, joint, one_shot, progressive, scratch",
        ),
        (
            {"blocks": "model.layer"},
            r"'model.layer' is not a list of blocks of LlamaForCausalLM; candidates: model.layers \(4 x LlamaDecoderLayer\)",
        ),
        ({"layer_map": "1:5"}, "layer_map: the teacher has blocks 1 to 4 and 'final', not 5"),
        ({"layer_map": "3:4"}, "layer_map: the student has blocks 1 to 2 and 'final', not 3"),
        ({"layer_map": "0:1"}, "layer_map: the student has blocks 1 to 2 and 'final', not 0"),
        ({"layer_map": "2:2,1:4"}, "layer_map 2:2,1:4 is not strictly increasing in both student and teacher"),
        ({"layer_map": "1:3,2:3"}, "layer_map 1:3,2:3 is not strictly increasing"),
        ({"layer_map": "final:final,2:4"}, "layer_map final:final,2:4 is not strictly increasing"),
        ({"layer_map": "1-2"}, "'1-2' is not a student:teacher pair such as 1:2"),
        ({"layer_map": "one:2"}, "'one' is neither a block number nor 'final'"),
        (
            {"student": "layers=5"},
            "the student has 5 blocks, the teacher 4: the uniform layer map needs a student that is",
        ),
        ({"num_stages": 3}, "num_stages must be from 1 to the student's 2 blocks, got 3"),
        (
            {"max_steps": 2, "method": "extraction"},
            r"budget too small for the stages: stage 1 \(hidden 1:1\) would get 0 steps; raise max_steps",
        ),
        ({"stage_steps": 4}, r"budget too small for the stages: stage 3 \(output\) would get 0 steps"),
        ({"stage_fraction": 1.5}, "stage_fraction must be a number from 0 to 1, got 1.5"),
        ({"projection": "hash"}, "unknown projection 'hash': use one of gaussian, orthogonal, rademacher, pca, logits"),
        ({"normalize": "layer"}, "unknown normalize 'layer': use one of standardize, none"),
        ({"warm_start": "all"}, "unknown warm_start 'all': use one of none, head, embedding, head\\+embedding"),
        (
            {"warm_start": "head", "layer_map": "1:2", "student_init": "random"},
            "warm_start='head' needs a stage that pairs the places before the two output heads",
        ),
        ({"temperature": 0}, "temperature must be positive and finite, got 0"),
        ({"label_weight": 2}, "label_weight must be a number from 0 to 1, got 2"),
        ({"embedding_loss": "dot"}, "unknown embedding_loss 'dot': use 'cosine' or 'mse'"),
        ({"task": "translation"}, "unknown task 'translation': use one of causal_lm, masked_lm"),
    ],
)
def test_settings_that_cannot_work(refused: Refused, flags: dict[str, Any], message: str) -> None:
    assert re.search(message, refused(**flags))


@pytest.mark.parametrize("projection", ["orthogonal", "pca", "logits"])
def test_a_projection_that_cannot_widen(refused: Refused, projection: str) -> None:
    line = refused(student="layers=2,hidden_size=64", projection=projection)
    assert f"projection='{projection}' cannot widen 32 to 64: use projection='gaussian' or a narrower student" in line


def test_a_warm_start_that_cannot_be_made(
    refused: Refused, embedding_teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    line = refused(
        teacher_model_name_or_path=embedding_teacher,
        student=embedding_teacher,
        dataset=corpus / "text.jsonl",
        layer_map="2:2,final:final",
        warm_start="head",
    )
    assert "warm_start='head' needs a student with a linear head on its embedding" in line
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Gemma2Config(vocab_size=VOCAB, num_key_value_heads=2, head_dim=8, pad_token_id=0, **sizes)
    Gemma2ForCausalLM(config).save_pretrained(tmp_path / "gemma")
    make_tokenizer().save_pretrained(tmp_path / "gemma")
    line = refused(
        teacher_model_name_or_path=tmp_path / "gemma",
        student="layers=1,final_logit_softcapping=20.0",
        layer_map="final:final",
        warm_start="head",
        student_init="random",
    )
    assert "the teacher soft-caps its logits at 30.0, the student at 20.0: a head transplant needs both alike" in line


def test_no_blocks(refused: Refused, tmp_path: Path) -> None:
    LlamaForCausalLM(llama_config(num_hidden_layers=0)).save_pretrained(tmp_path / "flat")
    make_tokenizer().save_pretrained(tmp_path / "flat")
    line = refused(teacher_model_name_or_path=tmp_path / "flat", student="layers=1")
    assert "found no blocks in LlamaForCausalLM: it has no nn.ModuleList" in line


def test_several_lists_of_blocks(refused: Refused, corpus: Path, tmp_path: Path) -> None:
    sizes = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    config = BartConfig(
        vocab_size=VOCAB,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        max_position_embeddings=POSITIONS,
        **sizes,
    )
    BartForSequenceClassification(config).save_pretrained(tmp_path / "bart")
    make_tokenizer(encoder=True).save_pretrained(tmp_path / "bart")
    line = refused(
        teacher_model_name_or_path=tmp_path / "bart", student=tmp_path / "bart", dataset=corpus / "text.jsonl"
    )
    lists = r"model.encoder.layers \(2 x BartEncoderLayer\), model.decoder.layers \(2 x BartDecoderLayer\)"
    assert re.search(f"has several lists of blocks: {lists}; name one with `blocks=`", line)


# ---- Teachers and students ----


def test_a_missing_teacher(refused: Refused) -> None:
    for teacher in ("/nowhere/teacher", "nobody/nothing"):
        line = refused(teacher_model_name_or_path=teacher)
        assert (
            f"no teacher at '{teacher}': there is no local folder of that name, and it was not found on the Hub" in line
        )
        assert "give an existing folder or a Hub name" in line


def test_a_pickled_teacher(refused: Refused, causal_teacher: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(causal_teacher, tmp_path / "pickled"))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    line = refused(teacher_model_name_or_path=folder)
    assert "stores its weights as a pickle (pytorch_model.bin), which can run code when loaded: convert it" in line


def test_progressive_without_checkpoints(refused: Refused) -> None:
    line = refused(method="progressive")
    assert "progressive distillation needs the teacher's intermediate checkpoints: pass teacher_checkpoints" in line


def test_progressive_with_a_checkpoint_of_another_architecture(refused: Refused, tmp_path: Path) -> None:
    other = save_llama(tmp_path / "other", num_hidden_layers=2)
    line = refused(method="progressive", teacher_checkpoints=other)
    assert f"checkpoint '{other}' has a different architecture than the teacher: it lacks model.layers.2." in line
    line = refused(method="progressive", teacher_checkpoints="/nowhere/early")
    assert "teacher checkpoint '/nowhere/early' is not a folder with model.safetensors in it" in line


def test_another_tokenizer(refused: Refused, tmp_path: Path) -> None:
    student = save_llama(tmp_path / "student", num_hidden_layers=2)
    make_tokenizer(words=WORDS[::-1]).save_pretrained(student)
    line = refused(student=student)
    assert "student and teacher have different tokenizers (102 and 102 entries; " in line
    assert "use the teacher's tokenizer for the student" in line


def test_another_vocabulary(refused: Refused) -> None:
    line = refused(student=f"layers=2,vocab_size={VOCAB - 2}")
    assert f"the student has {VOCAB - 2} vocabulary entries, the teacher {VOCAB}" in line


def test_other_classes(refused: Refused, classifier_teacher: Path, corpus: Path, tmp_path: Path) -> None:
    teacher = {"teacher_model_name_or_path": classifier_teacher}
    config = json.loads((classifier_teacher / "config.json").read_text())
    labels = {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}
    (tmp_path / "student.json").write_text(json.dumps({**config, **labels, "num_hidden_layers": 2}))
    line = refused(**teacher, student=tmp_path / "student.json", dataset=corpus / "text.jsonl")
    assert "the student has 2 classes, the teacher 3: they must be the same classes" in line
    Dataset.from_dict({"text": ["ba"] * 40, "label": [0, 3] * 20}).to_json(tmp_path / "labels.jsonl")
    line = refused(**teacher, dataset=tmp_path / "labels.jsonl")
    assert "the training dataset has the label 3, but the model has the classes 0 to 2: correct the labels" in line


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"input_ids": ["abc", "def"]}, "each row needs a list of whole numbers"),
        ({"input_ids": [[1, 2], [1, 2.5]]}, "each row needs a list of whole numbers"),
        ({"input_ids": [[1, 2], []]}, "has a row without tokens: drop it"),
        ({"input_ids": [[1, 2], None]}, "has input_ids without a value: drop these rows"),
        ({"input_ids": [[1, 2], [1, VOCAB]]}, f"has the token id {VOCAB}, but ids are from 0 to {VOCAB - 1}"),
        ({"input_ids": [[1, 2], [1, -5]]}, f"has the token id -5, but ids are from 0 to {VOCAB - 1}"),
        ({"input_ids": [[1, 2], [1, 2]], "labels": [[1, 2], [1]]}, "more or fewer labels than tokens"),
        (
            {"input_ids": [[1, 2], [1, 2]], "labels": [[-100, 2], [1, VOCAB]]},
            f"has the label {VOCAB}, but the model has",
        ),
    ],
)
def test_rows_that_no_model_takes(refused: Refused, tmp_path: Path, rows: dict[str, Any], message: str) -> None:
    data = Dataset.from_dict({name: values * 20 for name, values in rows.items()})
    data.to_parquet(tmp_path / "rows.parquet")
    assert message in refused(dataset=tmp_path / "rows.parquet")


def test_an_evaluation_of_rows_that_no_model_takes(
    error_of: Callable[..., str], causal_teacher: Path, tmp_path: Path
) -> None:
    Dataset.from_dict({"input_ids": [[1, 2], [1, VOCAB]]}).to_parquet(tmp_path / "rows.parquet")
    line = error_of("evaluate", "--model", causal_teacher, "--dataset", tmp_path / "rows.parquet")
    assert f"the evaluation dataset has the token id {VOCAB}" in line


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ("layers=2,depth=3", "LlamaConfig has no field 'depth'"),
        ("layers=two", "num_hidden_layers must be a positive whole number, got 'two'"),
        ("hidden_size=30,heads=4,head_dim=8,num_key_value_heads=3", "4 heads are not divisible by 3 key/value heads"),
        ("/nowhere/student", "no student at '/nowhere/student'"),
    ],
)
def test_students_that_cannot_be_made(refused: Refused, student: str, message: str) -> None:
    assert message in refused(student=student)


def test_a_teacher_without_student_or_dataset(refused: Refused) -> None:
    assert "no student was given: name one, e.g. --student layers=3,hidden_size=192" in refused(student=None)
    assert "no dataset was given: name one, e.g. --dataset corpus.txt" in refused(dataset=None)


# ---- Data ----


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "is empty: it needs at least one example"),
        ("latin.txt", b"na\xefve\n" * 50, "is not UTF-8: byte 0xef near offset 2; convert it, e.g. `iconv"),
        ("column.jsonl", b'{"body": "ba den"}\n' * 50, r"no column 'text' \(it has body\)"),
        ("broken.jsonl", b"not json\n", r"could not read '.*broken.jsonl' as .jsonl"),
        ("short.txt", b"ba den\n" * 3, "too short for one block of 16 tokens: lower --max_length or add text"),
        ("one.jsonl", b'{"text": "ba den"}\n', r"has 1 example\(s\), too few to hold 1 out for evaluation"),
        ("table.csv", b"text\nba\n", "ends in '.csv': expected .txt, .jsonl or .parquet"),
    ],
)
def test_files_that_cannot_be_used(refused: Refused, tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert re.search(message, refused(dataset=tmp_path / name))


def test_an_empty_folder_of_datasets(refused: Refused, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Dataset.from_dict({"text": []}).save_to_disk(tmp_path / "empty")
    assert "is empty: it needs at least one example" in refused(dataset=tmp_path / "empty")


def test_a_missing_dataset(refused: Refused) -> None:
    assert "no dataset file '/nowhere/text.txt'" in refused(dataset="/nowhere/text.txt")
    assert "no dataset 'nobody/nothing': there is no local file or folder of that name" in refused(
        dataset="nobody/nothing"
    )


def test_a_classification_set_without_labels(refused: Refused, classifier_teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "ba den"}\n' * 40)
    line = refused(teacher_model_name_or_path=classifier_teacher, dataset=tmp_path / "text.jsonl")
    assert "no column 'label' (it has text); task sequence_classification needs text and label" in line


def test_sequences_longer_than_the_positions(refused: Refused, tmp_path: Path) -> None:
    line = refused(max_length=POSITIONS + 1)
    assert f"max_length {POSITIONS + 1} is longer than the model's {POSITIONS} positions: lower it" in line
    Dataset.from_dict({"input_ids": [[7] * 8] * 30 + [[7] * (POSITIONS + 1)]}).to_parquet(tmp_path / "ids.parquet")
    ready = {"dataset": tmp_path / "ids.parquet", "eval_dataset": tmp_path / "ids.parquet"}
    line = refused(**ready, max_length=POSITIONS)
    assert f"the dataset has a sequence of {POSITIONS + 1} tokens, the model takes {POSITIONS}: truncate it" in line


def test_the_shorter_of_student_and_teacher_counts(refused: Refused) -> None:
    line = refused(student=f"layers=2,max_position_embeddings={2 * POSITIONS}", max_length=POSITIONS + 1)
    assert f"longer than the model's {POSITIONS} positions" in line


# ---- Output ----


def test_a_folder_that_contains_a_different_run(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "curriculum.json").write_text("{}")
    line = refused(output_dir=tmp_path / "old")
    assert "already contains a run. Choose a different folder, resume the run with --resume auto" in line
    assert (tmp_path / "old" / "curriculum.json").read_text() == "{}"


def test_the_teachers_own_folder(refused: Refused, causal_teacher: Path) -> None:
    before = (causal_teacher / "model.safetensors").read_bytes()
    for overwrite in ("false", "true"):
        line = refused(output_dir=causal_teacher, overwrite_output_dir=overwrite)
        assert (
            "contains model.safetensors, which was not made by a run of tutelage (there is no curriculum.json): choose"
            in line
        )
    assert (causal_teacher / "model.safetensors").read_bytes() == before


def test_a_file_in_the_place_of_the_folder(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "is a file: choose a folder" in refused(output_dir=tmp_path / "file")
    assert "is inside a file" in refused(output_dir=tmp_path / "file" / "out")


def test_resuming_where_nothing_is(refused: Refused, tmp_path: Path) -> None:
    assert "no complete checkpoint in" in refused(resume_from_checkpoint="true")
    assert "is missing or was not written to its end" in refused(resume_from_checkpoint=tmp_path / "checkpoint-4")


# ---- A loss that is not finite ----


def test_nan_loss_stops_and_names_the_last_good_checkpoint(
    error_of: Callable[..., str], monkeypatch: pytest.MonkeyPatch, causal_teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    flags = [
        f"--teacher_model_name_or_path={causal_teacher}",
        f"--student={STUDENT}",
        f"--dataset={corpus / 'text.txt'}",
        f"--output_dir={out}",
        *budget(save_strategy="steps", save_steps=2, method="extraction"),
    ]
    original = Trainer.training_step

    def poisoned(self: Trainer, *arguments: Any, **settings: Any) -> torch.Tensor:
        loss = original(self, *arguments, **settings)
        return loss * float("nan") if self.state.global_step == 3 else loss

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", poisoned)
        line = error_of("distill", *flags)
    checkpoint = out / "checkpoint-2"
    assert f"the loss is nan at step 4, stage 2 (hidden 2:4); the last good checkpoint is {checkpoint};" in line
    assert sorted(folder.name for folder in out.glob("checkpoint-*")) == ["checkpoint-2"]
    assert not (out / "model.safetensors").exists()
    model, info = AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert not info["missing_keys"]
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())

    run("distill", *flags, "--resume_from_checkpoint=true")
    steps = [json.loads(record)["step"] for record in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 6, 8, 8, 8]
    assert json.loads((out / "result.json").read_text())["budget"]["steps"] == 8


def test_nan_loss_before_the_first_checkpoint(
    error_of: Callable[..., str], causal_teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    teacher = Path(shutil.copytree(causal_teacher, tmp_path / "teacher"))
    model = LlamaForCausalLM.from_pretrained(teacher)
    model.lm_head.weight.data[:] = float("nan")
    model.save_pretrained(teacher)
    flags = [f"--teacher_model_name_or_path={teacher}", f"--student={STUDENT}", f"--dataset={corpus / 'text.txt'}"]
    line = error_of("distill", *flags, f"--output_dir={tmp_path / 'out'}", *budget(method="one_shot"))
    assert "the loss is nan at step 1, stage 1 (output); no checkpoint had been saved yet; lower learning_rate" in line


# ---- Flags and files of flags ----


def test_flags(refused: Refused, error_of: Callable[..., str]) -> None:
    assert "unknown option '--shape=round': see tutelage distill --help" in refused(shape="round")
    assert "argument --max_steps" in refused(max_steps="many")
    assert main(["paint"]) == 2
    assert "no dataset was given: name one, e.g. --dataset held-out.txt" in error_of("evaluate", "--model", "m")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"methid: one_shot\n", "has an unknown option 'methid'"),
        (b"- one_shot\n", "must be a mapping of options, e.g. `method: extraction`"),
        (b"method: [one_shot\n", "is not valid YAML"),
        (b"method: na\xefve\n", "is not valid YAML"),
        (b"max_steps: many\n", "argument --max_steps"),
    ],
)
def test_config_files(error_of: Callable[..., str], tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "run.yaml").write_bytes(content)
    assert message in error_of("distill", "--config", tmp_path / "run.yaml")


def test_a_missing_config_file(error_of: Callable[..., str]) -> None:
    assert "no config file '/nowhere/run.yaml'" in error_of("distill", "--config", "/nowhere/run.yaml")


def test_an_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["paint"]) == 2
    known = "plan, distill, extract, inspect, evaluate, compare, report, diagnose"
    assert capsys.readouterr().err == f"tutelage: there is no command 'paint': use one of {known}\n"


def test_plan(error_of: Callable[..., str], causal_teacher: Path) -> None:
    assert "no student was given: name one" in error_of("plan", "--teacher", causal_teacher)
    assert "no teacher at '/nowhere/t'" in error_of("plan", "--teacher", "/nowhere/t", "--student", STUDENT)
    flags = ("plan", "--teacher", causal_teacher, "--student", STUDENT, "--warm_start=none")
    assert "is not strictly increasing" in error_of(*flags, "--layer_map", "2:2,1:4")
    assert "budget too small for the stages" in error_of(*flags, "--max_steps", "2", "--method", "extraction")


def test_evaluate(
    error_of: Callable[..., str], causal_teacher: Path, embedding_teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    data = ("--dataset", corpus / "text.txt")
    assert "no model at '/nowhere/m'" in error_of("evaluate", "--model", "/nowhere/m", *data)
    line = error_of("evaluate", "--model", causal_teacher, *data, "--max_length", POSITIONS + 1)
    assert f"longer than the model's {POSITIONS} positions" in line
    line = error_of("evaluate", "--model", embedding_teacher, *data)
    assert "an embedding model is measured against its teacher: name one with --teacher" in line
    line = error_of("evaluate", "--model", causal_teacher, "--teacher", embedding_teacher, *data)
    assert "could not load teacher" in line or "has no weights for" in line
    LlamaForCausalLM(llama_config()).save_pretrained(tmp_path)
    assert "has no tokenizer in its folder: save one there" in error_of("evaluate", "--model", tmp_path, *data)
    other = save_llama(tmp_path / "other")
    make_tokenizer(words=WORDS[::-1]).save_pretrained(other)
    line = error_of("evaluate", "--model", causal_teacher, "--teacher", other, *data)
    assert "different tokenizers" in line


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("progress.json", b'{"stage": 0'),
        ("progress.json", b'{"stage": 0, "unknown": 1}'),
        ("trainer_state.json", b"{"),
        ("trainer_state.json", None),
        ("model.safetensors", b"garbage"),
    ],
)
def test_a_damaged_checkpoint_names_the_one_before(
    error_of: Callable[..., str], causal_teacher: Path, corpus: Path, tmp_path: Path, name: str, content: bytes | None
) -> None:
    data = ("--teacher", causal_teacher, "--student", STUDENT, "--dataset", corpus / "text.txt")
    flags = (*data, "--output_dir", tmp_path / "out", *budget(save_strategy="steps", save_steps=2, max_steps=4))
    run("distill", *flags)
    file = tmp_path / "out" / "checkpoint-4" / name
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    line = error_of("distill", *flags, "--resume_from_checkpoint", tmp_path / "out" / "checkpoint-4")
    assert f"is damaged, so resume from '{tmp_path / 'out' / 'checkpoint-2'}'" in line


def test_a_run_does_not_overwrite_what_it_reads(refused: Refused, causal_teacher: Path, tmp_path: Path) -> None:
    folder = tmp_path / "student"
    shutil.copytree(causal_teacher, folder)
    shutil.copytree(causal_teacher, folder / "checkpoint-2")
    (folder / "curriculum.json").write_text("{}")  # as after a run
    for read in (folder, folder / "checkpoint-2"):
        for name in ("teacher_model_name_or_path", "student"):
            line = refused(**{name: read}, output_dir=folder, overwrite_output_dir="true")
            assert f"the run would overwrite '{read}', which it reads: choose a different output_dir" in line
    assert (folder / "model.safetensors").is_file()
