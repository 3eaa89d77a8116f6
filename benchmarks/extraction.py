"""What the curriculum on disk costs and saves, as ratios measured within one run.

    python benchmarks/extraction.py --teacher .assets/smollm2 --dataset .assets/wikipedia/train.jsonl \\
        --output results/extraction

- *throughput*: tokens per second of an extraction (forward, projection, top-k, quantising, writing) over those of a bare
  `model(**batch)` loop on the same batches, truncated at the same blocks; the two alternate, batch by batch.
- *step*: a training step whose batch comes from disk (from the system's file cache, as rows that were read before) over one
  whose batch is in memory already.
- *memory*: peak resident memory of `tutelage distill --curriculum_dir` over that of `--method scratch` on the same student and
  text.
- *bytes*: per token, by stage and dtype, over float32 hidden states and full logits.
- *scale*: what int8 loses with a scale per token, and with a scale per dimension.
- *students*: seconds of three students from one extraction over three live distillations.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from tutelage.core.blocks import FINAL
from tutelage.core.inputs import model_inputs
from tutelage.core.stages import HiddenStage
from tutelage.io.store import Store
from tutelage.runs.environment import environment
from tutelage.runs.extraction.encoder import Encoder
from tutelage.runs.extraction.job import extract
from tutelage.runs.extraction.options import ExtractOptions
from tutelage.runs.extraction.schedule import Schedule, plan_shards
from tutelage.runs.inputs import RunOptions, load_inputs, with_defaults
from tutelage.targets import rows
from tutelage.targets.extracted import ExtractedTargets
from tutelage.targets.folder import ExtractedCurriculum
from tutelage.targets.live import LiveTargets
from tutelage.targets.manifest import ShardWriter
from tutelage.targets.source import Reading, StatisticsFile
from tutelage.targets.stored_rows import StoredRows
from tutelage.tasks.loading import load_config
from tutelage.tasks.registry import get_task
from tutelage.tasks.students import make_student, student_config
from tutelage.training.config import CurriculumConfig
from tutelage.training.objective import StageObjective
from tutelage.training.preparation import Given, prepare

STUDENT = "layers=4,hidden_size=192"
WIDTHS = (192, 128, 96)
STEP_TARGET = 1.05  # largest ratio of a step from disk


def settings(options: Any, folder: str, **fields: Any) -> tuple[RunOptions, CurriculumConfig]:
    run = RunOptions(student=STUDENT, dataset=options.dataset, max_length=options.length, max_samples=32)
    args = CurriculumConfig(
        output_dir=folder,
        teacher_model_name_or_path=options.teacher,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        top_k=64,
        student_init="random",  # one extraction for students of several widths
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **fields,
    )
    return run, args


def throughput(options: Any, folder: Path) -> dict[str, float]:
    """Tokens per second of extraction and of a bare loop, by stage."""
    run, args = with_defaults(*settings(options, str(folder / "unused")))
    inputs = load_inputs(run, args)
    source, data = inputs.source, inputs.train_dataset
    assert isinstance(source, LiveTargets) and data is not None
    given = Given(inputs.student, source, data, inputs.eval_dataset, inputs.tokenizer, None)
    resolved = prepare(given, args).run
    schedule = Schedule(resolved.curriculum, len(data), resolved.reading)
    vocabulary = max(len(inputs.tokenizer), int(source.model.config.vocab_size))  # type: ignore[union-attr]
    encoder = Encoder(source, data, inputs.eval_dataset, inputs.collator, vocabulary, ExtractOptions().dtype)
    rows_of_stages = [schedule.examples(index) for index in range(len(resolved.curriculum.stages))]
    batches_of = [plan_shards(found, [options.length] * len(found), options.batch, 10**6) for found in rows_of_stages]
    calibration = [encoder.batch(list(range(min(resolved.calibration_samples, len(data)))))]
    source.prepare(StatisticsFile(folder / "unused", read=False, write=False), lambda: calibration, "cpu")
    model: Any = source.model
    found = {}
    for index, stage in enumerate(resolved.curriculum.stages):
        batches = [batch for shard in batches_of[index] for batch in shard][: options.batches]
        form = encoder.form(stage, encoder.batch([0]))
        bare: Callable[..., Any] = model
        if isinstance(stage, HiddenStage):
            assert stage.teacher_place == FINAL, "the bare loop knows the stage before the output head"
            bare = model.get_decoder()
        writer = ShardWriter(Store(folder / "shards"), f"stage_{index + 1}", len(batches), form.features)
        times: dict[str, list[float]] = {"bare": [], "extract": []}
        for number, examples in enumerate(batches):
            batch = encoder.batch(examples)
            for key in ("bare", "extract") if number % 2 else ("extract", "bare"):
                start = time.perf_counter()
                if key == "bare":
                    with torch.inference_mode():
                        bare(**model_inputs(model, batch))
                else:
                    writer.write(number, encoder.stage_columns(index, form, [examples]))
                times[key].append(time.perf_counter() - start)
        medians = {key: statistics.median(values[1:]) for key, values in times.items()}
        tokens = options.batch * options.length
        found[stage.name] = {
            "bare_tokens_per_second": tokens / medians["bare"],
            "extract_tokens_per_second": tokens / medians["extract"],
            "ratio": medians["bare"] / medians["extract"],
        }
    return found


def step(options: Any, curriculum: Path) -> dict[str, Any]:
    """Milliseconds of a step from disk and from memory, by stage."""
    stored = ExtractedCurriculum(curriculum, check=False)
    task = get_task("causal_lm")
    student = make_student(STUDENT, task, student_config(STUDENT, load_config(str(stored.teacher_config)))).float()
    source = ExtractedTargets(stored)
    source.attach(stored.curriculum, student)
    source.prepare(StatisticsFile(curriculum / "unused", read=False, write=False), list, "cpu")
    objective = StageObjective(student, source)
    data = StoredRows(stored, stored.curriculum, 192, Reading(options.batch, options.batch, seed=1))
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    found = {}

    def train(batch: dict[str, Any]) -> None:
        optimizer.zero_grad()
        objective(**batch)["loss"].backward()
        optimizer.step()

    for index, stage in enumerate(stored.curriculum.stages):
        objective.stage_index = index
        positions = [
            range(int(data.starts[index]) + n * options.batch, int(data.starts[index]) + (n + 1) * options.batch)
            for n in range(min(stage.steps, options.batches))
        ]
        times: dict[str, list[float]] = {"disk": [], "memory": []}
        for number, where in enumerate(positions):
            kept = data.__getitems__(list(where)).tensors(0)
            for key in ("disk", "memory") if number % 2 else ("memory", "disk"):
                start = time.perf_counter()
                train(data.__getitems__(list(where)).tensors(0) if key == "disk" else kept)
                times[key].append(1e3 * (time.perf_counter() - start))
        medians = {key: statistics.median(values[1:]) for key, values in times.items()}
        found[stage.name] = {**medians, "ratio": medians["disk"] / medians["memory"]}
    return found


def scale_errors(options: Any, curriculum: Path) -> dict[str, float]:
    """Mean square error of int8 targets over their mean square, with a scale per token and a scale per dimension."""
    stored = ExtractedCurriculum(curriculum, check=False)
    data = StoredRows(stored, stored.curriculum, stored.identity.width, Reading(options.batch, options.batch, seed=1))
    last = min(16 * options.batch, int(data.starts[1]))
    starts = range(0, last, options.batch)
    batches = [data.__getitems__(list(range(start, start + options.batch))).tensors(0) for start in starts]
    states = torch.cat([rows.dequantized(batch)[batch[rows.KEEP]] for batch in batches])
    errors = {}
    for name, dim in (("token", 1), ("dimension", 0)):
        scale = states.abs().amax(dim, keepdim=True) / 127
        errors[name] = float(((states / scale).round() * scale - states).square().mean() / states.square().mean())
    return errors


def command(arguments: Iterable[str]) -> tuple[float, float]:
    """Seconds and peak resident memory, MiB, of a `tutelage` command in a process of its own (Linux)."""
    start = time.perf_counter()
    # VmHWM, since ru_maxrss counts what the parent had when it forked
    script = (
        "import re, sys; from tutelage.cli import main; code = main(sys.argv[1:]); "
        "print(int(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read()).group(1)) / 1024); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return time.perf_counter() - start, float(done.stdout.strip().splitlines()[-1])


def flags(options: Any, folder: Path, student: str) -> list[str]:
    values = {
        "output_dir": folder,
        "student": student,
        "per_device_train_batch_size": options.batch,
        "max_steps": options.steps,
        "student_init": "random",
        "use_cpu": "true",
        "save_strategy": "no",
        "overwrite_output_dir": "true",
    }
    return [f"--{key}={value}" for key, value in values.items()]


def text_flags(options: Any) -> list[str]:
    return [f"--dataset={options.dataset}", f"--max_length={options.length}", "--max_samples=32"]


def live_flags(options: Any) -> list[str]:
    return [f"--teacher={options.teacher}", "--top_k=64", *text_flags(options)]


def memory(options: Any, folder: Path) -> dict[str, float]:
    """Peak resident memory, MiB, of training from disk, from labels alone, and with the live teacher."""
    stored = [f"--curriculum_dir={folder / 'int8'}"]
    labels = ["--method=scratch", f"--teacher={options.teacher}", *text_flags(options)]
    _, from_disk = command(["distill", *flags(options, folder / "a", STUDENT), *stored])
    _, alone = command(["distill", *flags(options, folder / "b", STUDENT), *labels])
    _, live = command(["distill", *flags(options, folder / "c", STUDENT), *live_flags(options)])
    return {"from disk": from_disk, "student alone": alone, "live teacher": live, "ratio": from_disk / alone}


def students(options: Any, folder: Path) -> dict[str, Any]:
    """Seconds of one extraction and three students from it, and of three live distillations."""
    once = folder / "once"
    widest = ["--projection_dim=192", *live_flags(options)]
    extraction, _ = command(["extract", *flags(options, once, STUDENT)[:-1], *widest])
    seconds: dict[str, list[float]] = {"live": [], "stored": []}
    for width in WIDTHS:
        student = f"layers=4,hidden_size={width}"
        stored = [*flags(options, folder / f"s{width}", student), f"--curriculum_dir={once}"]
        seconds["stored"].append(command(["distill", *stored])[0])
        live = [*flags(options, folder / f"l{width}", student), *live_flags(options)]
        seconds["live"].append(command(["distill", *live])[0])
    total = extraction + sum(seconds["stored"])
    return {"extraction": extraction, **seconds, "ratio": total / sum(seconds["live"])}


def main() -> None:
    """Measure, and write results.json and README.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batches", type=int, default=20, help="batches timed in throughput and step")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        found["throughput"] = throughput(options, folder)
        print(found["throughput"])
        curricula = {}
        for dtype in rows.DTYPES:
            run, args = settings(options, str(folder / dtype))
            curricula[dtype] = extract(run, args, ExtractOptions(dtype=dtype), log=lambda line: None)
        found["step"] = step(options, folder / "int8")
        found["scale"] = scale_errors(options, folder / "float32")
        print(found["step"], found["scale"])
        found["bytes_per_token"] = {
            dtype: {split.name: split.bytes / split.tokens for split in made.splits if split.name.startswith("stage")}
            for dtype, made in curricula.items()
        }
        teacher = ExtractedCurriculum(folder / "int8", check=False).identity.teacher
        config = json.loads((folder / "int8" / "teacher" / "config.json").read_text(encoding="utf-8"))
        found["uncompressed"] = {"hidden": 4 * config["hidden_size"], "logits": 4 * teacher.outputs}
        print(found["bytes_per_token"], found["uncompressed"])
        found["memory_mib"] = memory(options, folder)
        print(found["memory_mib"])
        found["students_seconds"] = students(options, folder)
        print(found["students_seconds"])
    write(options, found)


