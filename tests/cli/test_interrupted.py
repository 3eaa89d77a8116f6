"""One command starts a run, continues it after a signal, and says that it is finished."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer

from tests.cli.conftest import budget, run
from tutelage.cli import main
from tutelage.core.interrupts import Interrupted, Interrupts
from tutelage.io.files import alone
from tutelage.runs import distill as distill_module

TIMES = ("seconds", "runtime", "per_second", "_time")


def flags(teacher: Path, corpus: Path, folder: Path, **changes: Any) -> list[str]:
    """A run with logs and evaluations that do not fall on its checkpoints."""
    given = {"teacher": teacher, "student": "layers=2,hidden_size=16", "dataset": corpus / "text.txt", "resume": "auto"}
    given |= {"output_dir": folder, **changes}
    return [
        "distill",
        *(f"--{name}={value}" for name, value in given.items()),
        *budget(method="extraction", save_strategy="steps", save_steps=100, eval_strategy="steps", eval_steps=3),
    ]


def rows(folder: Path) -> list[dict[str, Any]]:
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in record.items() if not name.endswith(TIMES)} for record in records]


@pytest.fixture(scope="module")
def whole(causal_teacher: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run(*flags(causal_teacher, corpus, folder))
    return folder


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_after_its_step_and_the_same_command_continues_it(
    causal_teacher: Path,
    corpus: Path,
    tmp_path: Path,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
    code: int,
) -> None:
    original, handler = Trainer.training_step, signal.getsignal(number)

    def interrupted(self: Trainer, *arguments: Any, **settings: Any) -> Any:
        loss = original(self, *arguments, **settings)
        if self.state.global_step == 4:
            os.kill(os.getpid(), number)
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", interrupted)
        assert main(flags(causal_teacher, corpus, tmp_path)) == code
    (*_, line) = capsys.readouterr().err.splitlines()
    saved = f"interrupted after step 5 of 8, saved in '{tmp_path / 'checkpoint-5'}'"
    assert line == f"tutelage distill: {saved}; --resume auto continues the run"
    assert signal.getsignal(number) == handler
    assert not (tmp_path / "result.json").exists()

    run(*flags(causal_teacher, corpus, tmp_path))
    assert rows(tmp_path) == rows(whole)
    assert (tmp_path / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    ends = [json.loads((folder / "result.json").read_text()) for folder in (tmp_path, whole)]
    for end in ends:
        end["budget"].pop("seconds")
        end.pop("digest")
    assert ends[0] == ends[1]


def test_a_finished_run_says_so_and_is_left_alone(
    causal_teacher: Path, corpus: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}
    assert main(flags(causal_teacher, corpus, whole)) == 0
    found = capsys.readouterr()
    assert "contains this run, and it is finished: nothing was trained" in found.out + found.err
    assert "budget: 8 steps" in found.out
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()} == before
    assert main(flags(causal_teacher, corpus, whole, learning_rate=0.5)) == 2
    assert "was created with a different learning rate" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model.safetensors", "result.json"])
def test_a_finished_run_whose_student_or_result_is_damaged_writes_it_again(
    causal_teacher: Path, corpus: Path, tmp_path: Path, whole: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(whole, tmp_path / "copy")
    content = bytearray((whole / name).read_bytes())
    content[-20] ^= 1
    (tmp_path / "copy" / name).write_bytes(content)
    run(*flags(causal_teacher, corpus, tmp_path / "copy"))
    assert f"{tmp_path / 'copy' / name} is" in caplog.text
    assert json.loads((tmp_path / "copy" / "result.json").read_text())["files"]["model.safetensors"]
    assert (tmp_path / "copy" / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_run_killed_before_its_result_evaluates_again_and_logs_the_same(
    causal_teacher: Path, corpus: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(distill_module, "write_card", killed)
        assert main(flags(causal_teacher, corpus, tmp_path)) == 130
    assert (tmp_path / "model.safetensors").exists() and not (tmp_path / "result.json").exists()
    run(*flags(causal_teacher, corpus, tmp_path))
    assert rows(tmp_path) == rows(whole)


def test_a_full_disk_anywhere_is_one_line(
    causal_teacher: Path,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/tmp/cache")
        except OSError as error:
            raise RuntimeError("the cache could not be made") from error

    monkeypatch.setattr("tutelage.runs.inputs.tokenize", full)
    assert main(flags(causal_teacher, corpus, tmp_path)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tutelage distill: could not write '/tmp/cache': No space left on device; free space there")


def test_a_second_signal_ends_at_once_and_a_thread_has_no_handlers() -> None:
    interrupts = Interrupts()
    with interrupts.handled("name"), interrupts.finishing():
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.received == signal.SIGINT
        with pytest.raises(Interrupted) as raised:
            os.kill(os.getpid(), signal.SIGTERM)
    assert raised.value.exit_code == 143
    active: list[bool] = []

    def elsewhere() -> None:
        with interrupts.handled("name"):
            active.append(interrupts.active)

    (thread := threading.Thread(target=elsewhere)).start()
    thread.join()
    assert active == [False]


def test_a_signal_amid_the_imports_is_one_line() -> None:
    program = (
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch': os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from tutelage.cli import main\n"
        "sys.exit(main(['distill']))\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (143, "", "tutelage distill: interrupted\n")


@pytest.mark.parametrize("command", ["distill", "extract"])
def test_another_process_in_the_folder_is_named_and_left_alone(
    causal_teacher: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    pytest.importorskip("fcntl", reason="folders are locked on Unix")
    given = [f"--teacher={causal_teacher}", f"--dataset={corpus / 'text.jsonl'}", "--student=layers=2,hidden_size=16"]
    words = [command, *given, f"--output_dir={tmp_path / 'out'}", "--max_steps=1", "--use_cpu=true", "--max_length=16"]
    with alone(tmp_path / "out", "working"):
        assert main(words) == 2
        assert "another process is" in capsys.readouterr().err and not list((tmp_path / "out").iterdir())
    assert main(words) == 0
