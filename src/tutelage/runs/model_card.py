"""The model card of a distilled student.

Public names: `write_card`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tutelage.core.curriculum import Curriculum
from tutelage.io.files import write_atomically


def write_card(folder: Path, result: dict[str, Any], curriculum: Curriculum) -> None:
    """Write README.md: teacher, data, method, budget and metrics."""
    budget, environment = result["budget"], result["environment"]
    tags = {"embedding": "sentence-similarity", "causal_lm": "text-generation", "masked_lm": "fill-mask"}
    pipeline = tags.get(result["task"], "text-classification")
    library = "sentence-transformers" if result["task"] == "embedding" else "transformers"
    stages = "\n".join(
        f"| {number} | {stage.name} | {stage.steps} |" for number, stage in enumerate(curriculum.stages, 1)
    )
    rows = "\n".join(
        f"| {name} | {_show(result['student'].get(name))} | {_show(result['teacher'].get(name))} |"
        for name in result["student"]
    )
    text = f"""---
library_name: {library}
pipeline_tag: {pipeline}
tags:
- knowledge-distillation
- curriculum-extraction
- tutelage
---

# Student of {Path(result["names"]["teacher"]).name}

Trained with [tutelage](https://arxiv.org/abs/2503.17494) {environment["tutelage"]}, method `{curriculum.method}`.

| | |
|---|---|
| Teacher | {Path(result["names"]["teacher"]).name} |
| Student | `{result["names"]["student"]}` |
| Data | {Path(result["names"]["dataset"]).name} |
| Method | {curriculum.method} |
| Hidden stages | projection {curriculum.projection}, normalize {curriculum.normalize}, warm start {curriculum.warm_start} |
| Budget | {curriculum.total_steps:,} steps, {budget["samples"]:,} samples, {budget["tokens"]:,} tokens |
| FLOPs | {budget["student_flops"]:.3g} student + {budget["teacher_flops"]:.3g} teacher |
| Time | {budget["seconds"]:.0f} s on {environment["machine"]} |

## Curriculum

| stage | what | steps |
|---|---|---|
{stages}

## Held-out metrics

| | student | teacher |
|---|---|---|
{rows}

![Loss](loss.png)
"""
    write_atomically(folder / "README.md", text)


def _show(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
