"""The commands on tiny teachers: what they print, what they leave behind."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.cli.conftest import BATCH, LENGTH, STEPS, budget, run
from tests.conftest import CLASSES, VOCAB, WORDS, make_tokenizer, save_llama
from tutelage import Curriculum, __version__
from tutelage.cli import main
from tutelage.tasks.embedding import load_embedding_model

STUDENT = "layers=2,hidden_size=16"
METHODS = ("extraction", "joint", "one_shot", "progressive", "scratch")
STUDENT_FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
RECORD_FILES = {"README.md", "curriculum.json", "identity.json", "loss.png", "metrics.jsonl", "result.json"}


# ---- plan ----


def test_plan_prints_blocks_stages_and_costs(causal_teacher: Path) -> None:
    printed = run(
        "plan", "--teacher", causal_teacher, "--student", STUDENT, "--max_steps", "100", "--method=extraction"
    )
    lines = printed.splitlines()
    assert lines[0] == "task: causal_lm"
    assert re.match(rf"teacher: {causal_teacher} \(LlamaForCausalLM, [\d,]+ parameters, width 32, 4 blocks", lines[1])
    assert re.match(rf"student: {STUDENT} \(LlamaForCausalLM, [\d,]+ parameters, width 16, 2 blocks", lines[2])
    shape = "2 of 4 blocks, 2 of 4 heads, 1 of 2 key/value heads, 32 of 64 neurons; 0.0 of 0.2 MB on disk in float32"
    assert re.fullmatch(rf"student of teacher: {shape}; predicted speed [\d.]+x \(.*\)", lines[3])
    start = (
        "the student starts from blocks 1, 4 of the teacher; give --dataset to measure what its residual basis keeps"
    )
    assert lines[4] == start
    assert [line.split()[:3] for line in lines[7:10]] == [
        ["hidden", "1:1", "25"],
        ["hidden", "2:4", "25"],
        ["output", "50", lines[9].split()[2]],
    ]
    assert lines[-1].endswith("Nothing was trained.")


def test_plan_as_json(causal_teacher: Path) -> None:
    planned = json.loads(
        run(
            "plan",
            "--teacher",
            causal_teacher,
            "--student",
            STUDENT,
            "--max_steps=100",
            "--method=extraction",
            "--max_length=16",
            "--json",
        )
    )
    assert planned["teacher"]["blocks"] == [f"model.layers.{index}" for index in range(4)]
    assert planned["student"]["blocks"] == ["model.layers.0", "model.layers.1"]
    parameters = sum(value.numel() for value in load_file(causal_teacher / "model.safetensors").values())
    assert planned["teacher"]["parameters"] == parameters
    assert [stage["steps"] for stage in planned["stages"]] == [25, 25, 50]
    ratios = [stage["one_shot_ratio"] for stage in planned["stages"]]
    assert ratios[0] > ratios[1] > ratios[2] == 1
    assert planned["tokens"] == 100 * 16 * 16
    costs = [stage["student_flops_per_token"] + stage["teacher_flops_per_token"] for stage in planned["stages"]]
    total = sum(stage["steps"] * cost for stage, cost in zip(planned["stages"], costs, strict=True)) * 16 * 16
    assert planned["flops"] == pytest.approx(total)
    assert planned["one_shot_flops"] == pytest.approx(100 * costs[2] * 16 * 16)


def test_plan_predicts_what_distill_counts(runs: dict[str, Path], causal_teacher: Path) -> None:
    flags = ("--max_steps", STEPS, "--max_length", LENGTH, "--per_device_train_batch_size", BATCH, "--json")
    planned = json.loads(run("plan", "--teacher", causal_teacher, "--student", STUDENT, "--method", "one_shot", *flags))
    counted = json.loads((runs["one_shot"] / "result.json").read_text())["budget"]
    # a plan has no labels, so it also counts the heads at each sequence's last position, where nothing is predicted
    heads = STEPS * BATCH * VOCAB * (3 * 2 * 16 + 2 * 32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        AutoModelForCausalLM.from_pretrained(causal_teacher).model(input_ids=torch.zeros(1, LENGTH, dtype=torch.long))
    start = 2 * 8 * counter.get_total_flops()  # the teacher runs twice over 8 examples to start the student
    expected = planned["flops"] - heads + start
    assert counted["student_flops"] + counted["teacher_flops"] == expected


@pytest.mark.parametrize(("preset", "normalize"), [("paper", "none"), ("default", "standardize")])
def test_a_preset_gives_the_settings_that_are_left_out(causal_teacher: Path, preset: str, normalize: str) -> None:
    flags = ("--preset", preset, "--projection=pca", "--json")
    curriculum = json.loads(run("plan", "--teacher", causal_teacher, "--student", STUDENT, *flags))["curriculum"]
    assert (curriculum["projection"], curriculum["normalize"]) == ("pca", normalize)
    expected = ("extraction", "random", "none") if preset == "paper" else ("joint", "teacher", "none")
    assert (curriculum["method"], curriculum["student_init"], curriculum["warm_start"]) == expected


@pytest.mark.parametrize("kind", ["mlm", "classifier", "embedding"])
def test_plan_of_the_other_tasks(kind: str, request: pytest.FixtureRequest) -> None:
    teacher = request.getfixturevalue(f"{kind}_teacher")
    method = ("--method=extraction", "--warm_start=none")
    planned = json.loads(run("plan", "--teacher", teacher, "--student", STUDENT, *method, "--json"))
    assert [stage["name"] for stage in planned["stages"]] == ["hidden 1:2", "hidden 2:4", "output"]


def test_plan_takes_the_config_of_a_run(causal_teacher: Path, corpus: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        f"teacher_model_name_or_path: {causal_teacher}\nstudent: {STUDENT}\ndataset: {corpus / 'text.txt'}\n"
        "method: one_shot\nmax_length: 16\n"
    )
    planned = json.loads(run("plan", "--config", config, "--warm_start=none", "--json"))
    assert [stage["name"] for stage in planned["stages"]] == ["output"]


# ---- distill ----


@pytest.fixture(scope="module")
def held_out(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("held-out") / "held-out.txt"
    file.write_text("".join((corpus / "text.txt").read_text().splitlines(keepends=True)[:30]))
    return file


@pytest.fixture(scope="module")
def printed() -> dict[str, str]:
    """What each run of `runs` printed."""
    return {}


@pytest.fixture(scope="module")
def runs(
    causal_teacher: Path,
    corpus: Path,
    held_out: Path,
    printed: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """The output folder of each method: one YAML file for all, the rest by flags."""
    root = tmp_path_factory.mktemp("runs")
    config = root / "run.yaml"
    config.write_text(
        f"teacher_model_name_or_path: {causal_teacher}\nstudent: {STUDENT}\ndataset: {corpus / 'text.txt'}\n"
        f"eval_dataset: {held_out}\nmethod: scratch\nmax_steps: 1000\nlearning_rate: 1e-3\nseed: 3\n"
    )
    checkpoint = save_llama(root / "early-teacher", seed=9)
    for method in METHODS:
        extra = ["--teacher_checkpoints", str(checkpoint)] if method == "progressive" else []
        flags = ["--method", method, "--output_dir", root / method, *budget(max_samples=1000), *extra]
        printed[method] = run("distill", "--config", config, *flags)
    return {method: root / method for method in METHODS}


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", METHODS)
def test_the_folder_holds_a_plain_student_and_records(runs: dict[str, Path], method: str) -> None:
    statistics = (
        {"target_stats.safetensors"} if method in ("extraction", "joint") else set()
    )  # what a resumed run needs
    assert {file.name for file in runs[method].iterdir()} == STUDENT_FILES | RECORD_FILES | statistics


@pytest.mark.parametrize("method", METHODS)
def test_the_student_loads_with_transformers(runs: dict[str, Path], method: str) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(runs[method], output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (2, 16)
    stored = load_file(runs[method] / "model.safetensors")
    assert set(stored) == set(model.state_dict())
    assert {value.dtype for value in stored.values()} == {torch.float32}
    tokenizer = AutoTokenizer.from_pretrained(runs[method])
    assert tokenizer.get_vocab() == make_tokenizer().get_vocab()
    ids = tokenizer(" ".join(WORDS[:5]), return_tensors="pt")["input_ids"]
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] <= 8


@pytest.mark.parametrize(
    ("method", "stages"),
    [
        ("extraction", [("hidden 1:1", 2), ("hidden 2:4", 2), ("output", 4)]),
        ("joint", [("joint 1:1,2:4", 8)]),
        ("one_shot", [("output", 8)]),
        ("progressive", [("output {early}", 4), ("output", 4)]),
        ("scratch", [("labels", 8)]),
    ],
)
def test_the_curriculum_is_recorded(runs: dict[str, Path], method: str, stages: list[tuple[str, int]]) -> None:
    curriculum = Curriculum.from_json((runs[method] / "curriculum.json").read_text())
    early = runs[method].parent / "early-teacher"
    assert curriculum.method == method
    expected = [(name.format(early=early), steps) for name, steps in stages]
    assert [(stage.name, stage.steps) for stage in curriculum.stages] == expected


@pytest.mark.parametrize("method", METHODS)
def test_metrics(runs: dict[str, Path], method: str) -> None:
    records = metrics(runs[method])
    training = [record for record in records if "loss" in record]
    assert [record["step"] for record in training] == [2, 4, 6, 8]
    stages = {"extraction": [1, 2, 3, 3], "progressive": [1, 1, 2, 2]}.get(method, [1, 1, 1, 1])
    assert [record["stage"] for record in training] == stages
    for record in records:
        assert record["method"] == method
        assert record["samples"] == record["step"] * BATCH
        assert record["tokens"] == record["samples"] * LENGTH
        assert record["flops"] == record["student_flops"] + record["teacher_flops"]
        assert (record["teacher_flops"] == 0) == (method == "scratch")
        assert record["student_flops"] > 0
    seconds = [record["seconds"] for record in training]
    assert 0 < seconds[0] < seconds[1] < seconds[2] < seconds[3]
    assert all(record["learning_rate"] <= 1e-3 for record in training)  # the YAML's
    assert "eval_loss" in records[-1]


@pytest.mark.parametrize("method", METHODS)
def test_result_and_card(runs: dict[str, Path], method: str, causal_teacher: Path) -> None:
    result = json.loads((runs[method] / "result.json").read_text())
    last = metrics(runs[method])[-1]
    assert (result["method"], result["seed"], result["budget"]["steps"]) == (method, 3, STEPS)
    for name in ("samples", "tokens", "student_flops", "teacher_flops"):
        assert result["budget"][name] == last[name]
    assert result["student"]["metrics"]["loss"] == last["eval_loss"]
    assert result["environment"]["tutelage"] == __version__
    card = (runs[method] / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: text-generation\n")
    for words in (f"method `{method}`", "text.txt", f"{STEPS} steps, {STEPS * BATCH} samples, 512 tokens"):
        assert words in card
    assert f"{result['student']['metrics']['loss']:.4g}" in card
    differing = [f"method={method}"] * (method != ("extraction" if method == "scratch" else "joint"))
    differing += ["student_init=random"] * (method == "scratch") + ["calibration_samples=8"]
    differing += ["warm_start=none"] * (method == "scratch")
    assert f"| Preset | default; deviations: {', '.join(differing)} |" in card
    start = (
        "random weights (student_init=random)"
        if method == "scratch"
        else "its teacher's weights (student_init=teacher), residual basis pca"
    )
    assert f"| Student starts from | {start} |" in card
    if method != "scratch":
        assert causal_teacher.name in card
        assert {"kl", "agreement"} <= result["student"]["metrics"].keys()
        assert result["teacher"]["metrics"]["loss"] > 0
    assert (runs[method] / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("method", METHODS)
def test_metrics_and_files_are_printed(runs: dict[str, Path], printed: dict[str, str], method: str) -> None:
    result = json.loads((runs[method] / "result.json").read_text())
    lines = printed[method].splitlines()
    assert lines[0].split() == ["student", "teacher"]
    values = {line.split()[0]: line.split()[1] for line in lines[1 : 2 + len(result["student"]["metrics"])]}
    assert values["parameters"] == f"{result['student']['parameters']:,}"
    assert values["loss"] == f"{result['student']['metrics']['loss']:.4f}"
    assert any(line.startswith(f"budget: {STEPS} steps, {STEPS * BATCH} samples, 512 tokens") for line in lines)
    places = dict(line.split(":", 1) for line in lines[-3:])
    for name, file in (("student", ""), ("table", "README.md"), ("plot", "loss.png")):
        assert Path(places[name].strip()) == runs[method] / file


def test_a_second_run_with_the_same_seed_gives_the_same_student(runs: dict[str, Path], tmp_path: Path) -> None:
    config = runs["extraction"].parent / "run.yaml"
    flags = ["--method", "extraction", "--output_dir", tmp_path, *budget(max_samples=1000)]
    run("distill", "--config", config, *flags)
    for name, value in load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(value, load_file(runs["extraction"] / "model.safetensors")[name]), name


def test_yaml_values_are_read_like_flags(causal_teacher: Path, corpus: Path, tmp_path: Path) -> None:
    """YAML alone takes 1:2 for sixty-two, and 1e-3 for a string."""
    config = tmp_path / "run.yaml"
    config.write_text(
        f"teacher_model_name_or_path: {causal_teacher}\nstudent: {STUDENT}\ndataset: {corpus / 'text.txt'}\n"
        "layer_map: 1:2\nstage_steps: [3]\nlearning_rate: 1e-3\nreport_to: none\nstage_learning_rate:\n"
        "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr_rate: 0.5}\nuse_cpu: true\n"
    )
    run("distill", "--config", config, "--output_dir", tmp_path / "out", *budget())
    curriculum = Curriculum.from_json((tmp_path / "out" / "curriculum.json").read_text())
    assert [(stage.name, stage.steps) for stage in curriculum.stages] == [("hidden 1:2", 3), ("output", 5)]


def test_an_overwritten_run_leaves_nothing_of_the_old_one(runs: dict[str, Path], tmp_path: Path) -> None:
    config = runs["one_shot"].parent / "run.yaml"
    run("distill", "--config", config, "--output_dir", tmp_path, *budget(save_strategy="steps", save_steps=4))
    assert (tmp_path / "checkpoint-4").is_dir()
    flags = budget(method="one_shot", overwrite_output_dir="true", max_steps=2)
    run("distill", "--config", config, "--output_dir", tmp_path, *flags)
    assert {file.name for file in tmp_path.iterdir()} == STUDENT_FILES | RECORD_FILES
    assert {record["method"] for record in metrics(tmp_path)} == {"one_shot"}


def _distill(teacher: Path, corpus: Path, output: Path, **changes: Any) -> dict[str, Any]:
    flags = ("--teacher_model_name_or_path", teacher, "--student", STUDENT, "--dataset", corpus / "text.jsonl")
    run("distill", *flags, "--output_dir", output, *budget(**changes))
    return json.loads((output / "result.json").read_text())


@pytest.mark.parametrize("method", ["extraction", "one_shot", "scratch"])
def test_masked_language_models(mlm_teacher: Path, corpus: Path, tmp_path: Path, method: str) -> None:
    result = _distill(mlm_teacher, corpus, tmp_path, method=method)
    assert result["task"] == "masked_lm"
    assert {"loss", "perplexity", "accuracy"} <= result["student"]["metrics"].keys()
    model, info = AutoModelForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.hidden_size == 16
    assert AutoTokenizer.from_pretrained(tmp_path).mask_token == "[MASK]"
    assert "pipeline_tag: fill-mask" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("layer_map", ["1:2,2:4", "1:2,final:final"])
def test_classifiers(classifier_teacher: Path, corpus: Path, tmp_path: Path, layer_map: str) -> None:
    result = _distill(classifier_teacher, corpus, tmp_path, layer_map=layer_map, label_weight=0.5)
    assert result["task"] == "sequence_classification"
    assert {"loss", "accuracy", "kl", "agreement"} <= result["student"]["metrics"].keys()
    assert "perplexity" not in result["student"]["metrics"]
    model, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert model.config.num_labels == CLASSES
    assert "pipeline_tag: text-classification" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("method", ["extraction", "one_shot"])
def test_sentence_encoders(embedding_teacher: Path, corpus: Path, tmp_path: Path, method: str) -> None:
    result = _distill(embedding_teacher, corpus, tmp_path, method=method)
    assert result["task"] == "embedding"
    assert {"cosine", "similarity_pearson", "similarity_spearman"} <= result["student"]["metrics"].keys()
    model = load_embedding_model(str(tmp_path))
    assert (model.config.hidden_size, model.embedding_size) == (16, 32)
    assert (tmp_path / "modules.json").is_file()
    assert "library_name: sentence-transformers" in (tmp_path / "README.md").read_text()


def test_a_sentence_encoder_by_progressive_distillation(embedding_teacher: Path, corpus: Path, tmp_path: Path) -> None:
    _distill(
        embedding_teacher, corpus, tmp_path, method="progressive", teacher_checkpoints=embedding_teacher, max_steps=2
    )
    curriculum = Curriculum.from_json((tmp_path / "curriculum.json").read_text())
    assert [stage.teacher_checkpoint for stage in curriculum.stages] == [str(embedding_teacher), None]


# ---- evaluate ----


def evaluate(*arguments: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("evaluate", *arguments, "--json"))
    return {**found, **found["metrics"]}


@pytest.mark.parametrize("method", METHODS)
def test_evaluate_agrees_with_the_run(runs: dict[str, Path], method: str, causal_teacher: Path, held_out: Path) -> None:
    result = json.loads((runs[method] / "result.json").read_text())["student"]["metrics"]
    against = () if method == "scratch" else ("--teacher", causal_teacher)
    found = evaluate("--model", runs[method], "--dataset", held_out, "--max_length", LENGTH, *against)
    for name in ("loss", "accuracy", "perplexity", *(("kl", "agreement") if against else ())):
        assert found[name] == pytest.approx(result[name], rel=1e-6), name
    assert ("kl" in found) == bool(against)
    assert found["perplexity"] == pytest.approx(torch.tensor(found["loss"]).exp().item())


def test_a_teacher_agrees_with_itself(causal_teacher: Path, mlm_teacher: Path, corpus: Path) -> None:
    for teacher in (causal_teacher, mlm_teacher):
        found = evaluate("--model", teacher, "--teacher", teacher, "--dataset", corpus / "text.txt")
        assert found["kl"] == pytest.approx(0, abs=1e-6)
        assert found["agreement"] == 1
        assert found["loss"] > 1


def test_a_padded_vocabulary_is_left_out(causal_teacher: Path, corpus: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(causal_teacher)
    model.resize_token_embeddings(VOCAB + 5)
    model.lm_head.weight.data[VOCAB:] = 9.0  # entries that the tokenizer does not have, and that would win
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="vocabularies are padded to different sizes"):
        found = evaluate("--model", tmp_path, "--teacher", causal_teacher, "--dataset", corpus / "text.txt")
    assert found["kl"] == pytest.approx(0, abs=1e-6)
    assert found["agreement"] == 1


def test_a_sentence_encoder_agrees_with_itself(embedding_teacher: Path, corpus: Path) -> None:
    flags = ("--dataset", corpus / "text.jsonl", "--max_samples", 10, "--batch_size", 3)
    found = evaluate("--model", embedding_teacher, "--teacher", embedding_teacher, *flags)
    assert found["cosine"] == pytest.approx(1)
    assert found["similarity_spearman"] == pytest.approx(1)
    assert found["sequences"] == 10


def test_evaluate_prints_a_table(classifier_teacher: Path, corpus: Path) -> None:
    flags = ("--model", classifier_teacher, "--dataset", corpus / "text.parquet", "--max_samples", 12)
    lines = run("evaluate", *flags).splitlines()
    found = dict(line.split(maxsplit=1) for line in lines)
    expected = evaluate(*flags)
    assert found["loss"] == f"{expected['loss']:.4f}"
    assert found["accuracy"] == f"{expected['accuracy']:.4f}"
    assert (found["model"], found["sequences"]) == (str(classifier_teacher), "12")


# ---- The command itself ----


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["-h"], ["--help"]):
        assert main(arguments) == 0
        assert "tutelage distill" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"tutelage {__version__}\n"


@pytest.mark.parametrize("command", ["plan", "distill", "evaluate"])
def test_help_of_a_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert f"usage: tutelage {command}" in capsys.readouterr().out
