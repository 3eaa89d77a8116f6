"""One distillation run, from settings to a folder with the student in it.

Public names: `distill`.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from transformers.trainer_callback import PrinterCallback

from tutelage import __version__
from tutelage.io.files import write_atomically
from tutelage.runs.model_card import write_card
from tutelage.runs.plots import plot_run
from tutelage.runs.settings import RunArguments, count_parameters, fill_defaults, prepare_run
from tutelage.training.checks import check_output_dir
from tutelage.training.config import CurriculumConfig
from tutelage.training.evaluation import perplexity
from tutelage.training.records import evaluation_metrics
from tutelage.training.trainer import CurriculumTrainer

RESULT_FILE = "result.json"


def distill(run: RunArguments, args: CurriculumConfig) -> dict[str, Any]:
    """Train a student and write it, with its records, to `args.output_dir`.

    Returns:
        What result.json holds: names, task, `student` and `teacher` metrics, `budget`, `environment`.

    Raises:
        UserError: settings that cannot work.
        TrainingDiverged: the loss is no longer finite.
    """
    fill_defaults(run, args)
    args.disable_tqdm = quiet_unless_terminal(args.disable_tqdm)
    resume = _resume(args.resume_from_checkpoint)
    folder = Path(args.output_dir or ".")
    if args.process_index == 0:
        check_output_dir(folder, bool(resume), args.overwrite_output_dir)
    prepared = prepare_run(run, args)
    trainer = CurriculumTrainer(
        model=prepared.student,
        teacher_model=prepared.teacher,
        args=args,
        train_dataset=prepared.train_dataset,
        eval_dataset=prepared.eval_dataset,
        processing_class=prepared.tokenizer,
        data_collator=prepared.collator,
    )
    if args.disable_tqdm:
        trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    student, teacher = _held_out_metrics(trainer)
    result = {
        "names": prepared.names,
        "task": prepared.task.name,
        "method": trainer.curriculum.method,
        "seed": args.seed,
        "student": student,
        "teacher": teacher,
        "budget": {
            "steps": trainer.state.global_step,
            "samples": trainer.progress.samples,
            "tokens": trainer.progress.tokens,
            "student_flops": trainer.progress.student_flops,
            "teacher_flops": trainer.progress.teacher_flops,
            "seconds": round(trainer.progress.seconds, 1),
        },
        "environment": environment(),
    }
    if trainer.is_world_process_zero():
        trainer.save_model()
        write_atomically(folder / RESULT_FILE, json.dumps(result, indent=2) + "\n")
        source = f"{Path(prepared.names['teacher']).name} to " if trainer.teacher is not None else ""
        title = f"{trainer.curriculum.method}: {source}{prepared.names['student']}"
        plot_run(trainer.metrics_file.read(), folder / "loss.png", title)
        write_card(folder, result, trainer.curriculum)
    if args.push_to_hub:
        trainer.push_to_hub()
    return result


def _held_out_metrics(trainer: CurriculumTrainer) -> tuple[dict[str, Any], dict[str, Any]]:
    """Held-out metrics of student and teacher."""
    trainer.args.eval_with_teacher = True
    student: dict[str, Any] = {"parameters": count_parameters(trainer.model)}
    teacher: dict[str, Any] = {}
    if trainer.teacher is not None:
        teacher["parameters"] = count_parameters(trainer.teacher.model)
    for name, value in evaluation_metrics(trainer.evaluate()).items():
        (teacher if name.startswith("teacher_") else student)[name.removeprefix("teacher_")] = value
    if "loss" in teacher and trainer.task.per_position:
        teacher["perplexity"] = perplexity(teacher["loss"])
    return student, teacher


def _resume(value: str | None) -> str | bool | None:
    if value is None or value.lower() in ("false", "no"):
        return None
    return True if value.lower() in ("true", "yes") else value


def quiet_unless_terminal(asked: bool | None = False) -> bool:
    """Turn progress bars off where that is asked for or nobody watches; returns whether they are off."""
    quiet = bool(asked) or ("TUTELAGE_PROGRESS" not in os.environ and not sys.stderr.isatty())
    if quiet:
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    return quiet


def environment() -> dict[str, Any]:
    """Versions and machine, for results."""
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    return {
        "tutelage": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "datasets": datasets.__version__,
        "python": platform.python_version(),
        "machine": f"{device} ({platform.machine()})",
        "threads": torch.get_num_threads(),
    }


def describe(result: dict[str, Any], output_dir: str) -> str:
    """A few lines for the terminal: student, teacher and budget metrics, and where things are."""
    student, teacher, budget = result["student"], result["teacher"], result["budget"]
    width = max(len(name) for name in student)
    lines = [f"{'':{width}}  {'student':>12}  {'teacher':>12}"]
    for name, value in student.items():
        shown = [
            f"{v:,}" if isinstance(v, int) else f"{v:.4f}" if v is not None else "-" for v in (value, teacher.get(name))
        ]
        lines.append(f"{name:{width}}  {shown[0]:>12}  {shown[1]:>12}")
    flops = budget["student_flops"] + budget["teacher_flops"]
    lines += [
        "",
        f"budget: {budget['steps']:,} steps, {budget['samples']:,} samples, {budget['tokens']:,} tokens, {flops:.3g} FLOPs "
        f"(teacher {budget['teacher_flops'] / flops:.0%}), {budget['seconds']:.0f} s",
        f"student:  {output_dir}",
        f"table:    {Path(output_dir) / 'README.md'}",
        f"plot:     {Path(output_dir) / 'loss.png'}",
    ]
    return "\n".join(lines)
