"""`tutelage compare` and `tutelage report`, as typed."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import make_tokenizer, save_llama
from tutelage import CurriculumConfig, RunOptions, plan
from tutelage.cli import compare as compare_module
from tutelage.cli import main
from tutelage.core.curriculum import Curriculum
from tutelage.core.stages import HiddenStage, OutputStage
from tutelage.reproduction.recipes import RECIPES
from tutelage.reproduction.recipes.user_run import UserRecipe, user_recipe
from tutelage.reproduction.results import Comparison
from tutelage.tasks.parity import planted_teacher

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SMALL = {
    "d": 8,
    "k": 2,
    "teacher": "planted",
    "teacher_width": 64,
    "student_width": 16,
    "batch_size": 16,
    "budget_samples": 640,
    "eval_every": 80,
    "eval_samples": 64,
    "stage_samples": 160,
    "target": 0.9,
}
OWN = {
    "student": "layers=1,hidden_size=32",
    "seeds": [0],
    "learning_rates": ["3e-3"],
    "batch_size": 4,
    "budget_samples": 24,
    "eval_every": 8,
    "max_samples": 4,
    "max_length": 16,
    "use_cpu": True,
    "calibration_samples": 48,
}


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs begin in an empty folder, without the user's teachers."""
    monkeypatch.setenv("TUTELAGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TUTELAGE_ASSETS", str(tmp_path / "assets"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture
def succeeds(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """Standard output and standard error of a command that succeeds."""

    def run(*arguments: Any) -> tuple[str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return captured.out, captured.err

    return run


@pytest.fixture
def error_of(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The line on stderr of a command that fails as a user's mistake should, after lines of progress at most."""

    def error(*arguments: Any) -> str:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert code == 2, captured.err
        assert captured.out == "" and "Traceback" not in captured.err
        *progress, line = captured.err.splitlines()
        assert all(text.startswith("teacher of ") for text in progress), progress
        assert line.startswith(f"tutelage {arguments[0]}: ")
        return line

    return error


def flags(**fields: Any) -> list[str]:
    return [word for key, value in {**SMALL, **fields}.items() for word in (f"--{key}", str(value))]


def own_file(folder: Path, text: str = "", **options: Any) -> Path:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({**OWN, **options}) + text, encoding="utf-8")
    return path


def names(result: Comparison) -> list[str]:
    return [method.name for method in result.methods]


def teacher_of(result: Comparison) -> str:
    """What is said of the only teacher."""
    (teacher,) = result.teachers
    return teacher.description


def curriculum_of(result: Comparison, name: str) -> Curriculum:
    curriculum = result.method(name).curriculum
    assert curriculum is not None
    return curriculum


# ---- Recipes ----


def test_list_shows_recipes_sizes_and_fields(succeeds: Callable[..., tuple[str, str]]) -> None:
    out, err = succeeds("compare", "--list")
    assert err == ""
    for name, sizes in RECIPES.items():
        assert name in out and sizes["laptop"].about in out
        for field in sizes["laptop"].settings():
            assert field in out
    assert "scaling" in out and "sizes: smoke, laptop, paper" in out
    assert not list(Path().iterdir())


def test_a_recipe_with_overrides(succeeds: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    arguments = ["compare", "parity-mlp/smoke", *flags(d=12), "--seeds", 0, 3, "--methods", "extraction", "one_shot"]
    out, err = succeeds(*arguments, "--output_dir", tmp_path / "o")
    result = Comparison.read(tmp_path / "o")
    assert (result.settings["d"], result.settings["k"], result.seeds) == (12, 2, (0, 3))
    assert names(result) == ["extraction", "one_shot"]
    assert result.command is not None and result.command.startswith("tutelage compare parity-mlp/smoke --d 12 ")
    assert out.startswith(result.verdict) and str(tmp_path / "o" / "comparison.json") in out
    assert err.splitlines()[0] == "teacher of parity-mlp/smoke"
    assert err.splitlines()[1:] == [f"{name}: chosen 0.1, seeds 0, 3" for name in ("extraction", "one_shot")]
    assert {"comparison.json", "report.md", "curves_samples.png"} <= {file.name for file in (tmp_path / "o").iterdir()}


def test_the_command_in_the_record_makes_it_again(succeeds: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    variant = "deep:layer_map=2:2,stage_steps=5"
    words = ["--methods", "one_shot", "--variant", variant, "--output_dir", "a folder"]
    succeeds("compare", "parity-mlp/smoke", *flags(), *words)
    first = Comparison.read(Path("a folder"))
    assert names(first) == ["one_shot", "deep"]
    words = shlex.split(first.command or "")
    assert words[:2] == ["tutelage", "compare"]
    words[words.index("a folder")] = str(tmp_path / "again")
    succeeds(*words[1:])
    again = Comparison.read(tmp_path / "again")
    finals = [[run.final for run in made.method("deep").runs] for made in (first, again)]
    assert finals[0] == finals[1]


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        (["--d=12"], "d", 12),
        (["--budget_samples", "6.4e2"], "budget_samples", 640),
        (["--learning_rates", "0.1"], "learning_rates", [0.1]),
        (["--seeds", "5"], "seeds", [5]),
        (["--seeds=5,6"], "seeds", [5, 6]),
        (["--support", "7", "1"], "support", [7, 1]),
        (["--d", "9", "--d", "12"], "d", 12),
    ],
)
def test_fields_are_options(succeeds: Callable[..., tuple[str, str]], words: list[str], field: str, value: Any) -> None:
    arguments = [word for word in flags() if word]
    succeeds("compare", "parity-mlp/smoke", *arguments, *words, "--methods", "scratch", "--output_dir", "o")
    assert Comparison.read(Path("o")).settings[field] == value


@pytest.mark.parametrize(
    "before", [["--match", "samples"], ["--output_dir", "o"], ["--output_dir=o", "--match=samples"]]
)
def test_options_may_come_before_the_recipe(succeeds: Callable[..., tuple[str, str]], before: list[str]) -> None:
    after = [] if any("o" in word.split("=")[-1:] for word in before) else ["--output_dir", "o"]
    succeeds("compare", *before, "parity-mlp/smoke", *flags(), *after, "--methods", "scratch")
    assert Comparison.read(Path("o")).recipe == "parity-mlp"


def test_the_folder_is_named_after_the_recipe(succeeds: Callable[..., tuple[str, str]]) -> None:
    succeeds("compare", "parity-mlp/smoke", *flags(), "--methods", "scratch")
    (folder,) = Path("comparisons").iterdir()
    assert re.fullmatch(r"parity-mlp-smoke-[0-9a-f]{6}", folder.name)  # marked by the fields that flags() change
    assert Comparison.read(folder).size == "smoke"
    succeeds("compare", "parity-mlp/smoke", *flags(), "--methods", "scratch")  # the same again is resumed
    succeeds("compare", "parity-mlp/smoke", *flags(), "--seeds", "5", "--methods", "scratch")  # another has its own
    assert len(list(Path("comparisons").iterdir())) == 2


def test_a_teacher_given_by_folder(succeeds: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    planted_teacher(8, 2, 40, support=(0, 1)).save_pretrained(tmp_path / "wise")
    words = [word for word in flags(support="0 1") if word not in ("--teacher", "planted")]
    arguments = ["--teacher", tmp_path / "wise", "--methods", "one_shot", "--output_dir", "o"]
    succeeds("compare", "parity-mlp/smoke", *words, *arguments)
    assert teacher_of(Comparison.read(Path("o"))) == "given: wise"


def test_report_redraws_what_is_there(succeeds: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    succeeds("compare", "parity-mlp/smoke", *flags(), "--methods", "extraction", "one_shot", "--output_dir", "o")
    before = (Path("o") / "report.md").read_text(encoding="utf-8")
    for file in (*Path("o").glob("*.png"), *Path("o").glob("report.*")):
        file.unlink()
    out, err = succeeds("report", "o")
    assert err == "" and Path(out.strip()).is_file() and Path(out.strip()).parent == Path("o")
    assert (Path("o") / "report.md").read_text(encoding="utf-8") == before
    assert "extraction" in before and "planted" in before
    # a comparison that is not finished
    known = Comparison.read(Path("o"))
    (tmp_path / "going").mkdir()
    dataclasses.replace(known, complete=False, methods=known.methods[:1]).write(tmp_path / "going")
    succeeds("report", tmp_path / "going")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["parity"], "unknown recipe 'parity': there are parity-mlp, parity-transformer"),
        (["parity-mlp/big"], "unknown size 'big' of parity-mlp"),
        (["parity-mlp/smoke", "--heads", "3"], "parity-mlp has no field 'heads': it has seeds"),
        (["parity-mlp/smoke", "--d", "--k", "2"], "--d needs a value"),
        (["parity-mlp/smoke", "--d", "x"], "cannot read d='x': it must be a whole number"),
        (["parity-mlp/smoke", "--d", "inf"], "cannot read d='inf': it must be a whole number"),
        (["parity-mlp/smoke", "extra", "--d", "8"], "unexpected argument 'extra'"),
        (["parity-mlp/smoke", "--k", "17"], "got k=17"),
        (["parity-mlp/smoke", "--seeds", "1", "1"], "seeds are repeated: 1, 1"),
        (["parity-mlp/smoke", "--seeds", "-1"], "seed"),
        (["parity-mlp/smoke", "--seeds", "1000"], "are tuning seeds too"),
        (["parity-mlp/smoke", "--learning_rates", ""], "learning_rates"),
        (["parity-mlp/smoke", "--batch_size", "0"], "batch_size"),
        (["parity-mlp/smoke", "--match", "steps"], "invalid choice: 'steps'"),
        (["parity-mlp/smoke", "--methods", "distil"], "unknown method 'distil'"),
        (["parity-mlp/smoke", "--methods", "one_shot", "one_shot"], "methods are repeated"),
        (
            ["parity-mlp/smoke", "--methods", "extraction:layer_map=1:1"],
            "Give settings to a named variant: --variant NAME:method=extraction,layer_map=1:1",
        ),
        (["parity-mlp/smoke", "--variant", "deep:layer_map=9:9"], "the student has blocks 1 to 2"),
        (["parity-mlp/smoke", "--variant", "deep:stage_steps=x"], "cannot read stage_steps='x'"),
        (["parity-mlp/smoke", "--methods", "one_shot", "--variant", "one_shot:temperature=2"], "methods are repeated"),
        (
            ["parity-mlp/smoke", "--methods", "progressive", "--teacher", "planted"],
            "leave progressive out of --methods",
        ),
        (["parity-mlp/smoke", "--teacher", "nowhere"], "unknown teacher 'nowhere'"),
        (
            ["parity-mlp/smoke", "--target", "1.5", "--teacher", "planted"],
            "is beyond the teacher, which reaches 1.0000",
        ),
        (
            ["parity-transformer/smoke", "--teacher", "planted"],
            "unknown teacher 'planted': use 'trained', or the folder of a finished teacher",
        ),
        (["scaling/big"], "unknown size 'big' of scaling"),
        (["scaling/smoke", "--ds", "8"], "at least two values of ds"),
        (["scaling/smoke", "--methods", "extraction"], "methods"),
        (["scaling/smoke", "--match", "flops"], "match"),
        (["nowhere.yaml"], "no config file 'nowhere.yaml'"),
    ],
)
def test_mistakes_are_one_line(error_of: Callable[..., str], words: list[str], message: str) -> None:
    planted = words[:1] == ["parity-mlp/smoke"] and "--teacher" not in words and "extra" not in words
    assert message in error_of("compare", *words, *(["--teacher=planted"] if planted else []))


def test_the_folder_of_a_different_comparison_is_refused(
    succeeds: Callable[..., tuple[str, str]], error_of: Callable[..., str]
) -> None:
    succeeds("compare", "parity-mlp/smoke", *flags(), "--methods", "scratch", "--output_dir", "o")
    line = error_of("compare", "parity-mlp/smoke", *flags(d=9), "--methods", "scratch", "--output_dir", "o")
    assert "'o' contains a comparison with a different" in line and "choose a different --output_dir" in line
    Path("notes.txt").write_text("mine", encoding="utf-8")
    line = error_of("compare", "parity-mlp/smoke", *flags(), "--methods", "scratch", "--output_dir", "notes.txt")
    assert "notes.txt" in line


@pytest.mark.parametrize("words", [["nowhere"], []])
def test_report_of_nothing_is_one_line(error_of: Callable[..., str], words: list[str]) -> None:
    assert "comparison.json" in error_of("report", *words) if words else "folder" in error_of("report")


# ---- A file of the user's own ----


def test_own_file_with_the_embedded_teacher(
    succeeds: Callable[..., tuple[str, str]], tmp_path: Path, corpus: Path
) -> None:
    methods = {"extraction": {}, "paper": {"projection": "gaussian", "normalize": "none"}, "one_shot": None}
    file = own_file(tmp_path, dataset=str(corpus / "text.txt"), methods=methods)
    out, err = succeeds("compare", file)
    folder = Path("comparisons") / "mine"
    result = Comparison.read(folder)
    assert (result.recipe, result.size, result.budget) == ("mine", "own", 24)
    assert names(result) == ["extraction", "one_shot", "paper"]
    assert (result.metric, result.better, result.seeds) == ("loss", "lower", (0,))
    ours, paper = (curriculum_of(result, name) for name in ("extraction", "paper"))
    assert (ours.student_init, ours.projection, ours.normalize) == ("teacher", "residual", "standardize")
    assert (paper.student_init, paper.warm_start, paper.normalize) == ("teacher", "none", "none")
    starts = {method.runs[0].curve[0].metrics["loss"] for method in result.methods}
    assert len(starts) == 1  # the same student, on the same text
    assert "given: " in teacher_of(result)
    assert "| paper | extraction | normalize=none, projection=gaussian |" in (folder / "report.md").read_text()
    assert result.verdict in out and err.splitlines()[0] == "teacher of mine/own"
    succeeds("report", folder)


def test_own_file_names_its_teacher_and_flags_win(
    succeeds: Callable[..., tuple[str, str]], tmp_path: Path, corpus: Path, causal_teacher: Path
) -> None:
    file = own_file(tmp_path, teacher=str(causal_teacher), dataset=str(corpus / "text.jsonl"), budget_samples=8_000)
    words = ["--budget_samples", 16, "--seeds", 1, 2, "--methods", "one_shot", "--output_dir", "o"]
    words += ["--student_init", "random"]
    succeeds("compare", file, *words)
    result = Comparison.read(Path("o"))
    assert (result.budget, result.seeds) == (16, (1, 2))
    first, second = result.method("one_shot").runs
    assert first.curve[0].metrics["loss"] != second.curve[0].metrics["loss"]  # the initial students differ


def test_own_file_starts_students_as_distill_does(
    succeeds: Callable[..., tuple[str, str]], tmp_path: Path, corpus: Path, causal_teacher: Path
) -> None:
    methods = {"joint": {}, "from_random": {"method": "joint", "student_init": "random"}}
    student = "layers=2,hidden_size=16"
    data = {"teacher": str(causal_teacher), "dataset": str(corpus / "text.jsonl"), "student": student}
    succeeds("compare", own_file(tmp_path, methods=methods, **data), "--output_dir", "o")
    result = Comparison.read(Path("o"))
    args = CurriculumConfig(teacher_model_name_or_path=str(causal_teacher), max_steps=6, use_cpu=True)
    planned = plan(RunOptions(student=student), args).curriculum  # by the default method
    assert curriculum_of(result, "joint") == planned
    assert (planned.student_init, planned.projection) == ("teacher", "residual")
    random = curriculum_of(result, "from_random")
    assert (random.student_init, random.projection) == ("random", "gaussian")
    first = [result.method(name).runs[0].curve[0].metrics["loss"] for name in ("joint", "from_random")]
    assert first[0] != first[1]


def test_scratch_cannot_start_from_the_teacher(
    error_of: Callable[..., str], tmp_path: Path, corpus: Path, causal_teacher: Path
) -> None:
    file = own_file(tmp_path, teacher=str(causal_teacher), dataset=str(corpus / "text.jsonl"), student_init="teacher")
    message = error_of("compare", file, "--methods", "one_shot", "scratch", "--output_dir", "o")
    assert "student_init='teacher' needs a teacher, but method 'scratch' has none: use student_init='random'" in message
    assert not Path("o", "runs").exists()


def test_own_teacher_by_flag(
    succeeds: Callable[..., tuple[str, str]], tmp_path: Path, corpus: Path, causal_teacher: Path
) -> None:
    file = own_file(tmp_path, dataset=str(corpus / "text.jsonl"))
    succeeds("compare", file, "--teacher", causal_teacher, "--methods", "one_shot", "--output_dir", "o")
    assert teacher_of(Comparison.read(Path("o"))) == f"given: {causal_teacher}"


def test_own_options_by_flag_are_read_as_their_type(
    succeeds: Callable[..., tuple[str, str]], tmp_path: Path, corpus: Path
) -> None:
    file = own_file(tmp_path, dataset=str(corpus / "text.jsonl"))
    words = ["--max_length", 12, "--label_weight", 0.5, "--warmup_steps", "0", "--eval_fraction", "0.2"]
    succeeds("compare", file, *words, "--methods", "one_shot", "--output_dir", "o")
    (stage,) = curriculum_of(Comparison.read(Path("o")), "one_shot").stages
    assert isinstance(stage, OutputStage) and stage.label_weight == 0.5


def test_own_yaml_is_read_as_distill_reads_it(
    succeeds: Callable[..., tuple[str, str]], tmp_path: Path, corpus: Path
) -> None:
    """YAML alone takes `1:2` for 62 and `1e-3` for a word."""
    text = "layer_map: 1:2\nstage_learning_rate: 1e-3\nadam_epsilon: 1e-7\nmax_grad_norm: 1e0\n"
    file = own_file(tmp_path, text, dataset=str(corpus / "text.jsonl"))
    succeeds("compare", file, "--methods", "extraction", "--output_dir", "o")
    hidden, _ = curriculum_of(Comparison.read(Path("o")), "extraction").stages
    assert isinstance(hidden, HiddenStage)
    assert (hidden.student_place, hidden.teacher_place, hidden.learning_rate) == (1, 2, 1e-3)


def test_values_in_a_files_methods_are_read_as_text_is(
    succeeds: Callable[..., tuple[str, str]], tmp_path: Path, corpus: Path
) -> None:
    """YAML alone takes `1:2` for 62."""
    text = "methods:\n  one_shot:\n  deep: {layer_map: 1:2, stage_learning_rate: 1e-3}\n"
    succeeds("compare", own_file(tmp_path, text, dataset=str(corpus / "text.jsonl")), "--output_dir", "o")
    result = Comparison.read(Path("o"))
    assert names(result) == ["one_shot", "deep"]
    hidden, _ = curriculum_of(result, "deep").stages
    assert isinstance(hidden, HiddenStage)
    assert (hidden.student_place, hidden.teacher_place, hidden.learning_rate) == (1, 2, 1e-3)


def test_a_variant_is_compared_beside_the_default_methods(
    succeeds: Callable[..., tuple[str, str]], tmp_path: Path, corpus: Path
) -> None:
    file = own_file(tmp_path, dataset=str(corpus / "text.jsonl"))
    succeeds(
        "compare", file, "--variant", "one_shot:temperature=2", "--variant", "short:budget=0.5", "--output_dir", "o"
    )
    result = Comparison.read(Path("o"))
    assert names(result) == ["joint", "extraction", "one_shot", "short"]
    assert curriculum_of(result, "one_shot").temperature == 2
    assert result.method("short").runs[0].curve[-1].samples == 12


def test_without_a_recipe_the_users_own_data_are_compared(
    succeeds: Callable[..., tuple[str, str]], corpus: Path, causal_teacher: Path
) -> None:
    own = {**OWN, "teacher": causal_teacher, "dataset": corpus / "text.jsonl", "learning_rates": "3e-3"}
    words = [word for key, value in {**own, "seeds": 0}.items() for word in (f"--{key}", value)]
    succeeds("compare", *words, "--output_dir", "o")
    result = Comparison.read(Path("o"))
    assert (result.recipe, names(result)) == ("own", ["joint", "extraction", "one_shot"])
    assert teacher_of(result) == f"given: {causal_teacher}"


def test_without_arguments_the_embedded_teacher_and_text_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def watch(recipe: Any, *args: Any, **settings: Any) -> None:
        seen.append((recipe, *args))
        raise KeyboardInterrupt

    monkeypatch.setattr(compare_module, "compare", watch)
    assert main(["compare"]) == 130
    ((recipe, folder, methods),) = seen
    assert (recipe.name, recipe.task, folder, methods) == ("own", "causal_lm", Path("comparisons/own"), None)
    assert [method.name for method in recipe.default_methods] == ["joint", "extraction", "one_shot"]


@pytest.mark.parametrize("name", ["minilm", "smollm2", "same_width", "austen", "start"])
def test_every_comparison_file_of_the_repository_is_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The models and texts of some have to be fetched first, so only what needs none of them is checked."""
    monkeypatch.setattr(UserRecipe, "check", lambda self: None)
    recipe = user_recipe(CONFIGS / f"compare_{name}.yaml", {})
    assert len(list(CONFIGS.glob("compare_*.yaml"))) == 5
    assert recipe.budget_samples % recipe.batch_size == recipe.budget_samples % recipe.eval_every == 0
    real = {
        "one_shot",
        "one_shot-transplant",
        "final-stage",
        "final-stage-transplant",
        "joint",
        "one_shot-teacher",
        "extraction-teacher",
        "joint-teacher",
    }
    usual = {"start": {"random-one-shot", "teacher-joint"}, "minilm": real, "smollm2": real}.get(
        name, {"one_shot", "paper"}
    )
    assert usual <= {method.name for method in recipe.default_methods}
    assert not set(recipe.seeds) & set(recipe.tuning_seeds)
    if name == "same_width":
        shown = {method.name: method.settings for method in recipe.default_methods}
        assert shown["final-state-transplant"] == "layer_map=final:final, warm_start=head"
        assert len(shown) == 6


def test_own_encoder_is_compared_by_cosine(
    succeeds: Callable[..., tuple[str, str]], tmp_path: Path, corpus: Path, embedding_teacher: Path
) -> None:
    options = {
        "teacher": str(embedding_teacher),
        "student": "layers=2,hidden_size=16",
        "dataset": str(corpus / "text.jsonl"),
    }
    succeeds("compare", own_file(tmp_path, **options), "--methods", "one_shot", "--output_dir", "o")
    result = Comparison.read(Path("o"))
    assert (result.metric, result.better) == ("cosine", "higher")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"colour": "red"}, "has an unknown option 'colour'"),
        ({"method": "extraction"}, "method is set by the comparison itself; use --methods"),
        ({"learning_rate": 0.1}, "learning_rate is set by the comparison itself"),
        ({"max_steps": 5}, "max_steps is set by the comparison itself"),
        ({"output_dir": "elsewhere"}, "output_dir"),
        ({"eval_strategy": "no"}, "eval_strategy"),
        ({"resume_from_checkpoint": "true"}, "resume_from_checkpoint"),
        ({"seeds": [0, 0]}, "seeds are repeated: 0, 0"),
        ({"batch_size": 0}, "batch_size"),
        ({"budget_samples": "many"}, "cannot read budget_samples='many': it must be a whole number"),
        ({"student": "layers=nine"}, "num_hidden_layers must be a positive whole number"),
        ({"dataset": "nowhere.txt"}, "nowhere.txt"),
        ({"teacher": "nowhere"}, "no teacher at 'nowhere'"),
        ({"max_length": 10**6}, "max_length 1000000 is longer than the model's"),
    ],
)
def test_own_mistakes_are_one_line(
    error_of: Callable[..., str], tmp_path: Path, corpus: Path, options: dict[str, Any], message: str
) -> None:
    file = own_file(tmp_path, **{"dataset": str(corpus / "text.jsonl"), **options})
    assert message in error_of("compare", file, "--methods", "one_shot", "--output_dir", "o")


def test_own_file_that_is_no_mapping(error_of: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    assert "must be a mapping of options" in error_of("compare", tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    assert "is not valid YAML" in error_of("compare", tmp_path / "broken.yaml")


def test_own_folder_named_like_a_recipe_is_a_file(succeeds: Callable[..., tuple[str, str]], corpus: Path) -> None:
    Path("scaling").mkdir()
    own_file(Path("scaling"), dataset=str(corpus / "text.jsonl"))
    succeeds("compare", "scaling/mine.yaml", "--methods", "one_shot", "--output_dir", "o")
    assert Comparison.read(Path("o")).recipe == "mine"


def test_an_own_student_with_weights_starts_from_them(tmp_path: Path, corpus: Path) -> None:
    teacher = save_llama(tmp_path / "llama")
    make_tokenizer().save_pretrained(save_llama(tmp_path / "student", seed=5, num_hidden_layers=2))
    options = {"teacher": str(teacher), "student": str(tmp_path / "student"), "dataset": str(corpus / "text.jsonl")}
    system = user_recipe(own_file(tmp_path, **options), {})
    one, two = system.make_student([0]), system.make_student([1])
    for name, value in one.state_dict().items():
        assert value.equal(two.state_dict()[name])
