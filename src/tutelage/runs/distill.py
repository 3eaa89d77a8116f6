"""One distillation run, from options to a folder with the student in it."""

from __future__ import annotations

import copy
from pathlib import Path

from transformers.trainer_callback import PrinterCallback

from tutelage.io.files import write_atomically, writing_errors
from tutelage.runs.environment import environment, quiet_unless_terminal
from tutelage.runs.inputs import RunInputs, RunOptions, load_inputs, with_defaults
from tutelage.runs.model_card import write_card
from tutelage.runs.plots import plot_run
from tutelage.runs.results import RESULT_FILE, Budget, ModelMetrics, RunResult
from tutelage.tasks.language import perplexity
from tutelage.tasks.loading import count_parameters
from tutelage.training.checks import check_output_dir
from tutelage.training.config import CurriculumConfig
from tutelage.training.records import evaluation_metrics
from tutelage.training.trainer import CurriculumTrainer


def distill(options: RunOptions | None = None, args: CurriculumConfig | None = None) -> RunResult:
    """Train a student and write it, with its records, to `args.output_dir`.

    Args:
        options: what is trained on which data; None is the embedded teacher, student and text.
        args: the settings of the run; both arguments stay as they are.

    Raises:
        UserError: settings that cannot work, or a loss that is no longer finite (`TrainingDiverged`).
    """
    options, args = with_defaults(options or RunOptions(), copy.copy(args or CurriculumConfig()))
    args.disable_tqdm = quiet_unless_terminal(args.disable_tqdm)
    resume = _resume(args.resume_from_checkpoint)
    folder = Path(args.output_dir or ".")
    if args.process_index == 0:
        check_output_dir(folder, bool(resume), args.overwrite_output_dir)
    inputs = load_inputs(options, args)
    trainer = CurriculumTrainer(
        model=inputs.student,
        teacher_model=inputs.source,
        args=args,
        train_dataset=inputs.train_dataset,
        eval_dataset=inputs.eval_dataset,
        processing_class=inputs.tokenizer,
        data_collator=inputs.collator,
    )
    if args.disable_tqdm:
        trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    result = _result(trainer, inputs)
    if trainer.is_world_process_zero():
        with writing_errors(folder):
            trainer.save_model()
        _write_records(trainer, result, folder)
    if args.push_to_hub:
        trainer.push_to_hub()
    return result


def _result(trainer: CurriculumTrainer, inputs: RunInputs) -> RunResult:
    student, teacher = _held_out_metrics(trainer)
    progress = trainer.progress
    budget = Budget(
        trainer.state.global_step,
        progress.samples,
        progress.tokens,
        progress.student_flops,
        progress.teacher_flops,
        round(progress.seconds, 1),
    )
    return RunResult(
        inputs.names,
        inputs.task.name,
        trainer.curriculum.method,
        trainer.args.seed,
        student,
        teacher,
        budget,
        environment(),
    )


def _held_out_metrics(trainer: CurriculumTrainer) -> tuple[ModelMetrics, ModelMetrics]:
    """Of student and teacher."""
    trainer.compares_with_teacher = True
    student: dict[str, float] = {}
    teacher: dict[str, float] = {}
    for name, value in evaluation_metrics(trainer.evaluate()).items():
        (teacher if name.startswith("teacher_") else student)[name.removeprefix("teacher_")] = value
    if "loss" in teacher and trainer.task.per_position:
        teacher["perplexity"] = perplexity(teacher["loss"])
    return ModelMetrics(count_parameters(trainer.model), student), ModelMetrics(trainer.source.parameters, teacher)


def _write_records(trainer: CurriculumTrainer, result: RunResult, folder: Path) -> None:
    write_atomically(folder / RESULT_FILE, result.to_json() + "\n")
    source = f"{Path(result.names['teacher']).name} to " if trainer.source.parameters is not None else ""
    title = f"{result.method}: {source}{result.names['student']}"
    plot_run(trainer.metrics_file.read(), folder / "loss.png", title)
    write_card(folder, result, trainer.curriculum)


def _resume(value: str | None) -> str | bool | None:
    if value is None or value.lower() in ("false", "no"):
        return None
    return True if value.lower() in ("true", "yes") else value


def describe(result: RunResult, output_dir: str) -> str:
    """A few lines for the terminal: metrics of student and teacher, the budget, and where things are."""
    budget = result.budget
    rows = [("parameters", _count(result.student.parameters), _count(result.teacher.parameters))]
    for name, value in result.student.metrics.items():
        rows.append((name, f"{value:.4f}", _metric(result.teacher.metrics.get(name))))
    width = max(len(name) for name, *_ in rows)
    lines = [f"{'':{width}}  {'student':>12}  {'teacher':>12}"]
    lines += [f"{name:{width}}  {mine:>12}  {theirs:>12}" for name, mine, theirs in rows]
    lines += [
        "",
        f"budget: {budget.steps:,} steps, {budget.samples:,} samples, {budget.tokens:,} tokens, {budget.flops:.3g} FLOPs "
        f"(teacher {budget.teacher_flops / max(1.0, budget.flops):.0%}), {budget.seconds:.0f} s",
        f"student:  {output_dir}",
        f"table:    {Path(output_dir) / 'README.md'}",
        f"plot:     {Path(output_dir) / 'loss.png'}",
    ]
    return "\n".join(lines)


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _metric(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
