"""The model card of a distilled student."""

from pathlib import Path
from typing import Any

from tutelage.core.curriculum import RESIDUAL, Curriculum
from tutelage.core.stages import JointStage
from tutelage.io.files import write_atomically
from tutelage.runs.escaping import as_code, as_markdown
from tutelage.runs.results import RunResult
from tutelage.tasks.registry import get_task
from tutelage.training.config import CurriculumConfig
from tutelage.training.resolution import deviations

_START = {
    "random": "random weights (student_init=random)",
    "own": "its own weights",
    "teacher": "its teacher's weights (student_init=teacher)",
}


def write_card(
    folder: Path, result: RunResult, curriculum: Curriculum, args: CurriculumConfig, weights: str = "own"
) -> None:
    """Write README.md; `weights` are what the student came with, as in `tutelage.tasks.students.WEIGHTS`."""
    different = deviations(args, curriculum)
    if weights == "own":
        different.pop("student_init", None)
    else:
        weights = curriculum.student_init
    start = _START[weights]
    if weights == "teacher" and curriculum.residual_basis is not None:
        start += f", residual basis {curriculum.residual_basis}"
    differing = ", ".join(f"{name}={value}" for name, value in different.items())
    preset = as_markdown(f"{args.preset}; deviations: {differing}" if differing else args.preset)
    budget, task = result.budget, get_task(result.task)
    student = as_code(result.names["student"]).replace("|", r"\|")  # in a table
    teacher, data = (as_markdown(Path(result.names[name]).name) for name in ("teacher", "dataset"))
    rows = [("parameters", result.student.parameters, result.teacher.parameters)]
    rows += [(name, value, result.teacher.metrics.get(name)) for name, value in result.student.metrics.items()]  # type: ignore[misc]
    metrics = "\n".join(f"| {name} | {_show(mine)} | {_show(theirs)} |" for name, mine, theirs in rows)
    text = f"""---
library_name: {task.library}
pipeline_tag: {task.pipeline_tag}
tags:
- knowledge-distillation
- curriculum-extraction
- tutelage
---

# Student of {teacher}

Trained with [tutelage](https://arxiv.org/abs/2503.17494) {result.environment["tutelage"]}, method {as_code(curriculum.method)}.

| | |
|---|---|
| Teacher | {teacher} |
| Student | {student} |
| Data | {data} |
| Method | {as_markdown(curriculum.method)} |
| Preset | {preset} |
| Student starts from | {start} |
{_hidden_row(curriculum)}| Budget | {curriculum.total_steps:,} steps, {budget.samples:,} samples, {budget.tokens:,} tokens |
| FLOPs | {budget.student_flops:.3g} student + {budget.teacher_flops:.3g} teacher |
| Time | {budget.seconds:.0f} s on {result.environment["machine"]} |

## Curriculum

| stage | what | steps |
|---|---|---|
{_stage_rows(curriculum)}

## Held-out metrics

| | student | teacher |
|---|---|---|
{metrics}

![Loss](loss.png)
"""
    write_atomically(folder / "README.md", text)


def _stage_rows(curriculum: Curriculum) -> str:
    numbered = enumerate(curriculum.stages, 1)
    return "\n".join(f"| {number} | {as_markdown(stage.name)} | {stage.steps} |" for number, stage in numbered)


def _hidden_row(curriculum: Curriculum) -> str:
    """What the hidden targets and the warm start are; nothing where there are none."""
    if not curriculum.calibrated_pairs:
        return "" if curriculum.warm_start == "none" else f"| Warm start | {curriculum.warm_start} |\n"
    settings = [f"projection {curriculum.projection}"]
    if curriculum.projection != RESIDUAL:  # whose targets keep their scale
        settings.append(f"normalize {curriculum.normalize}")
    settings.append(f"warm start {curriculum.warm_start}")
    weights = [stage.hidden_weight for stage in curriculum.stages if isinstance(stage, JointStage)]
    settings += [f"hidden weight {weight:g}" for weight in weights]
    return f"| {'Hidden stages' if curriculum.hidden_stages else 'Warm start'} | {', '.join(settings)} |\n"


def _show(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
