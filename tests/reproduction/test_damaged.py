"""Files of a comparison that were damaged, edited or left half-written: made again or refused, never taken as they are."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.reproduction.comparing import TRAINED, changed, made, silent, timeless, tiny
from tests.reproduction.reporting import comparison
from tutelage.cli import main
from tutelage.core.errors import UserError
from tutelage.core.records import sealed, unsealed
from tutelage.io.files import alone
from tutelage.reproduction import teachers
from tutelage.reproduction.compare import compare
from tutelage.reproduction.recipes import resolve
from tutelage.reproduction.report import write_report
from tutelage.reproduction.results import COMPARISON_FILE, Comparison
from tutelage.reproduction.teachers import trained_teacher

Edit = Callable[[dict[str, Any]], None]


def edit(path: Path, change: Edit, seal: bool = False) -> None:
    """Change the JSON values of a file; with `seal` as somebody would who writes the digest anew."""
    values = json.loads(path.read_text(encoding="utf-8"))
    change(values)
    values = sealed({name: value for name, value in values.items() if name != "digest"}) if seal else values
    path.write_text(json.dumps(values), encoding="utf-8")


def first_point(values: dict[str, Any]) -> Any:
    return values["methods"][0]["runs"][0]["curve"][0]


def first_tuning(part: str) -> Callable[[dict[str, Any]], Any]:
    return lambda values: values["methods"][0]["tunings"][0][part]


def set_in(place: Callable[[dict[str, Any]], Any], name: str, value: Any) -> Edit:
    def change(values: dict[str, Any]) -> None:
        place(values)[name] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_in(lambda v: v, "match", "steps"), "match must be one of samples, flops, seconds"),
        (set_in(lambda v: v, "better", "more"), "better must be one of higher, lower"),
        (set_in(lambda v: v, "budget", 0), "budget must be at least 1"),
        (set_in(lambda v: v, "target", float("nan")), "target must be a finite number"),
        (set_in(lambda v: v, "seeds", [-1]), "seeds must be a number from 0 up"),
        (set_in(first_tuning("candidate"), "learning_rate", -0.1), "learning_rate must be positive"),
        (set_in(lambda v: first_tuning("trials")(v)[1], "score", float("nan")), "score must be a finite number"),
        (set_in(lambda v: v["methods"][0]["variant"], "budget_fraction", 16.5), "budget_fraction must be above 0"),
        (
            set_in(lambda v: v["methods"][0]["variant"], "match", "euros"),
            "match must be one of samples, flops, seconds",
        ),
        (set_in(lambda v: v["methods"][0]["variant"], "method", "magic"), "method must be one of extraction"),
        (set_in(lambda v: v["methods"][0]["runs"][0], "seed", -3), "seed must be a number from 0 up"),
        (set_in(lambda v: v["methods"][0]["runs"][0], "teacher", -1), "teacher must be a number from 0 up"),
        (set_in(lambda v: first_tuning("trials")(v)[1], "seeds", 0), "seeds must be at least 1"),
        (set_in(first_point, "samples", -64), "samples must be a number from 0 up"),
        (set_in(first_point, "seconds", float("inf")), "seconds must be a number from 0 up"),
        (set_in(first_point, "samples", 10**9), "the curve of seed 0 is not in order of samples"),
        (set_in(first_point, "metrics", {"accuracy": float("nan")}), "accuracy must be a finite number"),
        (set_in(lambda v: v["ratios"][0], "cost", "euros"), "cost must be one of samples"),
        (set_in(lambda v: v["ratios"][0]["paired"], "unreached", 4), "unreached must be a number from 0 to 3"),
        (set_in(lambda v: v["teachers"][0]["metrics"], "accuracy", float("inf")), "accuracy must be a finite number"),
        (set_in(lambda v: v["differences"][0]["paired"], "mean", float("nan")), "mean must be a finite number"),
        (set_in(lambda v: v["differences"][0]["paired"], "pairs", -1), "pairs must be a number from 0 up"),
    ],
)
def test_a_value_out_of_range_in_a_comparison_is_refused_with_the_file_named(
    tmp_path: Path, change: Edit, message: str
) -> None:
    comparison().write(tmp_path)
    edit(tmp_path / COMPARISON_FILE, change, seal=True)
    with pytest.raises(UserError, match=message) as refused:
        write_report(tmp_path)
    assert COMPARISON_FILE in str(refused.value)


def test_a_comparison_that_was_edited_is_refused(tmp_path: Path) -> None:
    comparison().write(tmp_path)
    edit(tmp_path / COMPARISON_FILE, set_in(first_point, "seconds", 0.25))
    with pytest.raises(UserError, match=r"comparison\.json.*it was changed.*give the command of the comparison again"):
        Comparison.read(tmp_path)
    edit(tmp_path / COMPARISON_FILE, lambda values: values.pop("digest"))  # as results of earlier versions
    assert Comparison.read(tmp_path).methods[0].runs[0].curve[0].seconds == 0.25


def test_the_result_of_a_different_comparison_is_not_mixed_with_this_one(tmp_path: Path) -> None:
    made(tiny(), tmp_path / "mine", ["one_shot"])
    made(tiny(student_width=8), tmp_path / "other", ["scratch"])
    (tmp_path / "other" / COMPARISON_FILE).replace(tmp_path / "mine" / COMPARISON_FILE)
    with pytest.raises(UserError, match=r"mine/comparison\.json' is of a different comparison: delete it"):
        compare(tiny(), tmp_path / "mine", ["one_shot"], log=silent)


def other_digit(path: Path) -> None:
    """Change one digit of a metric."""
    text = path.read_text(encoding="utf-8")
    at = text.index('"accuracy": 0.') + len('"accuracy": 0.')
    path.write_text(text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :], encoding="utf-8")


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def exchange(path: Path) -> None:
    """Swap the results of two seeds."""
    (other,) = (file for file in path.parent.parent.glob("*/run.json") if file != path)
    mine, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(mine)


def rename_seed(path: Path) -> None:
    edit(path, lambda values: values["records"][0].update(seed=7), seal=True)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (other_digit, "it was changed"),
        (halve, "cannot read"),
        (exchange, "is of a different run"),
        (rename_seed, "is of a different run"),
        (lambda path: path.write_text("[]"), "cannot read"),
    ],
)
def test_the_result_of_a_run_that_was_damaged_is_made_again_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], words: str
) -> None:
    recipe = changed(tiny(budget_samples=320, stage_samples=160), replicated=False)
    first = made(recipe, tmp_path, ["one_shot"])
    file = next(tmp_path.glob("runs/one_shot-*/*seed-0/run.json"))
    damage(file)
    assert timeless(made(recipe, tmp_path, ["one_shot"])) == timeless(first)
    message = caplog.messages[0]
    assert str(file) in message and words in message and message.endswith("the run is made again")


def test_metrics_and_checkpoints_of_an_unfinished_run_that_were_damaged_do_not_change_it(
    tmp_path: Path, kill: Callable[[str, int], None], caplog: pytest.LogCaptureFixture
) -> None:
    recipe = tiny(eval_every=16, target=1.0, k=3, d=10)  # checkpoints each 20 steps
    whole = made(recipe, tmp_path / "whole", ["one_shot"])

    def without(name: str, damage: Callable[[Path], Any]) -> None:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        kill("one_shot", 30)
        with pytest.raises(KeyboardInterrupt):
            made(recipe, folder, ["one_shot"])
        (file,) = folder.glob(f"runs/*/*/{name}")
        damage(file)
        caplog.clear()
        assert timeless(made(recipe, folder, ["one_shot"])) == timeless(whole)
        again = name.startswith("checkpoint")  # the checkpoint has a copy of the metrics
        assert ("the run is made again" in caplog.text and str(file.parent) in caplog.text) == again
        assert not [*folder.glob("runs/*/*/checkpoint-*")]

    without("metrics.jsonl", lambda file: file.write_text("".join(file.read_text().splitlines(True)[3:])))
    without("metrics.jsonl", lambda file: file.write_text(file.read_text().replace('"step": 5', '"step" 5', 1)))
    without("metrics.jsonl", lambda file: file.write_text(file.read_text().replace("0.", "1.", 1)))
    without("checkpoint-20/model.safetensors", halve)


def test_checkpoints_that_a_finished_run_left_behind_are_removed(tmp_path: Path) -> None:
    first = made(tiny(), tmp_path, ["one_shot"])
    (run,) = tmp_path.glob("runs/*/*")
    (run / "checkpoint-60").mkdir()
    assert made(tiny(), tmp_path, ["one_shot"]) == first
    assert not (run / "checkpoint-60").exists()


def test_costs_of_a_step_that_were_damaged_are_measured_again_if_they_come_out_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def again(match: str) -> Any:
        file = next((tmp_path / match).glob("pilot/*.json"))
        edit(file, lambda values: values["costs"].update(output=1.0))
        return made(tiny(), tmp_path / match, ["one_shot", "extraction"], match=match)

    first = made(tiny(), tmp_path / "flops", ["one_shot", "extraction"], match="flops")
    assert timeless(again("flops")) == timeless(first)
    assert "the cost of a step is measured again" in caplog.text
    made(tiny(), tmp_path / "seconds", ["one_shot", "extraction"], match="seconds")
    with pytest.raises(UserError, match=r"pilot.*json.*it was changed.*\. Choose a different --output_dir, or delete"):
        again("seconds")


# ---- Cached teachers ----


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """Folder of a teacher in the cache."""
    trained_teacher(resolve("parity-mlp/smoke", TRAINED))  # type: ignore[arg-type]
    (folder,) = (path for path in (tmp_path / "cache" / "teachers").iterdir() if path.is_dir())
    return folder


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_cached_teacher_that_was_damaged_is_trained_again(trained: Path, caplog: pytest.LogCaptureFixture) -> None:
    def contents() -> dict[str, Any]:
        weights = {str(file): file.read_bytes() for file in sorted(trained.glob("**/*.safetensors"))}
        return {**weights, "record": unsealed(json.loads((trained / "teacher.json").read_text()))}

    before = contents()
    checkpoint = sorted(trained.glob("at-*"))[0] / "model.safetensors"
    damages: list[tuple[Path, Callable[[Path], Any]]] = [
        (trained / "final" / "model.safetensors", flip),
        (checkpoint, lambda path: path.unlink()),
        (trained / "teacher.json", lambda path: edit(path, lambda values: values.update(samples=640))),
    ]
    for file, damage in damages:
        damage(file)
        caplog.clear()
        trained_teacher(resolve("parity-mlp/smoke", TRAINED))  # type: ignore[arg-type]
        assert str(file) in caplog.text and "the teacher is trained again" in caplog.text
        assert contents() == before
    caplog.clear()
    trained_teacher(resolve("parity-mlp/smoke", TRAINED))  # type: ignore[arg-type]
    assert not caplog.records


def test_of_two_processes_that_need_a_teacher_one_trains_it(
    tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The second one waits, says so, and takes the teacher of the first."""
    elsewhere = trained.rename(tmp_path / "finished")
    lock = FileLock(trained.with_name(f"{trained.name}.lock"), is_singleton=False)
    lock.acquire()

    class Said(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:  # meanwhile the first one finishes
            assert "waiting for another process, which is training the same teacher" in record.getMessage()
            elsewhere.rename(trained)
            lock.release()

    monkeypatch.setattr(teachers, "_train", None)
    handler = Said()
    logging.getLogger(teachers.__name__).addHandler(handler)
    try:
        teacher = trained_teacher(resolve("parity-mlp/smoke", TRAINED))  # type: ignore[arg-type]
    finally:
        logging.getLogger(teachers.__name__).removeHandler(handler)
    assert teacher.checkpoints and len(caplog.records) == 1


# ---- Folders and processes ----


@pytest.mark.parametrize("names", [["settings.json.0123456789abcdef.tmp"], ["settings.json"]])
def test_what_a_comparison_that_was_killed_left_behind_does_not_keep_others_out(
    tmp_path: Path, names: list[str]
) -> None:
    for name in names:
        (tmp_path / name).write_text("{")
    made(tiny(), tmp_path, ["one_shot"])
    assert not list(tmp_path.glob("*.tmp"))


def test_two_processes_do_not_make_one_comparison(tmp_path: Path) -> None:
    made(tiny(), tmp_path, ["one_shot"])
    with (
        alone(tmp_path, "making the comparison"),
        pytest.raises(UserError, match=r"another process is making the comparison in .*: wait until"),
    ):
        compare(tiny(), tmp_path, ["one_shot"], log=silent)
    made(tiny(), tmp_path, ["one_shot"])


@pytest.mark.parametrize(
    ("limit", "file"),
    [(200, "settings.json"), (2_000, "model.safetensors|at-"), (1_500, "teacher.json|at-|final|identity.json")],
)
def test_a_disk_without_room_is_said_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], limit: int, file: str
) -> None:
    resource: Any = pytest.importorskip("resource", reason="limits of file sizes are those of Unix")
    flags = [
        word for name, value in TRAINED.items() if not isinstance(value, tuple) for word in (f"--{name}", str(value))
    ]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        code = main(["compare", "parity-mlp/smoke", *flags, "--output_dir", str(tmp_path / "o")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    *_, line = capsys.readouterr().err.splitlines()
    assert code == 2 and re.search(f"could not write '.*({file}).*': .*; free space there", line), line
