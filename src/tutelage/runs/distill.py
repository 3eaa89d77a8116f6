"""One distillation run, from options to a folder with the student in it."""

import copy
import logging
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from transformers.trainer_callback import PrinterCallback

from tutelage.core.processes import Group
from tutelage.io.files import alone, write_atomically, writing_errors
from tutelage.io.store import sha256_of_file
from tutelage.runs.environment import environment, quiet_unless_terminal
from tutelage.runs.inputs import RunInputs, RunOptions, load_inputs, with_defaults
from tutelage.runs.model_card import write_card
from tutelage.runs.plots import plot_run
from tutelage.runs.results import RESULT_FILE, Budget, ModelMetrics, RunResult
from tutelage.tasks.language import perplexity
from tutelage.tasks.loading import count_parameters
from tutelage.tasks.students import weights_of
from tutelage.training.checks import TrainingDiverged, check_output_dir, check_same_folder
from tutelage.training.config import CurriculumConfig
from tutelage.training.records import CURRICULUM_FILE, IDENTITY_FILE, METRICS_FILE, TARGETS_FILE, evaluation_metrics
from tutelage.training.saving import AUTO, resume_choice
from tutelage.training.trainer import CurriculumTrainer

_RECORDS = (CURRICULUM_FILE, IDENTITY_FILE, METRICS_FILE, TARGETS_FILE, RESULT_FILE, "loss.png", "README.md")
_log = logging.getLogger(__name__)


def distill(
    options: RunOptions | None = None,
    args: CurriculumConfig | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> RunResult:
    """Train a student (by default the embedded one) and write it, with its records, to `args.output_dir`.

    With `args.resume_from_checkpoint="auto"` the same call starts the run, continues it, or reads what it ended with; `log` is
    told of the last.

    Raises:
        UserError: settings that cannot work, or a loss that is no longer finite (`TrainingDiverged`)."""
    options, args = with_defaults(options or RunOptions(), copy.copy(args or CurriculumConfig()))
    args.disable_tqdm = quiet_unless_terminal(args.disable_tqdm)
    resume = resume_choice(args.resume_from_checkpoint)
    folder = Path(args.output_dir or ".")
    if args.process_index == 0:
        check_output_dir(folder, bool(resume), args.overwrite_output_dir)
    inputs = load_inputs(options, args)
    weights = weights_of(inputs.student) or "own"
    rows = (inputs.train_dataset, inputs.eval_dataset)
    trainer = CurriculumTrainer(inputs.student, inputs.source, args, *rows, inputs.tokenizer, inputs.collator)
    if args.disable_tqdm:
        trainer.remove_callback(PrinterCallback)
    with alone(folder, "training") if trainer.is_world_process_zero() else nullcontext():
        first = Group.of_all(args.device).first  # other machines may not have the folder
        if resume == AUTO and (made := first(lambda: _finished(trainer))) is not None:
            log(f"{str(folder)!r} contains this run, and it is finished: nothing was trained")
            return made
        trainer.train(resume_from_checkpoint=resume)
        result = _result(trainer, inputs)
        result = _write(trainer, result, weights)
    if args.push_to_hub:
        trainer.push_to_hub()
    return result


def _write(trainer: CurriculumTrainer, result: RunResult, weights: str) -> RunResult:
    """Write the student and what is said of it; returns the result with the student's checksums, on the first process."""
    folder = trainer.folder
    with writing_errors(folder):
        trainer.save_model()
        if trainer.is_world_process_zero():
            source = f"{Path(result.names['teacher']).name} to " if trainer.source.parameters is not None else ""
            title = f"{result.method}: {source}{result.names['student']}"
            plot_run(trainer.metrics_file.read(), folder / "loss.png", title)
            write_card(folder, result, trainer.curriculum, trainer.args, weights)
            result = replace(result, files=_student_files(folder))
            write_atomically(folder / RESULT_FILE, result.to_json() + "\n")  # last: with it the run is finished
    return result


def _student_files(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of the student in a run's folder."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    own = [name for name in names if name not in _RECORDS and not name.startswith(("checkpoint-", "runs/", "."))]
    return {name: sha256_of_file(folder / name) for name in own}


def _finished(trainer: CurriculumTrainer) -> RunResult | None:
    """What the run in the folder ended with; None where it did not end, or its student or result was damaged. UserError where
    the folder contains a different run."""
    folder = trainer.folder
    if not (folder / RESULT_FILE).is_file():
        return None
    check_same_folder(folder, trainer.curriculum, trainer.identity())
    try:
        made = RunResult.from_json((folder / RESULT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        _log.warning("%s is damaged (%s): it is made again", folder / RESULT_FILE, error)
        return None
    for name, checksum in made.files.items():
        if sha256_of_file(folder / name) != checksum:
            _log.warning("%s is missing or was changed since the run ended: it is made again", folder / name)
            return None
    return made


def _result(trainer: CurriculumTrainer, inputs: RunInputs) -> RunResult:
    """Held-out metrics of student and teacher, and what the run has spent."""
    trainer.compares_with_teacher = True
    student: dict[str, float] = {}
    teacher: dict[str, float] = {}
    for name, value in evaluation_metrics(trainer.evaluate()).items():
        (teacher if name.startswith("teacher_") else student)[name.removeprefix("teacher_")] = value
    if not math.isfinite(reached := student.get(trainer.task.metric, 0.0)):
        found = f"the {trainer.task.metric} of the trained student on held-out data is {reached}"
        raise TrainingDiverged(f"{found}: lower learning_rate, or raise warmup_steps")
    if "loss" in teacher and trainer.task.per_position:
        teacher["perplexity"] = perplexity(teacher["loss"])
    spent, steps = trainer.progress, trainer.state.global_step
    seconds = round(spent.seconds, 1)
    return RunResult(
        names=inputs.names,
        task=trainer.task.name,
        method=trainer.curriculum.method,
        seed=trainer.args.seed,
        student=ModelMetrics(count_parameters(trainer.model), student),
        teacher=ModelMetrics(trainer.source.parameters, teacher),
        budget=Budget(steps, spent.samples, spent.tokens, spent.student_flops, spent.teacher_flops, seconds),
        environment=environment(),
    )


def describe(result: RunResult, output_dir: str) -> str:
    """A few lines for the terminal: metrics of student and teacher, the budget, and where things are."""
    budget = result.budget
    student, teacher = result.student, result.teacher
    rows = [("parameters", _show(student.parameters, ","), _show(teacher.parameters, ","))]
    rows += [
        (name, _show(mine, ".4f"), _show(teacher.metrics.get(name), ".4f")) for name, mine in student.metrics.items()
    ]
    width = max(len(name) for name, *_ in rows)
    lines = [f"{'':{width}}  {'student':>12}  {'teacher':>12}"]
    lines += [f"{name:{width}}  {mine:>12}  {theirs:>12}" for name, mine, theirs in rows]
    folder = Path(output_dir)
    lines += [
        "",
        f"budget: {budget.steps:,} steps, {budget.samples:,} samples, {budget.tokens:,} tokens, {budget.flops:.3g} FLOPs "
        f"(teacher {budget.teacher_flops / max(1.0, budget.flops):.0%}), {budget.seconds:.0f} s",
        f"student:  {output_dir}\ntable:    {folder / 'README.md'}\nplot:     {folder / 'loss.png'}",
    ]
    return "\n".join(lines)


def _show(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