def write(options: Any, found: dict[str, Any]) -> None:
    """results.json and README.md."""
    machine = environment()
    line = (
        f"python benchmarks/extraction.py --teacher {Path(options.teacher).name} --dataset {Path(options.dataset).name}"
    )
    line += f" --output {options.output} --batch {options.batch} --length {options.length} --steps {options.steps}"
    line += f" --batches {options.batches}"
    options.output.mkdir(parents=True, exist_ok=True)
    result = {"command": line, "environment": machine, **found}
    (options.output / "results.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    memory, students, scale = found["memory_mib"], found["students_seconds"], found["scale"]
    lines = [
        "# The curriculum on disk",
        "",
        f"By `{line}`; {machine['machine']}, {machine['threads']} thread(s), torch {machine['torch']}.",
        "",
        "| what | measured | ratio |",
        "|---|---|---|",
        *(
            f"| extraction over a bare truncated loop, {name} | {v['extract_tokens_per_second']:,.0f} and "
            f"{v['bare_tokens_per_second']:,.0f} tokens/s | {v['ratio']:.2f} |"
            for name, v in found["throughput"].items()
        ),
        *(
            f"| a step from disk over one from memory (target: at most {STEP_TARGET}), {name} | {v['disk']:.1f} and "
            f"{v['memory']:.1f} ms | {v['ratio']:.3f} |"
            for name, v in found["step"].items()
        ),
        f"| peak memory from disk over the student alone | {memory['from disk']:.0f} and {memory['student alone']:.0f} MiB "
        f"(live teacher {memory['live teacher']:.0f}) | {memory['ratio']:.2f} |",
        f"| three students from one extraction over three live runs | {students['extraction']:.0f} + "
        f"{sum(students['stored']):.0f} s and {sum(students['live']):.0f} s | {students['ratio']:.2f} |",
        f"| int8 error (fraction of the mean square), a scale per token and a scale per dimension | {scale['token']:.2e} and "
        f"{scale['dimension']:.2e} | {scale['token'] / scale['dimension']:.2f} |",
        "",
        "Bytes per token, everything in the files counted; float32 hidden states take "
        f"{found['uncompressed']['hidden']:,}, float32 logits {found['uncompressed']['logits']:,}.",
        "",
        "| dtype | " + " | ".join(next(iter(found["bytes_per_token"].values()))) + " |",
        "|---|" + "---|" * len(next(iter(found["bytes_per_token"].values()))),
        *(
            f"| {dtype} | " + " | ".join(f"{size:.1f}" for size in sizes.values()) + " |"
            for dtype, sizes in found["bytes_per_token"].items()
        ),
        "",
    ]
    (options.output / "README.md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
